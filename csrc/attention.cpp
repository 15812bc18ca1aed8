#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "phases.h"
#include "scratch.h"

namespace fastppo {
namespace {

using Index = std::int64_t;

constexpr Index kSize = size_of(Type::bfloat16);

char* row(const Heads& m, Index batch, Index head, Index r) {
    const Index at = batch * m.batch_stride + head * m.head_stride + r * m.row_stride;
    return const_cast<char*>(static_cast<const char*>(m.data)) + at * size_of(m.type);
}

// What an item needs, for one thread.
struct Buffers {
    char *q, *k, *v, *d_out;                // rows in bfloat16, padded with zeros to whole blocks
    char *k_across, *v_across;              // panels [d, 64], one for 64 keys
    char *q_down, *k_down, *v_down, *d_out_down;  // panels of 64 columns, as deep as there are rows
    char *p, *ds;                           // [64, keys]
    char *p_across, *ds_across;             // [keys, rows]
    float *s, *dp, *c, *mask;               // [64, keys], [64, keys], [64, 64], [queries, keys]
};

class Item {
public:
    Item(const Attention& a, const Buffers& b, Index item)
        : a_(a), b_(b), k_(row_kernels(a.machine.isa)), batch_(item / a.key_heads), key_head_(item % a.key_heads),
          group_(a.heads / a.key_heads), rows_(group_ * a.queries), all_rows_(padded(rows_)), all_keys_(padded(a.keys)),
          across_stride_(all_rows_ + kSkew) {}

    void forward() const {
        prepare();
        down(b_.v, all_keys_, b_.v_down);
        for (Index first = 0; first < rows_; first += kRowBlock) {
            const Index count = std::min(kRowBlock, rows_ - first);
            across(b_.q + first * a_.dim * kSize, b_.k_across, b_.s);
            for (Index i = 0; i < count; ++i) {
                *log_sum(first + i) = k_.softmax(b_.s + i * all_keys_, b_.mask + (first + i) % a_.queries * all_keys_,
                                                 a_.scale, all_keys_, halves(b_.p) + i * all_keys_);
            }
            clear(b_.p, count);
            product(b_.p, all_keys_, all_keys_, b_.v_down, count, [&](Index i) { return query_row(a_.out, first + i); },
                    a_.out.type);
        }
        a_.machine.products.release(true);
    }

    void backward() const {
        prepare();
        gather(a_.out, rows_, all_rows_, b_.d_out, true);
        over(b_.v, b_.v_across);
        down(b_.k, all_keys_, b_.k_down);
        down(b_.q, all_rows_, b_.q_down);
        down(b_.d_out, all_rows_, b_.d_out_down);
        for (Index first = 0; first < all_rows_; first += kRowBlock) {
            const Index count = std::min(kRowBlock, rows_ - first);
            across(b_.q + first * a_.dim * kSize, b_.k_across, b_.s);
            across(b_.d_out + first * a_.dim * kSize, b_.v_across, b_.dp);
            for (Index i = 0; i < count; ++i) {
                k_.softmax_backward(b_.s + i * all_keys_, b_.mask + (first + i) % a_.queries * all_keys_, a_.scale,
                                    *log_sum(first + i), b_.dp + i * all_keys_, all_keys_,
                                    halves(b_.p) + i * all_keys_, halves(b_.ds) + i * all_keys_);
            }
            clear(b_.p, count);
            clear(b_.ds, count);
            k_.transpose(b_.p, all_keys_, kRowBlock, all_keys_, Type::bfloat16, b_.p_across + first * kSize,
                         across_stride_);
            k_.transpose(b_.ds, all_keys_, kRowBlock, all_keys_, Type::bfloat16, b_.ds_across + first * kSize,
                         across_stride_);
            product(b_.ds, all_keys_, all_keys_, b_.k_down, count, [&](Index i) { return query_row(a_.d_q, first + i); },
                    a_.d_q.type);
        }
        for (Index first = 0; first < a_.keys; first += kRowBlock) {
            const Index count = std::min(kRowBlock, a_.keys - first), at = first * across_stride_ * kSize;
            product(b_.p_across + at, across_stride_, all_rows_, b_.d_out_down, count,
                    [&](Index i) { return row(a_.d_v, batch_, key_head_, first + i); }, a_.d_v.type);
            product(b_.ds_across + at, across_stride_, all_rows_, b_.q_down, count,
                    [&](Index i) { return row(a_.d_k, batch_, key_head_, first + i); }, a_.d_k.type);
        }
        a_.machine.products.release(true);
    }

private:
    static std::uint16_t* halves(char* p) { return reinterpret_cast<std::uint16_t*>(p); }

    // Rows of all heads of the group, one head after the other.
    char* query_row(const Heads& m, Index r) const {
        return row(m, batch_, key_head_ * group_ + r / a_.queries, r % a_.queries);
    }
    float* log_sum(Index r) const {
        const Index head = key_head_ * group_ + r / a_.queries;
        return a_.log_sums + (batch_ * a_.heads + head) * a_.queries + r % a_.queries;
    }

