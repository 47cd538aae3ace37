// Everything along one row: quantizing activations, norms, gates.
#include <math.h>  // sqrtf of C: an inline function of C++ could be shared with files that have fewer instructions

#include "kernels/linear.h"

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

F gated(Gate gate, F a, F b) {
    switch (gate) {
        case Gate::silu:
            a = Simd::multiply(a, sigmoid(a));
            break;
        case Gate::gelu_tanh: {
            const F cubic = Simd::fma(Simd::multiply(Simd::multiply(a, a), a), Simd::all(0.044715f), a);
            const F t = hyperbolic_tangent(Simd::multiply(cubic, Simd::all(0.7978845608f)));
            a = Simd::multiply(Simd::multiply(a, Simd::all(0.5f)), Simd::add(t, Simd::all(1.0f)));
            break;
        }
        case Gate::gelu: {
            const F e = error_function(Simd::multiply(a, Simd::all(0.7071067812f)));
            a = Simd::multiply(Simd::multiply(a, Simd::all(0.5f)), Simd::add(e, Simd::all(1.0f)));
            break;
        }
        case Gate::none:
            break;
    }
    return Simd::multiply(a, b);
}

void gate(Gate kind, float* a, const float* b, int n) {
    for (int i = 0; i < n; i += kTile) {
        const F v = gated(kind, Simd::load_some(a + i, n - i), Simd::load_some(b + i, n - i));
        Simd::store_some(a + i, v, n - i);
    }
}

void rms_norm(const float* x, const float* weight, int k, float epsilon, float* y) {
    F squares = Simd::zero();
    for (int i = 0; i < k; i += kTile) {
        const F v = Simd::load_some(x + i, k - i);
        squares = Simd::fma(v, v, squares);
    }
    const float inverse = 1.0f / sqrtf(Simd::sum(squares) / static_cast<float>(k) + epsilon);
    for (int i = 0; i < k; i += kTile) {
        const F v = Simd::multiply(Simd::load_some(x + i, k - i), Simd::all(inverse));
        Simd::store_some(y + i, Simd::multiply(v, Simd::load_some(weight + i, k - i)), k - i);
    }
}

