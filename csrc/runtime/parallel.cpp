// The pool of threads behind parallel_for.
#include "runtime/parallel.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace fastppo {
namespace {

struct Job {
    const int parts;
    void (*const body)(const void*, int);
    const void* const context;
    std::atomic<int> next{0};
    int seats;       // helpers that may still join
    int joined = 0;  // helpers at work
    std::atomic<bool> failed{false};
    std::exception_ptr error{};  // the first one; read when all threads are done

    // Nothing is thrown here: an exception that leaves a helper's thread ends the process.
    void work() noexcept {
        try {
            for (int part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) body(context, part);
        } catch (...) {
            next.store(parts, std::memory_order_relaxed);  // the parts that nobody has begun are not needed any more
            if (!failed.exchange(true)) error = std::current_exception();
        }
    }
};

class Pool {
public:
    void run(Job& job) {
        bool served = false;  // else the pool serves another caller: work alone
        {
            std::lock_guard<std::mutex> lock(mutex_);
            served = job_ == nullptr && hire(job.seats);
            if (served) job_ = &job;
        }
        if (served) wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        if (served) job_ = nullptr;  // a thread that wakes now is too late: `job` is about to go
        left_.wait(lock, [&] { return job.joined == 0; });
    }

private:
    bool hire(int helpers) {
        try {
            for (; size_ < helpers; ++size_) std::thread(&Pool::serve, this).detach();
        } catch (const std::system_error&) {
            // The system gives no more threads: make do with those there are.
        }
        return size_ > 0;
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return job_ != nullptr && job_->seats > 0; });
            Job& job = *job_;
            --job.seats;
            ++job.joined;
            lock.unlock();
            job.work();
            lock.lock();
            if (--job.joined == 0) left_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, left_;
    Job* job_ = nullptr;
    int size_ = 0;
};

std::atomic<Pool*> current{nullptr};
std::atomic<Team> team{nullptr};

// A forked child has none of its parent's threads, and perhaps a mutex that one of them held: it starts anew.
void watch_forks() {
#ifndef _WIN32
    static std::once_flag once;
    std::call_once(once, [] {
        pthread_atfork(nullptr, nullptr, [] {
            current = nullptr;
            team = nullptr;
        });
    });
#endif
}

// Never destroyed: its threads sleep in it until the process ends.
Pool& pool() {
    Pool* found = current.load();
    if (found != nullptr) return *found;
    watch_forks();
    Pool* made = new Pool;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
    return *found;
}

}  // namespace

void parallel_for(int parts, int threads, void (*body)(const void*, int), const void* context) {
    const int helpers = (parts < threads ? parts : threads) - 1;
    Job job{parts, body, context, {0}, helpers};
    if (helpers <= 0) {
        job.work();
    } else if (const Team together = team.load()) {
        // All of it always: libgomp ends the threads that a smaller team leaves over, and the next call makes new ones.
        together([](void* shared) { static_cast<Job*>(shared)->work(); }, &job, static_cast<unsigned>(threads), 0);
    } else {
        pool().run(job);
    }
    if (job.error) std::rethrow_exception(job.error);
}

void use_team(Team given) {
    watch_forks();
    team = given;
}

}  // namespace fastppo
