// Products of rows of activations and tiles of a weight, and what is done to a sum before it is stored.
#pragma once

#include "kernels/gates.inl"
#include "kernels/kernels.h"
#include "kernels/sums.inl"

namespace lowbit {
namespace {

template <int kM, int kT>
LOWBIT_INLINE void finish(const PackedWeight& w, const Epilogue& e, int m0, int t0, F (&sums)[kM][kT], float* y,
                          std::int64_t stride) {
    if (w.paired) {
        if constexpr (kT == 2) {
            const int column = t0 / 2 * kTile, left = w.rows / 2 - column;
            for (int m = 0; m < kM; ++m) {
                F first = sums[m][0], second = sums[m][1];
                if (e.bias != nullptr) {
                    first = Simd::add(first, Simd::load(e.bias + t0 * kTile));
                    second = Simd::add(second, Simd::load(e.bias + (t0 + 1) * kTile));
                }
                Simd::store_some(y + (m0 + m) * stride + column, gated(e.gate, first, second), left);
            }
        }
        return;
    }
    for (int m = 0; m < kM; ++m) {
        for (int t = 0; t < kT; ++t) {
            const int column = (t0 + t) * kTile, left = w.rows - column;
            const std::int64_t at = (m0 + m) * stride + column;
            F v = sums[m][t];
            if (e.bias != nullptr) v = Simd::add(v, Simd::load(e.bias + column));
            if (e.addend != nullptr) v = Simd::add(v, Simd::load_some(e.addend + at, left));
            Simd::store_some(y + at, v, left);
        }
    }
}

template <Code code, int kDigits, int kM, int kT>
void product(const PackedWeight& w, const Activations& x, int m0, int t0, bool first, const Epilogue& e, float* y, std::int64_t stride) {
    F sums[kM][kT];
    if constexpr (is_float(code)) {
        float_block<code, kM, kT>(w, x, m0, t0, sums);
    } else if (w.segment == 32 && !w.wide_scale && !w.minimum && w.groups() > 1 && w.zero == x.zero) {
        block<code, kDigits, kM, kT, 32, true>(w, x, m0, t0, first, sums);
    } else if (w.segment == 32) {
        block<code, kDigits, kM, kT, 32, false>(w, x, m0, t0, first, sums);
    } else {
        block<code, kDigits, kM, kT, 0, false>(w, x, m0, t0, first, sums);
    }
    if constexpr (kDigits == 2) {
        for (int m = 0; m < kM; ++m) {
            if (!x.has_remainder[m0 + m]) continue;
            F more[kT];
            remainder_sums<code, kT>(w, x, m0 + m, t0, more);
            for (int t = 0; t < kT; ++t) sums[m][t] = Simd::add(sums[m][t], more[t]);
        }
    }
    finish<kM, kT>(w, e, m0, t0, sums, y, stride);
}

// Tiles outside, rows inside: a pair of tiles stays in the nearest cache while all rows pass it.
template <Code code, int kDigits>
void all_products(const PackedWeight& w, const Activations& x, int m0, int m1, int t0, int t1, const Epilogue& e, float* y,
                  std::int64_t stride) {
    constexpr int kM = Simd::kRows / kDigits > 0 ? Simd::kRows / kDigits : 1, kT = Simd::kTiles;
    constexpr int kPair = 2, kPairM = kT == 2 ? kM : 1;
    int t = t0;
    const int two = w.paired ? 2 : kT;
    if (two == 2) {
        for (; t + kPair <= t1; t += kPair) {
            int m = m0;
            for (; m + kPairM <= m1; m += kPairM) product<code, kDigits, kPairM, kPair>(w, x, m, t, m == m0, e, y, stride);
            if constexpr (kPairM > 4) {
                if (m + 4 <= m1) product<code, kDigits, 4, kPair>(w, x, m, t, m == m0, e, y, stride), m += 4;
            }
            if constexpr (kPairM > 2) {
                if (m + 2 <= m1) product<code, kDigits, 2, kPair>(w, x, m, t, m == m0, e, y, stride), m += 2;
            }
            for (; m < m1; ++m) product<code, kDigits, 1, kPair>(w, x, m, t, m == m0, e, y, stride);
        }
    }
    for (; t < t1; ++t) {
        int m = m0;
        for (; m + kM <= m1; m += kM) product<code, kDigits, kM, 1>(w, x, m, t, m == m0, e, y, stride);
        for (; m < m1; ++m) product<code, kDigits, 1, 1>(w, x, m, t, m == m0, e, y, stride);
    }
}

void linear(const PackedWeight& w, const Activations& x, int m0, int m1, int t0, int t1, const Epilogue& e, float* y,
            std::int64_t stride) {
    const bool two = x.digits == 2;
    switch (w.code) {
        case Code::u4:
            return (two ? all_products<Code::u4, 2> : all_products<Code::u4, 1>)(w, x, m0, m1, t0, t1, e, y, stride);
        case Code::table4:
            return (two ? all_products<Code::table4, 2> : all_products<Code::table4, 1>)(w, x, m0, m1, t0, t1, e, y,
                                                                                         stride);
        case Code::u8:
            return (two ? all_products<Code::u8, 2> : all_products<Code::u8, 1>)(w, x, m0, m1, t0, t1, e, y, stride);
        case Code::f16:
            return all_products<Code::f16, 1>(w, x, m0, m1, t0, t1, e, y, stride);
        case Code::bf16:
            return all_products<Code::bf16, 1>(w, x, m0, m1, t0, t1, e, y, stride);
        case Code::f32:
            return all_products<Code::f32, 1>(w, x, m0, m1, t0, t1, e, y, stride);
    }
}

// Row `row` of the weight as float32 [cols].
void unpack_row(const PackedWeight& w, int row, float* out) {
    const int lane = row % kTile;
    const std::uint8_t* p = w.tile(row / kTile);
    if (is_float(w.code)) {
        float lanes[kTile];
        const int bytes = w.code == Code::f32 ? 64 : 32;
        for (int k = 0; k < w.cols; ++k, p += bytes) {
            Simd::store(lanes, w.code == Code::f16    ? float_weights<Code::f16>(p)
                               : w.code == Code::bf16 ? float_weights<Code::bf16>(p)
                                                      : float_weights<Code::f32>(p));
            out[k] = lanes[lane];
        }
        return;
    }
    const int per_line = w.code == Code::u8 ? 4 : 8, tile = row / kTile;
    for (int g = 0; g < w.groups(); ++g, p += w.group / per_line * 64) {
        float scales[kTile], minima[kTile] = {};
        Simd::store(scales, load_scale(w.scales(tile) + g * w.scale_bytes(), w.wide_scale));
        if (w.minimum) Simd::store(minima, load_scale(w.minima(tile) + g * w.scale_bytes(), w.wide_scale));
        for (int k = 0; k < w.group && g * w.group + k < w.cols; ++k) {
            const std::uint8_t byte = p[k / per_line * 64 + lane * 4 + k % 4];
            int code = byte;
            if (per_line == 8) code = k % 8 < 4 ? byte & 15 : byte >> 4;
            if (w.code == Code::table4) code = w.table[code];
            out[g * w.group + k] = scales[lane] * static_cast<float>(code - w.zero) + minima[lane];
        }
    }
}

}  // namespace
}  // namespace lowbit
