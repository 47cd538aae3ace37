// A packed weight, quantized activations, and the table of kernels that multiply them.
//
// Layout of a weight [N, K], in tiles of 16 rows, every tile one forward stream of memory:
//
//   tile: the codes of all columns | for each group 16 scales | for each group 16 minima (only with an offset)
//   4-bit codes, 64 bytes for 8 columns:  byte[4 r + j] = q[r][8 c + j] | q[r][8 c + 4 + j] << 4
//   8-bit codes, 64 bytes for 4 columns:  byte[4 r + j] = q[r][4 c + j]
//   float weights, for each column:       16 values
//
// Codes are unsigned, activations signed: that is what the dot products of four bytes take (vpdpbusd), and neither
// signs nor zero-points cost an instruction. A weight is w = scale * (level - zero) + minimum, with `zero` the same for
// all and `level` the code or its entry in a table. The sum of -zero * x is where an accumulator starts.
#pragma once

#include <cstdint>
#include <string_view>

#include "core/buffer.h"

namespace lowbit {

constexpr int kTile = 16;

enum class Code : std::uint8_t { u4, table4, u8, f16, bf16, f32 };

constexpr bool is_float(Code code) { return code >= Code::f16; }

struct Linear {
    Code code = Code::u8;
    int rows = 0;           // N
    int cols = 0;           // K
    int padded_cols = 0;    // whole groups
    int group = 0;          // columns that share a scale
    int segment = 0;        // columns of the activations that share a scale; divides the group
    int zero = 0;
    bool wide_scale = false;  // float32 instead of float16
    bool minimum = false;
    bool paired = false;      // tiles alternate between two weights: gate and up
    alignas(64) std::uint8_t table[16] = {};
    std::int64_t code_bytes = 0;  // of a tile, whole cache lines
    std::int64_t tile_bytes = 0;
    Buffer<std::uint8_t> data;

    int tiles() const { return (rows + kTile - 1) / kTile; }
    int groups() const { return is_float(code) ? 0 : padded_cols / group; }
    int scale_bytes() const { return (wide_scale ? 4 : 2) * kTile; }
    const std::uint8_t* tile(int t) const { return data.data() + t * tile_bytes; }
    const std::uint8_t* scales(int t) const { return tile(t) + code_bytes; }
    const std::uint8_t* minima(int t) const { return scales(t) + groups() * scale_bytes(); }
};

// Whether one weight can be added to another: rows of activations are rounded once for both.
inline bool fits(const Linear& weight, const Linear& residual) {
    return residual.rows == weight.rows && residual.cols == weight.cols && residual.padded_cols == weight.padded_cols &&
           residual.segment == weight.segment && !weight.paired && !residual.paired;
}

// Rows of activations in 8 bits, x ~= scale * q; or in 15 bits as two planes, x ~= scale * (128 q0 + q1).
// The scale belongs to a row and a segment of columns. Beside a value of ten thousands 15 bits leave nothing of those near
// one, and weights may make up for the difference: what rounding left of such a segment is kept in two planes more.
struct Rows {
    int count = 0;
    int planes = 1;
    int padded_cols = 0;
    int segment = 0;
    int segments = 0;
    std::int8_t* q[2] = {};       // [count, padded_cols]
    float* scale = nullptr;       // [count, segments]
    int zero = 1;                 // of the weights that these rows are for, and 1 for those without
    std::int32_t* start[2] = {};  // [count, segments], -zero times the sum of q: where the sums of a product begin
    float* total = nullptr;       // [count, segments], of the values: scale * sum
    bool* spread = nullptr;       // [count], of two planes: whether some segment of the row has a rest
    std::int8_t* rest[2] = {};    // [count, padded_cols], where the segment has one
    float* rest_scale = nullptr;  // [count, segments], 0 without
    std::int32_t* rest_start[2] = {};  // [count, segments]
    const float* values = nullptr;  // [count, cols], what float weights multiply
    std::int64_t stride = 0;        // of values
};

enum class Gate : std::uint8_t { none, silu, gelu_tanh, gelu };

// y = gate(product + bias) or product + bias + residual.
struct Epilogue {
    const float* bias = nullptr;      // padded to whole tiles
    const float* residual = nullptr;  // as y
    Gate gate = Gate::none;           // of a paired weight: act(first) * second, half as wide
};

struct AttentionShape {
    int head_dim = 0;
    int group = 1;  // query heads that share a key head
    float scale = 1;
    float soft_cap = 0;  // 0: none
    bool int8 = false;
};

// The keys and values of one sequence and one key head, int16 or int8 with a scale for each position. What is multiplied in
// pairs lies in pairs: keys in tiles of 16 positions, [tile][head_dim / 2][16][2], values as [position / 2][head_dim][2].
// A scale below zero: this vector has channels far above its others, and is float16 times -scale, in the same order and in
// the place of int16, or beside int8 where there is memory for that.
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
    // One row of x [k] into row `row` of `out`. `fixed` > 0: the scale, given. `whole`: one scale for the row. A row with a
    // value that is not finite multiplies to NaN.
    void (*quantize)(const float* x, int k, const Rows& out, int row, float fixed, bool whole);
    // Rows [m0, m1) times tiles [t0, t1): y [count, N], `stride` floats apart. Pairs of tiles where the weight is paired.
    void (*linear)(const Linear&, const Rows&, int m0, int m1, int t0, int t1, const Epilogue&, float* y,
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
    void (*unpack_row)(const Linear&, int row, float* out);
    // What this processor could do at best: see limits.inl.
    std::int64_t (*peak)(std::int64_t rounds);
    std::int64_t (*read)(const std::uint8_t* from, std::int64_t bytes);
};

// By name ("avx512vnni", "avx512", "avx2", "portable"), or the best for an empty one; nullptr for what this build or
// processor lacks.
const Kernels* kernels_for(std::string_view isa);

}  // namespace lowbit
