#include "log_sink.h"

#include "llama.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>

namespace reap {

namespace {

constexpr size_t MAX_LINES = 8;
constexpr size_t MAX_LINE = 400;
constexpr size_t QUOTED = 2;

std::mutex mutex;
std::deque<std::string> lines;
std::string pending;
ggml_log_level pending_level = GGML_LOG_LEVEL_NONE;
std::atomic<const LogListener *> listening = nullptr;

void keep_line() {
    while (!pending.empty() && (pending.back() == '\n' || pending.back() == ' ')) {
        pending.pop_back();
    }
    if (!pending.empty() && (pending_level == GGML_LOG_LEVEL_ERROR || pending_level == GGML_LOG_LEVEL_WARN)) {
        lines.push_back(pending.substr(0, MAX_LINE));
        if (lines.size() > MAX_LINES) {
            lines.pop_front();
        }
    }
    pending.clear();
}

void sink(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (const LogListener * listener = listening) {
        (*listener)(text);  // without the lock: it may wait for another that belongs to someone who waits for this one
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (level != GGML_LOG_LEVEL_CONT) {
        keep_line();
        pending_level = level;
    }
    if (pending.size() < MAX_LINE) {
        pending += text;
    }
    if (!pending.empty() && pending.back() == '\n') {
        keep_line();
    }
}

}  // namespace

void install_log_sink() {
    llama_log_set(sink, nullptr);
}

void clear_log() {
    const std::lock_guard<std::mutex> lock(mutex);
    lines.clear();
    pending.clear();
}

std::string log_tail() {
    const std::lock_guard<std::mutex> lock(mutex);
    std::string tail;
    for (size_t i = lines.size() > QUOTED ? lines.size() - QUOTED : 0; i < lines.size(); ++i) {
        tail += (tail.empty() ? "" : "; ") + lines[i];
    }
    return tail;
}

ListenToLog::ListenToLog(const LogListener & listener) {
    listening = &listener;
}

ListenToLog::~ListenToLog() {
    listening = nullptr;
}

}  // namespace reap
