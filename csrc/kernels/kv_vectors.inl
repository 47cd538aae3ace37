// Keys, values and queries as vectors of integers, and how they are read.
#pragma once

#include <math.h>

#include "kernels/kernels.h"
#include "kernels/math.inl"

namespace lowbit {
namespace {

constexpr int kKeys = kCacheBlock;  // positions a block; a cache holds whole blocks
constexpr float kNever = -1e30f;
constexpr float kLargest = 32767, kLongest = 46000;  // of an element, and of a vector's norm before it is rounded
constexpr float kLargestHalf = 32768;                // of an element in float16

// Thirty-two elements of a cache: pairs of channels of 16 keys, or pairs of positions of 16 channels.
template <bool kInt8>
LOWBIT_INLINE B load_cached(const void* base, std::int64_t at) {
    if constexpr (kInt8) return Simd::widen(static_cast<const std::int8_t*>(base) + at);
    return Simd::load_bytes(reinterpret_cast<const std::uint8_t*>(static_cast<const std::int16_t*>(base) + at));
}

LOWBIT_INLINE B two_shorts(const std::int16_t* p) { return Simd::four_bytes(reinterpret_cast<const std::int8_t*>(p)); }

// codes = round(x / scale), [n]
LOWBIT_INLINE void to_shorts(const float* x, int n, float scale, std::int16_t* codes) {
    const F inverse = Simd::all(scale > 1e-35f ? 1.0f / scale : 0.0f);
    for (int i = 0; i < n; i += kTile)
        Simd::store_shorts(codes + i, Simd::to_int(Simd::multiply(Simd::load(x + i), inverse)));
}

// The scale by which a query or key keeps both bounds.
LOWBIT_INLINE float scale_by_norm(const float* x, int n) {
    F squares = Simd::zero();
    for (int i = 0; i < n; i += kTile) squares = Simd::fma(Simd::load(x + i), Simd::load(x + i), squares);
    const float by_norm = sqrtf(Simd::sum(squares)) / kLongest, by_peak = largest_magnitude(x, n) / kLargest;
    return by_norm > by_peak ? by_norm : by_peak;
}

}  // namespace
}  // namespace lowbit
