// exp and tanh of vectors: within 2 ulp on every float, denormals and infinities included (tests/engines/test_cpu.py walks all of
// them). Coefficients: a minimax fit (exp, on |r| ≤ ½ ln 2) and Cephes' single-precision series (tanh; S. L. Moshier,
// netlib.org/cephes).
#pragma once

#include "runtime/simd.h"

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
