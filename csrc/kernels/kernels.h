// The table of kernels: what every instruction set computes. To add an operation, write it in an .inl file, once for all sets
// with the functions of `Simd`, give it a line here, and name it in table.inl.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activations.h"
#include "kernels/packed_weight.h"

namespace lowbit {

enum class Gate : std::uint8_t { none, silu, gelu_tanh, gelu };

// What happens to a product before it is stored: y = gate(product + bias), or product + bias + addend.
struct Epilogue {
    const float* bias = nullptr;      // padded to whole tiles
    const float* addend = nullptr;  // as y
    Gate gate = Gate::none;           // of a paired weight: act(first) * second, half as wide
};

// How keys and values are stored: integers with a scale for each vector.
enum class KVFormat : std::uint8_t { int16, int8 };

struct AttentionShape {
    int head_dim = 0;
    int group = 1;  // query heads that share a key head
    float scale = 1;
    float soft_cap = 0;  // 0: none
    KVFormat format = KVFormat::int16;
};

// The keys and values of one sequence and one key head, int16 or int8 with a scale for each position. What is multiplied in
// pairs lies in pairs: keys in tiles of 16 positions, [tile][head_dim / 2][16][2], values as [position / 2][head_dim][2].
// A scale below zero: this vector has channels far above its others, and is float16 times -scale, in the same order and in
// the place of int16, or in memory of its own where the cache is int8.
struct KeyValues {
    void* keys = nullptr;
    void* values = nullptr;
    void* key_halves = nullptr;  // where float16 is: as keys and values where these are int16, else null until it is needed
    void* value_halves = nullptr;
    float* key_scale = nullptr;
    float* value_scale = nullptr;
};

// Floats of memory that attention over `rows` queries needs: scores, probabilities and those of floats of six, the queries
// as integers.
inline std::size_t attention_memory(int rows, int head_dim) {
    const std::size_t padded = (static_cast<std::size_t>(rows) + kTile - 1) / kTile * kTile;
    return 2 * 6 * 64 + padded + 6 * 32 + padded * head_dim / 2;
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
    // False, and nothing is done, where memory for float16 is needed and there is none.
    bool (*append)(const AttentionShape&, const KeyValues&, const float* key, const float* value, int position);
    // Row r of an 8-bit, 4-bit or float weight.
    void (*unpack_row)(const PackedWeight&, int row, float* out);
    // What this processor could do at best: see limits.inl.
    std::int64_t (*peak)(std::int64_t rounds);
    std::int64_t (*read)(const std::uint8_t* from, std::int64_t bytes);
};

}  // namespace lowbit
