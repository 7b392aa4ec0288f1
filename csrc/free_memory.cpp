#include "free_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <map>
#include <optional>
#include <sstream>

namespace reap {

namespace {

constexpr uint64_t UNKNOWN = std::numeric_limits<uint64_t>::max();

// The number in a file of one number; nothing where it says "max", or is absent.
std::optional<uint64_t> read_number(const std::string & path) {
    uint64_t value = 0;
    return std::ifstream(path) >> value ? std::optional<uint64_t>(value) : std::nullopt;
}

// The bytes that /proc/meminfo calls available.
uint64_t free_on_machine(const std::string & root) {
    std::ifstream info(root + "/proc/meminfo");
    std::string name, unit;
    for (uint64_t kilobytes; info >> name >> kilobytes; std::getline(info, unit)) {
        if (name == "MemAvailable:") {
            return kilobytes * 1024;
        }
    }
    return UNKNOWN;
}

// The names of a version's files.
struct Files {
    const char * limit;
    const char * used;
    const char * prefix;  // of memory.stat's names, for the group with all that is in it
};

constexpr Files VERSION_1 = {"/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_"};
constexpr Files VERSION_2 = {"/memory.max", "/memory.current", ""};

// What is counted as used and given up on demand: file pages, and the kernel's caches.
uint64_t reclaimable(const std::string & folder, const Files & files) {
    std::ifstream stat(folder + "/memory.stat");
    uint64_t bytes = 0;
    std::string name;
    for (uint64_t value; stat >> name >> value;) {
        for (const char * kind : {"inactive_file", "active_file", "slab_reclaimable"}) {
            bytes += name == files.prefix + std::string(kind) ? value : 0;
        }
    }
    return bytes;
}

uint64_t free_in_group(const std::string & folder, const Files & files) {
    const std::optional<uint64_t> limit = read_number(folder + files.limit);
    const std::optional<uint64_t> used = read_number(folder + files.used);
    if (!limit || !used) {
        return UNKNOWN;
    }
    const uint64_t held = *used - std::min(*used, reclaimable(folder, files));
    return *limit - std::min(*limit, held);
}

// A mounted hierarchy of control groups: where it is, and which group lies there (a container sees its own group as the root).
struct Mount {
    std::string point, group;
};

// Those of /proc/self/mountinfo that know about memory, by version.
std::map<int, Mount> find_mounts(const std::string & root) {
    std::map<int, Mount> mounts;
    std::ifstream info(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(info, line);) {
        const size_t dash = line.find(" - ");
        if (dash == std::string::npos) {
            continue;
        }
        std::istringstream before(line.substr(0, dash)), after(line.substr(dash + 3));
        std::string id, parent, device, type, source, options;
        Mount mount;
        before >> id >> parent >> device >> mount.group >> mount.point;
        after >> type >> source >> options;
        if (type == "cgroup2") {
            mounts.emplace(2, mount);
        } else if (type == "cgroup" && ("," + options + ",").find(",memory,") != std::string::npos) {
            mounts.emplace(1, mount);
        }
    }
    return mounts;
}

// This process's groups, from /proc/self/cgroup: "0::/a/b" (version 2) and "4:memory:/a/b" (version 1).
std::map<int, std::string> find_groups(const std::string & root) {
    std::map<int, std::string> groups;
    std::ifstream info(root + "/proc/self/cgroup");
    for (std::string line; std::getline(info, line);) {
        const size_t first = line.find(':');
        const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) {
            continue;
        }
        const std::string controllers = line.substr(first + 1, second - first - 1);
        if (controllers.empty()) {
            groups[2] = line.substr(second + 1);
        } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
            groups[1] = line.substr(second + 1);
        }
    }
    return groups;
}

// The group's path below the mount; "" where the mount does not show it.
std::string below(const Mount & mount, const std::string & group) {
    const std::string top = mount.group == "/" ? "" : mount.group;
    const bool inside = group.compare(0, top.size(), top) == 0 && (group.size() == top.size() || group[top.size()] == '/');
    const std::string path = inside ? group.substr(top.size()) : "";
    return path == "/" || path.find("..") != std::string::npos ? "" : path;
}

}  // namespace

uint64_t free_memory(const std::string & root) {
    uint64_t bytes = free_on_machine(root);
    const std::map<int, std::string> groups = find_groups(root);
    for (const auto & [version, mount] : find_mounts(root)) {
        const auto group = groups.find(version);
        const Files & files = version == 1 ? VERSION_1 : VERSION_2;
        std::string path = group == groups.end() ? "" : below(mount, group->second);
        for (;;) {  // a parent's limit holds for all that is in it
            bytes = std::min(bytes, free_in_group(root + mount.point + path, files));
            if (path.empty()) {
                break;
            }
            path.erase(path.rfind('/'));
        }
    }
    return bytes;
}

}  // namespace reap
