// GAE over one sequence, backwards in blocks of one vector:
//
//     delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        return_t = A_t + V_t
//
// Bytes: 16 a float32 token, and no less: rewards and values are read once, advantages and returns written once, past
// the cache where they would not stay in it (`stream`). mask and dones add 1 each. A copy of two such arrays moves as
// many. FLOPs: 2 log2 W + 6 a token for vectors of W, 14 in AVX-512: 0.2 ns a token on a Zen 4 core, less than the
// memory takes for the bytes.
//
// The recursion is serial, but with a constant q = gamma lam a block of W tokens is a prefix sum in log2 W steps,
//
//     a_t += q^s a_{t+s}       s = 1, 2, 4, … W/2           (tokens beyond the block count as 0)
//     A_t  = a_t + q^(W-t) A_W                              (A_W: the block after this one)
//
// so that only the last line, one multiply-add a block, waits for the block after. Nothing is transposed, one row is as
// fast as many, and the order of the sums depends on where the sequence lies, not on the threads: the same bits for any
// number of them.
//
// Padding is squeezed out of the block in registers, the packed tokens are scanned (n of them: the last line has
// q^(n-t)), and the results are spread back; blocks of padding alone are only zeroed. What padding holds is never used
// in arithmetic. A done token stops the sum: step s adds only where none of the tokens t … t+s-1 is done, and those bits
// double along with s.
//
// Blocks start at multiples of W in the outputs, so whole blocks are whole cache lines; what is left over at either end
// of a sequence is a block of n < W tokens.
//
// Included once by each instruction set's file, which supplies the vector type. All of it has internal linkage: code
// compiled for a newer machine must never be what the linker picks for an older one.
#pragma once

#include <cstdint>
#include <limits>

#include "gae/gae.h"

namespace fastppo {
namespace {

#define FASTPPO_INLINE inline __attribute__((always_inline))  // or the carry goes through memory, as slow as the sum

// V supplies: T, W, Vec; load, load_first, store, store_first, stream, fence; set1, first, spread (lane 0 to all), add,
// sub, fma, fma_where; next<s> (lane i takes lane i + s, 0 beyond the end), next_or (next<1>, then lane 0 of the second
// vector), insert (lane 0 of the second vector into the lane given); pack, unpack; bits, pack_bits, count.
template <class V, bool kMask, bool kDone>
class Scan {
    using T = typename V::T;
    using Vec = typename V::Vec;
    using Bits = std::uint32_t;  // bit i belongs to lane i
    static constexpr int W = V::W;
    static constexpr double kLeastNormal = std::numeric_limits<T>::min();
    static constexpr Bits kAll = static_cast<Bits>((std::uint64_t{1} << W) - 1);

    struct Carry {  // of the real token after the block; lane 0 counts
        Vec value, advantage;
        Vec poison;  // 0 times every advantage, summed: stays 0 as long as they are finite
    };

public:
    Scan(const GaeArgs<T>& args, bool stream) : args_(args), stream_(stream), gamma_(V::set1(T(args.gamma))) {
        double power = 1.0;
        for (int k = 1; k <= W; ++k) {
            power *= args.gamma * args.lam;
            // A subnormal factor would slow every multiplication by it and contribute nothing.
            powers_[W - k] = power < kLeastNormal ? T(0) : T(power);
            powers_[W + k - 1] = T(0);
        }
    }

