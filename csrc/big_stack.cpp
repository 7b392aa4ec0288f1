#include "big_stack.h"

#include "errors.h"
#include "memory_guard.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace reap {

namespace {

// The memory of a stack, with a page below it that ends the process rather than overwrite what is there.
class Stack {
  public:
    explicit Stack(size_t n_bytes) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), size_((n_bytes / page_ + 2) * page_) {
        memory_ = static_cast<char *>(reserve_address_space(size_));
        if (memory_ == nullptr || mprotect(memory_, page_, PROT_NONE) != 0) {
            release();
            throw EngineError("a stack of " + std::to_string(size_) + " bytes is needed, more than this process may map");
        }
    }
    ~Stack() { release(); }
    Stack(const Stack &) = delete;
    Stack & operator=(const Stack &) = delete;

    void * bottom() const { return memory_ + page_; }
    size_t size() const { return size_ - page_; }

    // Fresh memory is zero: from the lowest byte that is not, a stack was used.
    size_t touched() const {
        const std::vector<char> zeros(page_, 0);
        for (size_t at = page_; at < size_; at += page_) {
            if (std::memcmp(memory_ + at, zeros.data(), page_) != 0) {
                return size_ - at;
            }
        }
        return 0;
    }

  private:
    void release() {
        if (memory_ != nullptr) {
            munmap(memory_, size_);
        }
    }

    size_t page_, size_;
    char * memory_ = nullptr;
};

struct Job {
    const std::function<void()> & work;
    std::exception_ptr            error;
};

void * run_job(void * argument) {
    auto & job = *static_cast<Job *>(argument);
    try {
        job.work();
    } catch (...) {
        job.error = std::current_exception();
    }
    return nullptr;
}

}  // namespace

size_t run_on_stack(size_t n_bytes, const std::function<void()> & work, bool measure) {
    const Stack stack(n_bytes);
    Job job{work, nullptr};
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_t thread;
    int status = pthread_attr_setstack(&attributes, stack.bottom(), stack.size());
    if (status == 0) {
        status = pthread_create(&thread, &attributes, run_job, &job);
    }
    pthread_attr_destroy(&attributes);
    if (status != 0) {
        throw EngineError(std::string("a thread cannot be started: ") + std::strerror(status));
    }
    pthread_join(thread, nullptr);
    if (job.error) {
        std::rethrow_exception(job.error);
    }
    return measure ? stack.touched() : 0;
}

}  // namespace reap
