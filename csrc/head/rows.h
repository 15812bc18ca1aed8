// What is done to rows of logits between the matrix products, and to matrices on their way into them.
//
//     fold      z [v]            ->  Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ (z − m)                          pass 1, per vocabulary tile
//     gradient  z [v]            ->  ∂loss/∂x [v] as the products read it              pass 2
//     pack_*    matrix           ->  panels of 64 columns as the products read them    both
//
// One table of functions for each instruction set. Rows of logits are float32 buffers padded to whole panels: the
// padding holds −inf, which adds to no sum, so that no kernel has a remainder loop.
#pragma once

#include <cstdint>

#include "runtime/cpu.h"

namespace fastppo {

enum class Type { float32, bfloat16, float16 };

constexpr int size_of(Type type) { return type == Type::float32 ? 4 : 2; }

constexpr int kPanel = 64;  // columns of a packed panel, and what rows of logits are padded to

constexpr std::int64_t padded(std::int64_t n, std::int64_t to = kPanel) { return (n + to - 1) / to * to; }

// z = scale · x, or cap · tanh(inner · x); scale is the derivative at 0 of both.
struct Transform {
    float scale = 1.0f;
    float inner = 0.0f;
    float cap = 0.0f;  // 0: none
};

enum class Divergence { none, reverse, forward };

// A logit further below its row's maximum counts as this far below: eᶻ⁻ᵐ is 0, and 0 times it is still 0, where
// 0 · (−inf) would be NaN. No finite logit of use is so low, so that a divergence counts the whole distance to a
// reference that all but excludes a token; from one that gives it no mass at all, it is huge instead of infinite.
constexpr float kVeryNegative = -1e20f;

struct Sums {
    float sum, weighted;  // Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ (z − m)
};

struct BothSums {
    Sums weighting, other;
    // Σ eᶻ⁻ᵐ ((z − m) − (z' − m')), z' the other's: one sum of small differences, where the difference of two large sums
    // would lose a small divergence in rounding.
    float difference;
};

// One row of ∂z = p (a + b log p) + c [v = target] + d_kl · (the divergence's own term).
struct RowGradient {
    std::int64_t target;  // where in this part of the row; outside of it where it is in another
    float row_max, log_sum;
    float a, b, c;
    float d_kl, kl_center, ref_row_max, ref_log_sum;
};

struct RowKernels {
    // x (+ bias) [n] -> z [padded(n)], the rest −inf; x may be z. Returns the maximum.
    float (*transform)(const void* x, Type type, std::int64_t n, const float* bias, const Transform&, float* z);
    Sums (*fold)(const float* z, std::int64_t n, float m);
    BothSums (*fold_both)(const float* z, float m, const float* other, float other_m, std::int64_t n);
    // ∂loss/∂x [padded(n)] in `type`; out may be z.
    void (*gradient)(float* z, const float* ref_z, std::int64_t n, Divergence, const RowGradient&, const Transform&,
                     Type type, void* out);

    // n values from one type to another, then zeros up to padded_n.
    void (*convert)(const void* from, Type from_type, std::int64_t n, void* to, Type to_type, std::int64_t padded_n);
    // z − anchor in 16 bits: false if a value lies too far above the anchor for that.
    bool (*keep)(const float* z, std::int64_t n, float anchor, std::uint16_t* kept);
    void (*restore)(const std::uint16_t* kept, std::int64_t n, float anchor, float* z);

    // B [K, 64] of a product from 64 rows of K values each (float32 or bfloat16; `stride` in values, K even): the panel
    // holds B's rows one after the other, and in bfloat16 two of them interleaved.
    void (*pack_transposed)(const void* rows, std::int64_t stride, std::int64_t k, Type type, void* panel);
    // The same from B's own rows [K, 64], each `stride` values from the next.
    void (*pack)(const void* rows, std::int64_t stride, std::int64_t k, Type type, void* panel);
    // `rows` (a multiple of 32) rows of [n] (a multiple of 64) float32 or bfloat16 values as columns of out.
    void (*transpose)(const void* in, std::int64_t stride, std::int64_t rows, std::int64_t n, Type type, void* out,
                      std::int64_t out_stride);

    float (*sum)(const void* x, Type type, std::int64_t n);  // n a multiple of 32

    void (*exp)(const float* x, std::int64_t n, float* y);  // for the tests, as is the next
    void (*tanh)(const float* x, std::int64_t n, float* y);
};

const RowKernels& row_kernels(Isa isa);

// One definition for each instruction set.
extern const RowKernels kRowsPortable;
#ifdef FASTPPO_X86
extern const RowKernels kRowsAvx2, kRowsAvx512, kRowsAvx512Bf16;
#endif

}  // namespace fastppo
