// What a transformer's layer does to its rows between the products, in one reading of them.
//
//     RMS normalization   y = w x / √(mean x² + eps)            8 bytes a value forward, 16 backward (float32)
//     gated activation    h = silu(gate) · up                   6 bytes a value forward, 10 backward (bfloat16)
#pragma once

#include <cstdint>

#include "cpu.h"

namespace fastppo {

// x, y [rows, n]; scales [rows] is what the gradient wants to know again.
void rms_norm(const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t n, Isa isa, int threads,
              float* y, float* scales);
// d_weight [n] or null
void rms_norm_backward(const float* x, const float* weight, const float* scales, const float* dy, std::int64_t rows,
                       std::int64_t n, Isa isa, int threads, float* dx, float* d_weight);

// All [n] bfloat16.
void gated(const std::uint16_t* gate, const std::uint16_t* up, std::int64_t n, Isa isa, int threads, std::uint16_t* h);
void gated_backward(const std::uint16_t* gate, const std::uint16_t* up, const std::uint16_t* dh, std::int64_t n, Isa isa,
                    int threads, std::uint16_t* d_gate, std::uint16_t* d_up);

}  // namespace fastppo
