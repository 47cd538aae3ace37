// Softmax attention over a cache, with the running maximum of Milakov and Gimelshein (2018), as in FlashAttention
// (Dao et al. 2022, algorithm 1): keys are taken in blocks, scores never leave the cache.
//
// Products are of 16-bit integers with a scale for each vector, summed exactly in 32 bits: twice as fast as float32, and
// finer than float16. That no sum overflows is Cauchy and Schwarz: |sum q k| <= |q| |k|, and each norm is below 2^15.5.
//
// A key or value with channels in the ten thousands would lose all its others so. It is kept in float16, has no part in
// products of integers, and is multiplied in float32. What becomes of a position depends on nothing but its own
// key and value, so that batches and chunks change no bit.
#pragma once

#include "kernels/attention_packed.inl"

namespace lowbit {
namespace {

// What the rows of one call need besides what they are given.
struct AttentionScratch {
    float *scores, *apart;  // [6, 64] each
    std::int16_t* p;        // [6, 64]
    ReadyQueries q;         // as they are: [rows], [rows, head_dim]
    ReadyQueries folded;    // [parts, rows]
    float* row;             // [head_dim]
    ReadyBlock keys, values;

    AttentionScratch(const AttentionShape& a, float*& at, int rows, int padded)
        : scores(take(at, 6 * kKeys)),
          apart(take(at, 6 * kKeys)),
          p(reinterpret_cast<std::int16_t*>(take(at, 6 * kKeys / 2))),
          q{reinterpret_cast<std::int16_t*>(take(at, padded * a.head_dim / 2)), take(at, padded), nullptr, take(at, padded * a.head_dim / kTile)},
          folded{reinterpret_cast<std::int16_t*>(take(at, padded * a.head_dim)), take(at, 2 * padded), take(at, 2 * padded), nullptr},
          row(take(at, a.head_dim)),
          keys(a.keys, a.head_dim, at),
          values(a.values, a.head_dim, at) {
        if (!a.keys.per_channel()) folded = q;
        static_cast<void>(rows);
    }

