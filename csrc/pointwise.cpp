#include "pointwise.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "rows.h"

namespace fastppo {
namespace {

using Index = std::int64_t;

constexpr Index kFewest = 16384;  // values worth a thread: some microseconds

// body(part, begin, end) for equal parts of `items`, each a multiple of `unit` long, `values` values in all.
template <class Body>
void in_parts(Index items, Index unit, Index values, int threads, const Body& body) {
    if (items == 0) return;
    const Index most = std::clamp<Index>(values / kFewest, 1, threads);
    const Index each = ((items + most - 1) / most + unit - 1) / unit * unit;
    const int parts = static_cast<int>((items + each - 1) / each);
    parallel_for(parts, threads, [&](int part) { body(part, part * each, std::min(items, (part + 1) * each)); });
}

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, Index rows, Index n, Isa isa, int threads, float* y,
              float* scales) {
    const RowKernels& k = row_kernels(isa);
    in_parts(rows, 1, rows * n, threads, [&](int, Index begin, Index end) {
        for (Index i = begin; i < end; ++i) scales[i] = k.rms_norm(x + i * n, weight, eps, n, y + i * n);
    });
}

void rms_norm_backward(const float* x, const float* weight, const float* scales, const float* dy, Index rows, Index n,
                       Isa isa, int threads, float* dx, float* d_weight) {
    const RowKernels& k = row_kernels(isa);
    std::vector<float> sums(static_cast<std::size_t>(n * threads));
    in_parts(rows, 1, rows * n, threads, [&](int part, Index begin, Index end) {
        for (Index i = begin; i < end; ++i) {
            k.rms_norm_backward(x + i * n, weight, scales[i], dy + i * n, n, dx + i * n, sums.data() + part * n);
        }
    });
    if (!d_weight) return;
    std::fill(d_weight, d_weight + n, 0.0f);
    for (int part = 0; part < threads; ++part) {
        for (Index i = 0; i < n; ++i) d_weight[i] += sums[static_cast<std::size_t>(part * n + i)];
    }
}

void gated(const std::uint16_t* gate, const std::uint16_t* up, Index n, Isa isa, int threads, std::uint16_t* h) {
    const RowKernels& k = row_kernels(isa);
    in_parts(n, kPanel, n, threads, [&](int, Index begin, Index end) {
        k.gated(gate + begin, up + begin, end - begin, h + begin);
    });
}

void gated_backward(const std::uint16_t* gate, const std::uint16_t* up, const std::uint16_t* dh, Index n, Isa isa,
                    int threads, std::uint16_t* d_gate, std::uint16_t* d_up) {
    const RowKernels& k = row_kernels(isa);
    in_parts(n, kPanel, n, threads, [&](int, Index begin, Index end) {
        k.gated_backward(gate + begin, up + begin, dh + begin, end - begin, d_gate + begin, d_up + begin);
    });
}

}  // namespace fastppo
