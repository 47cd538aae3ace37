// Weights to codes under given scales and offsets, packed, with the error: formats/qtensor.py and formats/packing.py.
#pragma once

#include <cstring>

#include "solvers/blocks.inl"

namespace lowbit {
namespace {

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
constexpr bool kLittle = false;
#else
constexpr bool kLittle = true;
#endif

// One block of one row; codes are left 128 too small, as signed bytes. Adds to the squares of x and of its error.
template <class Grid>
LOWBIT_INLINE void round_block(const Grid& grid, const float* x, std::int64_t count, float scale, float offset, bool minimum,
                               bool affine, std::int8_t* codes, F& norm, F& error) {
    const F s = Simd::all(scale), by_step = Simd::all(inverse(scale));
    const F z = Simd::all(offset), minus = Simd::all(-offset);
    for (std::int64_t i = 0; i < count; i += 16) {
        const int n = least(16, static_cast<int>(count - i < 16 ? count - i : 16));
        const F v = n == 16 ? Simd::load(x + i) : Simd::load_some(x + i, n);
        F code, value;
        if (!affine) {
            value = Simd::multiply(grid.round(Simd::multiply(v, by_step), code), s);
        } else if (minimum) {
            const F level = grid.round(Simd::multiply(Simd::add(v, minus), by_step), code);
            value = Simd::add(Simd::multiply(level, s), z);
        } else {
            const F level = grid.round(Simd::add(Simd::multiply(v, by_step), z), code);
            value = Simd::multiply(Simd::add(level, minus), s);
        }
        const I bytes = Simd::to_int(Simd::add(code, Simd::all(-128.0f)));
        F off = Simd::add(v, negative(value));
        if (n < 16) {
            off = Simd::within(off, 0, n, Simd::zero());
            std::int8_t some[16];
            Simd::store_bytes(some, bytes);
            for (int k = 0; k < n; ++k) codes[i + k] = some[k];
        } else {
            Simd::store_bytes(codes + i, bytes);
        }
        norm = Simd::fused(v, v, norm);
        error = Simd::fused(off, off, error);
    }
}

// Signed bytes, 128 too small, to a row of packed codes: a little-endian stream of `bits` each.
void pack_row(const std::int8_t* codes, std::int64_t count, int bits, std::uint8_t* out) {
    const auto code = [codes](std::int64_t i) { return static_cast<std::uint8_t>(static_cast<std::uint8_t>(codes[i]) ^ 0x80u); };
    if (bits == 0 || bits == 8) {
        for (std::int64_t i = 0; i < count; ++i) out[i] = code(i);
    } else if (bits == 4) {
        for (std::int64_t i = 0; i < count / 2; ++i) {
            std::uint16_t two;
            std::memcpy(&two, codes + 2 * i, 2);
            two ^= 0x8080u;
            // The first of the two is the lower half of a byte whichever way memory is read.
            out[i] = static_cast<std::uint8_t>(kLittle ? (two & 15) | two >> 4 : two >> 8 | (two & 15) << 4);
        }
    } else if (bits == -3) {
        for (std::int64_t i = 0; i < count / 5; ++i) {
            int value = 0;
            for (int k = 4; k >= 0; --k) value = value * 3 + code(5 * i + k);
            out[i] = static_cast<std::uint8_t>(value);
        }
    } else {
        std::uint64_t waiting = 0;
        int have = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            waiting |= static_cast<std::uint64_t>(code(i)) << have;
            for (have += bits; have >= 8; have -= 8, waiting >>= 8) *out++ = static_cast<std::uint8_t>(waiting);
        }
    }
}

template <class Grid>
Squares round_rows(const Grid& grid, const Matrix& m, const Blocks& blocks, const Steps& steps, int bits,
                                 std::int64_t first, std::int64_t last, std::uint8_t* out, std::int64_t row_bytes, float* memory) {
    Squares total;
    std::int8_t* codes = reinterpret_cast<std::int8_t*>(memory + (m.cols + 15) / 16 * 16);
    for (std::int64_t row = first; row < last; ++row) {
        const float* x = memory;
        if (m.type == Type::f32) x = static_cast<const float*>(m.values) + row * m.cols;
        else read_floats(m, row * m.cols, m.cols, memory);
        F norm = Simd::zero(), error = Simd::zero();
        std::int64_t since = 0;
        for (std::int64_t b = 0, begin = 0; b < blocks.per_row; ++b, begin += blocks.size) {
            const std::int64_t at = row * blocks.per_row + b, left = m.cols - begin;
            const std::int64_t count = left < blocks.size ? left : blocks.size;
            round_block(grid, x + begin, count, steps.scale[at], steps.offset == nullptr ? 0.0f : steps.offset[at], steps.minimum,
                        steps.offset != nullptr, codes + begin, norm, error);
            since += count;
            if (since >= 4096 || b + 1 == blocks.per_row) {
                total.weight += across(norm);
                total.error += across(error);
                norm = error = Simd::zero();
                since = 0;
            }
        }
        pack_row(codes, m.cols, bits, out + row * row_bytes);
    }
    return total;
}

Squares round(const Levels& levels, const Matrix& m, const Blocks& blocks, const Steps& steps, int bits, std::int64_t first,
              std::int64_t last, std::uint8_t* out, std::int64_t row_bytes, float* memory) {
    if (levels.table) return round_rows(Table(levels), m, blocks, steps, bits, first, last, out, row_bytes, memory);
    return round_rows(Integers(levels), m, blocks, steps, bits, first, last, out, row_bytes, memory);
}

}  // namespace
}  // namespace lowbit
