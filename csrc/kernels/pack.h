// Packs weights into the layout of packed_weight.h.
#pragma once

#include <cstdint>

#include "kernels/packed_weight.h"

namespace lowbit {

// What a weight looks like before it is packed: w[r, k] = scale[r, k / group] * (level - zero) + minimum[r, k / group],
// where level is the code, or its entry in the table of unsigned bytes.
struct Layout {
    Code code = Code::u8;
    int rows = 0;
    int cols = 0;
    int group = 0;    // columns; 0: all of them
    int segment = 0;  // columns of the activations that share a scale; 0: as suits
    int zero = 0;
    bool wide_scale = false;
    bool minimum = false;
    bool paired = false;
    const std::uint8_t* table = nullptr;  // [16], of table4
};

// Columns of activations that share a scale, for a weight in groups: as many as the group has, at most 128, and a
// whole number of them in the row. 0 where the group has no such divisor.
int segment_of(int group, int cols);

// A weight whose codes are still to be filled in. std::invalid_argument for a layout that no kernel serves.
PackedWeight make_weight(const Layout&);

// Rows [0, rows) of a source into tiles first, first + step, ...; rows that fill no tile are followed by zeros.
// codes [rows, cols], scale and minimum [rows, groups]. minimum may be null.
void fill(PackedWeight&, int first, int step, int rows, const std::uint8_t* codes, const float* scale, const float* minimum);

// The same for float weights: values [rows, cols] in the type that the weight is stored in.
void fill_floats(PackedWeight&, int first, int step, int rows, const void* values);

// Whether float16 holds all of these exactly.
bool fits_half(const float* values, std::int64_t count);

}  // namespace lowbit
