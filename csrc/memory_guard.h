// Turns "the kernel ends the process" into an allocation that fails: while a guard lives, the process may map no more memory than
// the machine has free. Linux hands out more than it has and ends the process that touches it; llama.cpp reports a failed allocation.
#pragma once

#include <cstddef>
#include <cstdint>

namespace reap {

// The limit belongs to the process, so guards of several threads share it: the widest one holds, and the last one out sets it back.
class MemoryGuard {
  public:
    // `mapped_bytes`: of files that will be mapped, which take no memory of their own.
    explicit MemoryGuard(uint64_t mapped_bytes = 0);
    ~MemoryGuard();
    MemoryGuard(const MemoryGuard &) = delete;
    MemoryGuard & operator=(const MemoryGuard &) = delete;
};

// Address space of which only what is touched takes memory; not held against the guards of other threads. Null where there is none.
void * reserve_address_space(size_t n_bytes);

}  // namespace reap
