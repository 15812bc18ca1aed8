// The row kernels of one instruction set; included once by each set's file. Everything has internal linkage.
//
// Cost a logit: about 2 cycles a vector for `transform`, 8 for `fold` and 10 for `gradient`, all from the L1 or L2
// cache: a few percent of a product with D = 576.
#pragma once

#include "head/rows.h"
#include "runtime/vector_math.h"

namespace fastppo {
namespace {

using S = Simd;
constexpr int W = S::W;

FASTPPO_ALWAYS_INLINE F load_as(const void* p, Type type, std::int64_t at) {
    switch (type) {
        case Type::float32: return S::load(static_cast<const float*>(p) + at);
        case Type::bfloat16: return S::load_bf16(static_cast<const std::uint16_t*>(p) + at);
        case Type::float16: break;
    }
    return S::load_f16(static_cast<const std::uint16_t*>(p) + at);
}

FASTPPO_ALWAYS_INLINE void store_as(void* p, Type type, std::int64_t at, F v) {
    switch (type) {
        case Type::float32: return S::store(static_cast<float*>(p) + at, v);
        case Type::bfloat16: return S::store_low_halves(static_cast<std::uint16_t*>(p) + at, S::bf16_bits(v));
        case Type::float16: return S::store_f16(static_cast<std::uint16_t*>(p) + at, v);
    }
}

const char* at(const void* p, Type type, std::int64_t i) { return static_cast<const char*>(p) + i * size_of(type); }
char* at(void* p, Type type, std::int64_t i) { return static_cast<char*>(p) + i * size_of(type); }

// The n < W values at p as a vector, the other lanes 0.
F load_first(const void* p, Type type, std::int64_t n) {
    alignas(64) char buffer[W * 4] = {};
    std::memcpy(buffer, p, static_cast<std::size_t>(n * size_of(type)));
    return load_as(buffer, type, 0);
}

template <Type kType>
void convert_from(const void* from, std::int64_t n, void* to, Type to_type, std::int64_t padded_n) {
    std::int64_t i = 0;
    for (; i + W <= n; i += W) store_as(to, to_type, i, load_as(from, kType, i));
    if (i < n) {
        alignas(64) char buffer[W * 4];
        store_as(buffer, to_type, 0, load_first(at(from, kType, i), kType, n - i));
        std::memcpy(at(to, to_type, i), buffer, static_cast<std::size_t>((n - i) * size_of(to_type)));
    }
    if (padded_n > n) std::memset(at(to, to_type, n), 0, static_cast<std::size_t>((padded_n - n) * size_of(to_type)));
}

void convert(const void* from, Type from_type, std::int64_t n, void* to, Type to_type, std::int64_t padded_n) {
    if (from_type == to_type) {
        std::memcpy(to, from, static_cast<std::size_t>(n * size_of(to_type)));
        if (padded_n > n) std::memset(at(to, to_type, n), 0, static_cast<std::size_t>((padded_n - n) * size_of(to_type)));
        return;
    }
    switch (from_type) {
        case Type::float32: return convert_from<Type::float32>(from, n, to, to_type, padded_n);
        case Type::bfloat16: return convert_from<Type::bfloat16>(from, n, to, to_type, padded_n);
        case Type::float16: return convert_from<Type::float16>(from, n, to, to_type, padded_n);
    }
}

template <Type kType, bool kBias, bool kCap>
float transform(const void* x, std::int64_t n, const float* bias, const Transform& t, float* z) {
    const F scale = S::set1(kCap ? t.inner : t.scale), cap = S::set1(t.cap);
    const auto apply = [&](F v, F b) {
        if (kBias) v = S::add(v, b);
        v = S::mul(v, scale);
        return kCap ? S::mul(cap, tanh(v)) : v;
    };
    F high = S::set1(-kInfinity);
    std::int64_t i = 0;
    for (; i + W <= n; i += W) {
        const F v = apply(load_as(x, kType, i), kBias ? S::load(bias + i) : scale);
        S::store(z + i, v);
        high = S::max(v, high);
    }
    float highest = S::highest(high);
    if (i < n) {
        alignas(64) float last[W];
        S::store(last, apply(load_first(at(x, kType, i), kType, n - i),
                             kBias ? load_first(bias + i, Type::float32, n - i) : scale));
        for (std::int64_t k = i; k < n; ++k) {
            z[k] = last[k - i];
            highest = z[k] > highest ? z[k] : highest;
        }
    }
    for (std::int64_t k = n; k < padded(n); ++k) z[k] = -kInfinity;
    return highest;
}

// z as it is, its padding −inf.
float highest_logit(float* z, std::int64_t n) {
    for (std::int64_t k = n; k < padded(n); ++k) z[k] = -kInfinity;
    F high = S::set1(-kInfinity);
    for (std::int64_t i = 0; i < padded(n); i += W) high = S::max(S::load(z + i), high);
    return S::highest(high);
}

template <Type kType>
float transform_type(const void* x, std::int64_t n, const float* bias, const Transform& t, float* z) {
    if (x == z && bias == nullptr && t.cap == 0 && t.scale == 1.0f) return highest_logit(z, n);
    if (bias != nullptr) {
        return t.cap != 0 ? transform<kType, true, true>(x, n, bias, t, z) : transform<kType, true, false>(x, n, bias, t, z);
    }
    return t.cap != 0 ? transform<kType, false, true>(x, n, bias, t, z) : transform<kType, false, false>(x, n, bias, t, z);
}

float transform_any(const void* x, Type type, std::int64_t n, const float* bias, const Transform& t, float* z) {
    switch (type) {
        case Type::float32: return transform_type<Type::float32>(x, n, bias, t, z);
        case Type::bfloat16: return transform_type<Type::bfloat16>(x, n, bias, t, z);
        case Type::float16: break;
    }
    return transform_type<Type::float16>(x, n, bias, t, z);
}

// z − m, at least kVeryNegative.
FASTPPO_ALWAYS_INLINE F below_max(const float* z, F m) { return S::max(S::set1(kVeryNegative), S::sub(S::load(z), m)); }

Sums fold(const float* z, std::int64_t n, float m) {
    const F row_max = S::set1(m);
    F sum0 = S::set1(0.0f), sum1 = sum0, weighted0 = sum0, weighted1 = sum0;
    for (std::int64_t i = 0; i < padded(n); i += 2 * W) {
        const F d0 = below_max(z + i, row_max), d1 = below_max(z + i + W, row_max);
        const F e0 = exp(d0), e1 = exp(d1);
        sum0 = S::add(sum0, e0);
        sum1 = S::add(sum1, e1);
        weighted0 = S::fma(e0, d0, weighted0);
        weighted1 = S::fma(e1, d1, weighted1);
    }
    return {S::sum(S::add(sum0, sum1)), S::sum(S::add(weighted0, weighted1))};
}

BothSums fold_both(const float* z, float m, const float* other, float other_m, std::int64_t n) {
    const F row_max = S::set1(m), other_max = S::set1(other_m);
    F sum = S::set1(0.0f), weighted = sum, other_sum = sum, other_weighted = sum, difference = sum;
    for (std::int64_t i = 0; i < padded(n); i += W) {
        const F d = below_max(z + i, row_max), other_d = below_max(other + i, other_max);
        const F e = exp(d), other_e = exp(other_d);
        sum = S::add(sum, e);
        weighted = S::fma(e, d, weighted);
        difference = S::fma(e, S::sub(d, other_d), difference);
        other_sum = S::add(other_sum, other_e);
        other_weighted = S::fma(other_e, other_d, other_weighted);
    }
    return {{S::sum(sum), S::sum(weighted)}, {S::sum(other_sum), S::sum(other_weighted)}, S::sum(difference)};
}

// log p = (z − m) − log Σ; the two subtractions stay apart for the sake of logits with a large common offset.
FASTPPO_ALWAYS_INLINE F log_probability(const float* z, F m, F log_sum) {
    return S::sub(below_max(z, m), log_sum);
}

template <Divergence kKind, bool kCap, Type kType>
void gradient(float* z, const float* ref_z, std::int64_t n, const RowGradient& row, const Transform& t, void* out) {
    const F m = S::set1(row.row_max), log_sum = S::set1(row.log_sum), a = S::set1(row.a), b = S::set1(row.b);
    const F d_kl = S::set1(row.d_kl), center = S::set1(row.kl_center);
    const F ref_m = S::set1(row.ref_row_max), ref_log_sum = S::set1(row.ref_log_sum);
    const F scale = S::set1(t.scale), minus_scale = S::set1(-t.scale), per_cap = S::set1(kCap ? 1.0f / t.cap : 0.0f);
    const auto slope = [&](std::int64_t i) {
        if (!kCap) return scale;
        const F share = S::mul(S::max(S::set1(-t.cap), S::load(z + i)), per_cap);
        return S::fma(S::mul(share, share), minus_scale, scale);
    };
    const auto dz = [&](std::int64_t i) {
        const F log_p = log_probability(z + i, m, log_sum), p = exp(log_p);
        F coefficient = S::fma(b, log_p, a);
        if (kKind == Divergence::none) return S::mul(p, coefficient);
        const F log_q = log_probability(ref_z + i, ref_m, ref_log_sum);
        if (kKind == Divergence::forward) {
            return S::sub(S::mul(p, S::add(coefficient, d_kl)), S::mul(d_kl, exp(log_q)));
        }
        return S::mul(p, S::fma(d_kl, S::sub(S::sub(log_p, log_q), center), coefficient));
    };

    // The vector with the target in it, first: the loop may overwrite z.
    const bool here = row.target >= 0 && row.target < n;
    const std::int64_t vector = here ? row.target / W * W : 0;
    alignas(64) float with_target[W];
    if (here) {
        alignas(64) float one[W] = {};
        one[row.target - vector] = row.c;
        S::store(with_target, S::mul(S::add(dz(vector), S::load(one)), slope(vector)));
    }
    for (std::int64_t i = 0; i < padded(n); i += W) store_as(out, kType, i, S::mul(dz(i), slope(i)));
    if (here) store_as(out, kType, vector, S::load(with_target));
}

template <Divergence kKind, Type kType>
void gradient_kind(float* z, const float* ref_z, std::int64_t n, const RowGradient& row, const Transform& t, void* out) {
    if (t.cap != 0) {
        gradient<kKind, true, kType>(z, ref_z, n, row, t, out);
    } else {
        gradient<kKind, false, kType>(z, ref_z, n, row, t, out);
    }
}

template <Type kType>
void gradient_type(float* z, const float* ref_z, std::int64_t n, Divergence kind, const RowGradient& row,
                   const Transform& t, void* out) {
    switch (kind) {
        case Divergence::none: return gradient_kind<Divergence::none, kType>(z, ref_z, n, row, t, out);
        case Divergence::reverse: return gradient_kind<Divergence::reverse, kType>(z, ref_z, n, row, t, out);
        case Divergence::forward: return gradient_kind<Divergence::forward, kType>(z, ref_z, n, row, t, out);
    }
}

void gradient_any(float* z, const float* ref_z, std::int64_t n, Divergence kind, const RowGradient& row,
                  const Transform& t, Type type, void* out) {
    if (type == Type::bfloat16) {
        gradient_type<Type::bfloat16>(z, ref_z, n, kind, row, t, out);
    } else {
        gradient_type<Type::float32>(z, ref_z, n, kind, row, t, out);
    }
}

constexpr float kHighestHalf = 65504.0f;

bool keep(const float* z, std::int64_t n, float anchor, std::uint16_t* kept) {
    const F from = S::set1(anchor), lowest = S::set1(-kHighestHalf);
    F high = lowest;
    for (std::int64_t i = 0; i < padded(n); i += W) {
        const F d = S::max(lowest, S::sub(S::load(z + i), from));
        high = S::max(high, d);
        S::store_f16(kept + i, d);
    }
    return S::highest(high) <= kHighestHalf;
}

void restore(const std::uint16_t* kept, std::int64_t n, float anchor, float* z) {
    const F from = S::set1(anchor);
    for (std::int64_t i = 0; i < padded(n); i += W) S::store(z + i, S::add(S::load_f16(kept + i), from));
}

// W rows of 32-bit values, `stride` bytes apart, become W columns.
FASTPPO_ALWAYS_INLINE void transpose_block(const char* from, std::int64_t stride, std::uint32_t* to,
                                           std::int64_t to_stride) {
    S::I r[W];
    for (int i = 0; i < W; ++i) r[i] = S::load_bits(from + i * stride);
    S::transpose(r);
    for (int i = 0; i < W; ++i) S::store_bits(to + i * to_stride, r[i]);
}

void pack_transposed(const void* rows, std::int64_t stride, std::int64_t k, Type type, void* panel) {
    // A pair of bfloat16 values side by side in a row is what one 32-bit element of the panel holds. The rows need not
    // start at such an element: a stride may be odd.
    const std::int64_t words = k * size_of(type) / 4, row_bytes = stride * size_of(type);
    for (int c = 0; c < kPanel; c += W) {
        const char* from = static_cast<const char*>(rows) + c * row_bytes;
        auto* to = static_cast<std::uint32_t*>(panel) + c;
        for (std::int64_t i = 0; i < words; i += W) transpose_block(from + i * 4, row_bytes, to + i * kPanel, kPanel);
    }
}

void pack(const void* rows, std::int64_t stride, std::int64_t k, Type type, void* panel) {
    if (type == Type::float32) {
        for (std::int64_t i = 0; i < k; ++i) {
            std::memcpy(static_cast<float*>(panel) + i * kPanel, static_cast<const float*>(rows) + i * stride,
                        kPanel * sizeof(float));
        }
        return;
    }
    const auto* from = static_cast<const std::uint16_t*>(rows);
    auto* to = static_cast<std::uint32_t*>(panel);
    for (std::int64_t i = 0; i < k; i += 2, from += 2 * stride, to += kPanel) {
        for (int c = 0; c < kPanel; c += W) {
            S::store_bits(to + c, S::pairs(S::load_halves(from + c), S::load_halves(from + stride + c)));
        }
    }
}

void transpose(const void* in, std::int64_t stride, std::int64_t rows, std::int64_t n, Type type, void* out,
               std::int64_t out_stride) {
    if (type == Type::float32) {
        for (std::int64_t i = 0; i < rows; i += W) {
            for (std::int64_t c = 0; c < n; c += W) {
                transpose_block(static_cast<const char*>(in) + (i * stride + c) * 4, stride * 4,
                                static_cast<std::uint32_t*>(out) + c * out_stride + i, out_stride);
            }
        }
        return;
    }
    S::I r[W];
    for (std::int64_t i = 0; i < rows; i += 2 * W) {
        for (std::int64_t c = 0; c < n; c += W) {
            for (int k = 0; k < W; ++k) {
                const auto* pair = static_cast<const std::uint16_t*>(in) + (i + 2 * k) * stride + c;
                r[k] = S::pairs(S::load_halves(pair), S::load_halves(pair + stride));
            }
            S::transpose(r);
            for (int k = 0; k < W; ++k) {
                auto* to = static_cast<std::uint16_t*>(out) + (c + k) * out_stride + i;
                S::store_bits(reinterpret_cast<std::uint32_t*>(to), r[k]);
            }
        }
    }
}

float sum(const void* x, Type type, std::int64_t n) {
    F total = S::set1(0.0f);
    for (std::int64_t i = 0; i < n; i += W) total = S::add(total, load_as(x, type, i));
    return S::sum(total);
}

template <F (*kFunction)(F)>
void map(const float* x, std::int64_t n, float* y) {
    std::int64_t i = 0;
    for (; i + W <= n; i += W) S::store(y + i, kFunction(S::load(x + i)));
    if (i < n) {
        alignas(64) float last[W];
        S::store(last, kFunction(load_first(x + i, Type::float32, n - i)));
        std::memcpy(y + i, last, static_cast<std::size_t>(n - i) * sizeof(float));
    }
}

F exp_of(F x) { return exp(x); }
F tanh_of(F x) { return tanh(x); }

constexpr RowKernels kKernels{transform_any, fold, fold_both, gradient_any, convert, keep, restore, pack_transposed,
                             pack, transpose, sum, map<exp_of>, map<tanh_of>};

}  // namespace
}  // namespace fastppo
