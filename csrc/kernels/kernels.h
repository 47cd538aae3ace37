// The table of kernels: what every instruction set computes. To add an operation, write it in an .inl file, once for all sets
// with the functions of `Simd`, give it a line here, and name it in table.inl.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activations.h"
#include "kernels/kv_format.h"
#include "kernels/packed_weight.h"

namespace lowbit {

enum class Gate : std::uint8_t { none, silu, gelu_tanh, gelu };

// What happens to a product before it is stored: y = gate(product + bias), or product + bias + addend.
struct Epilogue {
    const float* bias = nullptr;      // padded to whole tiles
    const float* addend = nullptr;  // as y
    Gate gate = Gate::none;           // of a paired weight: act(first) * second, half as wide
};

struct AttentionShape {
    int head_dim = 0;
    int group = 1;  // query heads that share a key head
    float scale = 1;
    float soft_cap = 0;  // 0: none
    KVSide keys, values;
};

// The keys or the values of one sequence and one key head. What is multiplied in pairs lies in pairs: in each block of 64
// positions keys in tiles of 16 positions, [tile][head_dim / 2][16][2], values as [position / 2][head_dim][2]; of codes of fewer
// than 8 bits see kv_codes.inl.
//
// A scale below zero in a side that is `guarded`: this vector has channels far above its others, and is float16 times -scale, in
// the same order and in the place of int16, or in memory of its own where the side is packed.
struct CachedSide {
    void* data = nullptr;      // int16, or blocks
    void* halves = nullptr;    // where float16 is: `data` of int16, else null until it is needed
    float* scale = nullptr;    // of int16
};

struct KeyValues {
    CachedSide keys, values;
};

// Floats of memory that attention over `rows` queries needs.
inline std::size_t attention_memory(int rows, int head_dim) {
    const std::size_t width = head_dim;
    const std::size_t padded = (static_cast<std::size_t>(rows) + kTile - 1) / kTile * kTile;
    const std::size_t integers = 2 * 6 * kCacheBlock + padded + 6 * kCacheBlock / 2 + padded * width / 2;
    // One block unpacked, its scales and offsets, of keys and of values; sums of queries by groups; two foldings of them.
    const std::size_t block = width * kCacheBlock / 4 + 2 * width / kTile * kCacheBlock + 2 * width + kCacheBlock;
    return integers + 2 * block + padded * width / kTile + 2 * (padded * width / 2 + 2 * padded) + width;
}

struct Kernels {
    const char* name;
    // One row of x [k] into row `row` of `out`. static_scale > 0: the scale, given. per_token: one scale for the row. A row with a
    // value that is not finite multiplies to NaN.
    void (*quantize)(const float* x, int k, const Activations& out, int row, float static_scale, bool per_token);
    // Rows [m0, m1) times tiles [t0, t1): y [count, N], `stride` floats apart. Pairs of tiles where the weight is paired.
    void (*linear)(const PackedWeight&, const Activations&, int m0, int m1, int t0, int t1, const Epilogue&, float* y,
                   std::int64_t stride);
    // y = x / rms(x) * weight
    void (*rms_norm)(const float* x, const float* weight, int k, float epsilon, float* y);
    // y = act(a) * b, in place in a
    void (*gate)(Gate, float* a, const float* b, int n);
    // Turns pairs (i, i + half) of a head by angles: cosines [half], then sines [half].
    void (*rotate)(float* head, const float* angles, int half);
    // Softmax attention of `rows` queries that share one key head; see attention.inl.
    void (*attend)(const AttentionShape&, const KeyValues&, const float* q, int rows, const int* first, const int* last,
                   float* out, float* maximum, float* denominator, float* memory);
    // Stores a key and a value that have been rotated already. False, and nothing is done, where memory for float16 is needed and
    // there is none. Sides whose tokens share scales are left out: see `complete`.
    bool (*append)(const AttentionShape&, const KeyValues&, const float* key, const float* value, int position);
    // Stores the `tokens` positions from `position` of the sides whose tokens share scales, from what is kept of them in 16 bits:
    // exact's position `from`.
    void (*complete)(const AttentionShape&, const KeyValues&, const KeyValues& exact, int from, int position);
    // x H / sqrt(n) in place; n a power of two from 16.
    void (*hadamard)(float* x, int n);
    // Row r of an 8-bit, 4-bit or float weight.
    void (*unpack_row)(const PackedWeight&, int row, float* out);
    // What this processor could do at best: see limits.inl.
    std::int64_t (*peak)(std::int64_t rounds);
    std::int64_t (*read)(const std::uint8_t* from, std::int64_t bytes);
};

}  // namespace lowbit
