#include "kernels/moments.h"

#include <algorithm>
#include <memory>

namespace lowbit {

#ifdef LOWBIT_HAS_BF16
namespace {

constexpr int kWide = 48;      // columns of a panel: three registers
constexpr int kHigh = 8;       // rows of sums in registers, with kWide columns each
constexpr int kChunk = 512;   // tokens that are packed at once

// Panels of kWide columns, [panel][pair of tokens][column][2] of bfloat16: a register holds two tokens of 16 columns.
std::int64_t panel_size(int pairs) { return std::int64_t{pairs} * kWide; }  // in pairs

LOWBIT_BF16 inline __m512 load(const Rows& rows, std::int64_t at, __mmask16 mask) {
    if (!rows.halves) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(rows.values) + at);
    const __m256i narrow = _mm256_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(rows.values) + at);
    return widened(narrow);
}

// Rounded to bfloat16, in the upper half of each lane.
LOWBIT_BF16 inline __m512i rounded(__m512 v) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16);
}

LOWBIT_BF16 inline __m512i pair_of(__m512i even, __m512i odd) { return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd); }

// Packs one panel of x and of y - x for tokens [t0, t1), and adds to the sums of its columns.
LOWBIT_BF16 void pack_panel(int panel, int t0, int t1, int width, const Rows& x, const Rows& y, std::uint32_t* px,
                            std::uint32_t* py, const MomentSums& sums) {
    const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    for (int part = 0; part < kWide / kLanes; ++part) {
        const int column = panel * kWide + part * kLanes;
        const __mmask16 mask = first_lanes(width - column);
        __m512 largest = _mm512_setzero_ps(), sizes = _mm512_setzero_ps();
        for (int t = t0; t < t1; t += 2) {
            const std::int64_t out = std::int64_t{(t - t0) / 2} * kWide + part * kLanes;
            __m512i of_x[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            __m512i of_y[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int i = 0; i < 2 && t + i < t1; ++i) {
                const std::int64_t at = std::int64_t{t + i} * width + column;
                of_x[i] = rounded(load(x, at, mask));
                const __m512 value = _mm512_castsi512_ps(of_x[i]);
                const __m512 size = _mm512_castsi512_ps(_mm512_andnot_si512(sign, of_x[i]));
                largest = _mm512_max_ps(largest, size);
                sizes = _mm512_add_ps(sizes, size);
                if (py != nullptr) of_y[i] = rounded(_mm512_sub_ps(load(y, at, mask), value));
            }
            _mm512_storeu_si512(px + out, pair_of(of_x[0], of_x[1]));
            if (py != nullptr) _mm512_storeu_si512(py + out, pair_of(of_y[0], of_y[1]));
        }
        if (mask == 0) continue;
        const __m512 old = _mm512_maskz_loadu_ps(mask, sums.largest + column);
        const __m512 all = _mm512_add_ps(sizes, _mm512_maskz_loadu_ps(mask, sums.sizes + column));
        largest = _mm512_max_ps(largest, old);
        // A maximum forgets what is not a number; the sum does not.
        largest = _mm512_mask_mov_ps(largest, _mm512_cmp_ps_mask(all, all, _CMP_UNORD_Q), all);
        _mm512_mask_storeu_ps(sums.largest + column, mask, largest);
        _mm512_mask_storeu_ps(sums.sizes + column, mask, all);
    }
}

// out [kHigh rows, kWide columns] += sum over tokens of a[token, row] b[token, column]
LOWBIT_BF16 void add_tile(const std::uint32_t* a, const std::uint32_t* b, int pairs, float* out, int width, int rows,
                          int columns) {
    __m512 sums[kHigh][3];
    for (int r = 0; r < kHigh; ++r)
        for (int c = 0; c < 3; ++c) sums[r][c] = _mm512_setzero_ps();
    add_products<kHigh, 3>(sums, a, 1, kWide, b, kWide, pairs);
#pragma GCC unroll 8
    for (int r = 0; r < kHigh; ++r) {
        if (r >= rows) break;
        for (int c = 0; c < 3; ++c) {
            const __mmask16 mask = first_lanes(columns - c * kLanes);
            float* at = out + std::int64_t{r} * width + c * kLanes;
            if (mask != 0) _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sums[r][c]));
        }
    }
}

// Products of all columns of panel `of_a` with those of panel `of_b`.
void add_panels(const std::uint32_t* a, const std::uint32_t* b, int of_a, int of_b, int pairs, float* out, int width) {
    const int columns = std::min(kWide, width - of_b * kWide);
    for (int r = 0; r < kWide; r += kHigh) {
        const int row = of_a * kWide + r, rows = std::min(kHigh, width - row);
        if (rows <= 0) return;
        add_tile(a + r, b, pairs, out + std::int64_t{row} * width + of_b * kWide, width, rows, columns);
    }
}

}  // namespace
#endif

void add_moments(ThreadPool& pool, int tokens, int width, const Rows& x, const Rows& y, const MomentSums& sums) {
#ifdef LOWBIT_HAS_BF16
    const int panels = (width + kWide - 1) / kWide, most = (std::min(tokens, kChunk) + 1) / 2;
    const bool drift = sums.drift != nullptr;
    const std::int64_t size = panel_size(most);
    const std::unique_ptr<std::uint32_t[]> px(new std::uint32_t[size * panels]);
    const std::unique_ptr<std::uint32_t[]> py(drift ? new std::uint32_t[size * panels] : nullptr);
    for (int t0 = 0; t0 < tokens; t0 += kChunk) {
        const int t1 = std::min(tokens, t0 + kChunk), pairs = (t1 - t0 + 1) / 2;
        pool.run([&](Worker& worker) {
            worker.share(0, panels, 1, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t p = begin; p < end; ++p)
                    pack_panel(static_cast<int>(p), t0, t1, width, x, y, px.get() + p * size, drift ? py.get() + p * size : nullptr, sums);
            });
            worker.barrier();
            worker.share(1, std::int64_t{panels} * panels, 4, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i) {
                    const int b = static_cast<int>(i / panels), a = static_cast<int>(i % panels);
                    const std::uint32_t* right = px.get() + b * size;
                    if (a <= b) add_panels(px.get() + a * size, right, a, b, pairs, sums.products, width);
                    if (drift) add_panels(py.get() + a * size, right, a, b, pairs, sums.drift, width);
                }
            });
        });
    }
#else
    static_cast<void>(pool), static_cast<void>(tokens), static_cast<void>(width), static_cast<void>(x), static_cast<void>(y);
    static_cast<void>(sums);
#endif
}

}  // namespace lowbit
