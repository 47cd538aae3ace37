// Sums of a few rows of activations times a few tiles of a weight, in registers.
#pragma once

#include "kernels/activations.h"
#include "kernels/lines.inl"

namespace lowbit {
namespace {

// Sums of `kM` rows from `m0` and `kT` tiles from `t0`:
//
//   y[m, n] = sum over segments  scale_x[m, s] scale_w[n, g] (sum_k q_x q_w - zero sum_k q_x) + minimum[n, g] total_x[m, s]
//
// The integer sums are exact; what is rounded is the float32 sum over segments.
//
// first: of the blocks that these tiles are for, so that they come from afar, and the next ones are asked for.
// kSegment: columns of a segment where they are known, so that nothing is counted while running; else 0. kHalves: scales of
// groups in float16, no minima, and the zero that the rows were made for: the most frequent case.
template <Code code, int kDigits, int kM, int kT, int kSegment, bool kHalves>
LOWBIT_INLINE void block(const PackedWeight& w, const Activations& x, int m0, int t0, bool first, F (&y)[kM][kT]) {
    using L = Line<code>;
    const int segment = kSegment > 0 ? kSegment : w.segment;
    const int lines = segment / (4 * L::kQuads), segments = x.segments, scale_bytes = w.scale_bytes();
    const int segments_in_group = w.group / segment;
    const bool one_group = !kHalves && w.groups() == 1 && !w.minimum, wide = !kHalves && w.wide_scale;
    const bool same_zero = kHalves || w.zero == x.zero;
    B table{};
    if constexpr (code == Code::table4) table = Simd::load_table(w.table);

    const std::uint8_t* p[kT];
    for (int t = 0; t < kT; ++t) p[t] = w.tile(t0 + t);
    const std::int8_t* q[kDigits];
    for (int digit = 0; digit < kDigits; ++digit) q[digit] = x.q[digit] + std::int64_t{m0} * x.padded_cols;
    const float* scale_x = x.scale + std::int64_t{m0} * segments;
    for (int m = 0; m < kM; ++m)
        for (int t = 0; t < kT; ++t) y[m][t] = Simd::zero();

    Ahead ahead(w, t0, kT, segments);
    std::int64_t scale_at = 0;
    for (int s = 0, in_group = 0; s < segments; ++s) {
        if (kM == 1 || first) ahead.step();
        I sum[kDigits][kM][kT];
        for (int digit = 0; digit < kDigits; ++digit) {
            const std::int32_t* begin = x.start[digit] + std::int64_t{m0} * segments + s;
            for (int m = 0; m < kM; ++m) {
                const std::int32_t seed = begin[m * segments];
                const I start = Simd::all(same_zero ? seed : seed / x.zero * w.zero);
                for (int t = 0; t < kT; ++t) sum[digit][m][t] = start;
            }
        }
#pragma GCC unroll 8
        for (int line = 0; line < lines; ++line) {
            B codes[kT][L::kQuads];
            for (int t = 0; t < kT; ++t) L::expand(p[t] + line * 64, table, codes[t]);
            for (int quad = 0; quad < L::kQuads; ++quad) {
                for (int digit = 0; digit < kDigits; ++digit) {
                    for (int m = 0; m < kM; ++m) {
                        const B four = Simd::four_bytes(q[digit] + std::int64_t{m} * x.padded_cols + 4 * quad);
                        for (int t = 0; t < kT; ++t) sum[digit][m][t] = L::dot(sum[digit][m][t], codes[t][quad], four);
                    }
                }
            }
            for (int digit = 0; digit < kDigits; ++digit) q[digit] += 4 * L::kQuads;
        }
        for (int t = 0; t < kT; ++t) {
            p[t] += std::int64_t{lines} * 64;
            const F scale = one_group ? Simd::all(1.0f) : load_scale(w.scales(t0 + t) + scale_at, wide);
            for (int m = 0; m < kM; ++m) {
                I whole = sum[0][m][t];
                if constexpr (kDigits == 2) whole = Simd::add(Simd::shift_left(whole, 7), sum[1][m][t]);
                const F factor = Simd::multiply(scale, Simd::all(scale_x[m * segments + s]));
                y[m][t] = Simd::fma(Simd::to_float(whole), factor, y[m][t]);
            }
        }
        if (!kHalves && w.minimum) {
            for (int t = 0; t < kT; ++t) {
                const F minimum = load_scale(w.minima(t0 + t) + scale_at, w.wide_scale);
                for (int m = 0; m < kM; ++m)
                    y[m][t] = Simd::fma(Simd::all(x.total[(m0 + m) * std::int64_t{segments} + s]), minimum, y[m][t]);
            }
        }
        if (++in_group == segments_in_group) {
            in_group = 0;
            scale_at += scale_bytes;
        }
    }
    if (one_group) {
        for (int t = 0; t < kT; ++t) {
            const F scale = load_scale(w.scales(t0 + t), w.wide_scale);
            for (int m = 0; m < kM; ++m) y[m][t] = Simd::multiply(y[m][t], scale);
        }
    }
}

// What the rests of row `m` add to the sums of kT tiles from `t0`. On its own, as few rows have any.
template <Code code, int kT>
[[gnu::noinline]] void remainder_sums(const PackedWeight& w, const Activations& x, int m, int t0, F* more) {
    using L = Line<code>;
    const int lines = w.segment / (4 * L::kQuads), segments = x.segments, segments_in_group = w.group / w.segment;
    B table{};
    if constexpr (code == Code::table4) table = Simd::load_table(w.table);
    for (int t = 0; t < kT; ++t) more[t] = Simd::zero();
    for (int s = 0; s < segments; ++s) {
        const std::int64_t index = std::int64_t{m} * segments + s;
        if (x.remainder_scale[index] == 0) continue;
        const F scale_x = Simd::all(x.remainder_scale[index]);
        const std::int8_t* q[2];
        I start[2];
        for (int digit = 0; digit < 2; ++digit) {
            q[digit] = x.remainder[digit] + std::int64_t{m} * x.padded_cols + std::int64_t{s} * w.segment;
            start[digit] = Simd::all(x.remainder_start[digit][index] / x.zero * w.zero);
        }
        for (int t = 0; t < kT; ++t) {
            const std::uint8_t* p = w.tile(t0 + t) + std::int64_t{s} * lines * 64;
            I sum[2] = {start[0], start[1]};
            for (int line = 0; line < lines; ++line) {
                B codes[L::kQuads];
                L::expand(p + line * 64, table, codes);
                for (int quad = 0; quad < L::kQuads; ++quad)
                    for (int digit = 0; digit < 2; ++digit)
                        sum[digit] = L::dot(sum[digit], codes[quad], Simd::four_bytes(q[digit] + 4 * (line * L::kQuads + quad)));
            }
            const I whole = Simd::add(Simd::shift_left(sum[0], 7), sum[1]);
            const F scale = load_scale(w.scales(t0 + t) + std::int64_t{s / segments_in_group} * w.scale_bytes(), w.wide_scale);
            more[t] = Simd::fma(Simd::to_float(whole), Simd::multiply(scale, scale_x), more[t]);
        }
    }
}

template <Code code, int kM, int kT>
LOWBIT_INLINE void float_block(const PackedWeight& w, const Activations& x, int m0, int t0, F (&y)[kM][kT]) {
    constexpr int bytes = code == Code::f32 ? 64 : 32;
    const std::uint8_t* p[kT];
    const float* values[kM];
    for (int t = 0; t < kT; ++t) p[t] = w.tile(t0 + t);
    for (int m = 0; m < kM; ++m) values[m] = x.values + (m0 + m) * x.stride;
    for (int m = 0; m < kM; ++m)
        for (int t = 0; t < kT; ++t) y[m][t] = Simd::zero();
    Ahead ahead(w, t0, kT, (w.cols + 7) / 8);
#pragma GCC unroll 8
    for (int k = 0; k < w.cols; ++k) {
        if constexpr (kM == 1)
            if (k % 8 == 0) ahead.step();
        F weights[kT];
        for (int t = 0; t < kT; ++t) weights[t] = float_weights<code>(p[t] + std::int64_t{k} * bytes);
        for (int m = 0; m < kM; ++m) {
            const F value = Simd::all(values[m][k]);
            for (int t = 0; t < kT; ++t) y[m][t] = Simd::fma(value, weights[t], y[m][t]);
        }
    }
}

}  // namespace
}  // namespace lowbit
