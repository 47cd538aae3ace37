// Softmax attention over a cache, with the running maximum of Milakov and Gimelshein (2018), as in FlashAttention
// (Dao et al. 2022, algorithm 1): keys are taken in blocks, scores never leave the cache.
//
// Products are of 16-bit integers with a scale for each vector, summed exactly in 32 bits: twice as fast as float32, and
// finer than float16. That no sum overflows is Cauchy and Schwarz: |sum q k| <= |q| |k|, and each norm is below 2^15.5.
//
// A key or value with channels in the ten thousands would lose all its others so. It is kept in floats of as many bits, has
// no part in products of integers, and is multiplied in float32. What becomes of a position depends on nothing but its own
// key and value, so that batches and chunks change no bit.
#include "kernels/linear.h"

namespace lowbit {
namespace {

constexpr int kKeys = 64;  // positions a block; a cache holds whole blocks
constexpr float kNever = -1e30f;
constexpr float kLargest = 32767, kLongest = 46000;  // of an element, and of a vector's norm before it is rounded
constexpr float kLargestHalf = 32768, kLargestByte = 480;  // of an element as a float of 16 and of 8 bits

// Thirty-two elements of a cache: pairs of channels of 16 keys, or pairs of positions of 16 channels.
template <bool kInt8>
LOWBIT_INLINE B load_cached(const void* base, std::int64_t at) {
    if constexpr (kInt8) return Simd::widen(static_cast<const std::int8_t*>(base) + at);
    return Simd::load_bytes(reinterpret_cast<const std::uint8_t*>(static_cast<const std::int16_t*>(base) + at));
}

LOWBIT_INLINE B two_shorts(const std::int16_t* p) { return Simd::four_bytes(reinterpret_cast<const std::int8_t*>(p)); }

// What the rows of one call need beside what they are given.
struct AttentionScratch {
    float *scores, *apart, *scale;  // [6, 64], [6, 64], [rows]
    std::int16_t *p, *q;            // [6, 64], [rows, head_dim]

