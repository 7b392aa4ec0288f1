// Turns "the kernel kills the process" into an allocation that fails: while a guard lives, the process may map no more memory than
// the machine has free. Linux hands out more than it has and ends whoever touches it; llama.cpp reports a failed allocation.
#pragma once

#include <cstdint>

namespace reap {

class MemoryGuard {
  public:
    // `mapped_bytes`: of files that will be mapped, which take no memory of their own.
    explicit MemoryGuard(uint64_t mapped_bytes = 0);
    ~MemoryGuard();
    MemoryGuard(const MemoryGuard &) = delete;
    MemoryGuard & operator=(const MemoryGuard &) = delete;

  private:
    bool     active_ = false;
    uint64_t previous_ = 0;
};

}  // namespace reap
