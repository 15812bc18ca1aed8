// Generalized advantage estimation (Schulman et al., 2016, arXiv:1506.02438) over ragged sequences on the CPU.
#pragma once

#include <cstdint>

#include "runtime/cpu.h"

namespace fastppo {

// Sequence s is the tokens [offsets[s], offsets[s + 1]) of flat arrays. No array may overlap the outputs.
template <typename T>
struct GaeArgs {
    const T* rewards;
    const T* values;
    const bool* mask;          // true = a real token; null: all are
    const bool* dones;         // true = nothing flows back from beyond this token; null: none is
    const T* bootstrap;        // one a sequence: the value after its last real token; null: 0
    const std::int64_t* offsets;  // [sequences + 1], non-decreasing
    std::int64_t sequences;
    double gamma, lam;
    T* advantages;             // written whole, 0 where masked
    T* returns;
};

// False if the advantage of a real token is not finite: an input there is not, or the sum overflowed.
template <typename T>
bool gae(const GaeArgs<T>& args, Isa isa, int threads);

// The scan of sequences [begin, end) on one thread; one definition for each instruction set.
template <typename T>
using GaeScan = bool (*)(const GaeArgs<T>&, std::int64_t begin, std::int64_t end, bool stream);

template <typename T>
bool gae_scan_avx2(const GaeArgs<T>& args, std::int64_t begin, std::int64_t end, bool stream);
template <typename T>
bool gae_scan_avx512(const GaeArgs<T>& args, std::int64_t begin, std::int64_t end, bool stream);

}  // namespace fastppo
