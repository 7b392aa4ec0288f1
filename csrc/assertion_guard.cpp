#include "assertion_guard.h"

#include "ggml.h"

#include <cstdio>
#include <string>

namespace reap {

namespace {

thread_local int n_guards = 0;

void on_abort(const char * message) {
    if (n_guards > 0) {
        // "/somewhere/ggml/src/ggml.c:12: GGML_ASSERT(...) failed": where it was built says nothing to a user
        const std::string text = message;
        const size_t colon = text.find(':');
        const size_t slash = text.rfind('/', colon);
        throw AssertionFailed(slash == std::string::npos ? text : text.substr(slash + 1));
    }
    std::fprintf(stderr, "%s\n", message);
}

}  // namespace

void install_assertion_guard() {
    ggml_set_abort_callback(on_abort);
}

CatchAssertions::CatchAssertions() { ++n_guards; }

CatchAssertions::~CatchAssertions() { --n_guards; }

}  // namespace reap
