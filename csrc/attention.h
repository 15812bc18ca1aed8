// Attention over short sequences with a mask of its own for every sequence, and its gradients; bfloat16 products, softmax
// in float32.
//
//     S = scale · q kᵀ, −∞ where a query does not see a key      P = softmax(S)      out = P v
//     ∂P = ∂out vᵀ      ∂S = P (∂P − Σ P ∂P)      ∂q = scale ∂S k      ∂k = scale ∂Sᵀ q      ∂v = Pᵀ ∂out
//
// FLOPs: 4 Q K d a head forward, 10 backward. Bytes: q, k, v, out once, backward their gradients too; S is never in memory.
//
// Tiling: one item is a sequence and a key head with the queries of all its heads stacked; of these 64 rows at a time meet
// all keys. P is computed again in the backward pass, from the logarithm of each row's sum.
#pragma once

#include <cstdint>

#include "products.h"

namespace fastppo {

// [B, heads, rows, d], each row whole.
struct Heads {
    const void* data = nullptr;
    Type type = Type::float32;
    std::int64_t batch_stride = 0, head_stride = 0, row_stride = 0;  // in values
};

struct Attention {
    std::int64_t batch = 0, heads = 0, key_heads = 0, queries = 0, keys = 0, dim = 0;  // dim a multiple of 64
    Heads q, k, v;                        // of k and v, one head for heads / key_heads of q's
    Heads out;                            // or its gradient
    const std::uint8_t* visible = nullptr;  // [B, Q, K]
    std::int64_t visible_batch_stride = 0, visible_row_stride = 0;
    float scale = 1.0f;
    float* log_sums = nullptr;  // [B, heads, Q]: written forward, read backward
    Heads d_q, d_k, d_v;
    Machine machine;
};

void attention_forward(const Attention& attention);
void attention_backward(const Attention& attention);

}  // namespace fastppo
