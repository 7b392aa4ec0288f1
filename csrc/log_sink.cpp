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

// Without the name of the function that logged it ("load: missing pre-tokenizer type").
std::string without_function(const std::string & line) {
    const size_t colon = line.find_first_of(": ");
    const bool is_name = colon != std::string::npos && line[colon] == ':' && (colon + 1 == line.size() || line[colon + 1] == ' ');
    return is_name ? line.substr(std::min(line.find_first_not_of(' ', colon + 1), line.size())) : line;
}

void keep_line() {
    std::string line = std::move(record.pending);
    record.pending.clear();
    line.erase(line.find_last_not_of("\n ") + 1);
    if (line.empty() || (record.pending_level != GGML_LOG_LEVEL_ERROR && record.pending_level != GGML_LOG_LEVEL_WARN)) {
        return;
    }
    line.resize(std::min(line.size(), MAX_LINE));
    auto & warnings = record.warnings;
    const std::string warning = without_function(line);
    if (record.pending_level == GGML_LOG_LEVEL_WARN && warnings.size() < MAX_WARNINGS && !warning.empty() &&
        std::find(warnings.begin(), warnings.end(), warning) == warnings.end()) {
        warnings.push_back(warning);
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
