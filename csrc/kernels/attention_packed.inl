// Packed keys and values in a block of 64 positions: made ready once for all queries, then multiplied as bytes.
#pragma once

#include "kernels/attention_block.inl"
#include "kernels/kv_codes.inl"

namespace lowbit {
namespace {

// One side of a block, in whole numbers of a byte. x = scale * level + offset.
//   scale, offset: [groups][64] of positions; or [64 / tokens][head_dim] of channels, where tokens share them
//   raw: [64], of a guarded side, below zero where a vector is float16; its `scale` is 0 there
struct ReadyBlock {
    const std::int8_t* levels = nullptr;
    float *scale = nullptr, *offset = nullptr, *raw = nullptr;
    std::int8_t* memory = nullptr;
    int groups = 1, width = 0;  // of channels
    bool floats = false, poisoned = false;  // whether some vector is float16, or no number

    // Takes its memory from `at`.
    ReadyBlock(const KVSide& s, int head_dim, float*& at) {
        memory = reinterpret_cast<std::int8_t*>(at);
        scale = at + kCacheBlock / 4 * head_dim;
        const int most = head_dim / kTile * kCacheBlock > 2 * head_dim ? head_dim / kTile * kCacheBlock : 2 * head_dim;
        offset = scale + most;
        raw = offset + most;
        at = raw + kCacheBlock;
        groups = s.per_channel() ? 1 : s.groups(head_dim);
        width = head_dim / groups;
    }

