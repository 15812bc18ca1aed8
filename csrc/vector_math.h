// exp, log and tanh of vectors: within 2 ulp on every float, denormals and infinities included (tests/test_cpu.py walks
// all of them). Coefficients: minimax fits (exp, on |r| ≤ ½ ln 2) and Cephes' single-precision series (log, tanh;
// S. L. Moshier, netlib.org/cephes).
#pragma once

#include "simd.h"

namespace fastppo {
namespace {

using F = Simd::F;

// Σ c_k x^k by Horner's rule, highest power first.
template <class... C>
FASTPPO_ALWAYS_INLINE F polynomial(F x, float highest, C... rest) {
    F sum = Simd::set1(highest);
    ((sum = Simd::fma(sum, x, Simd::set1(rest))), ...);
    return sum;
}

// eˣ = 2ⁿ eʳ with n = round(x / ln 2), r = x − n ln 2 (ln 2 in two pieces, the first with trailing zeros).
FASTPPO_ALWAYS_INLINE F exp(F x) {
    // Beyond these eˣ is 0 or infinite, and n stays a number that `scale` can handle. NaN passes through.
    x = Simd::min(Simd::set1(100.0f), Simd::max(Simd::set1(-150.0f), x));
    const F n = Simd::round(Simd::mul(x, Simd::set1(1.44269504f)));
    const F r = Simd::fma(n, Simd::set1(-1.42860677e-6f), Simd::fma(n, Simd::set1(-0.693145752f), x));
    const F p = polynomial(r, 1.38145394e-3f, 8.36874545e-3f, 4.16683890e-2f, 1.66665211e-1f, 4.99999940e-1f, 1.0f, 1.0f);
    return Simd::scale(p, n);
}

// log x = e ln 2 + log m with m in [√½, √2).
FASTPPO_ALWAYS_INLINE F log(F x) {
    const F one = Simd::set1(1.0f), half_root = Simd::set1(1.41421356f);
    F m = Simd::mantissa(x), e = Simd::exponent(x);
    e = Simd::where_less(half_root, m, Simd::add(e, one), e);
    m = Simd::where_less(half_root, m, Simd::mul(m, Simd::set1(0.5f)), m);
    const F f = Simd::sub(m, one), square = Simd::mul(f, f);
    F y = polynomial(f, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                     -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
    y = Simd::mul(Simd::mul(y, f), square);
    y = Simd::fma(e, Simd::set1(-2.12194440e-4f), y);
    y = Simd::fma(square, Simd::set1(-0.5f), y);
    y = Simd::fma(e, Simd::set1(0.693359375f), Simd::add(f, y));
    y = Simd::where_less(x, Simd::set1(kInfinity), y, x);  // infinity and NaN stay what they are
    const F below = Simd::where_less(x, Simd::set1(0.0f), Simd::set1(kNaN), Simd::set1(-kInfinity));
    return Simd::where_less(x, Simd::set1(std::numeric_limits<float>::denorm_min()), below, y);
}

FASTPPO_ALWAYS_INLINE F tanh(F x) {
    const F magnitude = Simd::min(Simd::set1(10.0f), Simd::abs(x));  // tanh 10 is 1 in float
    const F square = Simd::mul(x, x);
    const F series = polynomial(square, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                                -3.33332819422e-1f);
    const F small = Simd::fma(Simd::mul(series, square), x, x);
    const F e = exp(Simd::add(magnitude, magnitude));
    const F large = Simd::sub(Simd::set1(1.0f), Simd::div(Simd::set1(2.0f), Simd::add(e, Simd::set1(1.0f))));
    return Simd::where_less(magnitude, Simd::set1(0.625f), small, Simd::copy_sign(large, x));
}

}  // namespace
}  // namespace fastppo