 private:
    LOWBIT_INLINE_MEMBER static float* take(float*& at, std::int64_t count) {
        float* here = at;
        at += count;
        return here;
    }
};

// One block of keys for kR rows: scores, softmax with a running maximum, values.
template <bool kPackedKeys, bool kPackedValues, int kR>
void attend_block(const AttentionShape& a, const KeyValues& kv, std::int64_t position, int rows, int r0, const int* first,
                  const int* last, const float* q, float* out, float* maximum, float* denominator,
                  const AttentionScratch& scratch) {
    constexpr int kKeyTiles = Simd::kRows < 6 ? 1 : kR >= 3 ? 2 : 4;  // sums enough to hide the latency of each
    constexpr int kChannelTiles = Simd::kRows < 6 ? 1 : kR > 3 ? 2 : 4;
    if constexpr (kPackedKeys) {
        if (kKeyTiles <= 2 || a.keys.tokens != 32) {
            for (int t = 0; t < kKeys / kTile; t += kKeyTiles)
                score_packed<kR, kKeyTiles>(a, scratch.keys, t, scratch.folded, rows, r0, scratch.scores + t * kTile);
        } else {
            for (int t = 0; t < kKeys / kTile; t += 2)
                score_packed<kR, 2>(a, scratch.keys, t, scratch.folded, rows, r0, scratch.scores + t * kTile);
        }
        if (scratch.keys.floats) score_rows_of_floats<kR>(a, kv.keys.halves, scratch.keys.raw, position, q, scratch.scores);
    } else {
        for (int t = 0; t < kKeys / kTile; t += kKeyTiles) {
            score<kR, kKeyTiles>(a, kv.keys, position / kTile + t, scratch.q.codes + std::int64_t{r0} * a.head_dim,
                                 scratch.q.scale + r0, scratch.scores + t * kTile);
        }
        if (has_floats(kv.keys.scale + position)) score_floats<kR>(a, kv.keys.data, kv.keys.scale + position, position, q, scratch.scores);
    }
    const int start = static_cast<int>(position);
    bool whole = true;
    int end = 0;
    for (int r = 0; r < kR; ++r) {
        whole = whole && first[r] <= start && last[r] >= start + kKeys;
        end = last[r] - start > end ? last[r] - start : end;
    }
    Softmax found;
    const float* value_scale = kPackedValues ? scratch.values.raw : kv.values.scale + position;
    float* apart = (kPackedValues ? scratch.values.floats : has_floats(value_scale)) ? scratch.apart : nullptr;
    if (whole) {
        softmax<kR, false, kPackedValues>(a, value_scale, start, first, last, scratch.scores, apart, scratch.p, found);
    } else {
        softmax<kR, true, kPackedValues>(a, value_scale, start, first, last, scratch.scores, apart, scratch.p, found);
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
        if constexpr (!kPackedValues) more[r] *= found.weighted[r] * (1 / kLargest);
    }
    const int pairs = (least(end, kKeys) + 1) / 2;
    if constexpr (kPackedValues) {
        if (whole) {
            gather_block<kR, false>(a, scratch.values, start, first, last, end, scratch.scores, scratch.p, old, more, out);
        } else {
            gather_block<kR, true>(a, scratch.values, start, first, last, end, scratch.scores, scratch.p, old, more, out);
        }
    } else {
        const auto gather_from = [&]<int kT>(int d) {
            gather<kR, kT>(a, static_cast<const std::int16_t*>(kv.values.data) + 2 * d, position, pairs, scratch.p, old, more, out + d);
        };
        int d = 0;
        for (; d + kChannelTiles * kTile <= a.head_dim; d += kChannelTiles * kTile)
            gather_from.template operator()<kChannelTiles>(d);
        for (; d < a.head_dim; d += kTile) gather_from.template operator()<1>(d);
    }
    if (apart != nullptr) gather_floats<kR>(a, kv.values.halves, position, pairs, apart, of_floats, out);
}

template <bool kPackedKeys, bool kPackedValues>
void attend_all(const AttentionShape& a, const KeyValues& kv, const float* q, int rows, const int* first,
                const int* last, float* out, float* maximum, float* denominator, float* memory) {
    const int padded = (rows + kTile - 1) / kTile * kTile;
    AttentionScratch scratch(a, memory, rows, padded);
    int begin = first[0], end = last[0];
    for (int r = 0; r < rows; ++r) {
        begin = least(begin, first[r]);
        end = last[r] > end ? last[r] : end;
        maximum[r] = kNever;
        denominator[r] = 0;
        if (kPackedKeys && a.keys.per_channel()) continue;
        std::int16_t* codes = scratch.q.codes + std::int64_t{r} * a.head_dim;
        scratch.q.scale[r] = scale_by_norm(q + r * a.head_dim, a.head_dim);
        to_shorts(q + r * a.head_dim, a.head_dim, scratch.q.scale[r], codes);
        if (!kPackedKeys || a.keys.offset == KVOffset::none) continue;
        for (int g = 0; g < scratch.keys.groups; ++g) {
            int sum = 0;
            for (int d = g * scratch.keys.width; d < (g + 1) * scratch.keys.width; ++d) sum += codes[d];
            scratch.q.sums[r * scratch.keys.groups + g] = static_cast<float>(sum);
        }
    }
    for (int i = 0; i < rows * a.head_dim; i += kTile) Simd::store(out + i, Simd::zero());
    for (int position = begin / kKeys * kKeys; position < end; position += kKeys) {
        int r = 0;
        bool ready = false;
        const auto take = [&](auto block, int count) {
            // Rows that see nothing of this block are left alone: causal attention halves its work so.
            bool sees = false;
            for (int i = r; i < r + count; ++i) sees = sees || (last[i] > position && first[i] < position + kKeys && first[i] < last[i]);
            if (sees) {
                if (!ready) {
                    if constexpr (kPackedKeys) {
                        scratch.keys.read(a.keys, a.head_dim, kv.keys.data, position);
                        if (a.keys.per_channel()) fold_queries(a, scratch.keys, q, rows, scratch.folded, scratch.row);
                    }
                    if constexpr (kPackedValues) scratch.values.read(a.values, a.head_dim, kv.values.data, position);
                    ready = true;
                }
                block(a, kv, position, rows, r, first + r, last + r, q + r * a.head_dim, out + r * a.head_dim, maximum + r,
                      denominator + r, scratch);
            }
            r += count;
        };
        if constexpr (Simd::kRows >= 6) {
            while (rows - r >= 6) take(attend_block<kPackedKeys, kPackedValues, 6>, 6);
        }
        while (rows - r >= 3) take(attend_block<kPackedKeys, kPackedValues, 3>, 3);
        while (rows - r >= 1) take(attend_block<kPackedKeys, kPackedValues, 1>, 1);
    }
}

// q [rows, head_dim]; row r sees positions [first[r], last[r]). out [rows, head_dim] holds sums of exp(score - maximum)
// times values, and `denominator` the sums of exp(score - maximum), so that parts can be joined. memory: attention_memory.
void attend(const AttentionShape& a, const KeyValues& kv, const float* q, int rows, const int* first, const int* last,
            float* out, float* maximum, float* denominator, float* memory) {
    const auto all = a.keys.packed() ? (a.values.packed() ? attend_all<true, true> : attend_all<true, false>)
                                     : (a.values.packed() ? attend_all<false, true> : attend_all<false, false>);
    all(a, kv, q, rows, first, last, out, maximum, denominator, memory);
}

}  // namespace
}  // namespace lowbit
