// What happens along one row between products: the norm, and rotary positions.
#pragma once

#include <math.h>  // sqrtf of C: an inline function of C++ could be shared with files that have fewer instructions

#include "kernels/simd.h"

namespace lowbit {
namespace {

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

}  // namespace
}  // namespace lowbit
