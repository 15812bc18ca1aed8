// How the work of a call is shared between threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/parallel.h"
#include "runtime/scratch.h"

namespace fastppo {

// body(worker, item) for every item; a worker number is in use by one thread at a time.
template <class Body>
void for_each(std::int64_t items, int threads, const Body& body) {
    std::atomic<std::int64_t> next{0};
    const int workers = static_cast<int>(std::min<std::int64_t>(items, threads));
    parallel_for(workers, threads, [&](int worker) {
        for (std::int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(worker, item);
    });
}

// Phases of items one after the other: an item begins when all of the phases before its own are done. The threads meet
// at a counter, not in the pool: to wake a thread costs as much as a block of logits, and there are hundreds of phases.
class Phases {
public:
    template <class Body>
    void add(std::int64_t items, Body body) {
        if (items == 0) return;
        phases_.push_back({total_, std::move(body)});
        total_ += items;
    }

    // body(worker, item) for all of them; a worker number is in use by one thread at a time. Once a body has thrown, no
    // later phase begins: the threads that wait for it leave, and parallel_for throws what it threw.
    void run(int threads) const {
        alignas(kLine) std::atomic<std::int64_t> next{0};
        alignas(kLine) std::atomic<std::int64_t> done{0};
        std::atomic<bool> failed{false};
        parallel_for(threads, threads, [&](int worker) {
            std::size_t at = 0;
            for (std::int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < total_;) {
                while (at + 1 < phases_.size() && phases_[at + 1].start <= item) ++at;
                const Phase& phase = phases_[at];
                // Those ahead are at work, or have lost their processor to someone who would like this one's.
                for (int tries = 0; done.load(std::memory_order_acquire) < phase.start; ++tries) {
                    if (failed.load(std::memory_order_relaxed)) return;
                    if (tries > kPatience) std::this_thread::yield();
                }
                try {
                    phase.body(worker, item - phase.start);
                } catch (...) {
                    failed = true;
                    throw;
                }
                done.fetch_add(1, std::memory_order_release);
            }
        });
    }

private:
    static constexpr int kPatience = 10000;  // loads of a shared cache line: tens of microseconds

    struct Phase {
        std::int64_t start;  // its first item, so how many must be done before it
        std::function<void(int, std::int64_t)> body;
    };

    std::vector<Phase> phases_;
    std::int64_t total_ = 0;
};

}  // namespace fastppo
