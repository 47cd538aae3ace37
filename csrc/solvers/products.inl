// Products of the solvers: of matrices, of a few rows with a weight each, and of runs of columns.
#pragma once

#include <utility>

#include "kernels/simd.h"
#include "solvers/kernels.h"

namespace lowbit {
namespace {

constexpr int kPanel = Simd::kTiles;                // vectors of a row whose sums stay in registers
constexpr int kStrip = Simd::kTiles == 2 ? 8 : 6;  // and rows

template <int rows, int vectors>
LOWBIT_INLINE void product_tile(Elements x, int depth, const float* h, std::int64_t h_stride, float* y, std::int64_t y_stride, bool fresh) {
    F sums[rows][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sums[i][v] = fresh ? Simd::zero() : Simd::load(y + i * y_stride + v * kTile);
    for (int k = 0; k < depth; ++k) {
        F row[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) row[v] = Simd::load(h + k * h_stride + v * kTile);
        const float* from = x.data + k * x.column;
        // What the next panel and the next strips read: rows are too far apart for the processor to see it coming.
        for (int v = 0; v < vectors; ++v) Simd::prefetch(h + k * h_stride + (vectors + v) * kTile);
        Simd::prefetch(from + 16);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
            const F one = Simd::all(from[i * x.row]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) sums[i][v] = Simd::fma(one, row[v], sums[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) Simd::store(y + i * y_stride + v * kTile, sums[i][v]);
}

template <int rows>
void product_strip(Elements x, int depth, const float* h, std::int64_t h_stride, int cols, float* y, std::int64_t y_stride,
                   bool fresh) {
    int n = 0;
    for (; n + kPanel * kTile <= cols; n += kPanel * kTile)
        product_tile<rows, kPanel>(x, depth, h + n, h_stride, y + n, y_stride, fresh);
    for (; n < cols; n += kTile) product_tile<rows, 1>(x, depth, h + n, h_stride, y + n, y_stride, fresh);
}

// The strip of fewer rows than kStrip at the end.
template <int rows>
void last_strip(int left, Elements x, int depth, const float* h, std::int64_t h_stride, int cols, float* y, std::int64_t y_stride,
                bool fresh) {
    if (left == rows) return product_strip<rows>(x, depth, h, h_stride, cols, y, y_stride, fresh);
    if constexpr (rows > 1) last_strip<rows - 1>(left, x, depth, h, h_stride, cols, y, y_stride, fresh);
}

void multiply_add(Elements x, int rows, int depth, const float* h, std::int64_t h_stride, int cols, float* y,
                  std::int64_t y_stride, bool fresh) {
    constexpr int kDepth = 64;  // rows of h that stay in the second cache while all rows of x pass
    for (int k = 0; k < depth; k += kDepth) {
        const int deep = least(kDepth, depth - k);
        const bool first = fresh && k == 0;
        for (int n = 0; n < cols; n += kPanel * kTile) {
            const int wide = least(kPanel * kTile, cols - n);
            const float* panel = h + k * h_stride + n;
            Elements from{x.data + k * x.column, x.row, x.column};
            int i = 0;
            for (; i + kStrip <= rows; i += kStrip, from.data += kStrip * x.row)
                product_strip<kStrip>(from, deep, panel, h_stride, wide, y + i * y_stride + n, y_stride, first);
            if (i < rows) last_strip<kStrip - 1>(rows - i, from, deep, panel, h_stride, wide, y + i * y_stride + n, y_stride, first);
        }
    }
}

template <int vectors>
LOWBIT_INLINE void add_panel(const float* const* row, const float* weight, int count, int at, float* y) {
    F sums[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[v] = Simd::load(y + at + v * kTile);
    for (int i = 0; i < count; ++i) {
        const F one = Simd::all(weight[i]);
        const float* from = row[i] + at;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[v] = Simd::fma(one, Simd::load(from + v * kTile), sums[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) Simd::store(y + at + v * kTile, sums[v]);
}

void add_rows(const float* const* row, const float* weight, int count, int cols, float* y) {
    int at = 0;
    for (; at + 4 * kTile <= cols; at += 4 * kTile) add_panel<4>(row, weight, count, at, y);
    for (; at < cols; at += kTile) add_panel<1>(row, weight, count, at, y);
}

void dots(const float* a, const float* b, int cols, int size, float* out) {
    for (int begin = 0; begin < cols; begin += size) {
        const int end = least(begin + size, cols);
        F sum = Simd::zero();
        int k = begin;
        for (; k + kTile <= end; k += kTile) sum = Simd::fma(Simd::load(a + k), Simd::load(b + k), sum);
        if (k < end) sum = Simd::fma(Simd::load_some(a + k, end - k), Simd::load_some(b + k, end - k), sum);
        *out++ = Simd::sum(sum);
    }
}

}  // namespace
}  // namespace lowbit
