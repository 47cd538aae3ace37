// A new key and value into the cache.
#pragma once

#include "kernels/kv_vectors.inl"

namespace lowbit {
namespace {

// Element `d` of position `position` of the keys and of the values.
std::int64_t key_at(int head_dim, int position, int d) {
    return (std::int64_t{position} / kTile * head_dim / 2 + d / 2) * 2 * kTile + position % kTile * 2 + d % 2;
}
std::int64_t value_at(int head_dim, int position, int d) {
    return (std::int64_t{position} / 2 * head_dim + d) * 2 + position % 2;
}

// One key or value as integers, or as float16 where these lose too much of it. Integers have no infinities and no NaN: with
// one in it the vector is none, and neither is what comes of it.
struct Vector {
    std::int16_t codes[kTile * 64];
    float scale;

    bool halves() const { return scale < 0; }
};

LOWBIT_INLINE void to_codes(const AttentionShape& a, const float* x, bool by_norm, Vector& out) {
    const int n = a.head_dim;
    const bool int8 = a.format == KVFormat::int8;
    const float peak = largest_magnitude(x, n);
    out.scale = by_norm && !int8 ? scale_by_norm(x, n) : peak / (int8 ? 127.0f : kLargest);
    const float inverse = out.scale > 1e-35f ? 1.0f / out.scale : 0.0f;
    // Of so many channels two are this small by chance in about one vector of a thousand.
    const float chance = (int8 ? 127 / kLargest : 1.0f) * 5000 / (static_cast<float>(n) * sqrtf(static_cast<float>(n)));
    F nothing = Simd::zero();
    Loss loss(int8 ? 2.0f : 64.0f, chance, 0.22f * static_cast<float>(n));
    for (int i = 0; i < n; i += kTile) {
        const F v = Simd::load(x + i);
        nothing = Simd::fma(v, Simd::zero(), nothing);
        loss.see(v, Simd::abs(Simd::multiply(v, Simd::all(inverse))));
    }
    const float finite = Simd::sum(nothing);
    if (finite == 0 && out.scale > 1e-30f && out.scale < 1e30f && loss.matters()) {
        out.scale = -peak / kLargestHalf;
        for (int i = 0; i < n; i += kTile)
            Simd::store_f16(reinterpret_cast<std::uint16_t*>(out.codes) + i, Simd::multiply(Simd::load(x + i), Simd::all(kLargestHalf / peak)));
        return;
    }
    to_shorts(x, n, finite == 0 ? out.scale : 0, out.codes);
    if (finite != 0) out.scale = finite;
}

template <class T>
void append_as(const AttentionShape& a, const Vector& key, const Vector& value, void* all_keys, void* all_values, int position) {
    const int n = a.head_dim;
    if (all_keys != nullptr) {
        T* keys = static_cast<T*>(all_keys) + key_at(n, position, 0);
        for (int d = 0; d < n; d += 2, keys += 2 * kTile) {
            keys[0] = static_cast<T>(key.codes[d]);
            keys[1] = static_cast<T>(key.codes[d + 1]);
        }
    }
    if (all_values == nullptr) return;
    T* values = static_cast<T*>(all_values) + value_at(n, position, 0);
    for (int d = 0; d < n; ++d) values[2 * d] = static_cast<T>(value.codes[d]);
}

bool append(const AttentionShape& a, const KeyValues& kv, const float* key, const float* value, int position) {
    Vector k, v;
    to_codes(a, key, true, k);
    to_codes(a, value, false, v);
    if ((k.halves() || v.halves()) && kv.key_halves == nullptr) return false;
    if (a.format == KVFormat::int8) {
        append_as<std::int8_t>(a, k, v, k.halves() ? nullptr : kv.keys, v.halves() ? nullptr : kv.values, position);
        append_as<std::int16_t>(a, k, v, k.halves() ? kv.key_halves : nullptr, v.halves() ? kv.value_halves : nullptr, position);
    } else {
        append_as<std::int16_t>(a, k, v, kv.keys, kv.values, position);
    }
    // A key that is no number is so in its value, where whoever sees it meets it.
    const bool finite = k.scale - k.scale == 0;
    kv.key_scale[position] = finite ? k.scale : 0;
    kv.value_scale[position] = finite ? v.scale : k.scale;
    return true;
}

}  // namespace
}  // namespace lowbit
