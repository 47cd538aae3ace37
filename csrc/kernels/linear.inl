// Products of rows and tiles. Included once for each instruction set, after `Simd`.
#include "kernels/linear.h"

namespace lowbit {
namespace {

using I = Simd::I;
using F = Simd::F;
using B = Simd::B;

LOWBIT_INLINE int least(int a, int b) { return a < b ? a : b; }

// Codes of one 64-byte line, as the unsigned bytes of `kQuads` dot products.
template <Code code>
struct Line;

template <>
struct Line<Code::u4> {
    static constexpr int kQuads = 2;
    LOWBIT_INLINE void expand(const std::uint8_t* p, const B&, B* out) {
        const B bytes = Simd::load_bytes(p);
        out[0] = Simd::low_nibbles(bytes);
        out[1] = Simd::high_nibbles(bytes);
    }
    LOWBIT_INLINE I dot(I sum, const B& w, const B& x) { return Simd::dot_small(sum, w, x); }
};

template <>
struct Line<Code::table4> {
    static constexpr int kQuads = 2;
    LOWBIT_INLINE void expand(const std::uint8_t* p, const B& table, B* out) {
        const B bytes = Simd::load_bytes(p);
        out[0] = Simd::look_up(table, Simd::low_nibbles(bytes));
        out[1] = Simd::look_up(table, Simd::high_nibbles(bytes));
    }
    LOWBIT_INLINE I dot(I sum, const B& w, const B& x) { return Simd::dot(sum, w, x); }
};

template <>
struct Line<Code::u8> {
    static constexpr int kQuads = 1;
    LOWBIT_INLINE void expand(const std::uint8_t* p, const B&, B* out) { out[0] = Simd::load_bytes(p); }
    LOWBIT_INLINE I dot(I sum, const B& w, const B& x) { return Simd::dot(sum, w, x); }
};

LOWBIT_INLINE F load_scale(const std::uint8_t* p, bool wide) {
    return wide ? Simd::load(reinterpret_cast<const float*>(p))
                : Simd::load_f16(reinterpret_cast<const std::uint16_t*>(p));
}

// Fetches the tiles after these, codes and scales alike and in the order of memory, while these are used: one row is as
// fast as memory, and what a processor fetches by itself stops at every page and tile.
class Ahead {
 public:
    // `steps`: times that `step` is called while `tiles` of them are read
    Ahead(const Linear& w, int t0, int tiles, int steps)
        : from_(w.tile(t0 + tiles)), lines_(static_cast<int>((tiles * w.tile_bytes / steps + 63) / 64)) {}
    void step() {
        for (int i = 0; i < lines_; ++i) Simd::prefetch(from_ + i * 64);
        from_ += lines_ * 64;
    }

