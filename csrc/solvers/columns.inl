// The loops over columns that depend on one another. Lanes are rows of the weight.
#pragma once

#include "kernels/simd.h"
#include "solvers/kernels.h"

namespace lowbit {
namespace {

template <bool integers>
LOWBIT_INLINE F nearest_level(const GridLevels& levels, F x) {
    if constexpr (integers) return Simd::min(Simd::max(Simd::nearest(x), Simd::all(levels.lo)), Simd::all(levels.hi));
    F found = Simd::all(levels.level[0]);
    for (int i = 0; i + 1 < levels.count; ++i)
        found = Simd::above(x, Simd::all(levels.bound[i]), Simd::all(levels.level[i + 1]), found);
    return found;
}

// Scales of one column, in `vectors` vectors of lanes.
template <int vectors>
struct ColumnScales {
    F scale[vectors], inverse[vectors], zero[vectors], base[vectors];
    LOWBIT_INLINE_MEMBER ColumnScales(const GroupScales& all, int group) {
        const std::int64_t at = static_cast<std::int64_t>(group) * vectors * kTile;
        for (int v = 0; v < vectors; ++v) {
            scale[v] = Simd::load(all.scale + at + v * kTile);
            inverse[v] = Simd::load(all.inverse + at + v * kTile);
            zero[v] = Simd::load(all.zero + at + v * kTile);
            base[v] = Simd::load(all.base + at + v * kTile);
        }
    }
    LOWBIT_INLINE_MEMBER F value(F level, int v) const { return Simd::fma(level, scale[v], base[v]); }
    template <bool integers>
    LOWBIT_INLINE_MEMBER F level(const GridLevels& levels, F w, int v) const {
        return nearest_level<integers>(levels, Simd::fma(w, inverse[v], zero[v]));
    }
};

LOWBIT_INLINE F unless_still(F w, const std::uint8_t* still) {
    float values[kTile];
    Simd::store(values, w);
    for (int i = 0; i < kTile; ++i)
        if (still[i]) values[i] = 0;
    return Simd::load(values);
}

// With H = R R', R upper triangular, e = w - q, and f what the errors so far ask of a column:
//
//   q_i = Q(w_i + f_i / R_ii);   f_j += e_i R_ij  for j > i
//
// which is GPTQ's loop, w_j -= d_i U_ij with d_i = (w_i - q_i) / U_ii and U = inv(R), for d = e R: no inverse is needed, and w
// stays as it was. Beside GPTAQ's shift P, w_j += (w_i + f_i / R_ii) P_ij.
//
// w, fed f, levels, errors e, moved d [count, kFeedLanes]; root R and shift (null: none) [count, count], `stride` floats a row; w becomes what
// the shift is multiplied with, if there is one. squares [kFeedLanes] gains the sum of d_i^2, which is e H e'.
template <bool integers>
void feed(const GridLevels& levels, const Columns& columns, const GroupScales& scales, const float* root, const float* shift,
          std::int64_t stride, float* w, float* fed, float* found, float* errors, float* moved, double* squares) {
    constexpr int kVectors = kFeedLanes / kTile;
    F sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = Simd::zero();
    for (int i = 0; i < columns.count; ++i) {
        const ColumnScales<kVectors> column(scales, columns.group[i]);
        const float* r = root + i * stride;
        const F diagonal = Simd::all(r[i]), by_diagonal = Simd::all(1.0f / r[i]);
        F error[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            const std::int64_t at = i * kFeedLanes + v * kTile;
            const F own = Simd::load(w + at), asked = Simd::fma(Simd::load(fed + at), by_diagonal, own);
            const F wanted = columns.still != nullptr ? unless_still(asked, columns.still + at) : asked;
            const F level = column.template level<integers>(levels, wanted, v);
            const F minus = Simd::multiply(column.value(level, v), Simd::all(-1.0f));
            const F left = Simd::multiply(Simd::add(asked, minus), diagonal);
            error[v] = Simd::add(own, minus);
            sums[v] = Simd::fma(left, left, sums[v]);
            Simd::store(found + at, level);
            Simd::store(errors + at, error[v]);
            Simd::store(moved + at, left);
            if (shift != nullptr) Simd::store(w + at, asked);
        }
        for (int j = i + 1; j < columns.count; ++j) {
            const F share = Simd::all(r[j]);
            for (int v = 0; v < kVectors; ++v) {
                float* at = fed + j * kFeedLanes + v * kTile;
                Simd::store(at, Simd::fma(share, error[v], Simd::load(at)));
            }
        }
        if (shift == nullptr) continue;
        for (int j = i + 1; j < columns.count; ++j) {
            const F share = Simd::all(shift[i * stride + j]);
            for (int v = 0; v < kVectors; ++v) {
                float* at = w + j * kFeedLanes + v * kTile;
                Simd::store(at, Simd::fma(share, Simd::load(w + i * kFeedLanes + v * kTile), Simd::load(at)));
            }
        }
    }
    float values[kFeedLanes];
    for (int v = 0; v < kVectors; ++v) Simd::store(values + v * kTile, sums[v]);
    for (int r = 0; r < kFeedLanes; ++r) squares[r] += values[r];
}

// With R = (Q - W) H:   q_k <- Q(q_k - R_k / H_kk);   R_j += (change of q_k) H_kj  for the columns j of this block
//
// pulled R, levels [count, kSweepLanes], both updated; changes [count, kSweepLanes] of levels; h [count, count]; gain
// [kSweepLanes] gains how the error under H changes, 2 c R_k + c^2 H_kk for a change of c.
template <bool integers>
void sweep(const GridLevels& levels, const Columns& columns, const GroupScales& scales, const float* h, float* pulled, float* found,
           float* changes, double* gain) {
    F sum = Simd::zero();
    for (int i = 0; i < columns.count; ++i) {
        const ColumnScales<1> column(scales, columns.group[i]);
        const std::int64_t at = i * kSweepLanes;
        const float* row = h + static_cast<std::int64_t>(i) * columns.count;
        const F old = Simd::load(found + at), r = Simd::load(pulled + at);
        F wanted = Simd::fma(r, Simd::all(-1.0f / row[i]), column.value(old, 0));
        if (columns.still != nullptr) wanted = unless_still(wanted, columns.still + at);
        const F level = column.template level<integers>(levels, wanted, 0);
        const F steps = Simd::fma(old, Simd::all(-1.0f), level);
        const F change = Simd::multiply(steps, column.scale[0]);
        Simd::store(found + at, level);
        Simd::store(changes + at, steps);
        const F twice = Simd::fma(change, Simd::all(row[i]), Simd::add(r, r));
        sum = Simd::fma(change, twice, sum);
        for (int j = i + 1; j < columns.count; ++j) {
            float* to = pulled + j * kSweepLanes;
            Simd::store(to, Simd::fma(Simd::all(row[j]), change, Simd::load(to)));
        }
    }
    float values[kSweepLanes];
    Simd::store(values, sum);
    for (int r = 0; r < kSweepLanes; ++r) gain[r] += values[r];
}

template <bool integers>
void round_all(const GridLevels& levels, const Columns& columns, const GroupScales& scales, const float* w, float* found) {
    constexpr int kVectors = kFeedLanes / kTile;
    for (int i = 0; i < columns.count; ++i) {
        const ColumnScales<kVectors> column(scales, columns.group[i]);
        for (int v = 0; v < kVectors; ++v) {
            const std::int64_t at = static_cast<std::int64_t>(i) * kFeedLanes + v * kTile;
            Simd::store(found + at, column.template level<integers>(levels, Simd::load(w + at), v));
        }
    }
}

void feed_columns(const GridLevels& levels, const Columns& columns, const GroupScales& scales, const float* root, const float* shift,
                  std::int64_t stride, float* w, float* fed, float* found, float* errors, float* moved, double* squares) {
    (levels.integers ? feed<true> : feed<false>)(levels, columns, scales, root, shift, stride, w, fed, found, errors, moved,
                                                  squares);
}

void sweep_columns(const GridLevels& levels, const Columns& columns, const GroupScales& scales, const float* h, float* pulled,
                   float* found, float* changes, double* gain) {
    (levels.integers ? sweep<true> : sweep<false>)(levels, columns, scales, h, pulled, found, changes, gain);
}

void round_columns(const GridLevels& levels, const Columns& columns, const GroupScales& scales, const float* w, float* found) {
    (levels.integers ? round_all<true> : round_all<false>)(levels, columns, scales, w, found);
}

}  // namespace
}  // namespace lowbit