    void prepare() const {
        gather(a_.q, rows_, all_rows_, b_.q, true);
        gather(a_.k, a_.keys, all_keys_, b_.k, false);
        gather(a_.v, a_.keys, all_keys_, b_.v, false);
        over(b_.k, b_.k_across);
        for (Index i = 0; i < a_.queries; ++i) {
            const std::uint8_t* const seen = a_.visible + batch_ * a_.visible_batch_stride + i * a_.visible_row_stride;
            float* const to = b_.mask + i * all_keys_;
            // Beside it a score is nothing, and a row that sees nothing is finite.
            for (Index j = 0; j < a_.keys; ++j) to[j] = seen[j] ? 0.0f : kVeryNegative;
            for (Index j = a_.keys; j < all_keys_; ++j) to[j] = -std::numeric_limits<float>::infinity();
        }
    }

    void gather(const Heads& m, Index rows, Index all, char* to, bool of_queries) const {
        const Index bytes = a_.dim * kSize;
        for (Index i = 0; i < rows; ++i) {
            const char* const from = of_queries ? query_row(m, i) : row(m, batch_, key_head_, i);
            k_.convert(from, m.type, a_.dim, to + i * bytes, Type::bfloat16, a_.dim);
        }
        std::memset(to + rows * bytes, 0, static_cast<std::size_t>((all - rows) * bytes));
    }

    // Rows of keys or values as panels [d, 64].
    void over(const char* rows, char* panels) const {
        for (Index first = 0; first < all_keys_; first += kPanel) {
            k_.pack_transposed(rows + first * a_.dim * kSize, a_.dim, a_.dim, Type::bfloat16,
                               panels + first * a_.dim * kSize);
        }
    }

    // Rows as panels [all, 64], one for 64 columns.
    void down(const char* rows, Index all, char* panels) const {
        for (Index c = 0; c < a_.dim; c += kPanel) {
            k_.pack(rows + c * kSize, a_.dim, all, Type::bfloat16, panels + c * all * kSize);
        }
    }

    // c [64, keys] = 64 rows times the keys' or values' panels.
    void across(const char* rows, const char* panels, float* c) const {
        for (Index first = 0; first < all_keys_; first += kPanel) {
            a_.machine.products.bfloat16(kRowBlock, kPanel, a_.dim, a_.dim, kPanel, all_keys_, false, rows,
                                 panels + first * a_.dim * kSize, c + first, true);
        }
    }

    // 64 rows [depth] times panels [depth, 64], a column panel after the other; `count` rows of the result go to to(i).
    template <class To>
    void product(const char* rows, Index stride, Index depth, const char* panels, Index count, const To& to,
                 Type type) const {
        for (Index c = 0; c < a_.dim; c += kPanel) {
            a_.machine.products.bfloat16(kRowBlock, kPanel, depth, stride, kPanel, kPanel, false, rows,
                                 panels + c * depth * kSize, b_.c, true);
            for (Index i = 0; i < count; ++i) {
                k_.convert(b_.c + i * kPanel, Type::float32, kPanel, to(i) + c * size_of(type), type, kPanel);
            }
        }
    }

    // The rows of [64, keys] from `count` on.
    void clear(char* block, Index count) const {
        const Index bytes = all_keys_ * kSize;
        std::memset(block + count * bytes, 0, static_cast<std::size_t>((kRowBlock - count) * bytes));
    }

    const Attention& a_;
    const Buffers& b_;
    const RowKernels& k_;
    const Index batch_, key_head_, group_, rows_, all_rows_, all_keys_, across_stride_;
};

template <class Run>
void each_item(const Attention& a, bool backward, const Run& run) {
    const Index rows = padded(a.heads / a.key_heads * a.queries), keys = padded(a.keys), dim = a.dim;
    std::vector<Buffers> buffers(static_cast<std::size_t>(a.machine.threads));
    const Scratch scratch([&](Scratch& s) {
        const auto halves = [&](Index count, bool needed) { return s.take<char>(needed ? count * kSize : 0); };
        for (Buffers& b : buffers) {
            b.q = halves(rows * dim, true);
            b.k = halves(keys * dim, true);
            b.v = halves(keys * dim, true);
            b.d_out = halves(rows * dim, backward);
            b.k_across = halves(keys * dim, true);
            b.v_across = halves(keys * dim, backward);
            b.q_down = halves(rows * dim, backward);
            b.k_down = halves(keys * dim, backward);
            b.v_down = halves(keys * dim, !backward);
            b.d_out_down = halves(rows * dim, backward);
            b.p = halves(kRowBlock * keys, true);
            b.ds = halves(kRowBlock * keys, backward);
            b.p_across = halves(keys * (rows + kSkew), backward);
            b.ds_across = halves(keys * (rows + kSkew), backward);
            b.s = s.take<float>(kRowBlock * keys);
            b.dp = s.take<float>(backward ? kRowBlock * keys : 0);
            b.c = s.take<float>(kRowBlock * kPanel);
            b.mask = s.take<float>(a.queries * keys);
        }
    });
    for_each(a.batch * a.key_heads, a.machine.threads, [&](int worker, Index item) { run(Item(a, buffers[worker], item)); });
}

}  // namespace

void attention_forward(const Attention& a) {
    each_item(a, false, [](const Item& item) { item.forward(); });
}

void attention_backward(const Attention& a) {
    each_item(a, true, [](const Item& item) { item.backward(); });
}

}  // namespace fastppo
