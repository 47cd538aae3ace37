// Products of a head with the Hadamard matrix of Sylvester, which is symmetric: H[i][j] = (-1)^(bits that i and j share).
#pragma once

#include <math.h>

#include "kernels/math.inl"

namespace lowbit {
namespace {

// The matrix of order 16.
struct Hadamard16 {
    alignas(64) float rows[kTile][kTile] = {};

    constexpr Hadamard16() {
        for (int i = 0; i < kTile; ++i) {
            for (int j = 0; j < kTile; ++j) {
                int odd = 0;
                for (int bits = i & j; bits != 0; bits >>= 1) odd ^= bits & 1;
                rows[i][j] = odd ? -1.0f : 1.0f;
            }
        }
    }
};
constexpr Hadamard16 kHadamard;

// Sixteen channels by the matrix of order 16, then whole vectors by sums and differences.
void hadamard(float* x, int n) {
    for (int i = 0; i < n; i += kTile) {
        F sum = Simd::zero();
        for (int k = 0; k < kTile; ++k) sum = Simd::fma(Simd::all(x[i + k]), Simd::load(kHadamard.rows[k]), sum);
        Simd::store(x + i, sum);
    }
    const F minus = Simd::all(-1.0f);
    for (int half = kTile; half < n; half *= 2) {
        for (int i = 0; i < n; i += 2 * half) {
            for (int j = i; j < i + half; j += kTile) {
                const F a = Simd::load(x + j), b = Simd::load(x + j + half);
                Simd::store(x + j, Simd::add(a, b));
                Simd::store(x + j + half, Simd::fma(b, minus, a));
            }
        }
    }
    const F factor = Simd::all(1.0f / sqrtf(static_cast<float>(n)));
    for (int i = 0; i < n; i += kTile) Simd::store(x + i, Simd::multiply(Simd::load(x + i), factor));
}

}  // namespace
}  // namespace lowbit
