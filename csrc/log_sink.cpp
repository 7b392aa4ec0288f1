#include "log_sink.h"

#include "llama.h"

#include <algorithm>
#include <deque>

namespace reap {

namespace {

constexpr size_t MAX_LINES = 8;
constexpr size_t MAX_WARNINGS = 64;
constexpr size_t MAX_LINE = 400;  // bytes
constexpr size_t QUOTED = 2;

// What one thread logged.
struct Record {
    std::deque<std::string>  lines;
    std::vector<std::string> warnings;
    std::string              pending;
    ggml_log_level           pending_level = GGML_LOG_LEVEL_NONE;
    const LogListener *      listener = nullptr;
};

thread_local Record record;

void keep_line() {
    std::string line = std::move(record.pending);
    record.pending.clear();
    line.erase(line.find_last_not_of("\n ") + 1);
    if (line.empty() || (record.pending_level != GGML_LOG_LEVEL_ERROR && record.pending_level != GGML_LOG_LEVEL_WARN)) {
        return;
    }
    line.resize(std::min(line.size(), MAX_LINE));
    auto & warnings = record.warnings;
    if (record.pending_level == GGML_LOG_LEVEL_WARN && warnings.size() < MAX_WARNINGS &&
        std::find(warnings.begin(), warnings.end(), line) == warnings.end()) {
        warnings.push_back(line);
    }
    record.lines.push_back(std::move(line));
    if (record.lines.size() > MAX_LINES) {
        record.lines.pop_front();
    }
}

void sink(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (record.listener != nullptr) {
        (*record.listener)(text);
    }
    if (level != GGML_LOG_LEVEL_CONT) {
        keep_line();
        record.pending_level = level;
    }
    if (record.pending.size() < MAX_LINE) {
        record.pending += text;
    }
    if (!record.pending.empty() && record.pending.back() == '\n') {
        keep_line();
    }
}

}  // namespace

void install_log_sink() {
    llama_log_set(sink, nullptr);
}

void clear_log() {
    record.lines.clear();
    record.warnings.clear();
    record.pending.clear();
}

std::string log_tail() {
    const auto & lines = record.lines;
    std::string tail;
    for (size_t i = lines.size() > QUOTED ? lines.size() - QUOTED : 0; i < lines.size(); ++i) {
        tail += (tail.empty() ? "" : "; ") + lines[i];
    }
    return tail;
}

std::string with_log(const std::string & message) {
    const std::string tail = log_tail();
    return tail.empty() ? message : message + ": " + tail;
}

std::vector<std::string> log_warnings() {
    return record.warnings;
}

ListenToLog::ListenToLog(const LogListener & listener) {
    record.listener = &listener;
}

ListenToLog::~ListenToLog() {
    record.listener = nullptr;
}

}  // namespace reap
