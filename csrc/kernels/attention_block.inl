// One block of 64 positions: scores, softmax, and sums of values.
#pragma once

#include "kernels/kv_vectors.inl"

namespace lowbit {
namespace {

// scores[r][16 t ..] = q[r] . K for kR rows and kT tiles of keys
template <int kR, int kT>
LOWBIT_INLINE void score(const AttentionShape& a, const CachedSide& keys, std::int64_t tile, const std::int16_t* q,
                         const float* scale, float* scores) {
    I sum[kR][kT];
    for (int r = 0; r < kR; ++r)
        for (int t = 0; t < kT; ++t) sum[r][t] = Simd::all(0);
    const int pairs = a.head_dim / 2;
    for (int d = 0; d < pairs; ++d) {
        B key[kT];
        for (int t = 0; t < kT; ++t) key[t] = load_cached<false>(keys.data, ((tile + t) * pairs + d) * 2 * kTile);
        for (int r = 0; r < kR; ++r) {
            const B value = two_shorts(q + r * a.head_dim + 2 * d);
            for (int t = 0; t < kT; ++t) sum[r][t] = Simd::dot_pairs(sum[r][t], key[t], value);
        }
    }
    for (int t = 0; t < kT; ++t) {
        const F given = Simd::max(Simd::load(keys.scale + (tile + t) * kTile), Simd::zero());
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

// Adds what keys kept as floats give to the scores of kR rows, in a block of 64 from `position`; scales: of the block.
template <int kR>
[[gnu::noinline]] void score_floats(const AttentionShape& a, const void* halves, const float* scales, std::int64_t position, const float* q,
                                    float* scores) {
    const int pairs = a.head_dim / 2;
    for (int t = 0; t < kKeys; t += kTile) {
        const std::int64_t tile = (position + t) / kTile;
        const F scale = Simd::max(Simd::multiply(Simd::load(scales + t), Simd::all(-1.0f)), Simd::zero());
        if (!(Simd::largest(scale) > 0)) continue;
        F sum[kR];
        for (int r = 0; r < kR; ++r) sum[r] = Simd::zero();
        for (int d = 0; d < pairs; ++d) {
            F even, odd;
            unpair(halves, (tile * pairs + d) * 2 * kTile, even, odd);
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

// The same of keys in memory of their own, where each lies in one row [head_dim]: few of a block are there.
template <int kR>
[[gnu::noinline]] void score_rows_of_floats(const AttentionShape& a, const void* halves, const float* scales, std::int64_t position,
                                            const float* q, float* scores) {
    for (int key = 0; key < kKeys; ++key) {
        if (!(scales[key] < 0)) continue;
        const std::uint16_t* row = static_cast<const std::uint16_t*>(halves) + (position + key) * a.head_dim;
        F sum[kR];
        for (int r = 0; r < kR; ++r) sum[r] = Simd::zero();
        for (int d = 0; d < a.head_dim; d += kTile) {
            const F value = Simd::load_f16(row + d);
            for (int r = 0; r < kR; ++r) sum[r] = Simd::fma(value, Simd::load(q + r * a.head_dim + d), sum[r]);
        }
        for (int r = 0; r < kR; ++r) scores[r * kKeys + key] += Simd::sum(sum[r]) * (-scales[key] * a.scale);
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
template <int kR, int kT>
LOWBIT_INLINE void gather(const AttentionShape& a, const void* values, std::int64_t position, int pairs,
                          const std::int16_t* p, const float* old, const float* more, float* out) {
    I sum[kR][kT];
    for (int r = 0; r < kR; ++r)
        for (int t = 0; t < kT; ++t) sum[r][t] = Simd::all(0);
    for (int k = 0; k < pairs; ++k) {
        B value[kT];
        for (int t = 0; t < kT; ++t)
            value[t] = load_cached<false>(values, (position + 2 * k) * a.head_dim + 2 * t * kTile);
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
// values that are kept as floats, which have none of the integers; null where there are none. kPacked: to probabilities alone.
// kMasked: some row sees only a part of the block. Stage by stage, so that rows hide each other's latencies.
template <int kR, bool kMasked, bool kPacked>
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
            if constexpr (kPacked) Simd::store(at, e);
            if (kPacked && apart == nullptr) continue;
            const F scale = Simd::load(value_scale + t);
            // The larger one second: a scale that is no number stays none.
            const F more = seen(Simd::multiply(e, Simd::max(Simd::zero(), scale)), r, t, Simd::zero());
            if (apart != nullptr) {
                const F other = Simd::max(Simd::multiply(scale, Simd::all(-1.0f)), Simd::zero());
                Simd::store(apart + r * kKeys + t, seen(Simd::multiply(e, other), r, t, Simd::zero()));
            }
            if constexpr (kPacked) continue;
            weighted = Simd::add(weighted, more);
            Simd::store(at, more);
        }
        found.total[r] = Simd::sum(sum);
        found.weighted[r] = Simd::sum(weighted);
    }
    if constexpr (kPacked) return;
    float inverse[kTile];
    Simd::store(inverse, Simd::divide(Simd::all(kLargest), Simd::max(Simd::load(found.weighted), Simd::all(1e-30f))));
    for (int r = 0; r < kR; ++r) {
        for (int t = 0; t < kKeys; t += kTile) {
            const F v = Simd::multiply(Simd::load(scores + r * kKeys + t), Simd::all(inverse[r]));
            Simd::store_shorts(p + r * kKeys + t, Simd::to_int(v));
        }
    }
}

}  // namespace
}  // namespace lowbit
