#include "dense.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "phases.h"
#include "scratch.h"

namespace fastppo {
namespace {

using Index = std::int64_t;

constexpr Index kSize = size_of(Type::bfloat16);
constexpr Index kDepth = 2048;  // longest sum of a product: a panel of 256 KB

Index blocks_of(Index rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// 64 rows of a matrix, from row 64 block on, as bfloat16 [64, padded(cols)]; zeros where there are no more.
void copy_rows(const Matrix& m, Index block, const RowKernels& kernels, char* to) {
    const Index first = block * kRowBlock, count = std::min(kRowBlock, m.rows - first), cols = padded(m.cols);
    const Index bytes = cols * kSize;
    for (Index i = 0; i < count; ++i) {
        kernels.convert(row(m, first + i), m.type, m.cols, to + i * bytes, Type::bfloat16, cols);
    }
    std::memset(to + count * bytes, 0, static_cast<std::size_t>((kRowBlock - count) * bytes));
}

// How many blocks of 64 rows lie in memory as the products read them.
Index blocks_in_place(const Matrix& m) {
    return m.type == Type::bfloat16 && m.cols == padded(m.cols) ? m.rows / kRowBlock : 0;
}

// A matrix as blocks of 64 rows of bfloat16, their length padded with zeros to whole panels: in place where it is that
// already, else copied.
class Operand {
public:
    Operand(const Matrix& m, const RowKernels& kernels)
        : m_(m), kernels_(kernels), cols_(padded(m.cols)), blocks_(blocks_of(m.rows)),
          in_place_(blocks_in_place(m)) {}

    void plan(Scratch& s) { copy_ = s.take<char>((blocks_ - in_place_) * kRowBlock * cols_ * kSize); }

    Index cols() const { return cols_; }
    Index stride(Index block) const { return block < in_place_ ? m_.stride : cols_; }
    const char* at(Index block) const { return block < in_place_ ? row(m_, block * kRowBlock) : copied(block); }

    void fill(Index block) const {
        if (block >= in_place_) copy_rows(m_, block, kernels_, copied(block));
    }

private:
    char* copied(Index block) const { return copy_ + (block - in_place_) * kRowBlock * cols_ * kSize; }

    const Matrix m_;
    const RowKernels& kernels_;
    const Index cols_, blocks_, in_place_;
    char* copy_ = nullptr;
};

// c [64, 64] (+)= a [64, k] times a panel [k, 64].
void multiply(const Products& products, Index k, const char* a, Index lda, const char* panel, bool add, float* c,
              Index ldc) {
    for (Index done = 0; done < k; done += kDepth) {
        products.bfloat16(kRowBlock, kPanel, std::min(kDepth, k - done), lda, kPanel, ldc, add || done > 0,
                          a + done * kSize, panel + done * kPanel * kSize, c, true);
    }
}

// 64 rows of a weight, from row 64 item on, as bfloat16 [64, padded(K)]: where they lie, or in `rows`.
const char* weight_rows(const Matrix& weight, Index item, const RowKernels& kernels, char* rows, Index& stride) {
    if (item < blocks_in_place(weight)) {
        stride = weight.stride;
        return row(weight, item * kPanel);
    }
    stride = padded(weight.cols);
    copy_rows(weight, item, kernels, rows);
    return rows;
}

// Fetches the cache lines of a block of a matrix that is about to be written, while its product is being computed.
void expect(const Matrix& m, Index first, Index count, Index column, Index cols) {
#if defined(__GNUC__)
    for (Index i = 0; i < count; ++i) {
        const char* const begin = row(m, first + i) + column * size_of(m.type);
        for (Index at = 0; at < cols * size_of(m.type); at += kLine) __builtin_prefetch(begin + at, 1, 2);
    }
#else
    (void)m, (void)first, (void)count, (void)column, (void)cols;
#endif
}

// `count` rows of c [64, 64], `cols` values of each, into a matrix from (first, column) on.
void store(const float* c, Index count, Index cols, const Matrix& to, Index first, Index column,
           const RowKernels& kernels) {
    for (Index i = 0; i < count; ++i) {
        char* const at = const_cast<char*>(row(to, first + i)) + column * size_of(to.type);
        kernels.convert(c + i * kPanel, Type::float32, cols, at, to.type, cols);
    }
}

}  // namespace

void dense_forward(const Dense& d) {
    const RowKernels& k = row_kernels(d.machine.isa);
    const Index deep = padded(d.x.cols), blocks = blocks_of(d.x.rows), panel_bytes = deep * kPanel * kSize;

    Operand x(d.x, k);
    std::vector<char*> packed(d.layers.size());
    std::vector<char*> rows(static_cast<std::size_t>(d.machine.threads));  // of a weight
    const Scratch scratch([&](Scratch& s) {
        x.plan(s);
        for (std::size_t g = 0; g < packed.size(); ++g) {
            packed[g] = s.take<char>(padded(d.layers[g].weight.rows) / kPanel * panel_bytes);
        }
        for (char*& r : rows) r = s.take<char>(kPanel * deep * kSize);
    });

    Index panels = 0;
    for (const DenseLayer& layer : d.layers) panels += padded(layer.weight.rows) / kPanel;
    Phases phases;
    phases.add(blocks + panels, [&](int worker, Index item) {
        if (item < blocks) return x.fill(item);
        item -= blocks;
        for (std::size_t g = 0; g < d.layers.size(); ++g) {
            const Index own = padded(d.layers[g].weight.rows) / kPanel;
            if (item < own) {
                Index stride;
                const char* const from = weight_rows(d.layers[g].weight, item, k, rows[worker], stride);
                return k.pack_transposed(from, stride, deep, Type::bfloat16, packed[g] + item * panel_bytes);
            }
            item -= own;
        }
    });
    for (std::size_t g = 0; g < d.layers.size(); ++g) {
        const Index own = padded(d.layers[g].weight.rows) / kPanel * blocks;
        const auto body = [&, g](int, Index item) {
            const DenseLayer& layer = d.layers[g];
            const Index block = item % blocks, panel = item / blocks, column = panel * kPanel;
            const Index first = block * kRowBlock, count = std::min(kRowBlock, d.x.rows - first);
            const Index cols = std::min<Index>(kPanel, layer.weight.rows - column);
            alignas(kLine) float c[kRowBlock * kPanel];
            expect(layer.y, first, count, column, cols);
            multiply(d.machine.products, deep, x.at(block), x.stride(block), packed[g] + panel * panel_bytes, false, c, kPanel);
            d.machine.products.release(true);
            for (Index i = 0; layer.bias && i < count; ++i) {
                float* const z = c + i * kPanel;
                k.transform(z, Type::float32, cols, layer.bias + column, Transform{}, z);
            }
            store(c, count, cols, layer.y, first, column, k);
        };
        g == 0 ? phases.add(own, body) : phases.beside(own, body);
    }
    phases.run(d.machine.threads);
}

void dense_backward(const Dense& d) {
    const RowKernels& k = row_kernels(d.machine.isa);
    const Index count_rows = d.x.rows, blocks = blocks_of(count_rows), all = blocks * kRowBlock, skewed = all + kSkew;
    const Index dim = padded(d.x.cols), columns = dim / kPanel;
    bool any_weight = false;
    Index deep = 0;  // rows of all weights, each padded
    for (const DenseLayer& layer : d.layers) {
        any_weight |= layer.d_weight != nullptr;
        deep += padded(layer.weight.rows);
    }

    Operand x(d.x, k);
    std::vector<Operand> dy;
    dy.reserve(d.layers.size());
    for (const DenseLayer& layer : d.layers) dy.emplace_back(layer.y, k);
    char *straight = nullptr, *x_panels = nullptr;  // columns panels of [deep, 64]; of [all, 64]
    std::vector<char*> transposed(d.layers.size());
    std::vector<char*> rows(static_cast<std::size_t>(d.machine.threads));
    const auto has_columns = [&](const DenseLayer& layer) { return layer.d_weight || layer.d_bias; };
    const Scratch scratch([&](Scratch& s) {
        if (any_weight) x.plan(s);
        for (Operand& operand : dy) operand.plan(s);
        straight = d.d_x.data ? s.take<char>(deep * dim * kSize) : nullptr;
        x_panels = any_weight ? s.take<char>(all * dim * kSize) : nullptr;
        for (std::size_t g = 0; g < dy.size(); ++g) {
            transposed[g] = has_columns(d.layers[g]) ? s.take<char>(dy[g].cols() * skewed * kSize) : nullptr;
        }
        for (char*& r : rows) r = s.take<char>(kPanel * dim * kSize);
    });

    Phases phases;
    phases.add(blocks + (d.d_x.data ? deep / kPanel : 0), [&](int worker, Index item) {
        if (item < blocks) {
            for (std::size_t g = 0; g < dy.size(); ++g) {
                dy[g].fill(item);
                if (transposed[g]) {
                    k.transpose(dy[g].at(item), dy[g].stride(item), kRowBlock, dy[g].cols(), Type::bfloat16,
                                transposed[g] + item * kRowBlock * kSize, skewed);
                }
            }
            if (!any_weight) return;
            x.fill(item);
            for (Index p = 0; p < columns; ++p) {
                k.pack(x.at(item) + p * kPanel * kSize, x.stride(item), kRowBlock, Type::bfloat16,
                       x_panels + (p * all + item * kRowBlock) * kPanel * kSize);
            }
            return;
        }
        item -= blocks;
        Index above = 0;
        for (const DenseLayer& layer : d.layers) {
            const Index own = padded(layer.weight.rows) / kPanel;
            if (item < own) {
                Index stride;
                const char* const from = weight_rows(layer.weight, item, k, rows[worker], stride);
                for (Index p = 0; p < columns; ++p) {
                    k.pack(from + p * kPanel * kSize, stride, kPanel, Type::bfloat16,
                           straight + (p * deep + above + item * kPanel) * kPanel * kSize);
                }
                return;
            }
            item -= own;
            above += padded(layer.weight.rows);
        }
    });

    phases.add(d.d_x.data ? columns * blocks : 0, [&](int, Index item) {
        const Index block = item % blocks, panel = item / blocks, column = panel * kPanel;
        const Index first = block * kRowBlock, count = std::min(kRowBlock, count_rows - first);
        const Index cols = std::min<Index>(kPanel, d.x.cols - column);
        alignas(kLine) float c[kRowBlock * kPanel];
        expect(d.d_x, first, count, column, cols);
        Index above = 0;
        for (const Operand& operand : dy) {
            multiply(d.machine.products, operand.cols(), operand.at(block), operand.stride(block),
                     straight + (panel * deep + above) * kPanel * kSize, above > 0, c, kPanel);
            above += operand.cols();
        }
        d.machine.products.release(true);
        store(c, count, cols, d.d_x, first, column, k);
    });
    for (std::size_t g = 0; g < dy.size(); ++g) {
        if (!transposed[g]) continue;
        // Not after the products of ∂x but beside them: none reads what another writes.
        phases.beside(dy[g].cols() / kPanel * columns, [&, g](int, Index item) {
            const DenseLayer& layer = d.layers[g];
            const Index first = item / columns * kPanel, panel = item % columns, column = panel * kPanel;
            const Index count = std::min<Index>(kPanel, layer.weight.rows - first);
            const char* const a = transposed[g] + first * skewed * kSize;
            if (layer.d_bias && panel == 0) {
                for (Index i = 0; i < count; ++i) {
                    layer.d_bias[first + i] = k.sum(a + i * skewed * kSize, Type::bfloat16, all);
                }
            }
            if (!layer.d_weight) return;
            const Matrix to{layer.d_weight, layer.weight.type, layer.weight.rows, layer.weight.cols, layer.weight.cols};
            const Index cols = std::min<Index>(kPanel, to.cols - column);
            const bool direct = to.type == Type::float32 && cols == kPanel && count == kPanel;
            alignas(kLine) float block[kRowBlock * kPanel];
            expect(to, first, count, column, cols);
            multiply(d.machine.products, all, a, skewed, x_panels + panel * all * kPanel * kSize, false,
                     direct ? reinterpret_cast<float*>(const_cast<char*>(row(to, first))) + column : block,
                     direct ? to.cols : kPanel);
            d.machine.products.release(true);
            if (!direct) store(block, count, cols, to, first, column, k);
        });
    }
    phases.run(d.machine.threads);
}

}  // namespace fastppo
