#include "memory_guard.h"

#include <algorithm>
#include <fstream>
#include <string>

#if defined(__linux__)
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace reap {

#if defined(__linux__)

namespace {

// The bytes that /proc/meminfo calls available; 0 where it does not say.
uint64_t available_memory() {
    std::ifstream info("/proc/meminfo");
    std::string name, unit;
    for (uint64_t kilobytes; info >> name >> kilobytes; std::getline(info, unit)) {
        if (name == "MemAvailable:") {
            return kilobytes * 1024;
        }
    }
    return 0;
}

// What a control group (a container) still allows; `otherwise` where there is none or it sets no limit.
uint64_t group_memory(uint64_t otherwise) {
    uint64_t limit = 0;
    uint64_t used = 0;
    std::ifstream("/sys/fs/cgroup/memory.max") >> limit;
    std::ifstream("/sys/fs/cgroup/memory.current") >> used;
    return limit > used ? limit - used : otherwise;
}

uint64_t address_space() {
    uint64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    return pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

MemoryGuard::MemoryGuard(uint64_t mapped_bytes) {
    const uint64_t available = available_memory();
    const uint64_t taken = address_space();
    rlimit limit{};
    if (available == 0 || taken == 0 || getrlimit(RLIMIT_AS, &limit) != 0) {
        return;
    }
    previous_ = limit.rlim_cur;
    limit.rlim_cur = std::min<uint64_t>({previous_, limit.rlim_max, taken + mapped_bytes + std::min(available, group_memory(available))});
    active_ = setrlimit(RLIMIT_AS, &limit) == 0;
}

MemoryGuard::~MemoryGuard() {
    rlimit limit{};
    if (active_ && getrlimit(RLIMIT_AS, &limit) == 0) {
        limit.rlim_cur = previous_;
        setrlimit(RLIMIT_AS, &limit);
    }
}

#else

MemoryGuard::MemoryGuard(uint64_t) {}
MemoryGuard::~MemoryGuard() = default;

#endif

}  // namespace reap