    AttentionScratch(float* memory, int rows)
        : scores(memory),
          apart(scores + 6 * kKeys),
          scale(apart + 6 * kKeys),
          p(reinterpret_cast<std::int16_t*>(scale + (rows + kTile - 1) / kTile * kTile)),
          q(p + 6 * kKeys) {}
};

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

// scores[r][16 t ..] = q[r] . K for kR rows and kT tiles of keys
template <bool kInt8, int kR, int kT>
LOWBIT_INLINE void score(const AttentionShape& a, const KeyValues& kv, std::int64_t tile, const std::int16_t* q,
                         const float* scale, float* scores) {
    I sum[kR][kT];
    for (int r = 0; r < kR; ++r)
        for (int t = 0; t < kT; ++t) sum[r][t] = Simd::all(0);
    const int pairs = a.head_dim / 2;
    for (int d = 0; d < pairs; ++d) {
        B key[kT];
        for (int t = 0; t < kT; ++t) key[t] = load_cached<kInt8>(kv.keys, ((tile + t) * pairs + d) * 2 * kTile);
        for (int r = 0; r < kR; ++r) {
            const B value = two_shorts(q + r * a.head_dim + 2 * d);
            for (int t = 0; t < kT; ++t) sum[r][t] = Simd::dot_pairs(sum[r][t], key[t], value);
        }
    }
    for (int t = 0; t < kT; ++t) {
        const F given = Simd::max(Simd::load(kv.key_scale + (tile + t) * kTile), Simd::zero());
        const F key_scale = Simd::multiply(given, Simd::all(a.scale));
        for (int r = 0; r < kR; ++r) {
            const F factor = Simd::multiply(key_scale, Simd::all(scale[r]));
            Simd::store(scores + r * kKeys + t * kTile, Simd::multiply(Simd::to_float(sum[r][t]), factor));
        }
    }
}

// Pairs of floats of 16 bits (1 sign, 5 exponent) or 8 (1, 4), which lie as integers would: all first ones, all second ones.
template <bool kInt8>
LOWBIT_INLINE void unpair(I pairs, F& first, F& second) {
    constexpr int kBits = kInt8 ? 0x007f0000 : 0x7fff0000, kDown = 3, kUp = 4;  // to where float32 has its exponent
    const auto one = [](I upper) {
        const I rest = Simd::both(upper, Simd::all(kBits)), sign = Simd::both(upper, Simd::all(INT32_MIN));
        const I bits = kInt8 ? Simd::shift_left(rest, kUp) : Simd::shift_right(rest, kDown);
        const F value = Simd::multiply(Simd::as_floats(bits), Simd::all(kInt8 ? 0x1p120f : 0x1p112f));
        return Simd::as_floats(Simd::either(Simd::as_ints(value), sign));
    };
    first = one(Simd::shift_left(pairs, 16));
    second = one(pairs);
}

// Adds what keys kept as floats give to the scores of kR rows, in a block of 64.
template <bool kInt8, int kR>
[[gnu::noinline]] void score_floats(const AttentionShape& a, const KeyValues& kv, std::int64_t position, const float* q, float* scores) {
    const int pairs = a.head_dim / 2;
    for (int t = 0; t < kKeys; t += kTile) {
        const std::int64_t tile = (position + t) / kTile;
        const F scale = Simd::max(Simd::multiply(Simd::load(kv.key_scale + position + t), Simd::all(-1.0f)), Simd::zero());
        if (!(Simd::largest(scale) > 0)) continue;
        F sum[kR];
        for (int r = 0; r < kR; ++r) sum[r] = Simd::zero();
        for (int d = 0; d < pairs; ++d) {
            F even, odd;
            unpair<kInt8>(Simd::as_ints(load_cached<kInt8>(kv.keys, (tile * pairs + d) * 2 * kTile)), even, odd);
            for (int r = 0; r < kR; ++r) {
                sum[r] = Simd::fma(even, Simd::all(q[r * a.head_dim + 2 * d]), sum[r]);
                sum[r] = Simd::fma(odd, Simd::all(q[r * a.head_dim + 2 * d + 1]), sum[r]);
            }
        }
        for (int r = 0; r < kR; ++r) {
            float* at = scores + r * kKeys + t;
            const F factor = Simd::multiply(scale, Simd::all(a.scale));
            Simd::store(at, Simd::fma(sum[r], factor, Simd::load(at)));
        }
    }
}

// out[r] += more[r] (apart[r] . V) of values kept as floats, in pairs of positions of a block.
template <bool kInt8, int kR>
[[gnu::noinline]] void gather_floats(const AttentionShape& a, const void* values, std::int64_t position, int pairs,
                                     const float* apart, const float* more, float* out) {
    for (int k = 0; k < pairs; ++k) {
        bool any = false;
        for (int r = 0; r < kR; ++r) any = any || apart[r * kKeys + 2 * k] != 0 || apart[r * kKeys + 2 * k + 1] != 0;
        if (!any) continue;
        for (int d = 0; d < a.head_dim; d += kTile) {
            F even, odd;
            unpair<kInt8>(Simd::as_ints(load_cached<kInt8>(values, (position + 2 * k) * a.head_dim + 2 * d)), even, odd);
            for (int r = 0; r < kR; ++r) {
                float* at = out + r * a.head_dim + d;
                F sum = Simd::fma(even, Simd::all(apart[r * kKeys + 2 * k] * more[r]), Simd::load(at));
                sum = Simd::fma(odd, Simd::all(apart[r * kKeys + 2 * k + 1] * more[r]), sum);
                Simd::store(at, sum);
            }
        }
    }
}

// Whether a block has vectors that are kept as floats.
LOWBIT_INLINE bool has_floats(const float* scale) {
    F least = Simd::zero();  // second: a scale that is no number is passed over
    for (int t = 0; t < kKeys; t += kTile) least = Simd::min(Simd::load(scale + t), least);
    return Simd::largest(Simd::multiply(least, Simd::all(-1.0f))) > 0;
}

// out[r][16 t ..] = old[r] out[r] + more[r] (p[r] . V) for kR rows and kT tiles of channels
template <bool kInt8, int kR, int kT>
LOWBIT_INLINE void gather(const AttentionShape& a, const void* values, std::int64_t position, int pairs,
                          const std::int16_t* p, const float* old, const float* more, float* out) {
    I sum[kR][kT];
    for (int r = 0; r < kR; ++r)
        for (int t = 0; t < kT; ++t) sum[r][t] = Simd::all(0);
    for (int k = 0; k < pairs; ++k) {
        B value[kT];
        for (int t = 0; t < kT; ++t)
            value[t] = load_cached<kInt8>(values, (position + 2 * k) * a.head_dim + 2 * t * kTile);
        for (int r = 0; r < kR; ++r) {
            const B two = two_shorts(p + r * kKeys + 2 * k);
            for (int t = 0; t < kT; ++t) sum[r][t] = Simd::dot_pairs(sum[r][t], value[t], two);
        }
    }
    for (int r = 0; r < kR; ++r) {
        for (int t = 0; t < kT; ++t) {
            float* at = out + r * a.head_dim + t * kTile;
            const F before = Simd::multiply(Simd::load(at), Simd::all(old[r]));
            Simd::store(at, Simd::fma(Simd::to_float(sum[r][t]), Simd::all(more[r]), before));
        }
    }
}

// Of each row of a block: the highest score, the sum of exp(score - highest), and that of exp(score - highest) times the
// scales of values, which integers up to `kLargest` stand for.
struct Softmax {
    alignas(64) float highest[kTile] = {}, total[kTile] = {}, weighted[kTile] = {};
};

// Scores of kR rows [kR, 64] to probabilities times the scales of values, as floats in place and as integers. apart: those of
// values that are kept as floats, which have none of the integers; null where there are none.
// kMasked: some row sees only a part of the block. Stage by stage, so that rows hide each other's latencies.
template <int kR, bool kMasked>
LOWBIT_INLINE void softmax(const AttentionShape& a, const float* value_scale, int position, const int* first,
                           const int* last, float* scores, float* apart, std::int16_t* p, Softmax& found) {
    const auto seen = [&](F v, int r, int t, F other) {
        if constexpr (!kMasked) return v;
        return Simd::within(v, first[r] - position - t, last[r] - position - t, other);
    };
    for (int r = 0; r < kR; ++r) {
        F peak = Simd::all(kNever);
        for (int t = 0; t < kKeys; t += kTile) {
            F v = Simd::load(scores + r * kKeys + t);
            if (a.soft_cap > 0) {
                v = Simd::multiply(hyperbolic_tangent(Simd::multiply(v, Simd::all(1.0f / a.soft_cap))),
                                   Simd::all(a.soft_cap));
                Simd::store(scores + r * kKeys + t, v);
            }
            peak = Simd::max(peak, seen(v, r, t, Simd::all(kNever)));
        }
        found.highest[r] = Simd::largest(peak);
    }
    for (int r = 0; r < kR; ++r) {
        F sum = Simd::zero(), weighted = Simd::zero();
        const F minus = Simd::all(-found.highest[r]);
        for (int t = 0; t < kKeys; t += kTile) {
            float* at = scores + r * kKeys + t;
            const F e = seen(exponential(Simd::add(Simd::load(at), minus)), r, t, Simd::zero());
            sum = Simd::add(sum, e);
            const F scale = Simd::load(value_scale + t);
            // The larger one second: a scale that is no number stays none.
            const F more = seen(Simd::multiply(e, Simd::max(Simd::zero(), scale)), r, t, Simd::zero());
            if (apart != nullptr) {
                const F other = Simd::max(Simd::multiply(scale, Simd::all(-1.0f)), Simd::zero());
                Simd::store(apart + r * kKeys + t, seen(Simd::multiply(e, other), r, t, Simd::zero()));
            }
            weighted = Simd::add(weighted, more);
            Simd::store(at, more);
        }
        found.total[r] = Simd::sum(sum);
        found.weighted[r] = Simd::sum(weighted);
    }
    float inverse[kTile];
    Simd::store(inverse, Simd::divide(Simd::all(kLargest), Simd::max(Simd::load(found.weighted), Simd::all(1e-30f))));
    for (int r = 0; r < kR; ++r) {
        for (int t = 0; t < kKeys; t += kTile) {
            const F v = Simd::multiply(Simd::load(scores + r * kKeys + t), Simd::all(inverse[r]));
            Simd::store_shorts(p + r * kKeys + t, Simd::to_int(v));
        }
    }
}

// One block of keys for kR rows: scores, softmax with a running maximum, values.
template <bool kInt8, int kR>
void attend_block(const AttentionShape& a, const KeyValues& kv, std::int64_t position, int r0, const int* first,
                  const int* last, const float* q, float* out, float* maximum, float* denominator,
                  const AttentionScratch& scratch) {
    constexpr int kKeyTiles = Simd::kRows < 6 ? 1 : kR >= 3 ? 2 : 4;  // sums enough to hide the latency of each
    constexpr int kChannelTiles = Simd::kRows < 6 ? 1 : kR > 3 ? 2 : 4;
    for (int t = 0; t < kKeys / kTile; t += kKeyTiles) {
        score<kInt8, kR, kKeyTiles>(a, kv, position / kTile + t, scratch.q + std::int64_t{r0} * a.head_dim,
                                    scratch.scale + r0, scratch.scores + t * kTile);
    }
    if (has_floats(kv.key_scale + position)) score_floats<kInt8, kR>(a, kv, position, q, scratch.scores);
    const int start = static_cast<int>(position);
    bool whole = true;
    int end = 0;
    for (int r = 0; r < kR; ++r) {
        whole = whole && first[r] <= start && last[r] >= start + kKeys;
        end = last[r] - start > end ? last[r] - start : end;
    }
    Softmax found;
    const float* value_scale = kv.value_scale + position;
    float* apart = has_floats(value_scale) ? scratch.apart : nullptr;
    if (whole) {
        softmax<kR, false>(a, value_scale, start, first, last, scratch.scores, apart, scratch.p, found);
    } else {
        softmax<kR, true>(a, value_scale, start, first, last, scratch.scores, apart, scratch.p, found);
    }
    alignas(64) float before[kTile] = {}, now[kTile], old[kTile], more[kTile], of_floats[kTile];
    for (int r = 0; r < kR; ++r) before[r] = maximum[r];
    const F highest = Simd::load(found.highest), together = Simd::max(highest, Simd::load(before));
    const F minus = Simd::multiply(together, Simd::all(-1.0f));
    Simd::store(now, together);
    Simd::store(old, exponential(Simd::add(Simd::load(before), minus)));
    Simd::store(more, exponential(Simd::add(highest, minus)));
    for (int r = 0; r < kR; ++r) {
        maximum[r] = now[r];
        denominator[r] = old[r] * denominator[r] + more[r] * found.total[r];
        of_floats[r] = more[r];
        more[r] *= found.weighted[r] * (1 / kLargest);
    }
    const int pairs = (least(end, kKeys) + 1) / 2;
    const auto gather_from = [&]<int kT>(int d) {
        const std::int64_t at = std::int64_t{2} * d * (kInt8 ? 1 : 2);
        gather<kInt8, kR, kT>(a, static_cast<const char*>(kv.values) + at, position, pairs, scratch.p, old, more, out + d);
    };
    int d = 0;
    for (; d + kChannelTiles * kTile <= a.head_dim; d += kChannelTiles * kTile)
        gather_from.template operator()<kChannelTiles>(d);
    for (; d < a.head_dim; d += kTile) gather_from.template operator()<1>(d);
    if (apart != nullptr) gather_floats<kInt8, kR>(a, kv.values, position, pairs, apart, of_floats, out);
}

template <bool kInt8>
void attend_all(const AttentionShape& a, const KeyValues& kv, const float* q, int rows, const int* first,
                const int* last, float* out, float* maximum, float* denominator, float* memory) {
    const AttentionScratch scratch(memory, rows);
    int begin = first[0], end = last[0];
    for (int r = 0; r < rows; ++r) {
        begin = least(begin, first[r]);
        end = last[r] > end ? last[r] : end;
        maximum[r] = kNever;
        denominator[r] = 0;
        scratch.scale[r] = scale_by_norm(q + r * a.head_dim, a.head_dim);
        to_shorts(q + r * a.head_dim, a.head_dim, scratch.scale[r], scratch.q + std::int64_t{r} * a.head_dim);
    }
    for (int i = 0; i < rows * a.head_dim; i += kTile) Simd::store(out + i, Simd::zero());
    for (int position = begin / kKeys * kKeys; position < end; position += kKeys) {
        int r = 0;
        const auto take = [&](auto block, int count) {
            // Rows that see nothing of this block are left alone: causal attention halves its work so.
            bool sees = false;
            for (int i = r; i < r + count; ++i) sees = sees || (last[i] > position && first[i] < position + kKeys);
            if (sees) {
                block(a, kv, position, r, first + r, last + r, q + r * a.head_dim, out + r * a.head_dim, maximum + r,
                      denominator + r, scratch);
            }
            r += count;
        };
        if constexpr (Simd::kRows >= 6) {
            while (rows - r >= 6) take(attend_block<kInt8, 6>, 6);
        }
        while (rows - r >= 3) take(attend_block<kInt8, 3>, 3);
        while (rows - r >= 1) take(attend_block<kInt8, 1>, 1);
    }
}

// q [rows, head_dim]; row r sees positions [first[r], last[r]). out [rows, head_dim] holds sums of exp(score - maximum)
// times values, and `denominator` the sums of exp(score - maximum), so that parts can be joined. memory: attention_memory.
void attend(const AttentionShape& a, const KeyValues& kv, const float* q, int rows, const int* first, const int* last,
            float* out, float* maximum, float* denominator, float* memory) {
    (a.int8 ? attend_all<true> : attend_all<false>)(a, kv, q, rows, first, last, out, maximum, denominator, memory);
}

// Element `d` of position `position` of the keys and of the values.
std::int64_t key_at(int head_dim, int position, int d) {
    return (std::int64_t{position} / kTile * head_dim / 2 + d / 2) * 2 * kTile + position % kTile * 2 + d % 2;
}
std::int64_t value_at(int head_dim, int position, int d) {
    return (std::int64_t{position} / 2 * head_dim + d) * 2 + position % 2;
}

// A float of 8 bits: 1 sign, 4 exponent, 3 fraction, up to 480 (what e4m3 has for what is no number is numbers here).
LOWBIT_INLINE std::int8_t float_byte(float v) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    const std::uint32_t sign = bits >> 24 & 0x80, rest = bits & 0x7fffffff;
    float magnitude;
    __builtin_memcpy(&magnitude, &rest, 4);
    // Below 2^-6 steps are equal; above, half of the last place is added and what is beyond it cut off.
    const std::uint32_t code = magnitude < 0x1p-6f ? static_cast<std::uint32_t>(magnitude * 512 + 0.5f)
                                                   : ((rest + 0x7ffff + (rest >> 20 & 1)) >> 20) - (120 << 3);
    return static_cast<std::int8_t>(sign | (code < 127 ? code : 127));
}

// codes: x as floats of the bits of T, times the scale that is given back
template <class T>
LOWBIT_INLINE float to_floats(const float* x, int n, float peak, T* codes) {
    const float largest = sizeof(T) == 1 ? kLargestByte : kLargestHalf;
    const F inverse = Simd::all(largest / peak);
    for (int i = 0; i < n; i += kTile) {
        const F v = Simd::multiply(Simd::load(x + i), inverse);
        if constexpr (sizeof(T) == 2) {
            Simd::store_f16(reinterpret_cast<std::uint16_t*>(codes + i), v);
        } else {
            float some[kTile];
            Simd::store(some, v);
            for (int j = 0; j < kTile; ++j) codes[i + j] = float_byte(some[j]);
        }
    }
    return peak / largest;
}

// One key or value as integers, or as floats where these lose too much of it; its scale. Integers have no infinities and no
// NaN: with one in it the vector is none, and neither is what comes of it.
template <class T>
LOWBIT_INLINE float to_codes(const float* x, int n, bool by_norm, T* codes) {
    constexpr bool kBytes = sizeof(T) == 1;
    const float peak = largest_magnitude(x, n);
    float scale = peak / (kBytes ? 127.0f : kLargest);
    if (by_norm && !kBytes) scale = scale_by_norm(x, n);
    const F inverse = Simd::all(scale > 1e-35f ? 1.0f / scale : 0.0f);
    F nothing = Simd::zero();
    Loss loss(kBytes ? 2.0f : 64.0f, kBytes ? 1.0f / 64 : 4.0f, 0.22f * static_cast<float>(n));
    for (int i = 0; i < n; i += kTile) {
        const F v = Simd::load(x + i);
        nothing = Simd::fma(v, Simd::zero(), nothing);
        loss.see(v, Simd::abs(Simd::multiply(v, inverse)));
    }
    const float finite = Simd::sum(nothing);
    if (finite != 0) {
        for (int i = 0; i < n; ++i) codes[i] = 0;
        return finite;
    }
    if (scale > 1e-30f && scale < 1e30f && loss.matters()) return -to_floats(x, n, peak, codes);
    std::int16_t shorts[kTile];
    for (int i = 0; i < n; i += kTile) {
        Simd::store_shorts(shorts, Simd::to_int(Simd::multiply(Simd::load(x + i), inverse)));
        for (int j = 0; j < kTile; ++j) codes[i + j] = static_cast<T>(shorts[j]);
    }
    return scale;
}

template <class T>
void append_as(const AttentionShape& a, const KeyValues& kv, const float* key, const float* value, int position) {
    T codes[kTile * 64];
    const int n = a.head_dim;
    const float key_scale = to_codes(key, n, true, codes);
    T* keys = static_cast<T*>(kv.keys) + key_at(n, position, 0);
    for (int d = 0; d < n; d += 2, keys += 2 * kTile) {
        keys[0] = codes[d];
        keys[1] = codes[d + 1];
    }
    const float value_scale = to_codes(value, n, false, codes);
    T* values = static_cast<T*>(kv.values) + value_at(n, position, 0);
    for (int d = 0; d < n; ++d) values[2 * d] = codes[d];
    const bool finite = key_scale - key_scale == 0;
    kv.key_scale[position] = finite ? key_scale : 0;
    kv.value_scale[position] = finite ? value_scale : key_scale;
}

void append(const AttentionShape& a, const KeyValues& kv, const float* key, const float* value, int position) {
    (a.int8 ? append_as<std::int8_t> : append_as<std::int16_t>)(a, kv, key, value, position);
}

}  // namespace
}  // namespace lowbit
