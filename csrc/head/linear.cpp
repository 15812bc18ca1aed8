#include "head/linear.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "runtime/phases.h"
#include "runtime/scratch.h"

namespace fastppo {

const RowKernels& row_kernels(Isa isa) {
#ifdef FASTPPO_X86
    if (isa == Isa::avx512_bf16) return kRowsAvx512Bf16;
    if (isa == Isa::avx512) return kRowsAvx512;
    if (isa == Isa::avx2) return kRowsAvx2;
#endif
    (void)isa;
    return kRowsPortable;
}

namespace {

using Index = std::int64_t;

// What every pass does with one model: rows into the products' types and layouts, and logits out of them.
class Head {
public:
    Head(const Problem& p, const Model& model)
        : p_(p), model_(model), kernels_(row_kernels(p.isa)), dim_(padded(model.weight.cols)) {}

    Index dim() const { return dim_; }
    Index panel_bytes() const { return dim_ * kPanel * size_of(p_.compute); }

    // `count` ≤ 64 rows of m (index[i], or first + i) into [64, dim], zeros where there are no more.
    void gather(const Matrix& m, const Index* index, Index first, Index count, Index out_rows, char* out,
                char* spare) const {
        const Index bytes = dim_ * size_of(p_.compute);
        for (Index i = 0; i < count; ++i) {
            const void* from = row(m, index ? index[i] : first + i);
            Type type = m.type;
            if (type == Type::float32 && p_.operand != Type::float32 && p_.operand != p_.compute) {
                kernels_.convert(from, type, m.cols, spare, p_.operand, m.cols);
                from = spare;
                type = p_.operand;
            }
            kernels_.convert(from, type, m.cols, out + i * bytes, p_.compute, dim_);
        }
        std::memset(out + count * bytes, 0, static_cast<std::size_t>((out_rows - count) * bytes));
    }

    // Vocabulary rows [lo + 64 item, …) of a tile that ends at `hi`: for logits into transposed[item], for ∂h into its
    // place in every panel of `straight` ([dim / 64] panels of [tile_rows, 64]). Either may be null.
    void pack_weight(Index lo, Index hi, Index item, Index tile_rows, char* transposed, char* straight, char* rows,
                     char* spare) const {
        const Matrix& w = model_.weight;
        const Index first = lo + item * kPanel, count = std::min(kPanel + Index{0}, hi - first);
        const void* from = rows;
        Index stride = dim_;
        if (w.type == p_.compute && w.cols == dim_ && count == kPanel) {
            from = row(w, first);
            stride = w.stride;
        } else {
            gather(w, nullptr, first, count, kPanel, rows, spare);
        }
        if (transposed) {
            kernels_.pack_transposed(from, stride, dim_, p_.compute, transposed + item * panel_bytes());
        }
        if (straight) pack_rows(from, stride, item * kPanel, kPanel, tile_rows, straight);
    }

    // `count` rows in the compute type into place `at` of every panel of `panels`, each [all, 64].
    void pack_rows(const void* from, Index stride, Index at, Index count, Index all, char* panels) const {
        const Index size = size_of(p_.compute);
        for (Index c = 0; c < dim_; c += kPanel) {
            kernels_.pack(static_cast<const char*>(from) + c * size, stride, count, p_.compute,
                          panels + (c * all + at * kPanel) * size);
        }
    }

    // z [64, padded(hi − lo)] of the block's rows, transformed; maxima[i] of each.
    void logits(const Index* index, Index count, Index out_rows, Index lo, Index hi, const char* transposed, char* rows,
                char* spare, float* z, float* maxima) const {
        const Index width = padded(hi - lo);
        const Matrix& h = model_.hidden;
        const void* from = rows;
        Index stride = dim_;
        if (h.type == p_.compute && h.cols == dim_ && count == out_rows && index[count - 1] - index[0] == count - 1) {
            from = row(h, index[0]);
            stride = h.stride;
        } else {
            gather(h, index, 0, count, out_rows, rows, spare);
        }
        for (Index c = 0; c < width; c += kPanel) {
            multiply(out_rows, dim_, stride, width, false, from, transposed + c / kPanel * panel_bytes(), z + c);
        }
        release();
        for (Index i = 0; i < count; ++i) {
            const float* bias = model_.bias ? model_.bias + lo : nullptr;
            maxima[i] = kernels_.transform(z + i * width, Type::float32, hi - lo, bias, p_.transform, z + i * width);
        }
    }

