// Turns an assertion of the engine that fails (GGML_ASSERT, GGML_ABORT), which ends the process, into an error.
//
// What can be checked before the engine sees it is checked; this is for the rest: a file or an override whose numbers do not agree. ggml calls
// back before it ends the process (ggml_set_abort_callback), and an exception thrown there leaves through ggml's C code, which the build
// compiles with -fexceptions for that. On the engine's own worker threads nothing can catch it, and the process ends as it would have.
#pragma once

#include <stdexcept>

namespace reap {

// A failed assertion. The objects that it was about are not to be used any more.
struct AssertionFailed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// For this process, once.
void install_assertion_guard();

// While one lives, an assertion that fails on this thread throws AssertionFailed.
class CatchAssertions {
  public:
    CatchAssertions();
    ~CatchAssertions();
    CatchAssertions(const CatchAssertions &) = delete;
    CatchAssertions & operator=(const CatchAssertions &) = delete;
};

}  // namespace reap
