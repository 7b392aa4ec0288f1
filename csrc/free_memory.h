// How much memory this process may still take.
#pragma once

#include <cstdint>
#include <string>

namespace reap {

// Bytes that can be had without swapping or ending a process: what the machine has free, and what each control group around this
// process (a container, version 1 or 2, and its parents) still allows. The page cache counts as free, because the kernel gives it up.
// UINT64_MAX where nothing says. `root` is put before /proc and /sys, for tests.
uint64_t free_memory(const std::string & root = "");

}  // namespace reap
