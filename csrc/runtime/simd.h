// Vectors of floats in one interface for AVX-512, AVX2 and plain C++, chosen by the flags that the including file is
// compiled with. All of it has internal linkage: code for a newer machine must never be what the linker picks for an
// older one.
//
// F: W floats. I: W 32-bit integers. bf16_bits rounds to nearest even and leaves the 16 bits in an I's lower half.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if !defined(__AVX512F__) && !defined(__AVX2__)
#include <cmath>
#endif

#if defined(_MSC_VER)
#define FASTPPO_ALWAYS_INLINE __forceinline
#else
#define FASTPPO_ALWAYS_INLINE inline __attribute__((always_inline))
#endif

namespace fastppo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class To, class From>
FASTPPO_ALWAYS_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

#if defined(__AVX512F__)

struct Simd {
    using F = __m512;
    using I = __m512i;
    static constexpr int W = 16;

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F copy_sign(F a, F sign) {
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a), _mm512_castps_si512(sign),
                                                             _mm512_set1_epi32(INT32_MIN), 0xD8));
    }
    static F where_less(F a, F b, F yes, F no) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
    }
    static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F scale(F a, F n) { return _mm512_scalef_ps(a, n); }  // a · 2ⁿ
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    static float highest(F a) { return _mm512_reduce_max_ps(a); }

    static F load_bf16(const std::uint16_t* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static F load_f16(const std::uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store_f16(std::uint16_t* p, F v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    static I bf16_bits(F v) {
#if defined(__AVX512BF16__)
        return _mm512_cvtepu16_epi32(bits_as<__m256i>(_mm512_cvtneps_pbh(v)));
#else
        const I x = _mm512_castps_si512(v);
        const I odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
        const I rounded = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
        return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
#endif
    }
    static I pairs(I low, I high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }
    static I load_bits(const void* p) { return _mm512_loadu_si512(p); }
    static I load_halves(const std::uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store_bits(std::uint32_t* p, I v) { _mm512_storeu_si512(p, v); }
    static void store_low_halves(std::uint16_t* p, I v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
    }

    static void transpose(I (&r)[16]) {
        I t[16];
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
            t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
        }
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
            r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
            r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
            r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
        }
    }
};

#elif defined(__AVX2__)

struct Simd {
    using F = __m256;
    using I = __m256i;
    static constexpr int W = 8;

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F abs(F a) { return _mm256_andnot_ps(set1(-0.0f), a); }
    static F copy_sign(F a, F sign) { return _mm256_or_ps(abs(a), _mm256_and_ps(set1(-0.0f), sign)); }
    static F where_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
    static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F power_of_two(I n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }
    // In two steps, since 2ⁿ itself may be no normal float where a · 2ⁿ is.
    static F scale(F a, F n) {
        const I whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
        return mul(mul(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
    }
    static float sum(F a) {
        __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        h = _mm_add_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
    }
    static float highest(F a) {
        __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        h = _mm_max_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
    }

    static F load_bf16(const std::uint16_t* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static F load_f16(const std::uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store_f16(std::uint16_t* p, F v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    static I bf16_bits(F v) {
        const I x = _mm256_castps_si256(v);
        const I odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
        const I rounded = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
        const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    }
    static I pairs(I low, I high) { return _mm256_or_si256(low, _mm256_slli_epi32(high, 16)); }
    static I load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static I load_halves(const std::uint16_t* p) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store_bits(std::uint32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static void store_low_halves(std::uint16_t* p, I v) {
        const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }

    static void transpose(I (&r)[8]) {
        I t[8];
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
            t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
        }
        for (int i = 0; i < 8; ++i) r[i] = t[i];
    }
};

#else

// Plain loops of fixed length, which compilers turn into whatever vectors the machine has (NEON, VSX, SSE).
struct Simd {
    static constexpr int W = 4;
    struct F {
        float v[W];
    };
    struct I {
        std::uint32_t v[W];
    };

    template <class Out, class Op>
    static FASTPPO_ALWAYS_INLINE Out each(const Op& op) {
        Out out;
        for (int i = 0; i < W; ++i) out.v[i] = op(i);
        return out;
    }

    static F load(const float* p) { return each<F>([&](int i) { return p[i]; }); }
    static void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
    static F set1(float x) { return each<F>([&](int) { return x; }); }
    static F add(F a, F b) { return each<F>([&](int i) { return a.v[i] + b.v[i]; }); }
    static F sub(F a, F b) { return each<F>([&](int i) { return a.v[i] - b.v[i]; }); }
    static F mul(F a, F b) { return each<F>([&](int i) { return a.v[i] * b.v[i]; }); }
    static F div(F a, F b) { return each<F>([&](int i) { return a.v[i] / b.v[i]; }); }
    static F fma(F a, F b, F c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
        return each<F>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
#else
        // Exact in double but for one rounding at the end; a call of std::fma would be far slower.
        return each<F>([&](int i) { return static_cast<float>(double(a.v[i]) * b.v[i] + c.v[i]); });
#endif
    }
    static F max(F a, F b) { return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
    static F min(F a, F b) { return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
    static F abs(F a) { return each<F>([&](int i) { return std::fabs(a.v[i]); }); }
    static F copy_sign(F a, F sign) { return each<F>([&](int i) { return std::copysign(a.v[i], sign.v[i]); }); }
    static F where_less(F a, F b, F yes, F no) {
        return each<F>([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
    }
    static F round(F a) { return each<F>([&](int i) { return std::nearbyint(a.v[i]); }); }
    static float power_of_two(std::int32_t n) { return bits_as<float>(std::uint32_t(n + 127) << 23); }
    static F scale(F a, F n) {
        return each<F>([&](int i) {
            if (!(n.v[i] == n.v[i])) return n.v[i];
            const std::int32_t whole = static_cast<std::int32_t>(n.v[i]), half = whole >> 1;
            return a.v[i] * power_of_two(half) * power_of_two(whole - half);
        });
    }
    static float sum(F a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
    static float highest(F a) {
        float high = a.v[0];
        for (int i = 1; i < W; ++i) high = a.v[i] > high ? a.v[i] : high;
        return high;
    }

    static F load_bf16(const std::uint16_t* p) {
        return each<F>([&](int i) { return bits_as<float>(std::uint32_t{p[i]} << 16); });
    }
    static float half_to_float(std::uint16_t h) {
        const std::uint32_t sign = std::uint32_t(h & 0x8000u) << 16, rest = h & 0x7FFFu;
        if (rest >= 0x7C00u) return bits_as<float>(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
        const float magnitude = bits_as<float>(rest << 13) * bits_as<float>(0x77800000u);  // · 2¹¹²: moves the bias
        return bits_as<float>(sign | bits_as<std::uint32_t>(magnitude));
    }
    static std::uint16_t float_to_half(float x) {
        const std::uint32_t all = bits_as<std::uint32_t>(x), sign = all >> 16 & 0x8000u, rest = all & 0x7FFFFFFFu;
        if (rest > 0x7F800000u) return std::uint16_t(sign | 0x7E00u);
        if (rest >= 0x477FF000u) return std::uint16_t(sign | 0x7C00u);
        if (rest < 0x38800000u) {
            // Adding ½ lines the bits of a denormal half up at the end of a float, rounded to nearest even.
            const float shifted = bits_as<float>(rest) + 0.5f;
            return std::uint16_t(sign | (bits_as<std::uint32_t>(shifted) - 0x3F000000u));
        }
        return std::uint16_t(sign | (rest - 0x38000000u + 0xFFFu + (rest >> 13 & 1u)) >> 13);
    }
    static F load_f16(const std::uint16_t* p) {
        return each<F>([&](int i) { return half_to_float(p[i]); });
    }
    static void store_f16(std::uint16_t* p, F a) {
        for (int i = 0; i < W; ++i) p[i] = float_to_half(a.v[i]);
    }
    static I bf16_bits(F a) {
        return each<I>([&](int i) -> std::uint32_t {
            const std::uint32_t x = bits_as<std::uint32_t>(a.v[i]);
            return a.v[i] == a.v[i] ? (x + 0x7FFFu + (x >> 16 & 1u)) >> 16 : 0x7FC0u;
        });
    }
    static I pairs(I low, I high) { return each<I>([&](int i) { return low.v[i] | high.v[i] << 16; }); }
    static I load_bits(const void* p) {
        I r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static I load_halves(const std::uint16_t* p) { return each<I>([&](int i) { return std::uint32_t{p[i]}; }); }
    static void store_bits(std::uint32_t* p, I a) { std::memcpy(p, a.v, sizeof a.v); }
    static void store_low_halves(std::uint16_t* p, I a) {
        for (int i = 0; i < W; ++i) p[i] = static_cast<std::uint16_t>(a.v[i]);
    }

    static void transpose(I (&r)[W]) {
        for (int i = 0; i < W; ++i) {
            for (int j = 0; j < i; ++j) {
                const std::uint32_t kept = r[i].v[j];
                r[i].v[j] = r[j].v[i];
                r[j].v[i] = kept;
            }
        }
    }
};

#endif

}  // namespace
}  // namespace fastppo