void rotate(float* head, const float* angles, int half) {
    for (int i = 0; i < half; i += kTile) {
        const int n = half - i;
        const F a = Simd::load_some(head + i, n), b = Simd::load_some(head + half + i, n);
        const F cosine = Simd::load_some(angles + i, n), sine = Simd::load_some(angles + half + i, n);
        const F minus_sine = Simd::multiply(sine, Simd::all(-1.0f));
        Simd::store_some(head + i, Simd::fma(a, cosine, Simd::multiply(b, minus_sine)), n);
        Simd::store_some(head + half + i, Simd::fma(b, cosine, Simd::multiply(a, sine)), n);
    }
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

// Codes of two planes: v = 128 q0 + q1.
LOWBIT_INLINE void store_planes(I code, std::int8_t* const (&q)[2], std::int64_t at, I (&sums)[2]) {
    const I high = Simd::shift_right(Simd::add(code, Simd::all(64)), 7);
    const I low = Simd::subtract(code, Simd::shift_left(high, 7));
    Simd::store_bytes(q[0] + at, high);
    Simd::store_bytes(q[1] + at, low);
    sums[0] = Simd::add(sums[0], high);
    sums[1] = Simd::add(sums[1], low);
}

constexpr float kReach = 16256;  // the largest code of two planes

// What rounding left of a segment, in two planes of its own; the sum of it.
LOWBIT_INLINE float store_rest(const float* x, int count, const Rows& out, std::int64_t at, std::int64_t index, float scale) {
    const F inverse = Simd::all(1.0f / scale), bound = Simd::all(kReach), minus_bound = Simd::all(-kReach);
    const float finer = scale / (2 * kReach);  // at most half a step is left
    I sums[2] = {Simd::all(0), Simd::all(0)};
    for (int i = 0; i < out.segment; i += kTile) {
        const F v = Simd::multiply(count > i ? Simd::load_some(x + i, count - i) : Simd::zero(), inverse);
        const F code = Simd::to_float(Simd::to_int(Simd::max(Simd::min(v, bound), minus_bound)));
        const F left = Simd::multiply(Simd::fma(code, Simd::all(-1.0f), v), Simd::all(2 * kReach));
        store_planes(Simd::to_int(Simd::max(Simd::min(left, bound), minus_bound)), out.rest, at + i, sums);
    }
    std::int32_t total = 0;
    for (int plane = 0; plane < 2; ++plane) {
        const std::int32_t sum = Simd::sum(sums[plane]);
        out.rest_start[plane][index] = -out.zero * sum;
        total = total * 128 + sum;
    }
    out.rest_scale[index] = finer;
    return finer * static_cast<float>(total);
}

// One plane: q = round(x / s) with s = max |x| / 127. Two: v = round(x / s) with s = max |x| / 16256 and
// v = 128 q0 + q1, q0 in [-127, 127] and q1 in [-64, 63].
void quantize(const float* x, int k, const Rows& out, int row, float fixed, bool whole) {
    const bool two = out.planes == 2;
    const float reach = two ? kReach : 127.0f;
    float scale = fixed > 0 ? fixed : 0;
    if (whole && !(fixed > 0)) scale = largest_magnitude(x, k) / reach;
    F nothing = Simd::zero();  // or NaN: comparisons lose it, and integers have none
    bool spread = false;
    for (int s = 0; s < out.segments; ++s) {
        const int start = s * out.segment, count = least(out.segment, k - start);
        const std::int64_t at = std::int64_t{row} * out.padded_cols + start, index = std::int64_t{row} * out.segments + s;
        if (!whole && !(fixed > 0)) scale = count > 0 ? largest_magnitude(x + start, count) / reach : 0;
        // A scale so small that its inverse overflows belongs to values that are nothing beside any others.
        const F inverse = Simd::all(scale > 1e-37f ? 1.0f / scale : 0.0f);
        // A scale found elsewhere clips, and what it clips uses all codes.
        const F bound = Simd::all(reach), minus_bound = Simd::all(fixed > 0 && !two ? -128.0f : -reach);
        I sums[2] = {Simd::all(0), Simd::all(0)};
        Loss loss(64, 2, 4);
        for (int i = 0; i < out.segment; i += kTile) {
            const F v = count - i >= kTile ? Simd::load(x + start + i)
                        : count - i > 0    ? Simd::load_some(x + start + i, count - i)
                                           : Simd::zero();
            nothing = Simd::fma(v, Simd::zero(), nothing);
            const F steps = Simd::max(Simd::min(Simd::multiply(v, inverse), bound), minus_bound);
            const I code = Simd::to_int(steps);
            if (two) {
                store_planes(code, out.q, at + i, sums);
                loss.see(v, Simd::abs(steps));
            } else {
                Simd::store_bytes(out.q[0] + at + i, code);
                sums[0] = Simd::add(sums[0], code);
            }
        }
        out.scale[index] = scale;
        std::int32_t total = 0;
        for (int plane = 0; plane < out.planes; ++plane) {
            const std::int32_t sum = Simd::sum(sums[plane]);
            out.start[plane][index] = -out.zero * sum;
            total = total * 128 + sum;
        }
        out.total[index] = scale * static_cast<float>(total);
        if (!two) continue;
        out.rest_scale[index] = 0;
        if (scale > 1e-30f && scale < 1e30f && !(fixed > 0) && loss.matters()) {
            out.total[index] += store_rest(x + start, count, out, at, index, scale);
            spread = true;
        }
    }
    if (two) out.spread[row] = spread;
    const float finite = Simd::sum(nothing);
    if (finite != 0) out.scale[std::int64_t{row} * out.segments] = finite;
}

}  // namespace
}  // namespace lowbit