 private:
    const std::uint8_t* from_;
    int lines_;
};

// Sums of `kM` rows from `m0` and `kT` tiles from `t0`:
//
//   y[m, n] = sum over segments  scale_x[m, s] scale_w[n, g] (sum_k q_x q_w - zero sum_k q_x) + minimum[n, g] total_x[m, s]
//
// The integer sums are exact; what is rounded is the float32 sum over segments.
//
// first: of the blocks that these tiles are for, so that they come from afar, and the next ones are asked for.
// kSegment: columns of a segment where they are known, so that nothing is counted while running; else 0. kHalves: scales of
// groups in float16, no minima, and the zero that the rows were made for: the most frequent case.
template <Code code, int kPlanes, int kM, int kT, int kSegment, bool kHalves>
LOWBIT_INLINE void block(const Linear& w, const Rows& x, int m0, int t0, bool first, F (&y)[kM][kT]) {
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
    const std::int8_t* q[kPlanes];
    for (int plane = 0; plane < kPlanes; ++plane) q[plane] = x.q[plane] + std::int64_t{m0} * x.padded_cols;
    const float* scale_x = x.scale + std::int64_t{m0} * segments;
    for (int m = 0; m < kM; ++m)
        for (int t = 0; t < kT; ++t) y[m][t] = Simd::zero();

    Ahead ahead(w, t0, kT, segments);
    std::int64_t scale_at = 0;
    for (int s = 0, in_group = 0; s < segments; ++s) {
        if (kM == 1 || first) ahead.step();
        I sum[kPlanes][kM][kT];
        for (int plane = 0; plane < kPlanes; ++plane) {
            const std::int32_t* begin = x.start[plane] + std::int64_t{m0} * segments + s;
            for (int m = 0; m < kM; ++m) {
                const std::int32_t seed = begin[m * segments];
                const I start = Simd::all(same_zero ? seed : seed / x.zero * w.zero);
                for (int t = 0; t < kT; ++t) sum[plane][m][t] = start;
            }
        }
#pragma GCC unroll 8
        for (int line = 0; line < lines; ++line) {
            B codes[kT][L::kQuads];
            for (int t = 0; t < kT; ++t) L::expand(p[t] + line * 64, table, codes[t]);
            for (int quad = 0; quad < L::kQuads; ++quad) {
                for (int plane = 0; plane < kPlanes; ++plane) {
                    for (int m = 0; m < kM; ++m) {
                        const B four = Simd::four_bytes(q[plane] + std::int64_t{m} * x.padded_cols + 4 * quad);
                        for (int t = 0; t < kT; ++t) sum[plane][m][t] = L::dot(sum[plane][m][t], codes[t][quad], four);
                    }
                }
            }
            for (int plane = 0; plane < kPlanes; ++plane) q[plane] += 4 * L::kQuads;
        }
        for (int t = 0; t < kT; ++t) {
            p[t] += std::int64_t{lines} * 64;
            const F scale = one_group ? Simd::all(1.0f) : load_scale(w.scales(t0 + t) + scale_at, wide);
            for (int m = 0; m < kM; ++m) {
                I whole = sum[0][m][t];
                if constexpr (kPlanes == 2) whole = Simd::add(Simd::shift_left(whole, 7), sum[1][m][t]);
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
[[gnu::noinline]] void rest_sums(const Linear& w, const Rows& x, int m, int t0, F* more) {
    using L = Line<code>;
    const int lines = w.segment / (4 * L::kQuads), segments = x.segments, segments_in_group = w.group / w.segment;
    B table{};
    if constexpr (code == Code::table4) table = Simd::load_table(w.table);
    for (int t = 0; t < kT; ++t) more[t] = Simd::zero();
    for (int s = 0; s < segments; ++s) {
        const std::int64_t index = std::int64_t{m} * segments + s;
        if (x.rest_scale[index] == 0) continue;
        const F scale_x = Simd::all(x.rest_scale[index]);
        const std::int8_t* q[2];
        I start[2];
        for (int plane = 0; plane < 2; ++plane) {
            q[plane] = x.rest[plane] + std::int64_t{m} * x.padded_cols + std::int64_t{s} * w.segment;
            start[plane] = Simd::all(x.rest_start[plane][index] / x.zero * w.zero);
        }
        for (int t = 0; t < kT; ++t) {
            const std::uint8_t* p = w.tile(t0 + t) + std::int64_t{s} * lines * 64;
            I sum[2] = {start[0], start[1]};
            for (int line = 0; line < lines; ++line) {
                B codes[L::kQuads];
                L::expand(p + line * 64, table, codes);
                for (int quad = 0; quad < L::kQuads; ++quad)
                    for (int plane = 0; plane < 2; ++plane)
                        sum[plane] = L::dot(sum[plane], codes[quad], Simd::four_bytes(q[plane] + 4 * (line * L::kQuads + quad)));
            }
            const I whole = Simd::add(Simd::shift_left(sum[0], 7), sum[1]);
            const F scale = load_scale(w.scales(t0 + t) + std::int64_t{s / segments_in_group} * w.scale_bytes(), w.wide_scale);
            more[t] = Simd::fma(Simd::to_float(whole), Simd::multiply(scale, scale_x), more[t]);
        }
    }
}

template <Code code>
LOWBIT_INLINE F float_weights(const std::uint8_t* p) {
    if constexpr (code == Code::f16) return Simd::load_f16(reinterpret_cast<const std::uint16_t*>(p));
    if constexpr (code == Code::bf16) return Simd::load_bf16(reinterpret_cast<const std::uint16_t*>(p));
    return Simd::load(reinterpret_cast<const float*>(p));
}

template <Code code, int kM, int kT>
LOWBIT_INLINE void float_block(const Linear& w, const Rows& x, int m0, int t0, F (&y)[kM][kT]) {
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

F gated(Gate gate, F a, F b);

template <int kM, int kT>
LOWBIT_INLINE void finish(const Linear& w, const Epilogue& e, int m0, int t0, F (&sums)[kM][kT], float* y,
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
            if (e.residual != nullptr) v = Simd::add(v, Simd::load_some(e.residual + at, left));
            Simd::store_some(y + at, v, left);
        }
    }
}

template <Code code, int kPlanes, int kM, int kT>
void product(const Linear& w, const Rows& x, int m0, int t0, bool first, const Epilogue& e, float* y, std::int64_t stride) {
    F sums[kM][kT];
    if constexpr (is_float(code)) {
        float_block<code, kM, kT>(w, x, m0, t0, sums);
    } else if (w.segment == 32 && !w.wide_scale && !w.minimum && w.groups() > 1 && w.zero == x.zero) {
        block<code, kPlanes, kM, kT, 32, true>(w, x, m0, t0, first, sums);
    } else if (w.segment == 32) {
        block<code, kPlanes, kM, kT, 32, false>(w, x, m0, t0, first, sums);
    } else {
        block<code, kPlanes, kM, kT, 0, false>(w, x, m0, t0, first, sums);
    }
    if constexpr (kPlanes == 2) {
        for (int m = 0; m < kM; ++m) {
            if (!x.spread[m0 + m]) continue;
            F more[kT];
            rest_sums<code, kT>(w, x, m0 + m, t0, more);
            for (int t = 0; t < kT; ++t) sums[m][t] = Simd::add(sums[m][t], more[t]);
        }
    }
    finish<kM, kT>(w, e, m0, t0, sums, y, stride);
}

// Tiles outside, rows inside: a pair of tiles stays in the nearest cache while all rows pass it.
template <Code code, int kPlanes>
void all_products(const Linear& w, const Rows& x, int m0, int m1, int t0, int t1, const Epilogue& e, float* y,
                  std::int64_t stride) {
    constexpr int kM = Simd::kRows / kPlanes > 0 ? Simd::kRows / kPlanes : 1, kT = Simd::kTiles;
    constexpr int kPair = 2, kPairM = kT == 2 ? kM : 1;
    int t = t0;
    const int two = w.paired ? 2 : kT;
    if (two == 2) {
        for (; t + kPair <= t1; t += kPair) {
            int m = m0;
            for (; m + kPairM <= m1; m += kPairM) product<code, kPlanes, kPairM, kPair>(w, x, m, t, m == m0, e, y, stride);
            if constexpr (kPairM > 4) {
                if (m + 4 <= m1) product<code, kPlanes, 4, kPair>(w, x, m, t, m == m0, e, y, stride), m += 4;
            }
            if constexpr (kPairM > 2) {
                if (m + 2 <= m1) product<code, kPlanes, 2, kPair>(w, x, m, t, m == m0, e, y, stride), m += 2;
            }
            for (; m < m1; ++m) product<code, kPlanes, 1, kPair>(w, x, m, t, m == m0, e, y, stride);
        }
    }
    for (; t < t1; ++t) {
        int m = m0;
        for (; m + kM <= m1; m += kM) product<code, kPlanes, kM, 1>(w, x, m, t, m == m0, e, y, stride);
        for (; m < m1; ++m) product<code, kPlanes, 1, 1>(w, x, m, t, m == m0, e, y, stride);
    }
}

void linear(const Linear& w, const Rows& x, int m0, int m1, int t0, int t1, const Epilogue& e, float* y,
            std::int64_t stride) {
    const bool two = x.planes == 2;
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
void unpack_row(const Linear& w, int row, float* out) {
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
