// Small symmetric systems, one a lane.
#pragma once

#include "kernels/simd.h"

namespace lowbit {
namespace {

// L L' = A by columns of L, then L y = b and L' x = y. An unknown whose pivot is lost in rounding stays 0: what it would have
// changed is what the others have changed already.
void solve_symmetric(int n, float* a, float* b) {
    const auto at = [&](int i, int j) { return a + (static_cast<std::int64_t>(i) * n + j) * kTile; };
    const F one = Simd::all(1.0f), none = Simd::zero();
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j <= i; ++j) {
            F sum = none;
            const float *x = at(i, 0), *y = at(j, 0);
            for (int k = 0; k < j; ++k) sum = Simd::fma(Simd::load(x + k * kTile), Simd::load(y + k * kTile), sum);
            const F whole = Simd::load(at(i, j)), left = Simd::fma(sum, Simd::all(-1.0f), whole);
            // On the diagonal stands 1 / L_ii.
            if (j < i) {
                Simd::store(at(i, j), Simd::multiply(left, Simd::load(at(j, j))));
            } else {
                const F floor = Simd::multiply(whole, Simd::all(1e-5f));
                const F inverse = Simd::divide(one, Simd::root(Simd::max(left, Simd::all(1e-38f))));
                Simd::store(at(i, i), Simd::above(left, Simd::max(floor, Simd::all(1e-38f)), inverse, none));
            }
        }
    }
    for (int i = 0; i < n; ++i) {
        F sum = Simd::load(b + i * kTile);
        for (int k = 0; k < i; ++k) {
            const F part = Simd::multiply(Simd::load(at(i, k)), Simd::all(-1.0f));
            sum = Simd::fma(part, Simd::load(b + k * kTile), sum);
        }
        Simd::store(b + i * kTile, Simd::multiply(sum, Simd::load(at(i, i))));
    }
    for (int i = n - 1; i >= 0; --i) {
        const F x = Simd::multiply(Simd::load(b + i * kTile), Simd::load(at(i, i)));
        Simd::store(b + i * kTile, x);
        const F minus = Simd::multiply(x, Simd::all(-1.0f));
        for (int k = 0; k < i; ++k)
            Simd::store(b + k * kTile, Simd::fma(Simd::load(at(i, k)), minus, Simd::load(b + k * kTile)));
    }
}

}  // namespace
}  // namespace lowbit
