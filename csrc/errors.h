// The two ways in which the native core fails; bindings.cpp maps them to Python's ReapError tree.
#pragma once

#include <stdexcept>

namespace reap {

// llama.cpp refused or failed, or its graph is not what we expect.
struct EngineError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The engine runs the model, but not in a way that can be measured.
struct UnsupportedError : EngineError {
    using EngineError::EngineError;
};

// An option that can never work: an unknown device, cache type or pattern.
struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The user asked to stop (Ctrl-C); the batch under way was discarded.
struct Interrupted : std::runtime_error {
    Interrupted() : std::runtime_error("interrupted") {}
};

}  // namespace reap
