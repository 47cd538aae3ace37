// What the solvers ask of every instruction set.
#pragma once

#include <cstdint>

#include "solvers/levels.h"

namespace lowbit {

constexpr int kBlock = 32;       // columns that are rounded one by one before all others see what changed
constexpr int kFeedLanes = 32;   // rows that feed_columns rounds at a time
constexpr int kSweepLanes = 16;  // rows that sweep_columns rounds at a time

// A matrix that is read one element at a time.
struct Elements {
    const float* data;
    std::int64_t row, column;  // steps
};

// Some columns of several rows, in the order in which they are rounded.
struct Columns {
    int count;
    const int* group;           // [count]: the scales of each
    const std::uint8_t* still;  // [count][lanes]: rounded as zero, whatever they are; null: none
};

struct SolverKernels {
    // y [rows, cols] += x [rows, depth] h [depth, cols], or = where `fresh`; cols a multiple of 16, strides of h and y in floats.
    void (*multiply_add)(Elements x, int rows, int depth, const float* h, std::int64_t h_stride, int cols, float* y,
                         std::int64_t y_stride, bool fresh);
    // y [cols] += sum of weight[i] * row[i]; cols a multiple of 16.
    void (*add_rows)(const float* const* row, const float* weight, int count, int cols, float* y);
    // The dot product of a and b over each run of `size` columns, and over what is left after the last whole one.
    void (*dots)(const float* a, const float* b, int cols, int size, float* out);
    // Rounds columns in order and feeds each error to those that follow: see columns.inl.
    void (*feed_columns)(const GridLevels&, const Columns&, const GroupScales&, const float* root, const float* shift,
                         std::int64_t stride, float* w, float* fed, float* levels, float* errors, float* moved,
                         double* squares);
    // Chooses columns once more, each the best while all others stay: see columns.inl.
    void (*sweep_columns)(const GridLevels&, const Columns&, const GroupScales&, const float* h, float* pulled, float* levels,
                          float* changes, double* gain);
    // The nearest levels to w [cols, lanes of kFeedLanes].
    void (*round_columns)(const GridLevels&, const Columns&, const GroupScales&, const float* w, float* levels);
    // Solves A x = b for 16 rows at once: a [n, n, 16], of which the lower triangle is read and overwritten; b [n, 16] becomes x.
    void (*solve_symmetric)(int n, float* a, float* b);
};

}  // namespace lowbit
