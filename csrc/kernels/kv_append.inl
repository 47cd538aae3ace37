// A new key and value into the cache.
#pragma once

#include <string.h>

#include "kernels/kv_codes.inl"

namespace lowbit {
namespace {

constexpr int kWidest = kTile * 64;  // channels of a head

// One key or value as integers, or as float16 where these lose too much of it. Integers have no infinities and no NaN: with
// one in it the vector is none, and neither is what comes of it.
struct Vector {
    alignas(64) std::int16_t codes[kWidest];
    float scale;

    bool halves() const { return scale < 0; }
};

LOWBIT_INLINE float not_finite(const float* x, int n) {
    F nothing = Simd::zero();
    for (int i = 0; i < n; i += kTile) nothing = Simd::fma(Simd::load(x + i), Simd::zero(), nothing);
    return Simd::sum(nothing);
}

LOWBIT_INLINE void to_halves(const float* x, int n, float inverse, Vector& out) {
    for (int i = 0; i < n; i += kTile)
        Simd::store_f16(reinterpret_cast<std::uint16_t*>(out.codes) + i, Simd::multiply(Simd::load(x + i), Simd::all(inverse)));
}

// finite: what `not_finite` found, 0 or NaN.
LOWBIT_INLINE void to_codes(const KVSide& s, const float* x, int n, float finite, bool by_norm, Vector& out) {
    const bool int8 = s.packed();
    const float peak = largest_magnitude(x, n);
    out.scale = by_norm && !int8 ? scale_by_norm(x, n) : int8 ? as_half(peak / s.reach).value : peak / kLargest;
    const float inverse = out.scale > 1e-35f ? 1.0f / out.scale : 0.0f;
    // Of so many channels two are this small by chance in about one vector of a thousand.
    const float chance = (int8 ? 127 / kLargest : 1.0f) * 5000 / (static_cast<float>(n) * sqrtf(static_cast<float>(n)));
    Loss loss(int8 ? 2.0f : 64.0f, chance, 0.22f * static_cast<float>(n));
    for (int i = 0; i < n; i += kTile) {
        const F v = Simd::load(x + i);
        loss.see(v, Simd::abs(Simd::multiply(v, Simd::all(inverse))));
    }
    const bool beyond = int8 && peak > 65504.0f * s.reach;
    if (finite == 0 && out.scale > (int8 ? 0 : 1e-30f) && peak < 1e30f && (beyond || loss.matters())) {
        out.scale = int8 ? -out.scale : -peak / kLargestHalf;  // that of bytes is in float16, as its others are
        to_halves(x, n, -1 / out.scale, out);
        return;
    }
    if (int8) {
        std::int8_t codes[kWidest];
        const Fitted fitted{{0, out.scale}, {0, 0}, finite == 0 ? inverse_of(out.scale) : 0, 0, 0};
        round_to_codes(s, fitted, x, n, codes);
        for (int d = 0; d < n; ++d) out.codes[d] = codes[d];
    } else {
        to_shorts(x, n, finite == 0 ? out.scale : 0, out.codes);
    }
    if (finite != 0) out.scale = finite;
}

template <class T>
LOWBIT_INLINE void put_vector(const Vector& v, int n, T* all, int position, bool keys) {
    if (keys) {
        T* at = all + key_at(n, position, 0);
        for (int d = 0; d < n; d += 2, at += 2 * kTile) {
            at[0] = static_cast<T>(v.codes[d]);
            at[1] = static_cast<T>(v.codes[d + 1]);
        }
        return;
    }
    T* at = all + value_at(n, position, 0);
    for (int d = 0; d < n; ++d) at[2 * d] = static_cast<T>(v.codes[d]);
}

LOWBIT_INLINE std::uint8_t* block_of(const KVSide& s, int n, void* data, int position) {
    return static_cast<std::uint8_t*>(data) + position / kCacheBlock * s.block_bytes(n);
}
LOWBIT_INLINE std::uint16_t* scales_of(const KVSide& s, int n, std::uint8_t* block) {
    return reinterpret_cast<std::uint16_t*>(block + s.code_bytes(n));
}

// A vector of a guarded side. scale: what is stored of it, which is not always that of `v`.
LOWBIT_INLINE void put_guarded(const KVSide& s, const CachedSide& to, const Vector& v, float scale, int n, int position, bool keys) {
    if (!s.packed()) {
        put_vector(v, n, static_cast<std::int16_t*>(to.data), position, keys);
        to.scale[position] = scale;
        return;
    }
    std::uint8_t* block = block_of(s, n, to.data, position);
    if (v.halves()) {
        std::int16_t* halves = static_cast<std::int16_t*>(to.halves);
        if (keys) {
            memcpy(halves + std::int64_t{position} * n, v.codes, sizeof(std::int16_t) * n);  // in one row, as they are read one by one
        } else {
            put_vector(v, n, halves, position, keys);
        }
    } else {
        put_vector(v, n, reinterpret_cast<std::int8_t*>(block), position % kCacheBlock, keys);
    }
    scales_of(s, n, block)[position % kCacheBlock] = scale - scale == 0 ? as_half(scale).bits : std::uint16_t{0x7e00};
}

// A vector of a side with scales for each position and group. poison: 0, or NaN where nothing of the vector is to be left.
LOWBIT_INLINE void put_groups(const KVSide& s, const CachedSide& to, const float* x, float finite, float poison, int n, int position, bool keys) {
    std::uint8_t* block = block_of(s, n, to.data, position);
    const int groups = s.groups(n), width = n / groups, at = position % kCacheBlock;
    std::uint16_t *scales = scales_of(s, n, block), *offsets = scales + kCacheBlock * groups;
    std::int8_t codes[kWidest] = {};
    for (int g = 0; g < groups; ++g) {
        Fitted f{{0, 0}, {0, 0}, 0, 0, 0};
        if (finite == 0) {
            f = fit_group(s, x + g * width, width);
            round_to_codes(s, f, x + g * width, width, codes + g * width);
        }
        scales[g * kCacheBlock + at] = poison == 0 ? f.scale.bits : std::uint16_t{0x7e00};
        if (s.offset != KVOffset::none) offsets[g * kCacheBlock + at] = f.offset.bits;
    }
    put_codes(s, n, block, at, codes, keys);
}

bool append(const AttentionShape& a, const KeyValues& kv, const float* key, const float* value, int position) {
    const int n = a.head_dim;
    const float key_finite = not_finite(key, n), value_finite = not_finite(value, n);
    Vector k, v;
    if (a.keys.guarded()) to_codes(a.keys, key, n, key_finite, true, k);
    if (a.values.guarded()) to_codes(a.values, value, n, value_finite, false, v);
    const auto lacks = [](const KVSide& s, const CachedSide& to, const Vector& x) { return s.guarded() && x.halves() && to.halves == nullptr; };
    if (lacks(a.keys, kv.keys, k) || lacks(a.values, kv.values, v)) return false;
    // A key that is no number is so in its value, where whoever sees it meets it.
    const float poison = key_finite + value_finite;
    if (a.keys.guarded()) {
        put_guarded(a.keys, kv.keys, k, key_finite == 0 ? k.scale : 0, n, position, true);
    } else if (!a.keys.per_channel()) {
        put_groups(a.keys, kv.keys, key, key_finite, 0, n, position, true);
    }
    if (a.values.guarded()) {
        put_guarded(a.values, kv.values, v, poison == 0 ? v.scale : poison, n, position, false);
    } else if (!a.values.per_channel()) {
        put_groups(a.values, kv.values, value, value_finite, poison, n, position, false);
    }
    return true;
}

// Number `at` of a store in 16 bits whose scale this is.
LOWBIT_INLINE float exact_number(const void* data, std::int64_t at, float scale) {
    if (!(scale < 0)) return static_cast<const std::int16_t*>(data)[at] * scale;
    alignas(64) float all[kTile];
    alignas(64) std::uint16_t one[kTile] = {static_cast<const std::uint16_t*>(data)[at]};
    Simd::store(all, Simd::load_f16(one));
    return -all[0] * scale;
}

LOWBIT_INLINE void complete_side(const KVSide& s, const CachedSide& to, const CachedSide& exact, int n, int from, int position, bool keys) {
    std::uint8_t* block = block_of(s, n, to.data, position);
    const int first = position % kCacheBlock, sub = first / s.tokens;
    std::uint16_t *scales = scales_of(s, n, block) + sub * n, *offsets = scales + s.scales(n);
    alignas(64) float x[kCacheBlock];
    alignas(64) std::int8_t codes[kCacheBlock];
    for (int d = 0; d < n; ++d) {
        for (int t = 0; t < s.tokens; ++t) {
            const std::int64_t at = keys ? key_at(n, from + t, d) : value_at(n, from + t, d);
            x[t] = exact_number(exact.data, at, exact.scale[from + t]);
        }
        const bool finite = not_finite(x, s.tokens) == 0;
        Fitted f{{0, 0}, {0, 0}, 0, 0, 0};
        if (finite) {
            f = fit_group(s, x, s.tokens);
            round_to_codes(s, f, x, s.tokens, codes);
        } else {
            memset(codes, 0, sizeof codes);
        }
        scales[d] = finite || keys ? f.scale.bits : std::uint16_t{0x7e00};
        if (s.offset != KVOffset::none) offsets[d] = f.offset.bits;
        for (int t = 0; t < s.tokens; ++t) {
            const std::int64_t at = keys ? key_at(n, first + t, d) : value_at(n, first + t, d);
            if (s.bits == 8) {
                block[at] = static_cast<std::uint8_t>(codes[t]);
            } else {
                put_code(s, n, block, at, codes[t], false);
            }
        }
    }
}

void complete(const AttentionShape& a, const KeyValues& kv, const KeyValues& exact, int from, int position) {
    if (a.keys.per_channel()) complete_side(a.keys, kv.keys, exact.keys, a.head_dim, from, position, true);
    if (a.values.per_channel()) complete_side(a.values, kv.values, exact.values, a.head_dim, from, position, false);
}

}  // namespace
}  // namespace lowbit
