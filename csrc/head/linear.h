// The passes over a vocabulary behind the linear operators, between hidden states and per-row statistics or gradients.
//
//     pass 1   for each tile of `width` vocabulary rows:
//                  W [width, D]            -> panels of 64 rows, transposed as the product reads them
//                  for 64 tokens at a time: z [64, width] = h Wᵀ in float32 -> folded into the rows' sums
//                                           (and kept in 16 bits for pass 2 where there is memory for it)
//     pass 2   for each tile:
//                  for 64 tokens at a time: z kept or recomputed -> ∂z in place -> ∂h [64, D] += ∂z W
//                                           ∂zᵀ [width, tokens] beside it
//                  for 64 vocabulary rows:  ∂W [64, D] = ∂zᵀ h, rounded once, written once
//
// Only a block [64, width] of logits ever exists for each thread: it stays in the L2 cache from the product that makes
// it to the products that use it up. Sums over tiles are float32. Which thread takes which block changes no result.
#pragma once

#include <cstdint>

#include "runtime/cpu.h"
#include "head/products.h"
#include "head/rows.h"

namespace fastppo {

struct Model {
    Matrix hidden, weight;
    const float* bias = nullptr;  // [V]
};

struct Problem {
    Model policy;
    Model reference;  // of a divergence; weight.data null without one
    Divergence divergence = Divergence::none;
    Transform transform;
    const std::int64_t* rows = nullptr;  // [n]: which rows of hidden take part
    std::int64_t n = 0;
    const std::int64_t* targets = nullptr;  // by row of hidden
    Type operand = Type::float32;           // what inputs are rounded to
    Type compute = Type::float32;           // what the products read: float32 or bfloat16
    std::int64_t width = 0;                 // vocabulary rows of a tile, a multiple of 64
    std::int64_t block = 0;                 // tokens that share one ∂W product, a multiple of 64
    Isa isa = Isa::portable;
    int threads = 1;
    std::int64_t scratch = 0;  // bytes of scratch that may outlive the call
    Products products;
};

// Logits of pass 1 kept for pass 2, tile by tile: the first tiles in ∂W's own memory, where the rows of ∂W that
// overwrite a slot are written after the slot is read, the next ones in spare memory, the rest nowhere.
struct Kept {
    char* front = nullptr;
    std::int64_t front_stride = 0, front_tiles = 0;
    char* back = nullptr;
    std::int64_t back_tiles = 0;
    std::int64_t rows = 0;       // n of pass 1
    float* anchors = nullptr;    // [rows]: what was subtracted before rounding to 16 bits
    std::uint8_t* whole = nullptr;  // [tiles]: 1 where 16 bits could hold every logit
    const std::int64_t* row_of = nullptr;  // [n of pass 2]: which row of pass 1 each is
};

// out: [4 or 8][out_stride] float32: log-probability, entropy, row maximum, log Σ, and with a divergence its value, the
// center of its gradient, the reference's row maximum and log Σ. Written at the rows that take part.
void linear_statistics(const Problem& problem, const Kept& kept, float* out, std::int64_t out_stride);

struct Gradients {
    const float* scalars;        // [9][n]: row_max, log_sum, a, b, c, d_kl, kl_center, ref_row_max, ref_log_sum
    float* d_hidden = nullptr;   // [padded(n), padded(D)], zeros on entry
    void* d_weight = nullptr;    // [V, D] in the weight's type
    float* d_bias = nullptr;     // [V], zeros on entry
};

void linear_gradients(const Problem& problem, const Kept& kept, const Gradients& gradients);

// The same for logits [n, V] that are already there, rows[i] of them; out as above, 4 rows.
void selective_statistics(const Matrix& logits, const std::int64_t* rows, std::int64_t n, const std::int64_t* targets,
                          const Transform& transform, Isa isa, int threads, float* out, std::int64_t out_stride);
// scalars [5][n]: row_max, log_sum, a, b, c. `out` (stride of V) may be the logits themselves.
void selective_gradients(const Matrix& logits, const std::int64_t* rows, std::int64_t n, const std::int64_t* targets,
                         const Transform& transform, Isa isa, int threads, const float* scalars, void* out);

}  // namespace fastppo
