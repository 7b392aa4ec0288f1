// What belongs to the process or a thread: the log, the limit of memory, stacks, assertions.
#include "assertion_guard.h"
#include "big_stack.h"
#include "check.h"
#include "errors.h"
#include "free_memory.h"
#include "log_sink.h"
#include "memory_guard.h"
#include "session.h"

#include "ggml.h"
#include "llama.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <sys/resource.h>
#include <unistd.h>

using namespace reap;
namespace fs = std::filesystem;

// The engine's own logger, as it would be called from inside.
static void say(ggml_log_level level, const char * text) {
    ggml_log_callback callback = nullptr;
    void * user_data = nullptr;
    llama_log_get(&callback, &user_data);
    callback(level, text, user_data);
}

static void test_log() {
    clear_log();
    CHECK(log_tail().empty() && with_log("x") == "x");
    say(GGML_LOG_LEVEL_INFO, "load: nothing\n");
    say(GGML_LOG_LEVEL_WARN, "load: one ");
    say(GGML_LOG_LEVEL_CONT, "line\n");
    say(GGML_LOG_LEVEL_WARN, "load: one line\n");
    say(GGML_LOG_LEVEL_WARN, "load:    \n");
    say(GGML_LOG_LEVEL_ERROR, "open: failed\n");
    CHECK((log_warnings() == std::vector<std::string>{"one line"}));
    CHECK(log_tail() == "load:; open: failed");
    std::thread([] {
        CHECK(log_tail().empty() && log_warnings().empty());
        say(GGML_LOG_LEVEL_WARN, "of another thread\n");
        CHECK(log_tail() == "of another thread");
    }).join();
    CHECK(log_warnings().size() == 1);
    for (int i = 0; i < 1000; ++i) {
        say(GGML_LOG_LEVEL_WARN, (std::to_string(i) + std::string(1000, 'x') + "\n").c_str());
    }
    CHECK(log_warnings().size() == 64 && log_warnings().back().size() == 400);
    std::string heard;
    {
        const LogListener listener = [&](const std::string & text) { heard += text; };
        const ListenToLog listening(listener);
        say(GGML_LOG_LEVEL_INFO, "a");
    }
    say(GGML_LOG_LEVEL_INFO, "b");
    CHECK(heard == "a");
    clear_log();
    CHECK(log_warnings().empty());
}

static void write(const fs::path & path, const std::string & text) {
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text;
}

static void test_free_memory() {
    const fs::path root = fs::temp_directory_path() / ("reap_memory_" + std::to_string(getpid()));
    const std::string at = root.string();
    CHECK(free_memory(at) == UINT64_MAX);
    write(root / "proc/meminfo", "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable: 8000 kB\nHugePages_Total: 0\n");
    CHECK(free_memory(at) == 8000 * 1024);

    // version 2: a group in a group, of which the parent has the tighter limit
    write(root / "proc/self/cgroup", "0::/outer/inner\n");
    write(root / "proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n");
    const fs::path outer = root / "sys/fs/cgroup/outer";
    write(outer / "inner/memory.max", "5000000\n");
    write(outer / "inner/memory.current", "4000000\n");
    CHECK(free_memory(at) == 1000000);
    // the page cache is counted as used, and given up on demand
    write(outer / "inner/memory.stat", "anon 900000\nfile 3000000\ninactive_file 1500000\nactive_file 500000\nslab_reclaimable 100000\n");
    CHECK(free_memory(at) == 3100000);
    write(outer / "memory.max", "4500000\n");
    write(outer / "memory.current", "4400000\n");
    CHECK(free_memory(at) == 100000);
    write(outer / "memory.max", "max\n");
    CHECK(free_memory(at) == 3100000);
    // a container sees its own group at the mount
    write(root / "proc/self/cgroup", "0::/\n");
    write(root / "sys/fs/cgroup/memory.max", "2000\n");
    write(root / "sys/fs/cgroup/memory.current", "3000\n");
    CHECK(free_memory(at) == 0);

    // version 1, whose mount shows a group of the host
    write(root / "proc/self/cgroup", "4:cpu,memory:/docker/abc\n0::/\n");
    write(root / "proc/self/mountinfo", "31 23 0:27 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,cpu,memory\n");
    write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", "700000\n");
    write(root / "sys/fs/cgroup/memory/memory.usage_in_bytes", "600000\n");
    write(root / "sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50000\ntotal_active_file 0\n");
    CHECK(free_memory(at) == 150000);
    fs::remove_all(root);
    CHECK(free_memory() > 0);
}

static rlim_t address_limit() {
    rlimit limit{};
    getrlimit(RLIMIT_AS, &limit);
    return limit.rlim_cur;
}

static void test_memory_guard() {
    const rlim_t before = address_limit();
    {
        const MemoryGuard outer;
        const rlim_t lowered = address_limit();
        {
            const MemoryGuard inner(1 << 30);
            CHECK(address_limit() >= lowered);
        }
        CHECK(address_limit() >= lowered);
        const MemoryGuard wide(UINT64_MAX);
        CHECK(address_limit() == before);
    }
    CHECK(address_limit() == before);
    // overlapping, and not in the order in which they began
    for (int round = 0; round < 50; ++round) {
        std::vector<std::thread> threads;
        for (int i = 0; i < 4; ++i) {
            threads.emplace_back([] {
                const MemoryGuard guard(1 << 20);
                std::this_thread::yield();
            });
        }
        for (auto & thread : threads) {
            thread.join();
        }
    }
    CHECK(address_limit() == before);
}

// Few deep frames: ThreadSanitizer has room for 65,536 calls.
static size_t recurse(size_t depth) {
    volatile char frame[1280];
    std::memset(const_cast<char *>(frame), 1, sizeof frame);
    return depth == 0 ? frame[0] : recurse(depth - 1) + frame[1279];
}

static void test_big_stack() {
    size_t sum = 0;
    const size_t touched = run_on_stack(512ull << 20, [&] { sum = recurse(40000); }, true);
    CHECK(sum == 40001 && touched > 40000 * 1280);
    CHECK(run_on_stack(1 << 20, [] {}, true) < 1 << 20);
    CHECK(throws<UsageError>([] { run_on_stack(1 << 20, [] { throw UsageError("inside"); }); }));
    CHECK(throws<EngineError>([] { run_on_stack(size_t(1) << 60, [] {}); }));
}

static void test_assertions() {
    std::string message;
    try {
        const CatchAssertions catching;
        ggml_context * context = ggml_init({1 << 16, nullptr, false});
        const struct Free {
            ggml_context * context;
            ~Free() { ggml_free(context); }
        } freed{context};
        ggml_tensor * a = ggml_new_tensor_2d(context, GGML_TYPE_F32, 4, 4);
        ggml_tensor * b = ggml_new_tensor_2d(context, GGML_TYPE_F32, 5, 4);
        ggml_mul_mat(context, a, b);
    } catch (const AssertionFailed & failed) {
        message = failed.what();
    }
    CHECK(message.rfind("ggml.c:", 0) == 0 && message.find("GGML_ASSERT") != std::string::npos);
}

void test_process() {
    start_engine();
    test_log();
    test_free_memory();
    test_memory_guard();
    test_big_stack();
    test_assertions();
}