    LOWBIT_INLINE_MEMBER void read(const KVSide& s, int head_dim, const void* data, std::int64_t position) {
        const std::uint8_t* block = static_cast<const std::uint8_t*>(data) + position / kCacheBlock * s.block_bytes(head_dim);
        levels = unpacked(s, head_dim, block, memory);
        const std::uint16_t* scales = reinterpret_cast<const std::uint16_t*>(block + s.code_bytes(head_dim));
        const int count = s.scales(head_dim);
        const F unit = Simd::all(s.unit), shift = Simd::all(static_cast<float>(s.shift())), minus = Simd::all(-1.0f);
        floats = false;
        F nothing = Simd::zero();
        if (s.guarded()) {
            F least = Simd::zero();
            for (int i = 0; i < count; i += kTile) {
                const F given = Simd::load_f16(scales + i);
                Simd::store(raw + i, given);
                nothing = Simd::fma(given, Simd::zero(), nothing);
                least = Simd::min(given, least);  // second: a scale that is no number is passed over
                Simd::store(scale + i, Simd::max(Simd::zero(), given));
            }
            floats = Simd::largest(Simd::multiply(least, minus)) > 0;
            poisoned = Simd::sum(nothing) != 0;
            return;
        }
        for (int i = 0; i < count; i += kTile) {
            const F given = Simd::load_f16(scales + i);
            Simd::store(scale + i, Simd::multiply(given, unit));
            nothing = Simd::fma(given, Simd::zero(), nothing);
            if (s.offset == KVOffset::none) continue;
            const F more = Simd::load_f16(scales + count + i);
            if (s.offset == KVOffset::minimum) {
                Simd::store(offset + i, Simd::fma(given, shift, more));
            } else {
                Simd::store(offset + i, Simd::multiply(given, Simd::fma(more, minus, shift)));
            }
        }
        poisoned = Simd::sum(nothing) != 0;  // no number is equal to none
    }
};

// Queries as integers, x = scale * code. Where tokens share scales of channels, these are multiplied into the queries of each part of
// a block: [parts][rows], and `more` is what offsets of channels give. sums: [rows][groups], of codes, where groups have offsets.
struct ReadyQueries {
    std::int16_t* codes;
    float *scale, *more, *sums;
};

LOWBIT_INLINE void fold_queries(const AttentionShape& a, const ReadyBlock& keys, const float* q, int rows, const ReadyQueries& to, float* folded) {
    const int n = a.head_dim;
    for (int part = 0; part < kCacheBlock / a.keys.tokens; ++part) {
        const float *scale = keys.scale + part * n, *offset = keys.offset + part * n;
        for (int r = 0; r < rows; ++r) {
            const int at = part * rows + r;
            F more = Simd::zero();
            for (int d = 0; d < n; d += kTile) {
                const F v = Simd::load(q + r * n + d);
                Simd::store(folded + d, Simd::multiply(v, Simd::load(scale + d)));
                if (a.keys.offset != KVOffset::none) more = Simd::fma(v, Simd::load(offset + d), more);
            }
            to.scale[at] = scale_by_norm(folded, n);
            to.more[at] = Simd::sum(more) * a.scale;
            to_shorts(folded, n, to.scale[at], to.codes + std::int64_t{at} * n);
        }
    }
}

// scores[r][16 t ..] = q[r] . K for kR rows and kT tiles of keys
template <int kR, int kT>
LOWBIT_INLINE void score_packed(const AttentionShape& a, const ReadyBlock& keys, int tile, const ReadyQueries& q, int rows, int r0, float* scores) {
    const int pairs = a.head_dim / 2, of_group = keys.width / 2;
    const int from = (a.keys.per_channel() ? tile * kTile / a.keys.tokens * rows : 0) + r0;
    const std::int16_t* codes = q.codes + std::int64_t{from} * a.head_dim;
    F total[kR][kT];
    for (int r = 0; r < kR; ++r)
        for (int t = 0; t < kT; ++t) total[r][t] = Simd::zero();
    for (int g = 0; g < keys.groups; ++g) {
        I sum[kR][kT];
        for (int r = 0; r < kR; ++r)
            for (int t = 0; t < kT; ++t) sum[r][t] = Simd::all(0);
        for (int d = g * of_group; d < (g + 1) * of_group; ++d) {
            B key[kT];
            for (int t = 0; t < kT; ++t) key[t] = load_cached<true>(keys.levels, ((tile + t) * pairs + d) * 2 * kTile);
            for (int r = 0; r < kR; ++r) {
                const B value = two_shorts(codes + r * a.head_dim + 2 * d);
                for (int t = 0; t < kT; ++t) sum[r][t] = Simd::dot_pairs(sum[r][t], key[t], value);
            }
        }
        if (a.keys.per_channel()) {
            for (int r = 0; r < kR; ++r)
                for (int t = 0; t < kT; ++t) total[r][t] = Simd::to_float(sum[r][t]);
            continue;
        }
        for (int t = 0; t < kT; ++t) {
            const int at = g * kCacheBlock + (tile + t) * kTile;
            const F scale = Simd::load(keys.scale + at);
            for (int r = 0; r < kR; ++r) total[r][t] = Simd::fma(Simd::to_float(sum[r][t]), scale, total[r][t]);
            if (a.keys.offset == KVOffset::none) continue;
            const F offset = Simd::load(keys.offset + at);
            for (int r = 0; r < kR; ++r)
                total[r][t] = Simd::fma(offset, Simd::all(q.sums[(r0 + r) * keys.groups + g]), total[r][t]);
        }
    }
    for (int r = 0; r < kR; ++r) {
        const F factor = Simd::all(a.scale * q.scale[from + r]);
        const F more = Simd::all(a.keys.per_channel() ? q.more[from + r] : 0.0f);
        for (int t = 0; t < kT; ++t) Simd::store(scores + r * kKeys + t * kTile, Simd::fma(total[r][t], factor, more));
    }
}

// Of kR rows: probabilities times the scales of one group as integers, what one of these stands for, and the sum of probabilities
// times offsets, of positions [begin, end). scale, offset: of positions, or null where they belong to channels; poisoned: whether some
// scale is no number.
struct Weighed {
    alignas(64) float step[kTile], more[kTile];
};

template <int kR, bool kMasked>
LOWBIT_INLINE void weigh(const float* scale, const float* offset, bool poisoned, int position, const int* first, const int* last, int begin,
                         int end, const float* e, std::int16_t* p, Weighed& found) {
    const auto seen = [&](F v, int r, int t) {
        if constexpr (!kMasked) return v;
        return Simd::within(v, first[r] - position - t, last[r] - position - t, Simd::zero());
    };
    for (int r = 0; r < kR; ++r) {
        F peak = Simd::zero(), nothing = Simd::zero(), more = Simd::zero();
        for (int t = begin; t < end; t += kTile) {
            const F v = Simd::load(e + r * kKeys + t);
            const F weighed = scale == nullptr ? v : seen(Simd::multiply(v, Simd::load(scale + t)), r, t);
            peak = Simd::max(peak, Simd::abs(weighed));
            if (poisoned) nothing = Simd::fma(weighed, Simd::zero(), nothing);
            if (scale == nullptr) {
                more = Simd::add(more, v);
            } else if (offset != nullptr) {
                // One rounding, masked or not; a compiler might join a product and a sum in one of the two alone.
                more = Simd::fma(v, seen(Simd::load(offset + t), r, t), more);
            }
        }
        const float most = Simd::largest(peak), none = poisoned ? Simd::sum(nothing) : 0;
        found.more[r] = scale == nullptr || offset != nullptr ? Simd::sum(more) : 0;
        found.step[r] = none == 0 ? most * (1 / kLargest) : none;
        const F inverse = Simd::all(none == 0 && most > 1e-30f ? kLargest / most : 0.0f);
        for (int t = begin; t < end; t += kTile) {
            const F v = Simd::load(e + r * kKeys + t);
            const F weighed = scale == nullptr ? v : seen(Simd::multiply(v, Simd::load(scale + t)), r, t);
            Simd::store_shorts(p + r * kKeys + t, Simd::to_int(Simd::multiply(weighed, inverse)));
        }
    }
}

// out[r][16 t ..] = old[r] out[r] + step[r] (p[r] . V) [times scales of channels] + more[r] [times offsets of channels], for kR rows and
// kT tiles of channels, of `pairs` pairs of positions from pair `from` of the block.
template <int kR, int kT>
LOWBIT_INLINE void gather_packed(const AttentionShape& a, const std::int8_t* levels, int from, int pairs, const std::int16_t* p,
                                 const float* old, const Weighed& w, const float* scale, const float* offset, float* out) {
    I sum[kR][kT];
    for (int r = 0; r < kR; ++r)
        for (int t = 0; t < kT; ++t) sum[r][t] = Simd::all(0);
    for (int k = from; k < from + pairs; ++k) {
        B value[kT];
        for (int t = 0; t < kT; ++t) value[t] = load_cached<true>(levels, 2 * k * a.head_dim + 2 * t * kTile);
        for (int r = 0; r < kR; ++r) {
            const B two = two_shorts(p + r * kKeys + 2 * k);
            for (int t = 0; t < kT; ++t) sum[r][t] = Simd::dot_pairs(sum[r][t], value[t], two);
        }
    }
    for (int r = 0; r < kR; ++r) {
        for (int t = 0; t < kT; ++t) {
            float* at = out + r * a.head_dim + t * kTile;
            F v = Simd::to_float(sum[r][t]);
            if (scale != nullptr) v = Simd::multiply(v, Simd::load(scale + t * kTile));
            F before = Simd::zero();
            if (offset != nullptr) {
                before = Simd::multiply(Simd::all(w.more[r]), Simd::load(offset + t * kTile));
            } else if (scale == nullptr) {
                before = Simd::all(w.more[r]);
            }
            before = Simd::fma(Simd::load(at), Simd::all(old[r]), before);
            Simd::store(at, Simd::fma(v, Simd::all(w.step[r]), before));
        }
    }
}

// The same for all channels [begin, end).
template <int kR>
LOWBIT_INLINE void gather_channels(const AttentionShape& a, const std::int8_t* levels, int from, int pairs, const std::int16_t* p,
                                   const float* old, const Weighed& w, const float* scale, const float* offset, int begin, int end, float* out) {
    constexpr int kChannelTiles = Simd::kRows < 6 ? 1 : kR > 3 ? 2 : 4;
    const auto of = [](const float* all, int d) { return all == nullptr ? nullptr : all + d; };
    int d = begin;
    for (; d + kChannelTiles * kTile <= end; d += kChannelTiles * kTile)
        gather_packed<kR, kChannelTiles>(a, levels + 2 * d, from, pairs, p, old, w, of(scale, d), of(offset, d), out + d);
    for (; d < end; d += kTile) gather_packed<kR, 1>(a, levels + 2 * d, from, pairs, p, old, w, of(scale, d), of(offset, d), out + d);
}

// Adds the values of a block to kR rows. e [kR, 64]: probabilities, 0 where a row does not see; old, now: factors of what was there and of e.
template <int kR, bool kMasked>
LOWBIT_INLINE void gather_block(const AttentionShape& a, const ReadyBlock& values, int position, const int* first, const int* last, int end,
                                const float* e, std::int16_t* p, const float* old, const float* now, float* out) {
    const KVSide& s = a.values;
    Weighed w;
    const auto scaled = [&] {
        for (int r = 0; r < kR; ++r) {
            w.step[r] *= now[r];
            w.more[r] *= now[r];
        }
    };
    if (!s.per_channel()) {
        const int pairs = (least(end, kKeys) + 1) / 2;
        for (int g = 0; g < values.groups; ++g) {
            const float* offset = s.offset == KVOffset::none ? nullptr : values.offset + g * kKeys;
            weigh<kR, kMasked>(values.scale + g * kKeys, offset, values.poisoned, position, first, last, 0, kKeys, e, p, w);
            scaled();
            gather_channels<kR>(a, values.levels, 0, pairs, p, old, w, nullptr, nullptr, g * values.width, (g + 1) * values.width, out);
        }
        return;
    }
    // Parts of a block that share scales of channels: a row that sees nothing of one is left alone, as its scales may be no numbers.
    alignas(64) float kept[kTile], one[kTile];
    for (int r = 0; r < kTile; ++r) one[r] = 1;
    for (int r = 0; r < kR; ++r) kept[r] = old[r];
    for (int part = 0; part < kKeys / s.tokens; ++part) {
        const int begin = part * s.tokens, pairs = s.tokens / 2;
        const float *scale = values.scale + part * a.head_dim, *offset = s.offset == KVOffset::none ? nullptr : values.offset + part * a.head_dim;
        weigh<kR, kMasked>(nullptr, nullptr, false, position, first, last, begin, begin + s.tokens, e, p, w);
        bool all = true;
        for (int r = 0; r < kR; ++r) all = all && w.more[r] > 0;
        scaled();
        if (all) {
            gather_channels<kR>(a, values.levels, begin / 2, pairs, p, kept, w, scale, offset, 0, a.head_dim, out);
            for (int r = 0; r < kR; ++r) kept[r] = 1;
            continue;
        }
        for (int r = 0; r < kR; ++r) {
            if (!(w.more[r] > 0)) continue;
            Weighed own;
            own.step[0] = w.step[r];
            own.more[0] = w.more[r];
            gather_channels<1>(a, values.levels, begin / 2, pairs, p + r * kKeys, kept + r, own, scale, offset, 0, a.head_dim, out + r * a.head_dim);
            kept[r] = 1;
        }
    }
    for (int r = 0; r < kR; ++r) {  // of which no part was seen
        if (kept[r] == one[r]) continue;
        for (int d = 0; d < a.head_dim; d += kTile)
            Simd::store(out + r * a.head_dim + d, Simd::multiply(Simd::load(out + r * a.head_dim + d), Simd::all(kept[r])));
    }
}

}  // namespace
}  // namespace lowbit
