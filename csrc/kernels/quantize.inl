// Activations to integers.
#pragma once

#include "kernels/activations.h"
#include "kernels/math.inl"

namespace lowbit {
namespace {

// Codes of two digits: v = 128 q0 + q1.
LOWBIT_INLINE void store_digits(I code, std::int8_t* const (&q)[2], std::int64_t at, I (&sums)[2]) {
    const I high = Simd::shift_right(Simd::add(code, Simd::all(64)), 7);
    const I low = Simd::subtract(code, Simd::shift_left(high, 7));
    Simd::store_bytes(q[0] + at, high);
    Simd::store_bytes(q[1] + at, low);
    sums[0] = Simd::add(sums[0], high);
    sums[1] = Simd::add(sums[1], low);
}

constexpr float kReach = 16256;  // the largest code of two digits

// What rounding left of a segment, in two digits of its own; the sum of it.
LOWBIT_INLINE float store_remainder(const float* x, int count, const Activations& out, std::int64_t at, std::int64_t index, float scale) {
    const F inverse = Simd::all(1.0f / scale), bound = Simd::all(kReach), minus_bound = Simd::all(-kReach);
    const float finer = scale / (2 * kReach);  // at most half a step is left
    I sums[2] = {Simd::all(0), Simd::all(0)};
    for (int i = 0; i < out.segment; i += kTile) {
        const F v = Simd::multiply(count > i ? Simd::load_some(x + i, count - i) : Simd::zero(), inverse);
        const F code = Simd::to_float(Simd::to_int(Simd::max(Simd::min(v, bound), minus_bound)));
        const F left = Simd::multiply(Simd::fma(code, Simd::all(-1.0f), v), Simd::all(2 * kReach));
        store_digits(Simd::to_int(Simd::max(Simd::min(left, bound), minus_bound)), out.remainder, at + i, sums);
    }
    std::int32_t total = 0;
    for (int digit = 0; digit < 2; ++digit) {
        const std::int32_t sum = Simd::sum(sums[digit]);
        out.remainder_start[digit][index] = -out.zero * sum;
        total = total * 128 + sum;
    }
    out.remainder_scale[index] = finer;
    return finer * static_cast<float>(total);
}

// One digit: q = round(x / s) with s = max |x| / 127. Two: v = round(x / s) with s = max |x| / 16256 and
// v = 128 q0 + q1, q0 in [-127, 127] and q1 in [-64, 63].
void quantize(const float* x, int k, const Activations& out, int row, float static_scale, bool per_token) {
    const bool two = out.digits == 2;
    const float reach = two ? kReach : 127.0f;
    float scale = static_scale > 0 ? static_scale : 0;
    if (per_token && !(static_scale > 0)) scale = largest_magnitude(x, k) / reach;
    F nothing = Simd::zero();  // or NaN: comparisons lose it, and integers have none
    bool has_remainder = false;
    for (int s = 0; s < out.segments; ++s) {
        const int start = s * out.segment, count = least(out.segment, k - start);
        const std::int64_t at = std::int64_t{row} * out.padded_cols + start, index = std::int64_t{row} * out.segments + s;
        if (!per_token && !(static_scale > 0)) scale = count > 0 ? largest_magnitude(x + start, count) / reach : 0;
        // A scale so small that its inverse overflows belongs to values that count for nothing in any sum.
        const F inverse = Simd::all(scale > 1e-37f ? 1.0f / scale : 0.0f);
        // A scale found elsewhere clips, and what it clips uses all codes.
        const F bound = Simd::all(reach), minus_bound = Simd::all(static_scale > 0 && !two ? -128.0f : -reach);
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
                store_digits(code, out.q, at + i, sums);
                loss.see(v, Simd::abs(steps));
            } else {
                Simd::store_bytes(out.q[0] + at + i, code);
                sums[0] = Simd::add(sums[0], code);
            }
        }
        out.scale[index] = scale;
        std::int32_t total = 0;
        for (int digit = 0; digit < out.digits; ++digit) {
            const std::int32_t sum = Simd::sum(sums[digit]);
            out.start[digit][index] = -out.zero * sum;
            total = total * 128 + sum;
        }
        out.total[index] = scale * static_cast<float>(total);
        if (!two) continue;
        out.remainder_scale[index] = 0;
        if (scale > 1e-30f && scale < 1e30f && !(static_scale > 0) && loss.matters()) {
            out.total[index] += store_remainder(x + start, count, out, at, index, scale);
            has_remainder = true;
        }
    }
    if (two) out.has_remainder[row] = has_remainder;
    const float finite = Simd::sum(nothing);
    if (finite != 0) out.scale[std::int64_t{row} * out.segments] = finite;
}

}  // namespace
}  // namespace lowbit
