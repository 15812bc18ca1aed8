// The GAE scan in AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles a vector, masks in their own registers.
#include <immintrin.h>

#include "gae/gae_scan.h"

namespace fastppo {
namespace {

struct Floats {
    using T = float;
    using Vec = __m512;
    static constexpr int W = 16;

    static __mmask16 low(int n) { return static_cast<__mmask16>((1u << n) - 1); }
    static Vec load(const float* p) { return _mm512_loadu_ps(p); }
    static Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(low(n), p); }
    static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
    static void store_first(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, low(n), v); }
    static void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
    static void fence() { _mm_sfence(); }

    static Vec set1(float x) { return _mm512_set1_ps(x); }
    static Vec spread(Vec v) { return _mm512_broadcastss_ps(_mm512_castps512_ps128(v)); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static Vec fma_where(std::uint32_t m, Vec a, Vec b, Vec c) {
        return _mm512_mask3_fmadd_ps(a, b, c, static_cast<__mmask16>(m));
    }
    static bool all_zero(Vec v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xFFFF; }

    template <int kStep>
    static Vec shift(Vec v, Vec above) {
        return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(above), _mm512_castps_si512(v), kStep));
    }
    template <int kStep>
    static Vec next(Vec v) { return shift<kStep>(v, _mm512_setzero_ps()); }
    static Vec next_or(Vec v, Vec x) { return shift<1>(v, x); }
    static Vec insert(Vec v, int lane, Vec x) {
        return _mm512_mask_broadcastss_ps(v, static_cast<__mmask16>(1u << lane), _mm512_castps512_ps128(x));
    }
    static Vec pack(Vec v, std::uint32_t m) { return _mm512_maskz_compress_ps(static_cast<__mmask16>(m), v); }
    static Vec unpack(Vec v, std::uint32_t m) { return _mm512_maskz_expand_ps(static_cast<__mmask16>(m), v); }

    static std::uint32_t bits(const bool* p, int n) {
        const __m128i bytes = _mm_maskz_loadu_epi8(low(n), p);
        return _mm_test_epi8_mask(bytes, bytes);
    }
    static std::uint32_t pack_bits(std::uint32_t b, std::uint32_t m) { return _pext_u32(b, m); }
    static int count(std::uint32_t m) { return __builtin_popcount(m); }
};

struct Doubles {
    using T = double;
    using Vec = __m512d;
    static constexpr int W = 8;

    static __mmask8 low(int n) { return static_cast<__mmask8>((1u << n) - 1); }
    static Vec load(const double* p) { return _mm512_loadu_pd(p); }
    static Vec load_first(const double* p, int n) { return _mm512_maskz_loadu_pd(low(n), p); }
    static void store(double* p, Vec v) { _mm512_storeu_pd(p, v); }
    static void store_first(double* p, Vec v, int n) { _mm512_mask_storeu_pd(p, low(n), v); }
    static void stream(double* p, Vec v) { _mm512_stream_pd(p, v); }
    static void fence() { _mm_sfence(); }

    static Vec set1(double x) { return _mm512_set1_pd(x); }
    static Vec spread(Vec v) { return _mm512_broadcastsd_pd(_mm512_castpd512_pd128(v)); }
    static Vec add(Vec a, Vec b) { return _mm512_add_pd(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm512_sub_pd(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_pd(a, b, c); }
    static Vec fma_where(std::uint32_t m, Vec a, Vec b, Vec c) {
        return _mm512_mask3_fmadd_pd(a, b, c, static_cast<__mmask8>(m));
    }
    static bool all_zero(Vec v) { return _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_EQ_OQ) == 0xFF; }

    template <int kStep>
    static Vec shift(Vec v, Vec above) {
        return _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(above), _mm512_castpd_si512(v), kStep));
    }
    template <int kStep>
    static Vec next(Vec v) { return shift<kStep>(v, _mm512_setzero_pd()); }
    static Vec next_or(Vec v, Vec x) { return shift<1>(v, x); }
    static Vec insert(Vec v, int lane, Vec x) {
        return _mm512_mask_broadcastsd_pd(v, static_cast<__mmask8>(1u << lane), _mm512_castpd512_pd128(x));
    }
    static Vec pack(Vec v, std::uint32_t m) { return _mm512_maskz_compress_pd(static_cast<__mmask8>(m), v); }
    static Vec unpack(Vec v, std::uint32_t m) { return _mm512_maskz_expand_pd(static_cast<__mmask8>(m), v); }

    static std::uint32_t bits(const bool* p, int n) { return Floats::bits(p, n); }
    static std::uint32_t pack_bits(std::uint32_t b, std::uint32_t m) { return _pext_u32(b, m); }
    static int count(std::uint32_t m) { return __builtin_popcount(m); }
};

}  // namespace

template <>
bool gae_scan_avx512(const GaeArgs<float>& args, std::int64_t begin, std::int64_t end, bool stream) {
    return scan_sequences<Floats>(args, begin, end, stream);
}

template <>
bool gae_scan_avx512(const GaeArgs<double>& args, std::int64_t begin, std::int64_t end, bool stream) {
    return scan_sequences<Doubles>(args, begin, end, stream);
}

}  // namespace fastppo
