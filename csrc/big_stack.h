// Work on a stack as large as it needs.
#pragma once

#include <cstddef>
#include <functional>

namespace reap {

// Runs `work` on a thread with a stack of at least n_bytes, of which only what is touched takes memory, waits for it, and throws what it
// threw. Returns the bytes of stack that it touched, to a page, where `measure` asks for it. EngineError where there is no such stack.
size_t run_on_stack(size_t n_bytes, const std::function<void()> & work, bool measure = false);

}  // namespace reap
