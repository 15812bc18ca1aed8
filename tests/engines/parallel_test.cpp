// Run by test_parallel.py: the threads' own pool, and a team like GOMP_parallel's. Prints what went wrong, and exits with 1.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runtime/phases.h"
#include "runtime/scratch.h"

using namespace fastppo;

static int failures = 0;

static void expect(bool right, const char* what) {
    if (right) return;
    std::printf("%s\n", what);
    ++failures;
}

// Every thread runs the body, as in GOMP_parallel.
static void team(void (*body)(void*), void* context, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, context);
    body(context);
    for (std::thread& other : others) other.join();
}

// Waits until a thread other than the caller's takes part, and throws there alone.
static std::string thrown_by_a_helper(int threads) {
    const auto caller = std::this_thread::get_id();
    std::atomic<bool> there{false};
    try {
        parallel_for(threads, threads, [&](int) {
            if (std::this_thread::get_id() != caller) {
                there = true;
                throw std::runtime_error("of a helper");
            }
            while (!there) std::this_thread::yield();
        });
    } catch (const std::exception& error) {
        return error.what();
    }
    return "nothing was thrown";
}

static std::string thrown_in_a_phase(int threads) {
    Phases phases;
    std::atomic<int> later{0};
    phases.add(8, [](int, std::int64_t item) {
        if (item == 3) throw std::runtime_error("of a phase");
    });
    phases.add(8, [&](int, std::int64_t) { ++later; });
    try {
        phases.run(threads);
    } catch (const std::exception& error) {
        return later == 0 ? error.what() : "a later phase began";
    }
    return "nothing was thrown";
}

static bool adds_up(int threads) {
    std::atomic<int> sum{0};
    parallel_for(100, threads, [&](int part) { sum += part; });
    return sum == 4950;
}

static void all_of_it() {
    expect(adds_up(1) && adds_up(4), "wrong sum");
    expect(thrown_by_a_helper(4) == "of a helper", "the helper's exception did not arrive");
    for (int threads : {1, 2, 4}) expect(thrown_in_a_phase(threads) == "of a phase", "the phase's exception did not arrive");
    expect(adds_up(4), "wrong sum after an exception");
}

// Asked from another thread while this one has the scratch, as in a child that was forked then, where it never comes free.
static std::int64_t held_elsewhere() {
    const Scratch scratch(1 << 20, [](Scratch& s) { s.take<char>(1000); });
    std::int64_t held = -1;
    std::thread([&] { held = Scratch::held(); }).join();
    return held;
}

int main() {
    expect(held_elsewhere() == 0, "scratch in use counts as waiting");
    expect(Scratch::held() == 1024, "scratch does not wait for the next call");
    all_of_it();
    use_team(team);
    all_of_it();
    use_team(nullptr);
    // Several callers at once: one has the pool, the others work alone.
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) {
        callers.emplace_back([&] {
            for (int i = 0; i < 300; ++i) wrong += !adds_up(3);
        });
    }
    for (std::thread& caller : callers) caller.join();
    expect(wrong == 0, "wrong sum with several callers");
    return failures != 0;
}
