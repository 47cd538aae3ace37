#include "solvers/quantized.h"

#include <algorithm>
#include <cmath>

namespace lowbit {

float inverse_of(float scale) {
    const float inverse = 1.0f / scale;
    return std::isfinite(inverse) ? inverse : 0.0f;
}

void encode(const GridLevels& levels, const float* from, std::int64_t step, int count, std::uint8_t* codes) {
    if (levels.integers) {
        for (int i = 0; i < count; ++i) codes[i] = static_cast<std::uint8_t>(static_cast<int>(from[i * step] - levels.lo));
        return;
    }
    for (int i = 0; i < count; ++i) {
        int at = 0;
        for (int n = 0; n + 1 < levels.count; ++n) at += from[i * step] > levels.bound[n];
        codes[i] = levels.code[at];
    }
}

float level_of(const GridLevels& levels, std::uint8_t code) {
    if (levels.integers) return std::min(levels.lo + static_cast<float>(code), levels.hi);
    for (int i = 0; i < levels.count; ++i)
        if (levels.code[i] == code) return levels.level[i];
    return levels.level[0];
}

LaneScales::LaneScales(int lanes, int groups)
    : lanes_(lanes),
      groups_(groups),
      scale_(static_cast<std::size_t>(lanes) * groups),
      offset_(scale_.size()),
      inverse_(scale_.size()),
      zero_(scale_.size()),
      base_(scale_.size()) {}

void LaneScales::fill(const Shape& shape, const Grouped& from, int first, int rows) {
    for (int lane = 0; lane < lanes_; ++lane) {
        for (int g = 0; g < groups_; ++g) {
            const std::size_t i = static_cast<std::size_t>(first + lane) * shape.groups() + g;
            const bool there = lane < rows;
            set(from.offsets, lane, g, there ? from.scale[i] : 0, there && from.offset != nullptr ? from.offset[i] : 0);
        }
    }
}

void LaneScales::set(Offsets offsets, int lane, int group, float scale, float offset) {
    const std::size_t i = at(lane, group);
    scale_[i] = scale;
    offset_[i] = offset;
    inverse_[i] = inverse_of(scale);
    zero_[i] = offsets == Offsets::points ? offset : offsets == Offsets::minima ? -offset * inverse_[i] : 0;
    base_[i] = offsets == Offsets::points ? -offset * scale : offset;
}

}  // namespace lowbit
