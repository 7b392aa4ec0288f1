// llama.cpp's log: the last lines are kept, to be quoted in errors; nothing is printed.
#pragma once

#include <functional>
#include <string>

namespace reap {

// Takes over llama.cpp's and ggml's log for this process. Safe to call again.
void install_log_sink();

// Forgets what was logged, so that the next error quotes only what belongs to it.
void clear_log();

// The last warnings and errors, newest last, joined by "; ". Empty where there were none.
std::string log_tail();

// Hears each piece of the log as it is written, from whatever thread that is. It must not throw, and must not log.
using LogListener = std::function<void(const std::string &)>;

// While it lives, `listener` hears the log. One at a time.
class ListenToLog {
  public:
    explicit ListenToLog(const LogListener & listener);
    ~ListenToLog();
    ListenToLog(const ListenToLog &) = delete;
    ListenToLog & operator=(const ListenToLog &) = delete;
};

}  // namespace reap
