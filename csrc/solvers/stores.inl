// Values as they would be read back from the type that stores them (formats/stores.py).
#pragma once

#include "kernels/simd.h"
#include "solvers/fits.h"

namespace lowbit {
namespace {

// To the nearest bfloat16, ties to even.
LOWBIT_INLINE F as_bf16(F v) {
    const I bits = Simd::as_ints(v), odd = Simd::both(Simd::shift_right(bits, 16), Simd::all(1));
    const I rounded = Simd::add(Simd::add(bits, Simd::all(0x7fff)), odd);
    return Simd::as_floats(Simd::both(rounded, Simd::all(static_cast<std::int32_t>(0xffff0000u))));
}

LOWBIT_INLINE F as_f16(F v) {
    alignas(64) std::uint16_t halves[16];
    Simd::store_f16(halves, v);
    return Simd::load_f16(halves);
}

// What would vanish keeps the smallest magnitude. `largest` grows to the largest magnitude that was stored, over the largest
// that the type holds.
LOWBIT_INLINE F read_back(F v, Type type, F& largest) {
    if (type == Type::none || type == Type::f32) return v;
    const bool half = type == Type::f16;
    const F size = Simd::abs(v);
    largest = Simd::max(largest, Simd::multiply(size, Simd::all(half ? 1 / 65504.0f : 1 / 3.3895314e38f)));
    const F stored = half ? as_f16(v) : as_bf16(v);
    const F tiny = Simd::all(half ? 0x1p-24f : 0x1p-133f);
    const F least = Simd::above(v, Simd::zero(), tiny, negative(tiny));
    const F lost = Simd::above(Simd::abs(stored), Simd::zero(), stored, least);
    return Simd::above(size, Simd::zero(), lost, stored);
}

}  // namespace
}  // namespace lowbit
