// What a format's codes mean, as the loops over columns see it.
#pragma once

#include <cstdint>

namespace lowbit {

constexpr int kMostLevels = 16;  // of a table; each costs a comparison where a number is rounded

// Consecutive integers from `lo` to `hi`, ties to even; or a table of `count` ascending levels, where `bound[i]` is the largest
// number that goes to level i, and `code[i]` what is stored for it.
struct GridLevels {
    bool integers = true;
    float lo = 0, hi = 0;
    int count = 0;
    float level[kMostLevels] = {};
    float bound[kMostLevels] = {};
    std::uint8_t code[kMostLevels] = {};
};

// How one group of each of several rows is read, [groups][lanes] each: value = level * scale + base, and the level nearest to
// a value w is the one nearest to w * inverse + zero.
struct GroupScales {
    const float* scale;
    const float* inverse;
    const float* zero;
    const float* base;
};

}  // namespace lowbit
