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

#include "kernels/attention_block.inl"

namespace lowbit {
namespace {

// What the rows of one call need besides what they are given.
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
    (a.format == KVFormat::int8 ? attend_all<true> : attend_all<false>)(a, kv, q, rows, first, last, out, maximum, denominator, memory);
}

}  // namespace
}  // namespace lowbit
