// Softmax attention over a cache, with the running maximum of Milakov and Gimelshein (2018), as in FlashAttention
// (Dao et al. 2022, algorithm 1): keys are taken in blocks, scores never leave the cache.
//
// Products are of 16-bit integers with a scale for each vector, summed exactly in 32 bits: twice as fast as float32, and
// finer than float16. That no sum overflows is Cauchy and Schwarz: |sum q k| <= |q| |k|, and each norm is below 2^15.5.
//
// A key or value with channels in the ten thousands would lose all its others so. It is kept in float16, has no part in
// products of integers, and is multiplied in float32. What becomes of a position depends on nothing but its own
// key and value, so that batches and chunks change no bit.
#include "kernels/linear.h"

namespace lowbit {
namespace {

constexpr int kKeys = 64;  // positions a block; a cache holds whole blocks
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

// Pairs of float16, which lie as integers would: all first ones, all second ones.
LOWBIT_INLINE void unpair(const void* base, std::int64_t at, F& first, F& second) {
    const I pairs = Simd::as_ints(load_cached<false>(base, at));
    const auto one = [](I upper) {
        // To where float32 has exponent and fraction; the exponents differ by 112.
        const I bits = Simd::shift_right(Simd::both(upper, Simd::all(0x7fff0000)), 3);
        const F value = Simd::multiply(Simd::as_floats(bits), Simd::all(0x1p112f));
        return Simd::as_floats(Simd::either(Simd::as_ints(value), Simd::both(upper, Simd::all(INT32_MIN))));
    };
    first = one(Simd::shift_left(pairs, 16));
    second = one(pairs);
}

// Adds what keys kept as floats give to the scores of kR rows, in a block of 64.
template <int kR>
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
            unpair(kv.key_halves, (tile * pairs + d) * 2 * kTile, even, odd);
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
template <int kR>
[[gnu::noinline]] void gather_floats(const AttentionShape& a, const void* values, std::int64_t position, int pairs,
                                     const float* apart, const float* more, float* out) {
    for (int k = 0; k < pairs; ++k) {
        bool any = false;
        for (int r = 0; r < kR; ++r) any = any || apart[r * kKeys + 2 * k] != 0 || apart[r * kKeys + 2 * k + 1] != 0;
        if (!any) continue;
        for (int d = 0; d < a.head_dim; d += kTile) {
            F even, odd;
            unpair(values, (position + 2 * k) * a.head_dim + 2 * d, even, odd);
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
    if (has_floats(kv.key_scale + position)) score_floats<kR>(a, kv, position, q, scratch.scores);
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
    if (apart != nullptr) gather_floats<kR>(a, kv.value_halves, position, pairs, apart, of_floats, out);
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

// One key or value as integers, or as float16 where these lose too much of it. Integers have no infinities and no NaN: with
// one in it the vector is none, and neither is what comes of it.
struct Vector {
    std::int16_t codes[kTile * 64];
    float scale;

    bool halves() const { return scale < 0; }
};

LOWBIT_INLINE void to_codes(const AttentionShape& a, const float* x, bool by_norm, Vector& out) {
    const int n = a.head_dim;
    const float peak = largest_magnitude(x, n);
    out.scale = by_norm && !a.int8 ? scale_by_norm(x, n) : peak / (a.int8 ? 127.0f : kLargest);
    const float inverse = out.scale > 1e-35f ? 1.0f / out.scale : 0.0f;
    // Of so many channels two are this small by chance in about one vector of a thousand.
    const float chance = (a.int8 ? 127 / kLargest : 1.0f) * 5000 / (static_cast<float>(n) * sqrtf(static_cast<float>(n)));
    F nothing = Simd::zero();
    Loss loss(a.int8 ? 2.0f : 64.0f, chance, 0.22f * static_cast<float>(n));
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
    if (a.int8) {
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
