// A weight as the kernels read it.
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

#include "core/buffer.h"

namespace lowbit {

constexpr int kTile = 16;

enum class Code : std::uint8_t { u4, table4, u8, f16, bf16, f32 };

constexpr bool is_float(Code code) { return code >= Code::f16; }

struct PackedWeight {
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

// Whether the product of one weight can be added to that of another: activations are rounded once for both.
inline bool fits(const PackedWeight& weight, const PackedWeight& residual) {
    return residual.rows == weight.rows && residual.cols == weight.cols && residual.padded_cols == weight.padded_cols &&
           residual.segment == weight.segment && !weight.paired && !residual.paired;
}

}  // namespace lowbit