    // False if the advantage of a real token is not finite.
    bool sequence(std::int64_t s) const {
        const std::int64_t begin = args_.offsets[s];
        std::int64_t t = args_.offsets[s + 1];
        const Vec zero = V::set1(T(0));
        Carry carry{args_.bootstrap ? V::set1(args_.bootstrap[s]) : zero, zero, zero};
        const int ragged = int(t % W);
        if (ragged != 0 && t - ragged >= begin) block<false>(t -= ragged, ragged, carry);
        for (; t - W >= begin; t -= W) block<true>(t - W, W, carry);
        if (t > begin) block<false>(begin, int(t - begin), carry);
        // Unless a done token cuts it off, what is not finite spreads to the first token.
        return V::all_zero(kDone ? carry.poison : V::fma(V::spread(carry.advantage), zero, zero));
    }

private:
    // Tokens [at, at + n); n == W where kWhole.
    template <bool kWhole>
    FASTPPO_INLINE void block(std::int64_t at, int n, Carry& carry) const {
        const Bits inside = kWhole ? kAll : (Bits{1} << n) - 1;
        const Bits real = kMask ? V::bits(args_.mask + at, n) : inside;
        if (kMask && real == 0) return write<kWhole>(at, n, V::set1(T(0)), V::set1(T(0)));
        const Vec rewards = kWhole ? V::load(args_.rewards + at) : V::load_first(args_.rewards + at, n);
        const Vec values = kWhole ? V::load(args_.values + at) : V::load_first(args_.values + at, n);
        const Bits dones = kDone ? V::bits(args_.dones + at, n) : 0;
        if (kMask && real != inside) {
            const Vec packed = V::pack(values, real);
            scan<false>(V::pack(rewards, real), packed, V::pack_bits(dones, real), V::count(real), carry);
            const Vec returns = V::add(carry.advantage, packed);
            return write<kWhole>(at, n, V::unpack(carry.advantage, real), V::unpack(returns, real));
        }
        scan<kWhole>(rewards, values, dones, n, carry);
        write<kWhole>(at, n, carry.advantage, V::add(carry.advantage, values));
    }

    // From the first n lanes of rewards, values and dones (0 in the others) to the n advantages, which are the new carry.
    template <bool kWhole>
    FASTPPO_INLINE void scan(Vec rewards, Vec values, Bits dones, int n, Carry& carry) const {
        Bits flows = ~dones;  // the lanes into which something flows back; beyond the block, always
        const Vec after = kWhole ? V::next_or(values, carry.value) : V::insert(V::template next<1>(values), n - 1, carry.value);
        const Vec sum = kDone ? V::fma_where(flows, gamma_, after, rewards) : V::fma(gamma_, after, rewards);
        Vec a = V::sub(sum, values);
        prefix<1>(a, flows);
        const Vec weights = V::load(powers_ + (kWhole ? 0 : W - n));
        const Vec advantage = V::spread(carry.advantage);
        carry.value = values;
        carry.advantage = kDone ? V::fma_where(flows, weights, advantage, a) : V::fma(weights, advantage, a);
        if (kDone) carry.poison = V::fma(carry.advantage, V::set1(T(0)), carry.poison);
    }

    template <int kStep>
    FASTPPO_INLINE void prefix(Vec& a, Bits& flows) const {
        if constexpr (kStep < W) {
            const Vec power = V::set1(powers_[W - kStep]);
            const Vec next = V::template next<kStep>(a);
            a = kDone ? V::fma_where(flows, power, next, a) : V::fma(power, next, a);
            if (kDone) flows &= flows >> kStep;  // the bits above the block are set, and enough of them
            prefix<2 * kStep>(a, flows);
        }
    }

    template <bool kWhole>
    FASTPPO_INLINE void write(std::int64_t at, int n, Vec advantages, Vec returns) const {
        if (!kWhole) {
            V::store_first(args_.advantages + at, advantages, n);
            V::store_first(args_.returns + at, returns, n);
        } else if (stream_) {
            V::stream(args_.advantages + at, advantages);
            V::stream(args_.returns + at, returns);
        } else {
            V::store(args_.advantages + at, advantages);
            V::store(args_.returns + at, returns);
        }
    }

    const GaeArgs<T> args_;
    const bool stream_;
    const Vec gamma_;
    T powers_[2 * W];  // q^W … q^1, then W zeros: the weights of n lanes start at W - n
};

template <class V, bool kMask, bool kDone>
bool scan_sequences(const GaeArgs<typename V::T>& args, std::int64_t begin, std::int64_t end, bool stream) {
    const Scan<V, kMask, kDone> scan(args, stream);
    bool finite = true;
    for (std::int64_t s = end; s-- > begin;) finite &= scan.sequence(s);
    V::fence();
    return finite;
}

template <class V>
bool scan_sequences(const GaeArgs<typename V::T>& args, std::int64_t begin, std::int64_t end, bool stream) {
    if (args.mask && args.dones) return scan_sequences<V, true, true>(args, begin, end, stream);
    if (args.mask) return scan_sequences<V, true, false>(args, begin, end, stream);
    if (args.dones) return scan_sequences<V, false, true>(args, begin, end, stream);
    return scan_sequences<V, false, false>(args, begin, end, stream);
}

}  // namespace
}  // namespace fastppo
