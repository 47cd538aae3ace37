// Activations as the kernels multiply them.
#pragma once

#include <cstdint>
#include <vector>

#include "core/buffer.h"
#include "kernels/packed_weight.h"

namespace lowbit {

// How the activations in front of a weight are rounded.
struct ActivationSpec {
    int bits = 15;              // 8; or 15, which stands for activations that are not rounded
    bool per_token = false;     // one scale for a token, instead of one for each of its segments
    float static_scale = 0;     // > 0: the scale of all tokens, found on calibration text
    std::vector<float> divisor;  // [cols], or empty: x / divisor comes first (SmoothQuant)

    int digits() const { return bits == 8 ? 1 : 2; }
    bool operator==(const ActivationSpec&) const = default;
};

// Rows of activations in 8 bits, x ~= scale * q, or in 15 bits as two digits of 8 bits, x ~= scale * (128 q0 + q1). A scale
// belongs to a row and a segment of columns.
//
// Beside a value of ten thousand 15 bits leave nothing of those near one, and weights may make up for the difference. What
// rounding left of such a segment is its remainder, in two more digits with a scale of their own.
struct Activations {
    int count = 0;
    int digits = 1;  // 1 of 8 bits, or 2 of 15
    int padded_cols = 0;
    int segment = 0;
    int segments = 0;
    std::int8_t* q[2] = {};            // [count, padded_cols]
    float* scale = nullptr;            // [count, segments]
    int zero = 1;                      // of the weights that these rows are for, and 1 for those without
    std::int32_t* start[2] = {};       // [count, segments], -zero times the sum of q: where the sums of a product begin
    float* total = nullptr;            // [count, segments], of the values: scale * sum
    bool* has_remainder = nullptr;     // [count], of two digits: whether some segment of the row has a remainder
    std::int8_t* remainder[2] = {};    // [count, padded_cols], where the segment has one
    float* remainder_scale = nullptr;  // [count, segments], 0 without
    std::int32_t* remainder_start[2] = {};  // [count, segments]
    const float* values = nullptr;     // [count, cols], what float weights multiply
    std::int64_t stride = 0;           // of values
};

// Memory for quantized activations.
struct ActivationsBuffer {
    Activations rows;
    Buffer<std::int8_t> q[2], remainder[2];
    Buffer<std::int32_t> start[2], remainder_start[2];
    Buffer<float> scale, total, remainder_scale;
    Buffer<bool> has_remainder;

    // For `count` rows of what `weight` multiplies; grows as needed, and what was there is lost.
    void shape(const PackedWeight& weight, int digits, int count);
};

}  // namespace lowbit
