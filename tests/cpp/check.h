// CHECK(condition) and throws<Error>(work): what the tests are written with. They may be used from several threads.
#pragma once

#include <atomic>
#include <cstdio>

inline std::atomic<int> failures{0};
inline std::atomic<int> checks{0};

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        ++checks;                                                                        \
        if (!(condition)) {                                                              \
            ++failures;                                                                  \
            std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
        }                                                                                \
    } while (0)

template <typename Error, typename Work>
bool throws(Work && work) {
    try {
        work();
    } catch (const Error &) {
        return true;
    }
    return false;
}
