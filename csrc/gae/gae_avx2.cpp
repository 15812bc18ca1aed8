// The GAE scan in AVX2 (with FMA and BMI2): 8 floats or 4 doubles a vector. Lane masks are built from bits when needed.
#include <immintrin.h>

#include <cstring>

#include "gae/gae_scan.h"

namespace fastppo {
namespace {

// Of a 32-bit lane mask, the 8 indices that _mm256_permutevar8x32 gathers: to the front the lanes whose bit is set …
__m256i pack_index(std::uint32_t m) {
    const std::uint64_t bytes = _pdep_u64(m, 0x0101010101010101u) * 0xFF;
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(_pext_u64(0x0706050403020100u, bytes))));
}

// … and from the front back into those lanes.
__m256i unpack_index(std::uint32_t m) {
    const std::uint64_t bytes = _pdep_u64(m, 0x0101010101010101u) * 0xFF;
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(_pdep_u64(0x0706050403020100u, bytes))));
}

struct Floats {
    using T = float;
    using Vec = __m256;
    static constexpr int W = 8;

    static __m256i lanes(std::uint32_t m) {
        const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(m)), each), each);
    }
    static std::uint32_t low(int n) { return (1u << n) - 1; }
    static Vec keep(std::uint32_t m, Vec v) { return _mm256_and_ps(_mm256_castsi256_ps(lanes(m)), v); }

    static Vec load(const float* p) { return _mm256_loadu_ps(p); }
    static Vec load_first(const float* p, int n) { return _mm256_maskload_ps(p, lanes(low(n))); }
    static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
    static void store_first(float* p, Vec v, int n) { _mm256_maskstore_ps(p, lanes(low(n)), v); }
    static void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
    static void fence() { _mm_sfence(); }

    static Vec set1(float x) { return _mm256_set1_ps(x); }
    static Vec spread(Vec v) { return _mm256_broadcastss_ps(_mm256_castps256_ps128(v)); }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static Vec fma_where(std::uint32_t m, Vec a, Vec b, Vec c) {
        return _mm256_blendv_ps(c, fma(a, b, c), _mm256_castsi256_ps(lanes(m)));
    }
    static bool all_zero(Vec v) {
        return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_EQ_OQ)) == 0xFF;
    }

    template <int kStep>
    static Vec next(Vec v) {
        if constexpr (kStep == 4) return _mm256_permute2f128_ps(v, v, 0x81);
        const __m256i index = _mm256_setr_epi32(kStep, kStep + 1, kStep + 2, kStep + 3, kStep + 4, kStep + 5, 7, 7);
        constexpr int kBeyond = 0xFF & ~(0xFF >> kStep);
        return _mm256_blend_ps(_mm256_permutevar8x32_ps(v, index), _mm256_setzero_ps(), kBeyond);
    }
    static Vec next_or(Vec v, Vec x) {
        return _mm256_permutevar8x32_ps(_mm256_blend_ps(v, x, 1), _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0));
    }
    static Vec insert(Vec v, int lane, Vec x) {
        return _mm256_blendv_ps(v, spread(x), _mm256_castsi256_ps(lanes(1u << lane)));
    }
    static Vec pack(Vec v, std::uint32_t m) {
        return keep(low(count(m)), _mm256_permutevar8x32_ps(v, pack_index(m)));
    }
    static Vec unpack(Vec v, std::uint32_t m) { return keep(m, _mm256_permutevar8x32_ps(v, unpack_index(m))); }

    static std::uint32_t bits(const bool* p, int n) {
        std::uint64_t bytes = 0;
        if (n == W) {
            std::memcpy(&bytes, p, W);
        } else {
            for (int i = 0; i < n; ++i) bytes |= std::uint64_t{p[i]} << (8 * i);
        }
        return static_cast<std::uint32_t>(_pext_u64(bytes, 0x0101010101010101u));
    }
    static std::uint32_t pack_bits(std::uint32_t b, std::uint32_t m) { return _pext_u32(b, m); }
    static int count(std::uint32_t m) { return __builtin_popcount(m); }
};

struct Doubles {
    using T = double;
    using Vec = __m256d;
    static constexpr int W = 4;

    static __m256i lanes(std::uint32_t m) {
        const __m256i each = _mm256_setr_epi64x(1, 2, 4, 8);
        return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(m), each), each);
    }
    static std::uint32_t low(int n) { return (1u << n) - 1; }
    static std::uint32_t halves(std::uint32_t m) { return _pdep_u32(m, 0x55u) * 3; }  // a double is two floats

    static Vec load(const double* p) { return _mm256_loadu_pd(p); }
    static Vec load_first(const double* p, int n) { return _mm256_maskload_pd(p, lanes(low(n))); }
    static void store(double* p, Vec v) { _mm256_storeu_pd(p, v); }
    static void store_first(double* p, Vec v, int n) { _mm256_maskstore_pd(p, lanes(low(n)), v); }
    static void stream(double* p, Vec v) { _mm256_stream_pd(p, v); }
    static void fence() { _mm_sfence(); }

    static Vec set1(double x) { return _mm256_set1_pd(x); }
    static Vec spread(Vec v) { return _mm256_broadcastsd_pd(_mm256_castpd256_pd128(v)); }
    static Vec add(Vec a, Vec b) { return _mm256_add_pd(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm256_sub_pd(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_pd(a, b, c); }
    static Vec fma_where(std::uint32_t m, Vec a, Vec b, Vec c) {
        return _mm256_blendv_pd(c, fma(a, b, c), _mm256_castsi256_pd(lanes(m)));
    }
    static bool all_zero(Vec v) {
        return _mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_EQ_OQ)) == 0xF;
    }

    template <int kStep>
    static Vec next(Vec v) {
        return _mm256_castps_pd(Floats::next<2 * kStep>(_mm256_castpd_ps(v)));
    }
    static Vec next_or(Vec v, Vec x) { return _mm256_permute4x64_pd(_mm256_blend_pd(v, x, 1), 0b00111001); }
    static Vec insert(Vec v, int lane, Vec x) {
        return _mm256_blendv_pd(v, spread(x), _mm256_castsi256_pd(lanes(1u << lane)));
    }
    static Vec pack(Vec v, std::uint32_t m) {
        return _mm256_castps_pd(Floats::pack(_mm256_castpd_ps(v), halves(m)));
    }
    static Vec unpack(Vec v, std::uint32_t m) {
        return _mm256_castps_pd(Floats::unpack(_mm256_castpd_ps(v), halves(m)));
    }

    static std::uint32_t bits(const bool* p, int n) {
        std::uint32_t bytes = 0;
        if (n == W) {
            std::memcpy(&bytes, p, W);
        } else {
            for (int i = 0; i < n; ++i) bytes |= std::uint32_t{p[i]} << (8 * i);
        }
        return _pext_u32(bytes, 0x01010101u);
    }
    static std::uint32_t pack_bits(std::uint32_t b, std::uint32_t m) { return _pext_u32(b, m); }
    static int count(std::uint32_t m) { return __builtin_popcount(m); }
};

}  // namespace

template <>
bool gae_scan_avx2(const GaeArgs<float>& args, std::int64_t begin, std::int64_t end, bool stream) {
    return scan_sequences<Floats>(args, begin, end, stream);
}

template <>
bool gae_scan_avx2(const GaeArgs<double>& args, std::int64_t begin, std::int64_t end, bool stream) {
    return scan_sequences<Doubles>(args, begin, end, stream);
}

}  // namespace fastppo
