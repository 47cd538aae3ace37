// Softmax attention over a cache, with the running maximum of Milakov and Gimelshein (2018), as in FlashAttention
// (Dao et al. 2022, algorithm 1): keys are taken in blocks, scores never leave the cache.
#include "kernels/linear.h"

namespace lowbit {
namespace {

constexpr int kKeys = 64;  // positions a block; a cache holds whole blocks
constexpr float kNever = -1e30f;

template <bool kInt8>
LOWBIT_INLINE F load_cached(const void* base, std::int64_t at) {
    if constexpr (kInt8) return Simd::load_i8(static_cast<const std::int8_t*>(base) + at);
    return Simd::load_f16(static_cast<const std::uint16_t*>(base) + at);
}

// scores[r][16 t ..] = q[r] . K for kR rows and kT tiles of keys
template <bool kInt8, int kR, int kT>
LOWBIT_INLINE void score(const AttentionShape& a, const void* keys, std::int64_t tile, const float* q, float* scores) {
    F sum[kR][kT];
    for (int r = 0; r < kR; ++r)
        for (int t = 0; t < kT; ++t) sum[r][t] = Simd::zero();
    for (int d = 0; d < a.head_dim; ++d) {
        F key[kT];
        for (int t = 0; t < kT; ++t) key[t] = load_cached<kInt8>(keys, ((tile + t) * a.head_dim + d) * kTile);
        for (int r = 0; r < kR; ++r) {
            const F value = Simd::all(q[r * a.head_dim + d]);
            for (int t = 0; t < kT; ++t) sum[r][t] = Simd::fma(value, key[t], sum[r][t]);
        }
    }
    for (int r = 0; r < kR; ++r)
        for (int t = 0; t < kT; ++t) Simd::store(scores + r * kKeys + t * kTile, sum[r][t]);
}

// out[r][16 t ..] += scores[r] . V for kR rows and kT tiles of channels
template <bool kInt8, int kR, int kT>
LOWBIT_INLINE void gather(const AttentionShape& a, const void* values, std::int64_t position, int count,
                          const float* scores, float* out) {
    F sum[kR][kT];
    for (int r = 0; r < kR; ++r)
        for (int t = 0; t < kT; ++t) sum[r][t] = Simd::load(out + r * a.head_dim + t * kTile);
    for (int k = 0; k < count; ++k) {
        F value[kT];
        for (int t = 0; t < kT; ++t) value[t] = load_cached<kInt8>(values, (position + k) * a.head_dim + t * kTile);
        for (int r = 0; r < kR; ++r) {
            const F p = Simd::all(scores[r * kKeys + k]);
            for (int t = 0; t < kT; ++t) sum[r][t] = Simd::fma(p, value[t], sum[r][t]);
        }
    }
    for (int r = 0; r < kR; ++r)
        for (int t = 0; t < kT; ++t) Simd::store(out + r * a.head_dim + t * kTile, sum[r][t]);
}

template <bool kInt8, int kR>
void score_rows(const AttentionShape& a, const void* keys, std::int64_t tile, const float* q, float* scores) {
    constexpr int kT = Simd::kRows < 6 ? 1 : kR >= 3 ? 2 : 4;  // sums enough to hide the latency of each
    for (int t = 0; t < kKeys / kTile; t += kT) score<kInt8, kR, kT>(a, keys, tile + t, q, scores + t * kTile);
}

template <bool kInt8, int kR>
void gather_rows(const AttentionShape& a, const KeyValues& kv, std::int64_t position, int count, const float* scores,
                 float* out) {
    constexpr int kT = Simd::kRows > 2 ? 4 : 2;
    const std::size_t size = kInt8 ? 1 : 2;
    int d = 0;
    for (; d + kT * kTile <= a.head_dim; d += kT * kTile)
        gather<kInt8, kR, kT>(a, static_cast<const char*>(kv.values) + d * size, position, count, scores, out + d);
    for (; d < a.head_dim; d += kTile)
        gather<kInt8, kR, 1>(a, static_cast<const char*>(kv.values) + d * size, position, count, scores, out + d);
}

// One block of keys for kR rows: scores, softmax with a running maximum, values.
template <bool kInt8, int kR>
void attend_block(const AttentionShape& a, const KeyValues& kv, std::int64_t position, const float* q, const int* first,
                  const int* last, float* out, float* maximum, float* denominator, float* scores) {
    score_rows<kInt8, kR>(a, kv.keys, position / kTile, q, scores);
    int end = 0;
    for (int r = 0; r < kR; ++r) {
        float* row = scores + r * kKeys;
        const int from = first[r] - static_cast<int>(position), to = last[r] - static_cast<int>(position);
        F peak = Simd::all(kNever);
        for (int t = 0; t < kKeys; t += kTile) {
            F v = Simd::multiply(Simd::load(row + t), Simd::all(a.scale));
            if constexpr (kInt8) v = Simd::multiply(v, Simd::load(kv.key_scale + position + t));
            if (a.soft_cap > 0) {
                v = Simd::multiply(hyperbolic_tangent(Simd::multiply(v, Simd::all(1.0f / a.soft_cap))),
                                   Simd::all(a.soft_cap));
            }
            v = Simd::within(v, from - t, to - t, Simd::all(kNever));
            peak = Simd::max(peak, v);
            Simd::store(row + t, v);
        }
        const float highest = Simd::largest(peak), before = maximum[r];
        const float now = highest > before ? highest : before;
        F total = Simd::zero();
        for (int t = 0; t < kKeys; t += kTile) {
            F p = exponential(Simd::add(Simd::load(row + t), Simd::all(-now)));
            p = Simd::within(p, from - t, to - t, Simd::zero());
            total = Simd::add(total, p);
            if constexpr (kInt8) p = Simd::multiply(p, Simd::load(kv.value_scale + position + t));
            Simd::store(row + t, p);
        }
        if (now > before) {
            float factor[kTile];
            Simd::store(factor, exponential(Simd::all(before - now)));
            denominator[r] *= factor[0];
            maximum[r] = now;
            for (int d = 0; d < a.head_dim; d += kTile)
                Simd::store(out + r * a.head_dim + d,
                            Simd::multiply(Simd::load(out + r * a.head_dim + d), Simd::all(factor[0])));
        }
        denominator[r] += Simd::sum(total);
        end = to > end ? to : end;
    }
    gather_rows<kInt8, kR>(a, kv, position, least(end, kKeys), scores, out);
}

template <bool kInt8>
void attend_all(const AttentionShape& a, const KeyValues& kv, const float* q, int rows, const int* first,
                const int* last, float* out, float* maximum, float* denominator, float* scratch) {
    int begin = first[0], end = last[0];
    for (int r = 0; r < rows; ++r) {
        begin = least(begin, first[r]);
        end = last[r] > end ? last[r] : end;
        maximum[r] = kNever;
        denominator[r] = 0;
    }
    for (int i = 0; i < rows * a.head_dim; i += kTile) Simd::store(out + i, Simd::zero());
    for (int position = begin / kKeys * kKeys; position < end; position += kKeys) {
        int r = 0;
        const auto take = [&](auto block, int count) {
            // Rows that see nothing of this block are left alone: causal attention halves its work so.
            bool sees = false;
            for (int i = r; i < r + count; ++i) sees = sees || (last[i] > position && first[i] < position + kKeys);
            if (sees) {
                block(a, kv, position, q + r * a.head_dim, first + r, last + r, out + r * a.head_dim, maximum + r,
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
// times values, and `denominator` the sums of exp(score - maximum), so that parts can be joined. scratch: 6 x 64.
void attend(const AttentionShape& a, const KeyValues& kv, const float* q, int rows, const int* first, const int* last,
            float* out, float* maximum, float* denominator, float* scratch) {
    (a.int8 ? attend_all<true> : attend_all<false>)(a, kv, q, rows, first, last, out, maximum, denominator, scratch);
}

LOWBIT_INLINE float to_int8(const float* x, int n, std::int8_t* codes) {
    const float peak = largest_magnitude(x, n), inverse = peak > 1e-35f ? 127.0f / peak : 0.0f;
    for (int i = 0; i < n; i += kTile) {
        alignas(64) std::int8_t sixteen[kTile];
        Simd::store_bytes(sixteen, Simd::to_int(Simd::multiply(Simd::load_some(x + i, n - i), Simd::all(inverse))));
        for (int j = 0; j < least(kTile, n - i); ++j) codes[i + j] = sixteen[j];
    }
    return peak / 127.0f;
}

void append(const AttentionShape& a, const KeyValues& kv, const float* key, const float* value, int position) {
    const std::int64_t tile = std::int64_t{position} / kTile * a.head_dim * kTile + position % kTile;
    const std::int64_t row = std::int64_t{position} * a.head_dim;
    if (a.int8) {
        std::int8_t codes[kTile * 64];
        kv.key_scale[position] = to_int8(key, a.head_dim, codes);
        for (int d = 0; d < a.head_dim; ++d) static_cast<std::int8_t*>(kv.keys)[tile + d * kTile] = codes[d];
        kv.value_scale[position] = to_int8(value, a.head_dim, static_cast<std::int8_t*>(kv.values) + row);
        return;
    }
    for (int d = 0; d < a.head_dim; d += kTile) {
        std::uint16_t halves[kTile];
        Simd::store_f16(halves, Simd::load(key + d));
        for (int j = 0; j < kTile; ++j) static_cast<std::uint16_t*>(kv.keys)[tile + (d + j) * kTile] = halves[j];
        Simd::store_f16(static_cast<std::uint16_t*>(kv.values) + row + d, Simd::load(value + d));
    }
}

}  // namespace
}  // namespace lowbit
