// Linear layers that are given the same rows, and their gradients, for training in bfloat16 with weights in float32.
//
//     y_g [M, N_g] = x [M, K] W_gᵀ + b_g              ∂x = Σ_g ∂y_g W_g      ∂W_g = ∂y_gᵀ x      ∂b_g = Σ ∂y_g
//
// FLOPs: 2 M K ΣN forward, 4 M K ΣN backward. Bytes: x, y, W once (W as it lies in memory, no bfloat16 copy of it), ∂W
// once. Operands are rounded to bfloat16 and laid out in panels on their way into the products; what the products give
// is float32, rounded once where a result is kept in bfloat16.
//
// Tiling: forward, 64 rows of x by 64 outputs; ∂x, 64 rows of ∂y by 64 columns; ∂W, 64 rows of ∂yᵀ by all columns of x,
// 64 at a time. A panel stays in the L2 cache while the blocks of rows pass by it.
#pragma once

#include <cstdint>
#include <vector>

#include "products.h"

namespace fastppo {

struct DenseLayer {
    Matrix weight;                // [N, K], float32 or bfloat16
    const float* bias = nullptr;  // [N]
    Matrix y;                     // [M, N]: the result, or its gradient
    void* d_weight = nullptr;     // [N, K] in the weight's type, or null
    float* d_bias = nullptr;      // [N], or null
};

struct Dense {
    Matrix x;  // [M, K], float32 or bfloat16
    std::vector<DenseLayer> layers;
    Matrix d_x;  // as x; data null where it is not needed
    Machine machine;
};

void dense_forward(const Dense& dense);
void dense_backward(const Dense& dense);

}  // namespace fastppo
