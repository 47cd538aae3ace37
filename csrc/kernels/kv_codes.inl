// Codes of keys and values: fitted, packed into planes of bits, and unpacked to whole numbers of a byte.
//
// The numbers of a block lie in the order that kernels.h gives for 8 bits, in chunks of 64. A code of fewer bits is cut into
// parts of 4, 2 and 1 bits, as many as it has, and each part has a plane: byte i of the n-th 64 bytes of the plane of 4 bits has
// those of number i of the chunks 2 n and 2 n + 1, that of 2 bits those of four chunks, that of one bit those of eight.
#pragma once

#include <string.h>
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

#include "kernels/kv_vectors.inl"

namespace lowbit {
namespace {

// Element `d` of position `position` of the keys and of the values.
LOWBIT_INLINE std::int64_t key_at(int head_dim, int position, int d) {
    return (std::int64_t{position} / kTile * head_dim / 2 + d / 2) * 2 * kTile + position % kTile * 2 + d % 2;
}
LOWBIT_INLINE std::int64_t value_at(int head_dim, int position, int d) {
    return (std::int64_t{position} / 2 * head_dim + d) * 2 + position % 2;
}

struct HalfScale {
    std::uint16_t bits;
    float value;
};

// A float as float16: what would vanish keeps the smallest magnitude, and what would be infinite the largest.
LOWBIT_INLINE HalfScale as_half(float v) {
    alignas(64) std::uint16_t bits[kTile];
    alignas(64) float back[kTile];
    const float most = 65504;
    const float cut = v > most ? most : v < -most ? -most : v;
    Simd::store_f16(bits, Simd::all(cut));
    if ((bits[0] & 0x7fff) == 0 && v != 0) bits[0] = v > 0 ? 1 : 0x8001;
    for (int i = 1; i < kTile; ++i) bits[i] = bits[0];
    Simd::store(back, Simd::load_f16(bits));
    return {bits[0], back[0]};
}

LOWBIT_INLINE float inverse_of(float scale) {
    const float inverse = 1 / scale;
    return inverse - inverse == 0 ? inverse : 0;
}

// How a group is stored. inverse, more: a number in levels is x * inverse + more, or (x - less) * inverse.
struct Fitted {
    HalfScale scale, offset;
    float inverse, less, more;
};

// Codes of n numbers, as bytes, in multiples of 16.
LOWBIT_INLINE void round_to_codes(const KVSide& s, const Fitted& f, const float* x, int n, std::int8_t* codes) {
    const F inverse = Simd::all(f.inverse), less = Simd::all(-f.less), more = Simd::all(f.more);
    const F low = Simd::all(static_cast<float>(s.low)), high = Simd::all(static_cast<float>(s.low + s.count - 1));
    const F base = Simd::all(static_cast<float>(-(s.bits == 8 ? s.shift() : s.low)));
    for (int i = 0; i < n; i += kTile) {
        const F v = Simd::fma(Simd::add(Simd::load(x + i), less), inverse, more);
        F code;
        if (s.uniform) {
            code = Simd::add(Simd::min(Simd::max(Simd::nearest(v), low), high), base);
        } else {
            code = Simd::zero();
            for (int k = 0; k + 1 < s.count; ++k)
                code = Simd::add(code, Simd::above(v, Simd::all(s.bounds[k]), Simd::all(1.0f), Simd::zero()));
        }
        Simd::store_bytes(codes + i, Simd::to_int(code));
    }
}

// Levels, in those of the grid, of n numbers.
LOWBIT_INLINE F level_of(const KVSide& s, F v) {
    if (s.uniform) {
        const F low = Simd::all(static_cast<float>(s.low)), high = Simd::all(static_cast<float>(s.low + s.count - 1));
        return Simd::min(Simd::max(Simd::nearest(v), low), high);
    }
    F level = Simd::all(s.unit * static_cast<float>(s.levels[0]));
    for (int k = 0; k + 1 < s.count; ++k)
        level = Simd::above(v, Simd::all(s.bounds[k]), Simd::all(s.unit * static_cast<float>(s.levels[k + 1])), level);
    return level;
}

// The scale of least squares for the levels that n numbers go to with the scale 1 / inverse.
LOWBIT_INLINE float scale_of_levels(const KVSide& s, const float* x, int n, float inverse, float otherwise) {
    F squares = Simd::zero(), products = Simd::zero();
    for (int i = 0; i < n; i += kTile) {
        const F v = Simd::load(x + i), level = level_of(s, Simd::multiply(v, Simd::all(inverse)));
        squares = Simd::fma(level, level, squares);
        products = Simd::fma(v, level, products);
    }
    const float all = Simd::sum(squares);
    return all > 0 ? Simd::sum(products) / all : otherwise;
}

LOWBIT_INLINE float root_mean_square(const float* x, int n) {
    F sum = Simd::zero();
    for (int i = 0; i < n; i += kTile) sum = Simd::fma(Simd::load(x + i), Simd::load(x + i), sum);
    return sqrtf(Simd::sum(sum) / static_cast<float>(n));
}

// The scale and the offset of n numbers of a group.
LOWBIT_INLINE Fitted fit_group(const KVSide& s, const float* x, int n) {
    Fitted f{{0, 0}, {0, 0}, 0, 0, 0};
    if (s.fit == KVFit::minmax) {
        F least = Simd::load(x), most = least;
        for (int i = kTile; i < n; i += kTile) {
            least = Simd::min(Simd::load(x + i), least);
            most = Simd::max(Simd::load(x + i), most);
        }
        const float low = -Simd::largest(Simd::multiply(least, Simd::all(-1.0f))), high = Simd::largest(most);
        const float lowest = static_cast<float>(s.low), highest = static_cast<float>(s.low + s.count - 1);
        const bool constant = !(high > low);
        if (s.offset == KVOffset::minimum) {
            f.scale = as_half(constant ? 0 : (high - low) / (highest - lowest));
            f.offset = as_half(low - f.scale.value * lowest);
            f.inverse = inverse_of(f.scale.value);
            f.less = f.offset.value;
            return f;
        }
        float power = 1;  // of a constant: the largest level from one end that is a power of two
        while (2 * power <= highest - lowest) power *= 2;
        f.scale = as_half(constant ? (low < 0 ? -low : low) / power : (high - low) / (highest - lowest));
        f.offset = as_half(constant ? (low < 0 ? highest : lowest) : lowest - low / f.scale.value);
        f.inverse = inverse_of(f.scale.value);
        f.more = f.offset.value;
        return f;
    }
    if (s.fit == KVFit::norm) {
        const float first = root_mean_square(x, n) / s.reach;
        f.scale = as_half(scale_of_levels(s, x, n, inverse_of(first), first));
    } else {
        f.scale = as_half(largest_magnitude(x, n) / s.reach);
    }
    f.inverse = inverse_of(f.scale.value);
    return f;
}

#if defined(_MSC_VER) && !defined(__clang__)
LOWBIT_INLINE void put_bits(std::uint8_t* at, int mask, int bits) {
    _InterlockedAnd8(reinterpret_cast<volatile char*>(at), static_cast<char>(~mask));
    _InterlockedOr8(reinterpret_cast<volatile char*>(at), static_cast<char>(bits));
}
#else
LOWBIT_INLINE void put_bits(std::uint8_t* at, int mask, int bits) {
    __atomic_fetch_and(at, static_cast<std::uint8_t>(~mask), __ATOMIC_RELAXED);
    __atomic_fetch_or(at, static_cast<std::uint8_t>(bits), __ATOMIC_RELAXED);
}
#endif

// Writes one code, of number `at` of a block. Threads may write others into the same byte meanwhile where `shared`.
LOWBIT_INLINE void put_code(const KVSide& s, int head_dim, std::uint8_t* block, std::int64_t at, int code, bool shared) {
    const std::int64_t chunk = at / 64, lane = at % 64;
    std::uint8_t* plane = block;
    int left = code;
    for (int part = 4; part >= 1; part /= 2) {
        if ((s.bits & part) == 0) continue;
        const int ways = 8 / part, low = static_cast<int>(chunk % ways) * part, all = (1 << part) - 1;
        std::uint8_t* byte = plane + chunk / ways * 64 + lane;
        if (shared) {
            put_bits(byte, all << low, (left & all) << low);
        } else {
            *byte = static_cast<std::uint8_t>((*byte & ~(all << low)) | (left & all) << low);
        }
        left >>= part;
        plane += std::int64_t{8} * part * head_dim;
    }
}

// Whether a byte of codes may have some of several positions that different threads write.
LOWBIT_INLINE bool shares_bytes(const KVSide& s, int head_dim, bool keys) {
    if (s.bits == 8 || s.per_channel()) return false;
    const int chunks = keys ? head_dim / 4 : head_dim / 32, ways = 8 / (s.bits & -s.bits);
    return chunks == 0 || chunks % ways != 0;
}

// The codes of one position, [head_dim].
LOWBIT_INLINE void put_codes(const KVSide& s, int head_dim, std::uint8_t* block, int position, const std::int8_t* codes, bool keys) {
    const bool shared = shares_bytes(s, head_dim, keys);
    for (int d = 0; d < head_dim; ++d) {
        const std::int64_t at = keys ? key_at(head_dim, position, d) : value_at(head_dim, position, d);
        if (s.bits == 8) {
            block[at] = static_cast<std::uint8_t>(codes[d]);
        } else {
            put_code(s, head_dim, block, at, codes[d], shared);
        }
    }
}

// All codes of a block to whole numbers, 64 head_dim of them.
template <int kBits>
LOWBIT_INLINE void unpack_codes(const KVSide& s, int head_dim, const std::uint8_t* block, std::int8_t* out) {
    const std::uint8_t *four = block, *two = four + (kBits & 4 ? 32 * head_dim : 0), *one = two + (kBits & 2 ? 16 * head_dim : 0);
    const B table = kBits <= 4 ? Simd::load_table(reinterpret_cast<const std::uint8_t*>(s.levels)) : Simd::all_bytes(static_cast<std::int8_t>(s.low));
    const auto write = [&](std::int64_t chunk, const B& code) {
        Simd::store_all_bytes(out + 64 * chunk, kBits <= 4 ? Simd::look_up(table, code) : Simd::add_bytes(code, table));
    };
    if constexpr (kBits == 4) {
        for (std::int64_t c = 0; c < head_dim; c += 2) {
            const B both = Simd::load_bytes(four + 32 * c);
            write(c, Simd::low_nibbles(both));
            write(c + 1, Simd::high_nibbles(both));
        }
    } else {
        for (std::int64_t c = 0; c < head_dim; c += 8) {
            for (int k = 0; k < 8; ++k) {
                I code = Simd::all(0);
                int at = 0;
                if constexpr ((kBits & 4) != 0) {
                    const B both = Simd::load_bytes(four + (c + k) / 2 * 64);
                    code = Simd::as_ints(k % 2 ? Simd::high_nibbles(both) : Simd::low_nibbles(both));
                    at = 4;
                }
                const auto part = [&](const std::uint8_t* from, int bits, int low) {
                    const I lanes = Simd::shift_right(Simd::as_ints(Simd::load_bytes(from)), low);
                    const I cut = Simd::both(lanes, Simd::all(bits == 2 ? 0x03030303 : 0x01010101));
                    code = Simd::either(code, Simd::shift_left(cut, at));
                    at += bits;
                };
                if constexpr ((kBits & 2) != 0) part(two + (c + k) / 4 * 64, 2, k % 4 * 2);
                if constexpr ((kBits & 1) != 0) part(one + c / 8 * 64, 1, k);
                write(c + k, Simd::as_bytes(code));
            }
        }
    }
}

// The whole numbers of a block: where they lie, or in `out`.
LOWBIT_INLINE const std::int8_t* unpacked(const KVSide& s, int head_dim, const std::uint8_t* block, std::int8_t* out) {
    switch (s.bits) {
        case 1: unpack_codes<1>(s, head_dim, block, out); break;
        case 2: unpack_codes<2>(s, head_dim, block, out); break;
        case 3: unpack_codes<3>(s, head_dim, block, out); break;
        case 4: unpack_codes<4>(s, head_dim, block, out); break;
        case 5: unpack_codes<5>(s, head_dim, block, out); break;
        case 6: unpack_codes<6>(s, head_dim, block, out); break;
        case 7: unpack_codes<7>(s, head_dim, block, out); break;
        default: return reinterpret_cast<const std::int8_t*>(block);
    }
    return out;
}

}  // namespace
}  // namespace lowbit
