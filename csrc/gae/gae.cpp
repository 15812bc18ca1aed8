// The GAE scan: shares the sequences out over threads and picks the instruction set.
#include "gae/gae.h"

#include <algorithm>
#include <atomic>

#include "gae/gae_scan.h"
#include "runtime/parallel.h"

namespace fastppo {
namespace {

// Fewer tokens are scanned sooner than a sleeping thread wakes.
constexpr std::int64_t kTokensPerPart = 1 << 16;

// Outputs greater than this would not stay in any cache: they go past it.
constexpr std::int64_t kStreamBytes = 32 << 20;

// One token at a time, for machines without a vector path.
template <typename Float>
struct Portable {
    using T = Float;
    using Vec = Float;
    static constexpr int W = 1;

    static Vec load(const T* p) { return *p; }
    static Vec load_first(const T* p, int) { return *p; }
    static void store(T* p, Vec v) { *p = v; }
    static void store_first(T* p, Vec v, int) { *p = v; }
    static void stream(T* p, Vec v) { *p = v; }
    static void fence() {}

    static Vec set1(T x) { return x; }
    static Vec spread(Vec v) { return v; }
    static Vec add(Vec a, Vec b) { return a + b; }
    static Vec sub(Vec a, Vec b) { return a - b; }
    static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
    static Vec fma_where(std::uint32_t m, Vec a, Vec b, Vec c) { return m & 1 ? a * b + c : c; }
    static bool all_zero(Vec v) { return v == 0; }

    template <int>
    static Vec next(Vec) { return 0; }
    static Vec next_or(Vec, Vec x) { return x; }
    static Vec insert(Vec, int, Vec x) { return x; }
    static Vec pack(Vec v, std::uint32_t) { return v; }
    static Vec unpack(Vec v, std::uint32_t) { return v; }

    static std::uint32_t bits(const bool* p, int) { return *p; }
    static std::uint32_t pack_bits(std::uint32_t b, std::uint32_t) { return b; }
    static int count(std::uint32_t) { return 1; }
};

template <typename T>
GaeScan<T> scan_for([[maybe_unused]] Isa isa) {
#ifdef FASTPPO_X86
    if (isa >= Isa::avx512) return gae_scan_avx512<T>;
    if (isa == Isa::avx2) return gae_scan_avx2<T>;
#endif
    return scan_sequences<Portable<T>>;
}

bool on_cache_line(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 64 == 0; }

}  // namespace

template <typename T>
bool gae(const GaeArgs<T>& args, Isa isa, int threads) {
    const GaeScan<T> scan = scan_for<T>(isa);
    const std::int64_t* const first = args.offsets;
    const std::int64_t* const last = args.offsets + args.sequences;
    const std::int64_t tokens = *last - *first;
    const bool stream = 2 * tokens * std::int64_t(sizeof(T)) > kStreamBytes && on_cache_line(args.advantages) &&
                        on_cache_line(args.returns);
    const int parts = int(std::clamp<std::int64_t>(tokens / kTokensPerPart, 1, std::max<std::int64_t>(args.sequences, 1)));
    // Part 0 is the last sequences: like each sequence, the whole array is read from its end, one descending stream.
    const auto bound = [&](int part) {
        if (part == parts) return std::int64_t{0};
        return std::int64_t(std::lower_bound(first, last, *last - tokens / parts * part) - first);
    };
    std::atomic<bool> finite{true};
    parallel_for(parts, threads, [&](int part) {
        if (!scan(args, bound(part + 1), bound(part), stream)) finite = false;
    });
    return finite;
}

template bool gae(const GaeArgs<float>&, Isa, int);
template bool gae(const GaeArgs<double>&, Isa, int);

}  // namespace fastppo
