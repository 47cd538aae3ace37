#include "kernels/causal.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

namespace lowbit {

#ifdef LOWBIT_HAS_BF16
namespace {

constexpr int kQueries = 6;             // rows whose sums are in registers
constexpr int kVectors = 4;             // and registers for each
constexpr int kTileWidth = kVectors * kLanes;  // keys, or channels, of a tile
constexpr int kBlock = 96;              // queries that a thread takes at once

int tiles(int count) { return (count + kTileWidth - 1) / kTileWidth; }

// Keys as [tile of keys][pair of channels][key][2], values as [tile of channels][pair of keys][channel][2], zeros beyond the ends.
struct Packed {
    std::uint32_t *keys, *values;
};

void pack(const CausalShape& s, const std::uint16_t* k, const std::uint16_t* v, const Packed& out) {
    const int pairs = s.width / 2, key_tiles = tiles(s.tokens), key_pairs = key_tiles * kTileWidth / 2;
    std::memset(out.keys, 0, sizeof(std::uint32_t) * key_tiles * pairs * kTileWidth);
    for (int t = 0; t < s.tokens; ++t) {
        std::uint32_t* to = out.keys + std::int64_t{t / kTileWidth} * pairs * kTileWidth + t % kTileWidth;
        for (int p = 0; p < pairs; ++p) std::memcpy(to + p * kTileWidth, k + std::int64_t{t} * s.width + 2 * p, 4);
    }
    std::memset(out.values, 0, sizeof(std::uint32_t) * tiles(s.width) * key_pairs * kTileWidth);
    for (int t = 0; t < s.tokens; ++t) {
        for (int c = 0; c < s.width; ++c) {
            std::uint32_t* to = out.values + (std::int64_t{c / kTileWidth} * key_pairs + t / 2) * kTileWidth + c % kTileWidth;
            *to |= std::uint32_t{v[std::int64_t{t} * s.width + c]} << (t % 2 ? 16 : 0);
        }
    }
}

// e^x for x <= 0, within 2 units of the last place; 0 where it is too small for a float. Cody and Waite's reduction, and a
// polynomial of degree 6 (Cephes).
LOWBIT_BF16 inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// scores [count] to probabilities in bfloat16; those from `count` to `padded` become 0.
LOWBIT_BF16 void softmax(float* scores, int count, int padded, float scale, std::uint16_t* out) {
    const __m512 factor = _mm512_set1_ps(scale);
    __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, scores + i), factor);
        _mm512_storeu_ps(scores + i, v);
        largest = _mm512_mask_max_ps(largest, mask, largest, v);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < count; i += kLanes) {
        const __m512 less = _mm512_sub_ps(_mm512_loadu_ps(scores + i), top);
        // What is not a number stays so.
        const __m512 e = _mm512_mask_mov_ps(exponential(less), _mm512_cmp_ps_mask(less, less, _CMP_UNORD_Q), less);
        _mm512_storeu_ps(scores + i, e);
        sum = _mm512_mask_add_ps(sum, first_lanes(count - i), sum, e);
    }
    const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    for (int i = 0; i < padded; i += kLanes) {
        const __m512 p = _mm512_maskz_mul_ps(first_lanes(count - i), _mm512_loadu_ps(scores + i), share);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(p));
    }
}

// Memory of one thread: scores of kQueries rows, and their probabilities.
struct Scratch {
    float* scores;
    std::uint16_t* shares;
};

