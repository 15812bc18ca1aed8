// A loop over independent parts, shared between the caller and other threads: PyTorch's own team where it can be had, as
// its threads wait for more work in a loop, milliseconds long, and would take turns with ours; else, and in a forked
// child, which has none of them, a pool of sleeping threads.
//
// Not an OpenMP of our own: a second runtime beside PyTorch's oversubscribes the cores. Not fresh threads: on a busy
// machine a new one may wait milliseconds for its first turn.
#pragma once

namespace fastppo {

// Calls body(context, 0) … body(context, parts − 1), each once, on at most `threads` threads, the caller's among them.
// What body throws is thrown here once every thread is done, the first of several exceptions; parts not yet begun are
// then left out. The caller takes parts from the first on and waits only for those that another thread has begun:
// helpers that get no processor cost nothing.
void parallel_for(int parts, int threads, void (*body)(const void*, int), const void* context);

// GOMP_parallel of the OpenMP runtime that PyTorch uses; null for none.
using Team = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
void use_team(Team team);

template <class Body>
void parallel_for(int parts, int threads, const Body& body) {
    parallel_for(parts, threads, [](const void* b, int part) { (*static_cast<const Body*>(b))(part); }, &body);
}

}  // namespace fastppo
