#include "memory_guard.h"

#include "free_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <fstream>
#include <mutex>

#if defined(__linux__)
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace reap {

namespace {

void * map_reserved(size_t n_bytes) {
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void * memory = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

}  // namespace

#if defined(__linux__)

namespace {

std::mutex mutex;
int        n_guards = 0;
rlim_t     original = RLIM_INFINITY;  // the limit before the first guard

uint64_t address_space() {
    uint64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    return pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

uint64_t add(uint64_t a, uint64_t b) {
    return b > UINT64_MAX - a ? UINT64_MAX : a + b;
}

rlim_t current_limit() {
    rlimit limit{};
    return getrlimit(RLIMIT_AS, &limit) == 0 ? limit.rlim_cur : RLIM_INFINITY;
}

void set_limit(rlim_t bytes) {
    rlimit limit{};
    if (getrlimit(RLIMIT_AS, &limit) == 0) {
        limit.rlim_cur = std::min({bytes, original, limit.rlim_max});
        setrlimit(RLIMIT_AS, &limit);
    }
}

}  // namespace

MemoryGuard::MemoryGuard(uint64_t mapped_bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    const bool first = n_guards++ == 0;
    if (first) {
        original = current_limit();
    }
    const uint64_t available = free_memory();
    const uint64_t taken = address_space();
    if (available == UINT64_MAX || taken == 0) {
        return;
    }
    const uint64_t wanted = add(add(taken, mapped_bytes), available);
    set_limit(first ? wanted : std::max<uint64_t>(wanted, current_limit()));
}

MemoryGuard::~MemoryGuard() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (--n_guards == 0) {
        set_limit(original);
    }
}

void * reserve_address_space(size_t n_bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (n_guards == 0) {
        return map_reserved(n_bytes);
    }
    const rlim_t lowered = current_limit();
    set_limit(original);
    void * memory = map_reserved(n_bytes);
    set_limit(add(lowered, memory == nullptr ? 0 : n_bytes));
    return memory;
}

#else

MemoryGuard::MemoryGuard(uint64_t) {}
MemoryGuard::~MemoryGuard() = default;

void * reserve_address_space(size_t n_bytes) {
    return map_reserved(n_bytes);
}

#endif

}  // namespace reap