// Queries [first, first + count), at most kQueries, of one head: q and out begin at the head's first token.
LOWBIT_BF16 void attend(const CausalShape& s, const std::uint16_t* q, const Packed& packed, int first, int count,
                        const Scratch& scratch, std::uint16_t* out) {
    const int pairs = s.width / 2, stride = tiles(s.tokens) * kTileWidth, seen = first + count, key_tiles = tiles(seen);
    // Rows that are not there repeat the first.
    std::uint32_t queries[kQueries * 256];
    for (int r = 0; r < kQueries; ++r)
        std::memcpy(queries + r * pairs, q + std::int64_t{first + (r < count ? r : 0)} * s.width, sizeof(std::uint16_t) * s.width);
    for (int t = 0; t < key_tiles; ++t) {
        __m512 sums[kQueries][kVectors];
        for (int r = 0; r < kQueries; ++r)
            for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
        add_products<kQueries, kVectors>(sums, queries, pairs, 1, packed.keys + std::int64_t{t} * pairs * kTileWidth, kTileWidth, pairs);
        for (int r = 0; r < kQueries; ++r)
            for (int v = 0; v < kVectors; ++v)
                _mm512_storeu_ps(scratch.scores + std::int64_t{r} * stride + t * kTileWidth + v * kLanes, sums[r][v]);
    }
    for (int r = 0; r < kQueries; ++r) {
        const int last = first + (r < count ? r : 0) + 1;
        softmax(scratch.scores + std::int64_t{r} * stride, last, key_tiles * kTileWidth, s.scale, scratch.shares + std::int64_t{r} * stride);
    }
    const int key_pairs = (seen + 1) / 2;
    const auto* shares = reinterpret_cast<const std::uint32_t*>(scratch.shares);
    for (int t = 0; t < tiles(s.width); ++t) {
        __m512 sums[kQueries][kVectors];
        for (int r = 0; r < kQueries; ++r)
            for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
        add_products<kQueries, kVectors>(sums, shares, stride / 2, 1,
                                         packed.values + std::int64_t{t} * stride / 2 * kTileWidth, kTileWidth, key_pairs);
        for (int r = 0; r < kQueries; ++r) {
            if (r >= count) break;
            for (int v = 0; v < kVectors; ++v) {
                const int channel = t * kTileWidth + v * kLanes;
                _mm256_mask_storeu_epi16(out + std::int64_t{first + r} * s.width + channel, first_lanes(s.width - channel),
                                         (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
            }
        }
    }
}

}  // namespace
#endif

void causal_attention(ThreadPool& pool, const CausalShape& s, const std::uint16_t* q, const std::uint16_t* k,
                      const std::uint16_t* v, std::uint16_t* out) {
#ifdef LOWBIT_HAS_BF16
    const std::int64_t stride = std::int64_t{tiles(s.tokens)} * kTileWidth, one = std::int64_t{s.tokens} * s.width;
    const std::int64_t keys = stride * s.width / 2, values = std::int64_t{tiles(s.width)} * stride / 2 * kTileWidth;
    const std::int64_t packs = std::int64_t{s.windows} * s.key_heads, blocks = (s.tokens + kBlock - 1) / kBlock;
    const std::unique_ptr<std::uint32_t[]> packed(new std::uint32_t[packs * (keys + values)]);
    const std::unique_ptr<float[]> scores(new float[pool.threads() * kQueries * stride]);
    const std::unique_ptr<std::uint32_t[]> shares(new std::uint32_t[pool.threads() * kQueries * stride / 2]);
    const auto pack_of = [&](std::int64_t i) { return Packed{packed.get() + i * (keys + values), packed.get() + i * (keys + values) + keys}; };
    pool.run([&](Worker& worker) {
        worker.share(0, packs, 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) pack(s, k + i * one, v + i * one, pack_of(i));
        });
        worker.barrier();
        const Scratch scratch{scores.get() + worker.index() * kQueries * stride,
                              reinterpret_cast<std::uint16_t*>(shares.get() + worker.index() * kQueries * stride / 2)};
        worker.share(1, std::int64_t{s.windows} * s.heads * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) {
                const std::int64_t head = i / blocks, window = head / s.heads;
                // The longest first, so that no thread begins one when the others are done.
                const int first = static_cast<int>((blocks - 1 - i % blocks) * kBlock), last = std::min(s.tokens, first + kBlock);
                const Packed pair = pack_of(window * s.key_heads + head % s.heads / (s.heads / s.key_heads));
                for (int at = first; at < last; at += kQueries)
                    attend(s, q + head * one, pair, at, std::min(kQueries, last - at), scratch, out + head * one);
            }
        });
    });
#else
    static_cast<void>(pool), static_cast<void>(s), static_cast<void>(q), static_cast<void>(k), static_cast<void>(v), static_cast<void>(out);
#endif
}

}  // namespace lowbit