    // c [m, 64] (+)= a [m, k] times a panel [k, 64].
    void multiply(Index m, Index k, Index lda, Index ldc, bool add, const void* a, const void* panel, float* c) const {
        const bool low = p_.compute == Type::bfloat16;
        (low ? p_.products.bfloat16 : p_.products.float32)(m, kPanel, k, lda, kPanel, ldc, add, a, panel, c, low);
    }
    void release() const { p_.products.release(p_.compute == Type::bfloat16); }

private:
    const Problem& p_;
    const Model& model_;
    const RowKernels& kernels_;
    const Index dim_;
};

Index block_rows(Index n) { return n <= 32 ? 32 : kRowBlock; }

// Online softmax sums of a row; every sum is kept relative to the running maximum.
struct RowSums {
    float max, sum, weighted, target;
    float ref_max, ref_sum, difference;  // difference: of the model that weights from the other
};

// A target that no tile has is outside the vocabulary, and must not pass for a probability.
constexpr float kNoTarget = std::numeric_limits<float>::quiet_NaN();

// Moves a running maximum up to `high`: what was summed before is to be shifted by at most 0 and scaled by exp of that.
float raise(float& max, float high) {
    const float before = max;
    max = std::max(before, high);
    return std::max(before - max, kVeryNegative);
}

void add(float& sum, float& weighted, float shift, const Sums& tile) {
    const float scale = std::exp(shift);
    weighted = (weighted + sum * shift) * scale + tile.weighted;
    sum = sum * scale + tile.sum;
}

// The policy's probabilities weight the difference of the models' logits, but the reference's in a forward KL.
void add_both(RowSums& r, const BothSums& tile, float shift, float ref_shift, bool forward) {
    const float sum = forward ? r.ref_sum : r.sum, own = forward ? ref_shift : shift, other = forward ? shift : ref_shift;
    r.difference = (r.difference + sum * (own - other)) * std::exp(own) + tile.difference;
    add(r.sum, r.weighted, shift, forward ? tile.other : tile.weighting);
    r.ref_sum = r.ref_sum * std::exp(ref_shift) + (forward ? tile.weighting : tile.other).sum;
}

char* slot(const Kept& kept, Index tile, Index bytes) {
    if (tile < kept.front_tiles) return kept.front + tile * kept.front_stride;
    if (tile < kept.front_tiles + kept.back_tiles) return kept.back + (tile - kept.front_tiles) * bytes;
    return nullptr;
}

struct WorkerScratch {
    char *rows, *spare;  // [64, max dim] in the compute type; one row
    float *z, *ref_z;    // [64, width]
    char* dz;            // [64, width] in the compute type
    float* c;            // [64, dim]: a block of ∂W
};

void take_worker(Scratch& s, const Problem& p, Index dim, bool both, bool gradients, WorkerScratch& w) {
    w.rows = s.take<char>(kRowBlock * dim * size_of(p.compute));
    w.spare = s.take<char>(dim * 4);
    w.z = s.take<float>(kRowBlock * p.width);
    w.ref_z = both ? s.take<float>(kRowBlock * p.width) : nullptr;
    w.dz = gradients && p.compute != Type::float32 ? s.take<char>(kRowBlock * p.width * size_of(p.compute)) : nullptr;
    w.c = gradients ? s.take<float>(kRowBlock * dim) : nullptr;
}

}  // namespace

void linear_statistics(const Problem& p, const Kept& kept, float* out, Index out_stride) {
    const RowKernels& k = row_kernels(p.isa);
    const bool both = p.divergence != Divergence::none, forward = p.divergence == Divergence::forward;
    const Head policy(p, p.policy), reference(p, both ? p.reference : p.policy);
    const Index vocab = p.policy.weight.rows, tiles = (vocab + p.width - 1) / p.width;
    const Index rows = block_rows(p.n), blocks = (p.n + rows - 1) / rows;
    const bool halves = p.operand != Type::float32;
    const Index slot_row = p.width * (halves ? 2 : 4);

    RowSums* sums = nullptr;
    char *packed[2], *ref_packed[2];  // one tile is read while the next is packed
    std::unique_ptr<WorkerScratch[]> workers(new WorkerScratch[static_cast<std::size_t>(p.threads)]);
    const Scratch scratch(p.scratch, [&](Scratch& s) {
        sums = s.take<RowSums>(p.n);
        for (char*& buffer : packed) buffer = s.take<char>(p.width / kPanel * policy.panel_bytes());
        for (char*& buffer : ref_packed) {
            buffer = both ? s.take<char>(p.width / kPanel * reference.panel_bytes()) : nullptr;
        }
        for (int w = 0; w < p.threads; ++w) {
            take_worker(s, p, std::max(policy.dim(), reference.dim()), both, false, workers[w]);
        }
    });
    for (Index i = 0; i < p.n; ++i) sums[i] = {-FLT_MAX, 0, 0, kNoTarget, -FLT_MAX, 0, 0};

    const auto panels = [&](Index tile) {
        return tile < tiles ? padded(std::min(p.width, vocab - tile * p.width)) / kPanel : 0;
    };
    const auto pack = [&](const WorkerScratch& w, Index tile, Index item) {
        const Index lo = tile * p.width, hi = std::min(lo + p.width, vocab), width = padded(hi - lo);
        policy.pack_weight(lo, hi, item, width, packed[tile % 2], nullptr, w.rows, w.spare);
        if (both) reference.pack_weight(lo, hi, item, width, ref_packed[tile % 2], nullptr, w.rows, w.spare);
    };

    if (kept.whole) {
        std::memset(kept.whole, 1, static_cast<std::size_t>(tiles));
        prefer_huge_pages(kept.front, kept.front_tiles * kept.front_stride);
        prefer_huge_pages(kept.back, kept.back_tiles * kept.rows * slot_row);
    }
    const auto fold_row = [&](Index tile, Index lo, Index hi, Index i, const float* z, float high, const float* ref_z,
                              float ref_high) {
        RowSums& r = sums[i];
        const float shift = raise(r.max, high);
        const Index target = p.targets[p.rows[i]];
        if (target >= lo && target < hi) r.target = z[target - lo];
        if (!both) {
            add(r.sum, r.weighted, shift, k.fold(z, hi - lo, r.max));
        } else {
            const float ref_shift = raise(r.ref_max, ref_high);
            const BothSums tile_sums = forward ? k.fold_both(ref_z, r.ref_max, z, r.max, hi - lo)
                                               : k.fold_both(z, r.max, ref_z, r.ref_max, hi - lo);
            add_both(r, tile_sums, shift, ref_shift, forward);
        }
        if (char* const tile_slot = slot(kept, tile, kept.rows * slot_row)) {
            char* const to = tile_slot + i * slot_row;
            if (halves) {
                // The first tile's maximum: near enough to the row's that 16 bits around it serve.
                if (tile == 0) kept.anchors[i] = std::fabs(r.max) < 1e30f ? r.max : 0.0f;
                if (!k.keep(z, hi - lo, kept.anchors[i], reinterpret_cast<std::uint16_t*>(to))) {
                    // Many rows may find that out at once, all to the same end.
                    reinterpret_cast<std::atomic<std::uint8_t>*>(kept.whole + tile)->store(0, std::memory_order_relaxed);
                }
            } else {
                std::memcpy(to, z, static_cast<std::size_t>(padded(hi - lo)) * sizeof(float));
            }
        }
    };

    Phases phases;
    phases.add(panels(0), [&](int worker, Index item) { pack(workers[worker], 0, item); });
    for (Index tile = 0; tile < tiles; ++tile) {
        const Index lo = tile * p.width, hi = std::min(lo + p.width, vocab), width = padded(hi - lo);
        phases.add(blocks + panels(tile + 1), [&, tile, lo, hi, width](int worker, Index item) {
            const WorkerScratch& w = workers[worker];
            if (item >= blocks) return pack(w, tile + 1, item - blocks);
            const Index first = item * rows, count = std::min(rows, p.n - first);
            const Index* const index = p.rows + first;
            float maxima[kRowBlock], ref_maxima[kRowBlock];
            policy.logits(index, count, rows, lo, hi, packed[tile % 2], w.rows, w.spare, w.z, maxima);
            if (both) {
                reference.logits(index, count, rows, lo, hi, ref_packed[tile % 2], w.rows, w.spare, w.ref_z, ref_maxima);
            }
            for (Index i = 0; i < count; ++i) {
                fold_row(tile, lo, hi, first + i, w.z + i * width, maxima[i], both ? w.ref_z + i * width : nullptr,
                         both ? ref_maxima[i] : 0.0f);
            }
        });
    }
    phases.run(p.threads);

    const float most = std::log(static_cast<float>(vocab));
    for (Index i = 0; i < p.n; ++i) {
        const RowSums& r = sums[i];
        const float log_sum = std::log(r.sum), entropy = log_sum - r.weighted / r.sum;
        float* const to = out + p.rows[i];
        // Comparisons the other way round would turn NaN, which is to be seen, into 0.
        const float logprob = (r.target - r.max) - log_sum;
        to[0] = logprob > 0 ? 0.0f : logprob;
        to[out_stride] = entropy < 0 ? 0.0f : entropy > most ? most : entropy;
        to[2 * out_stride] = r.max;
        to[3 * out_stride] = log_sum;
        if (!both) continue;
        const float ref_log_sum = std::log(r.ref_sum);
        float divergence = 0, center = 0;
        if (forward) {
            divergence = r.difference / r.ref_sum - ref_log_sum + log_sum;
        } else {
            center = divergence = r.difference / r.sum - log_sum + ref_log_sum;
        }
        to[4 * out_stride] = divergence < 0 ? 0.0f : divergence;
        to[5 * out_stride] = center;
        to[6 * out_stride] = r.ref_max;
        to[7 * out_stride] = ref_log_sum;
    }
}

namespace {

RowGradient row_gradient(const float* scalars, Index n, Index i, bool divergence, Index target) {
    RowGradient g{};
    g.target = target;
    g.row_max = scalars[i];
    g.log_sum = scalars[n + i];
    g.a = scalars[2 * n + i];
    g.b = scalars[3 * n + i];
    g.c = scalars[4 * n + i];
    if (divergence) {
        g.d_kl = scalars[5 * n + i];
        g.kl_center = scalars[6 * n + i];
        g.ref_row_max = scalars[7 * n + i];
        g.ref_log_sum = scalars[8 * n + i];
    }
    return g;
}

}  // namespace

void linear_gradients(const Problem& p, const Kept& kept, const Gradients& g) {
    const RowKernels& k = row_kernels(p.isa);
    const bool both = p.divergence != Divergence::none;
    const Head policy(p, p.policy), reference(p, both ? p.reference : p.policy);
    const Matrix& weight = p.policy.weight;
    const Index vocab = weight.rows, tiles = (vocab + p.width - 1) / p.width, dim = policy.dim();
    const Index rows = block_rows(p.n), size = size_of(p.compute);
    const Index stretches = (p.n + p.block - 1) / p.block;
    const Index longest = padded(std::min(p.n, p.block), rows), dzt_stride = longest + kSkew;
    const bool halves = p.operand != Type::float32, columns = g.d_weight || g.d_bias;
    const Index slot_row = p.width * (halves ? 2 : 4);

    char *packed = nullptr, *straight = nullptr, *ref_packed = nullptr, *dzt = nullptr, *hidden = nullptr;
    float* sum = nullptr;  // [width, dim]: ∂W of a tile, where several stretches of tokens add to it
    std::unique_ptr<WorkerScratch[]> workers(new WorkerScratch[static_cast<std::size_t>(p.threads)]);
    const Scratch scratch(p.scratch, [&](Scratch& s) {
        packed = s.take<char>(p.width / kPanel * policy.panel_bytes());
        straight = g.d_hidden ? s.take<char>(p.width * dim * size) : nullptr;
        ref_packed = both ? s.take<char>(p.width / kPanel * reference.panel_bytes()) : nullptr;
        dzt = columns ? s.take<char>(p.width * dzt_stride * size) : nullptr;
        hidden = g.d_weight ? s.take<char>(longest * dim * size) : nullptr;
        sum = g.d_weight && stretches > 1 ? s.take<float>(p.width * dim) : nullptr;
        for (int w = 0; w < p.threads; ++w) take_worker(s, p, std::max(dim, reference.dim()), both, true, workers[w]);
    });

    const auto tile_slot_of = [&](Index tile) {
        return halves && kept.whole && !kept.whole[tile] ? nullptr : slot(kept, tile, kept.rows * slot_row);
    };
    const auto panels = [&](Index tile) {
        return tile < tiles ? padded(std::min(p.width, vocab - tile * p.width)) / kPanel : 0;
    };
    const auto pack = [&](const WorkerScratch& w, Index tile, Index item) {
        const Index lo = tile * p.width, hi = std::min(lo + p.width, vocab), width = padded(hi - lo);
        char* const transposed = tile_slot_of(tile) ? nullptr : packed;
        policy.pack_weight(lo, hi, item, width, transposed, straight, w.rows, w.spare);
        if (both) reference.pack_weight(lo, hi, item, width, ref_packed, nullptr, w.rows, w.spare);
    };

    if (g.d_weight) prefer_huge_pages(g.d_weight, vocab * weight.cols * size_of(weight.type));
    Phases phases;
    phases.add(panels(0), [&](int worker, Index item) { pack(workers[worker], 0, item); });
    for (Index tile = 0; tile < tiles; ++tile) {
        const Index lo = tile * p.width, hi = std::min(lo + p.width, vocab), width = padded(hi - lo);
        const char* const tile_slot = tile_slot_of(tile);

        for (Index stretch = 0; stretch < stretches; ++stretch) {
            const Index start = stretch * p.block, n = std::min(p.block, p.n - start), all = padded(n, rows);
            const bool repack = g.d_weight && (stretches > 1 || tile == 0);

            phases.add(all / rows, [&, tile_slot, lo, hi, width, start, n, all, repack](int worker, Index block) {
                const WorkerScratch& w = workers[worker];
                const Index inside = block * rows, first = start + inside, count = std::min(rows, n - inside);
                if (repack) {
                    policy.gather(p.policy.hidden, p.rows + first, 0, count, rows, w.rows, w.spare);
                    policy.pack_rows(w.rows, dim, inside, rows, all, hidden);
                }
                float unused[kRowBlock];
                if (tile_slot) {
                    for (Index i = 0; i < count; ++i) {
                        const Index kept_row = kept.row_of[first + i];
                        const char* const from = tile_slot + kept_row * slot_row;
                        if (halves) {
                            k.restore(reinterpret_cast<const std::uint16_t*>(from), hi - lo, kept.anchors[kept_row],
                                      w.z + i * width);
                        } else {
                            std::memcpy(w.z + i * width, from, static_cast<std::size_t>(width) * sizeof(float));
                        }
                    }
                } else {
                    policy.logits(p.rows + first, count, rows, lo, hi, packed, w.rows, w.spare, w.z, unused);
                }
                if (both) {
                    reference.logits(p.rows + first, count, rows, lo, hi, ref_packed, w.rows, w.spare, w.ref_z, unused);
                }
                char* const dz = w.dz ? w.dz : reinterpret_cast<char*>(w.z);
                for (Index i = 0; i < count; ++i) {
                    k.gradient(w.z + i * width, both ? w.ref_z + i * width : nullptr, hi - lo, p.divergence,
                               row_gradient(g.scalars, p.n, first + i, both, p.targets[p.rows[first + i]] - lo),
                               p.transform, p.compute, dz + i * width * size);
                }
                std::memset(dz + count * width * size, 0, static_cast<std::size_t>((rows - count) * width * size));
                if (g.d_hidden) {
                    for (Index c = 0; c < dim; c += kPanel) {
                        policy.multiply(rows, width, width, dim, true, dz, straight + c * width * size,
                                        g.d_hidden + first * dim + c);
                    }
                    policy.release();
                }
                if (columns) k.transpose(dz, width, rows, width, p.compute, dzt + inside * size, dzt_stride);
            });

            const bool begins = stretch == 0, ends = stretch + 1 == stretches;
            const Index blocks = columns ? width / kPanel : 0;
            // The tile's own panels have been read: the next tile's are packed alongside.
            phases.add(blocks + (ends ? panels(tile + 1) : 0), [&, tile, lo, hi, all, begins, ends, blocks](int worker,
                                                                                                            Index item) {
                if (item >= blocks) return pack(workers[worker], tile + 1, item - blocks);
                const Index first = lo + item * kPanel, count = std::min(Index{kPanel}, hi - first);
                const char* const a = dzt + item * kPanel * dzt_stride * size;
                if (g.d_bias) {
                    for (Index i = 0; i < count; ++i) {
                        g.d_bias[first + i] += k.sum(a + i * dzt_stride * size, p.compute, all);
                    }
                }
                if (!g.d_weight) return;
                float* const c = sum ? sum + item * kPanel * dim : workers[worker].c;
                for (Index d = 0; d < dim; d += kPanel) {
                    policy.multiply(kPanel, all, dzt_stride, dim, !begins, a, hidden + d * all * size, c + d);
                }
                policy.release();
                if (!ends) return;
                for (Index i = 0; i < count; ++i) {
                    k.convert(c + i * dim, Type::float32, weight.cols,
                              static_cast<char*>(g.d_weight) + (first + i) * weight.cols * size_of(weight.type),
                              weight.type, weight.cols);
                }
            });
        }
    }
    phases.run(p.threads);
}

namespace {

constexpr Index kSegment = 2048;  // logits at a time: 8 KB in float32, a quarter of an L1 cache

}  // namespace

void selective_statistics(const Matrix& logits, const Index* rows, Index n, const Index* targets,
                          const Transform& transform, Isa isa, int threads, float* out, Index out_stride) {
    const RowKernels& k = row_kernels(isa);
    const float most = std::log(static_cast<float>(logits.cols));
    for_each(n, threads, [&](int, Index i) {
        alignas(64) float z[kSegment];
        const Index target = targets[rows[i]];
        float max = -FLT_MAX, sum = 0, weighted = 0, taken = kNoTarget;
        for (Index lo = 0; lo < logits.cols; lo += kSegment) {
            const Index count = std::min(kSegment, logits.cols - lo);
            const float high = k.transform(row(logits, rows[i]) + lo * size_of(logits.type), logits.type, count, nullptr,
                                           transform, z);
            const float shift = raise(max, high);
            if (target >= lo && target < lo + count) taken = z[target - lo];
            add(sum, weighted, shift, k.fold(z, count, max));
        }
        const float log_sum = std::log(sum), entropy = log_sum - weighted / sum, logprob = (taken - max) - log_sum;
        float* const to = out + rows[i];
        to[0] = logprob > 0 ? 0.0f : logprob;
        to[out_stride] = entropy < 0 ? 0.0f : entropy > most ? most : entropy;
        to[2 * out_stride] = max;
        to[3 * out_stride] = log_sum;
    });
}

void selective_gradients(const Matrix& logits, const Index* rows, Index n, const Index* targets,
                         const Transform& transform, Isa isa, int threads, const float* scalars, void* out) {
    const RowKernels& k = row_kernels(isa);
    for_each(n, threads, [&](int, Index i) {
        alignas(64) float z[kSegment];
        const Index target = targets[rows[i]];
        const Index size = size_of(logits.type);
        for (Index lo = 0; lo < logits.cols; lo += kSegment) {
            const Index count = std::min(kSegment, logits.cols - lo);
            k.transform(row(logits, rows[i]) + lo * size, logits.type, count, nullptr, transform, z);
            k.gradient(z, nullptr, count, Divergence::none, row_gradient(scalars, n, i, false, target - lo), transform,
                       Type::float32, z);
            k.convert(z, Type::float32, count, static_cast<char*>(out) + (rows[i] * logits.cols + lo) * size,
                      logits.type, count);
        }
    });
}

}  // namespace fastppo
