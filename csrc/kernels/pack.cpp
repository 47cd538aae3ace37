#include "kernels/pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/half.h"

namespace lowbit {

namespace {

int round_up(int value, int to) { return (value + to - 1) / to * to; }

void store_scales(const PackedWeight& w, std::uint8_t* at, int rows, const float* scale, int groups, int group) {
    for (int r = 0; r < rows; ++r) {
        const float value = scale[std::int64_t{r} * groups + group];
        if (w.wide_scale) {
            std::memcpy(at + 4 * r, &value, 4);
        } else {
            const std::uint16_t half = float_to_half(value);
            std::memcpy(at + 2 * r, &half, 2);
        }
    }
}

// Four codes of a row, the ones after its end zero.
std::uint32_t four(const std::uint8_t* row, int k, int cols) {
    std::uint32_t codes = 0;
    if (k < cols) std::memcpy(&codes, row + k, static_cast<std::size_t>(std::min(4, cols - k)));
    return codes;
}

// Rows of codes into their four bytes of every line. A line is written once: what a row leaves of it would be gone from
// the nearest cache when the next row comes.
template <bool kHalves>
void fill_lines(const PackedWeight& w, std::uint8_t* at, const std::uint8_t* codes, int rows) {
    constexpr int kPerLine = kHalves ? 8 : 4;
    int k = 0;
    for (; k + kPerLine <= w.cols; k += kPerLine, at += 64) {
        for (int r = 0; r < rows; ++r) {
            const std::uint8_t* from = codes + std::int64_t{r} * w.cols + k;
            std::uint32_t low, high = 0;
            std::memcpy(&low, from, 4);
            if constexpr (kHalves) std::memcpy(&high, from + 4, 4);
            low |= high << 4;
            std::memcpy(at + 4 * r, &low, 4);
        }
    }
    for (int r = 0; k < w.cols && r < rows; ++r) {
        const std::uint8_t* row = codes + std::int64_t{r} * w.cols;
        const std::uint32_t line = four(row, k, w.cols) | (kHalves ? four(row, k + 4, w.cols) << 4 : 0);
        std::memcpy(at + 4 * r, &line, 4);
    }
}

// Column by column; T: an integer as wide as a value.
template <class T>
void transpose(PackedWeight& w, int first, int step, int rows, const void* values) {
    const T* from = static_cast<const T*>(values);
    for (int start = 0, t = first; start < rows; start += kTile, t += step) {
        const int here = std::min(kTile, rows - start);
        T* p = reinterpret_cast<T*>(w.data.data() + t * w.tile_bytes);
        for (int k = 0; k < w.cols; ++k, p += kTile)
            for (int r = 0; r < here; ++r) p[r] = from[std::int64_t{start + r} * w.cols + k];
    }
}

}  // namespace

int segment_of(int group, int cols) {
    if (group == 0) {
        // One group: padded columns are free, but a short segment at the end is not.
        for (const int segment : {128, 64})
            if (cols % segment == 0) return segment;
        return 32;
    }
    for (const int segment : {128, 64, 32, 16})
        if (group % segment == 0) return segment;
    return 0;
}

PackedWeight make_weight(const Layout& layout) {
    PackedWeight w;
    w.code = layout.code;
    w.rows = layout.rows;
    w.cols = layout.cols;
    w.paired = layout.paired;
    if (layout.rows < 1 || layout.cols < 1) throw std::invalid_argument("a weight without rows or columns");
    if (is_float(layout.code)) {
        w.padded_cols = layout.cols;
        w.tile_bytes = std::int64_t{layout.cols} * kTile * (layout.code == Code::f32 ? 4 : 2);
    } else {
        w.segment = layout.segment > 0 ? layout.segment : segment_of(layout.group, layout.cols);
        if (w.segment == 0 || w.segment % 16 != 0 || w.segment > 128 || (layout.group > 0 && layout.group % w.segment != 0)) {
            throw std::invalid_argument("groups of " + std::to_string(layout.group) + " columns and segments of " +
                                        std::to_string(w.segment) + "; multiples of 16 are served, the one of the other");
        }
        if ((layout.zero & (layout.zero - 1)) != 0 || layout.zero < 0) {
            throw std::invalid_argument("a zero of " + std::to_string(layout.zero) + "; 0 and powers of two are served");
        }
        w.padded_cols = round_up(layout.cols, layout.group == 0 ? w.segment : layout.group);
        w.group = layout.group == 0 ? w.padded_cols : layout.group;
        w.zero = layout.zero;
        w.wide_scale = layout.wide_scale;
        w.minimum = layout.minimum;
        if (layout.table != nullptr) std::copy(layout.table, layout.table + 16, w.table);
        w.code_bytes = std::int64_t{w.padded_cols} * kTile / (layout.code == Code::u8 ? 1 : 2);
        w.tile_bytes = w.code_bytes + std::int64_t{w.groups()} * w.scale_bytes() * (w.minimum ? 2 : 1);
    }
    // Lines of codes must not cross lines of the cache: kernels load them whole.
    w.tile_bytes = (w.tile_bytes + 63) / 64 * 64;
    w.data = Buffer<std::uint8_t>(static_cast<std::size_t>(w.tile_bytes) * w.tiles());
    return w;
}

void fill(PackedWeight& w, int first, int step, int rows, const std::uint8_t* codes, const float* scale, const float* minimum) {
    const int groups = w.groups();
    for (int start = 0, t = first; start < rows; start += kTile, t += step) {
        const int here = std::min(kTile, rows - start);
        std::uint8_t* p = w.data.data() + t * w.tile_bytes;
        const std::uint8_t* from = codes + std::int64_t{start} * w.cols;
        w.code == Code::u8 ? fill_lines<false>(w, p, from, here) : fill_lines<true>(w, p, from, here);
        p += w.code_bytes;
        for (int g = 0; g < groups; ++g, p += w.scale_bytes())
            store_scales(w, p, here, scale + std::int64_t{start} * groups, groups, g);
        if (!w.minimum || minimum == nullptr) continue;
        for (int g = 0; g < groups; ++g, p += w.scale_bytes())
            store_scales(w, p, here, minimum + std::int64_t{start} * groups, groups, g);
    }
}

void fill_floats(PackedWeight& w, int first, int step, int rows, const void* values) {
    w.code == Code::f32 ? transpose<std::uint32_t>(w, first, step, rows, values)
                        : transpose<std::uint16_t>(w, first, step, rows, values);
}

bool fits_half(const float* values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i)
        if (half_to_float(float_to_half(values[i])) != values[i]) return false;
    return true;
}

}  // namespace lowbit
