// The matrix products that everything here is built around, and what they read.
#pragma once

#include <cstdint>

#include "head/rows.h"

namespace fastppo {

// C [m, n] (+)= A [m, k] B [k, n], C float32; oneDNN's microkernels as PyTorch exports them, which use whatever the
// machine has (AMX tiles included). bfloat16 B has pairs of rows interleaved. `release` ends a thread's use of them.
struct Products {
    using Multiply = void (*)(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t lda, std::int64_t ldb,
                              std::int64_t ldc, bool add, const void* a, const void* b, float* c, bool interleaved);
    Multiply float32 = nullptr;
    Multiply bfloat16 = nullptr;
    void (*release)(bool interleaved) = nullptr;
};

struct Matrix {
    const void* data = nullptr;
    Type type = Type::float32;
    std::int64_t rows = 0, cols = 0, stride = 0;  // stride: values from row to row
};

inline const char* row(const Matrix& m, std::int64_t r) {
    return static_cast<const char*>(m.data) + r * m.stride * size_of(m.type);
}

constexpr std::int64_t kRowBlock = 64;  // rows of a product
// The rows of a transposed matrix lie this many values further apart than they are long: at a power of two they would
// share cache sets.
constexpr std::int64_t kSkew = 32;

}  // namespace fastppo
