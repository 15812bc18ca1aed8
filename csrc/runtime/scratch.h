// Memory for a call, and what is done to memory before it is first touched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastppo {

constexpr std::int64_t kLine = 64;  // bytes of a cache line

// A page of 4 KB at a time, the first touch of a new gradient takes as long as the softmax of all its logits.
inline void prefer_huge_pages(void* memory, std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr std::uintptr_t page = 4096;
    const std::uintptr_t start = (reinterpret_cast<std::uintptr_t>(memory) + page - 1) / page * page;
    const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(memory) + static_cast<std::uintptr_t>(bytes);
    if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // or not: it is a wish
#else
    (void)memory, (void)bytes;
#endif
}

// One piece of memory for a call, taken from the last call's where that is free and large enough.
class Scratch {
public:
    // Sums the sizes up first (`take` gives null), then hands the memory out in the same order. What an earlier call left
    // is given back first where it is over `most` bytes.
    template <class Plan>
    Scratch(std::int64_t most, const Plan& plan) {
        plan(*this);
        const std::int64_t size = used_;
        used_ = 0;
        lock_ = std::unique_lock<std::mutex>(shared().mutex, std::try_to_lock);
        Memory& memory = lock_ ? shared().memory : own_;
        if (memory.size < size || memory.size > std::max(most, size)) {
            memory = {};
            memory.data.reset(static_cast<char*>(std::malloc(static_cast<std::size_t>(size + kLine))));
            memory.size = memory.data ? size : 0;
            if (!memory.data) throw std::bad_alloc();
            prefer_huge_pages(memory.data.get(), size);
        }
        const auto start = reinterpret_cast<std::uintptr_t>(memory.data.get());
        base_ = memory.data.get() + (kLine - start % kLine) % kLine;
        plan(*this);
    }

    template <class T>
    T* take(std::int64_t count) {
        char* const at = base_ ? base_ + used_ : nullptr;
        used_ += (count * std::int64_t(sizeof(T)) + kLine - 1) / kLine * kLine;
        return reinterpret_cast<T*>(at);
    }

    // Bytes that wait for the next call: none while another thread has them, perhaps one that a fork left behind.
    static std::int64_t held() {
        const std::unique_lock<std::mutex> lock(shared().mutex, std::try_to_lock);
        return lock ? shared().memory.size : 0;
    }
    static void free_held() {
        const std::unique_lock<std::mutex> lock(shared().mutex, std::try_to_lock);
        if (lock) shared().memory = {};
    }

private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    struct Memory {
        std::unique_ptr<char, Free> data;
        std::int64_t size = 0;
    };
    struct Shared {
        std::mutex mutex;
        Memory memory;
    };
    static Shared& shared() {
        static Shared* const one = new Shared;  // outlives whatever still computes when the process ends
        return *one;
    }

    std::unique_lock<std::mutex> lock_;
    Memory own_;
    char* base_ = nullptr;
    std::int64_t used_ = 0;
};

}  // namespace fastppo
