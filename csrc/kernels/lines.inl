// How codes and scales of a packed weight are read, a cache line at a time.
#pragma once

#include "kernels/packed_weight.h"
#include "kernels/simd.h"

namespace lowbit {
namespace {

// Codes of one 64-byte line, as the unsigned bytes of `kQuads` dot products.
template <Code code>
struct Line;

template <>
struct Line<Code::u4> {
    static constexpr int kQuads = 2;
    LOWBIT_INLINE void expand(const std::uint8_t* p, const B&, B* out) {
        const B bytes = Simd::load_bytes(p);
        out[0] = Simd::low_nibbles(bytes);
        out[1] = Simd::high_nibbles(bytes);
    }
    LOWBIT_INLINE I dot(I sum, const B& w, const B& x) { return Simd::dot_small(sum, w, x); }
};

template <>
struct Line<Code::table4> {
    static constexpr int kQuads = 2;
    LOWBIT_INLINE void expand(const std::uint8_t* p, const B& table, B* out) {
        const B bytes = Simd::load_bytes(p);
        out[0] = Simd::look_up(table, Simd::low_nibbles(bytes));
        out[1] = Simd::look_up(table, Simd::high_nibbles(bytes));
    }
    LOWBIT_INLINE I dot(I sum, const B& w, const B& x) { return Simd::dot(sum, w, x); }
};

template <>
struct Line<Code::u8> {
    static constexpr int kQuads = 1;
    LOWBIT_INLINE void expand(const std::uint8_t* p, const B&, B* out) { out[0] = Simd::load_bytes(p); }
    LOWBIT_INLINE I dot(I sum, const B& w, const B& x) { return Simd::dot(sum, w, x); }
};

LOWBIT_INLINE F load_scale(const std::uint8_t* p, bool wide) {
    return wide ? Simd::load(reinterpret_cast<const float*>(p))
                : Simd::load_f16(reinterpret_cast<const std::uint16_t*>(p));
}

// Fetches the tiles after these, codes and scales alike and in the order of memory, while these are used: one row is as
// fast as memory, and what a processor fetches by itself stops at every page and tile.
class Ahead {
 public:
    // `steps`: times that `step` is called while `tiles` of them are read
    Ahead(const PackedWeight& w, int t0, int tiles, int steps)
        : from_(w.tile(t0 + tiles)), lines_(static_cast<int>((tiles * w.tile_bytes / steps + 63) / 64)) {}
    void step() {
        for (int i = 0; i < lines_; ++i) Simd::prefetch(from_ + i * 64);
        from_ += lines_ * 64;
    }

 private:
    const std::uint8_t* from_;
    int lines_;
};

template <Code code>
LOWBIT_INLINE F float_weights(const std::uint8_t* p) {
    if constexpr (code == Code::f16) return Simd::load_f16(reinterpret_cast<const std::uint16_t*>(p));
    if constexpr (code == Code::bf16) return Simd::load_bf16(reinterpret_cast<const std::uint16_t*>(p));
    return Simd::load(reinterpret_cast<const float*>(p));
}

}  // namespace
}  // namespace lowbit
