// A weight in its format, as the solvers read and write it.
#pragma once

#include <cstdint>

#include "core/buffer.h"
#include "solvers/kernels.h"

namespace lowbit {

// none; points: value = (level - offset) * scale; minima: value = level * scale + offset
enum class Offsets : std::uint8_t { none, points, minima };

struct Shape {
    int rows = 0, cols = 0;
    int group = 0;  // columns that share a scale; the last group may be short
    int groups() const { return (cols + group - 1) / group; }
    int padded() const { return (cols + 15) / 16 * 16; }
};

// Scales and offsets [rows, groups] of a weight, and the levels of its codes.
struct Grouped {
    GridLevels levels;
    Offsets offsets = Offsets::none;
    const float* scale = nullptr;
    const float* offset = nullptr;  // null where there are none
};

// 1 / scale, and 0 where that is not finite: the group then rounds to zero.
float inverse_of(float scale);

// The codes of levels that lie `step` apart.
void encode(const GridLevels& levels, const float* from, std::int64_t step, int count, std::uint8_t* codes);
float level_of(const GridLevels& levels, std::uint8_t code);

// The scales of up to `lanes` rows as the loops over columns take them. What stands for a row that is not there makes all zero.
class LaneScales {
 public:
    LaneScales(int lanes, int groups);
    void fill(const Shape& shape, const Grouped& from, int first, int rows);
    // The scale and the offset of one group of a row, changed.
    void set(Offsets offsets, int lane, int group, float scale, float offset);
    GroupScales view() const { return {scale_.data(), inverse_.data(), zero_.data(), base_.data()}; }
    float scale(int lane, int group) const { return scale_[at(lane, group)]; }
    float offset(int lane, int group) const { return offset_[at(lane, group)]; }
    float base(int lane, int group) const { return base_[at(lane, group)]; }

 private:
    std::size_t at(int lane, int group) const { return static_cast<std::size_t>(group) * lanes_ + lane; }
    int lanes_, groups_;
    Buffer<float> scale_, offset_, inverse_, zero_, base_;
};

}  // namespace lowbit
