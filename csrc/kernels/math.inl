// Functions of sixteen numbers at once, and of a row.
#pragma once

#include "kernels/simd.h"

namespace lowbit {
namespace {

// e^v by 2^n e^r with |r| <= ln 2 / 2 and a polynomial of degree 6; relative error below 2e-7. Cut at e^-87 and e^88.
LOWBIT_INLINE F exponential(F v) {
    v = Simd::min(Simd::max(v, Simd::all(-87.0f)), Simd::all(88.0f));
    const F n = Simd::nearest(Simd::multiply(v, Simd::all(1.44269504f)));
    F r = Simd::fma(n, Simd::all(-0.693359375f), v);
    r = Simd::fma(n, Simd::all(2.12194440e-4f), r);
    F p = Simd::all(1.0f / 720);
    p = Simd::fma(p, r, Simd::all(1.0f / 120));
    p = Simd::fma(p, r, Simd::all(1.0f / 24));
    p = Simd::fma(p, r, Simd::all(1.0f / 6));
    p = Simd::fma(p, r, Simd::all(0.5f));
    p = Simd::fma(p, r, Simd::all(1.0f));
    p = Simd::fma(p, r, Simd::all(1.0f));
    return Simd::times_power_of_two(p, n);
}

LOWBIT_INLINE F sigmoid(F v) {
    return Simd::divide(Simd::all(1.0f), Simd::add(Simd::all(1.0f), exponential(Simd::multiply(v, Simd::all(-1.0f)))));
}

LOWBIT_INLINE F hyperbolic_tangent(F v) {  // 2 sigmoid(2 v) - 1
    return Simd::fma(Simd::all(2.0f), sigmoid(Simd::multiply(v, Simd::all(2.0f))), Simd::all(-1.0f));
}

// Abramowitz and Stegun 7.1.26, |error| <= 1.5e-7
LOWBIT_INLINE F error_function(F v) {
    const F a = Simd::abs(v);
    const F t = Simd::divide(Simd::all(1.0f), Simd::fma(Simd::all(0.3275911f), a, Simd::all(1.0f)));
    F p = Simd::all(1.061405429f);
    p = Simd::fma(p, t, Simd::all(-1.453152027f));
    p = Simd::fma(p, t, Simd::all(1.421413741f));
    p = Simd::fma(p, t, Simd::all(-0.284496736f));
    p = Simd::fma(p, t, Simd::all(0.254829592f));
    p = Simd::multiply(p, t);
    const F e = exponential(Simd::multiply(Simd::multiply(a, a), Simd::all(-1.0f)));
    const F positive = Simd::fma(Simd::multiply(p, e), Simd::all(-1.0f), Simd::all(1.0f));
    // with the sign of v: positive * v / |v|, and 0 at 0
    return Simd::multiply(positive, Simd::divide(v, Simd::max(a, Simd::all(1e-30f))));
}

LOWBIT_INLINE float largest_magnitude(const float* x, int n) {
    F peak = Simd::zero();
    int i = 0;
    for (; i + kTile <= n; i += kTile) peak = Simd::max(peak, Simd::abs(Simd::load(x + i)));
    if (i < n) peak = Simd::max(peak, Simd::abs(Simd::load_some(x + i, n - i)));
    return Simd::largest(peak);
}

// How much of a vector is lost where integers have to reach its largest element: an element that is not zero counts the
// more the fewer steps are left of it. More than a quarter of the elements small is too much, or a few that are nothing.
class Loss {
 public:
    // small: steps from which on an element is none of those; nothing: the same of those that count `weight` times
    Loss(float small, float nothing, float weight)
        : by_small_(Simd::all(-1 / small)), by_nothing_(Simd::all(-1 / nothing)), weight_(Simd::all(weight)) {}
    // Sixteen elements, and their magnitudes in steps.
    LOWBIT_INLINE_MEMBER void see(F values, F steps) {
        const F one = Simd::all(1.0f), none = Simd::zero();
        const F there = Simd::min(Simd::multiply(Simd::abs(values), Simd::all(1e38f)), one);
        const F small = Simd::max(Simd::fma(steps, by_small_, one), none);
        const F nothing = Simd::max(Simd::fma(steps, by_nothing_, one), none);
        const F counts = Simd::fma(nothing, weight_, Simd::add(small, Simd::all(-0.25f)));
        score_ = Simd::fma(there, counts, score_);
    }
    LOWBIT_INLINE_MEMBER bool matters() const { return Simd::sum(score_) > 0; }

 private:
    F by_small_, by_nothing_, weight_, score_ = Simd::zero();
};

}  // namespace
}  // namespace lowbit
