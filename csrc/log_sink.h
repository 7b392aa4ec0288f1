// llama.cpp's log: the last lines are kept, to be quoted in errors, and the warnings, to be handed on; nothing is printed.
//
// Each thread has its own record. Two sessions that are opened at the same time never quote each other, and nothing here is shared.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace reap {

// Takes over llama.cpp's and ggml's log for this process. Safe to call again.
void install_log_sink();

// Forgets what was logged from this thread, so that the next error quotes only what belongs to it.
void clear_log();

// The last warnings and errors from this thread, newest last, joined by "; ". Empty where there were none.
std::string log_tail();

// `message`, followed by log_tail() where there is one.
std::string with_log(const std::string & message);

// The warnings from this thread since clear_log(), without the name of the function that each begins with, each once, in the order in which
// they first came; at most 64.
std::vector<std::string> log_warnings();

// Hears each piece of the log as it is written from this thread. It must not throw, and must not log.
using LogListener = std::function<void(const std::string &)>;

// While it lives, `listener` hears this thread's log. One at a time on a thread.
class ListenToLog {
  public:
    explicit ListenToLog(const LogListener & listener);
    ~ListenToLog();
    ListenToLog(const ListenToLog &) = delete;
    ListenToLog & operator=(const ListenToLog &) = delete;
};

}  // namespace reap
