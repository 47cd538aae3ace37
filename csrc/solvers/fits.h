// How weights become codes without statistics of the whole input: fits, which find the scale (and offset) of each block, and
// rounding to codes. The Python of src/lowbit/solvers/fits and formats/qtensor.py is the reference; what differs is the order of
// sums in float32. Nothing here depends on the number of threads.
#pragma once

#include <cstdint>

namespace lowbit {

enum class Type : std::uint8_t { f32, f16, bf16, none };  // of weights and of what is stored; none: kept as it is

// The levels of a grid: whole numbers from lo to hi, or a table of up to 16.
struct Levels {
    bool table = false;
    float lo = 0, hi = 0;
    alignas(64) float levels[16] = {};     // of a table: ascending
    alignas(64) float bounds[16] = {};     // the largest value that goes to level i and not to the one above; infinity at the end
    alignas(64) float codes[16] = {};      // of the levels
};

enum class FitKind : std::uint8_t { absmax, minmax, search };
enum class OffsetKind : std::uint8_t { none, grid, whole, real, minimum, nested };  // as formats/format.py has them

struct Fit {
    Levels grid;
    FitKind kind = FitKind::absmax;
    OffsetKind offset = OffsetKind::none;
    Type scale_store = Type::none, offset_store = Type::none;
    bool spans_zero = false;     // the range of a block includes zero
    bool signed_scale = true;    // a negative scale can be stored
    bool two_signs = false;      // negative scales are worth trying
    float reach = 1;             // what the largest magnitude is mapped to
    float extreme = 1;           // the level of the largest magnitude
    const float* factors = nullptr;
    int factor_count = 0;
};

// A matrix whose rows follow one another.
struct Matrix {
    const void* values = nullptr;
    Type type = Type::f32;
    std::int64_t rows = 0, cols = 0;
};

// How much the error of an element counts: values for each column or each element, or where there are none |x|, or all alike.
struct Importance {
    const float* values = nullptr;
    bool by_column = false, magnitude = false;
};

// Blocks of `size` along rows, the last of a row may be short; numbered row by row.
struct Blocks {
    std::int64_t size = 1, per_row = 1;
};

// What a fit found of each block. `constant`: the value of a block that has one only, else NaN. `zeros`: whether a block has
// so many zeros that they are meant (solvers/zeros.py); null where nobody asks.
struct Fitted {
    float* scale = nullptr;
    float* offset = nullptr;
    float* constant = nullptr;
    std::uint8_t* zeros = nullptr;
};

// What is to be known of many blocks at once.
struct Seen {
    bool fits = true;  // false: a scale or offset is too large for its type
    bool constant = false, zeros = false;
};

// Scales and offsets as they are read back, one for each block.
struct Steps {
    const float* scale = nullptr;
    const float* offset = nullptr;
    bool minimum = false;  // the offset is the value of level zero, and not in levels
};

struct Squares {
    double weight = 0, error = 0;  // sums of x^2 and of (x - its value)^2
};

// Floats of memory that a fit or rounding needs for each thread.
inline std::int64_t fit_memory(std::int64_t size) { return size <= 128 ? 4 * 16 * 128 : 4 * ((size + 15) / 16 * 16); }

struct Fitters {
    // Blocks [first, last).
    Seen (*fit)(const Fit&, const Matrix&, const Importance&, const Blocks&, std::int64_t first, std::int64_t last, const Fitted&,
                float* memory);
    // Rows [first, last) to codes of `bits`, packed (bits 0: one in each byte; -3: five digits of base 3 in each). memory: as
    // many floats as columns, and half as many again for the codes.
    Squares (*round)(const Levels&, const Matrix&, const Blocks&, const Steps&, int bits, std::int64_t first, std::int64_t last,
                     std::uint8_t* codes, std::int64_t row_bytes, float* memory);
    // The largest magnitude of each block, NaN where there is anything that is not finite.
    void (*peaks)(const Matrix&, const Blocks&, std::int64_t first, std::int64_t last, float* peaks, float* memory);
};

}  // namespace lowbit
