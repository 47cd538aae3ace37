// Sixteen lanes in plain arrays: what every processor runs, and what the others are read against.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/inline.h"

namespace lowbit {
namespace {

struct Simd {
    struct I {
        std::int32_t v[16];
    };
    struct F {
        float v[16];
    };
    struct B {
        std::uint8_t v[64];
    };
    static constexpr int kRows = 2;
    static constexpr int kTiles = 1;

    template <class T, class Function>
    LOWBIT_INLINE T each(const Function& f) {
        T out;
        for (int i = 0; i < 16; ++i) out.v[i] = f(i);
        return out;
    }

    LOWBIT_INLINE B load_bytes(const std::uint8_t* p) {
        B out;
        std::memcpy(out.v, p, 64);
        return out;
    }
    LOWBIT_INLINE void prefetch(const void*) {}
    LOWBIT_INLINE B low_nibbles(B b) {
        for (auto& byte : b.v) byte &= 15;
        return b;
    }
    LOWBIT_INLINE B high_nibbles(B b) {
        for (auto& byte : b.v) byte >>= 4;
        return b;
    }
    LOWBIT_INLINE B load_table(const std::uint8_t* p) {
        B out;
        for (int i = 0; i < 64; ++i) out.v[i] = p[i % 16];
        return out;
    }
    LOWBIT_INLINE B look_up(const B& table, B nibbles) {
        for (auto& byte : nibbles.v) byte = table.v[byte];
        return nibbles;
    }
    LOWBIT_INLINE B four_bytes(const std::int8_t* p) {
        B out;
        for (int i = 0; i < 64; ++i) out.v[i] = static_cast<std::uint8_t>(p[i % 4]);
        return out;
    }
    LOWBIT_INLINE I dot(I sum, const B& w, const B& x) {
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 4; ++j) sum.v[i] += w.v[4 * i + j] * static_cast<std::int8_t>(x.v[4 * i + j]);
        return sum;
    }
    LOWBIT_INLINE I dot_small(I sum, const B& w, const B& x) { return dot(sum, w, x); }

    // sum + two products of signed 16-bit integers
    LOWBIT_INLINE I dot_pairs(I sum, const B& a, const B& b) {
        std::int16_t x[32], y[32];
        std::memcpy(x, a.v, 64);
        std::memcpy(y, b.v, 64);
        const auto product = [](int a, int b) { return static_cast<std::uint32_t>(a * b); };
        for (int i = 0; i < 16; ++i) {  // unsigned: sums that nobody reads may overflow
            const std::uint32_t two = product(x[2 * i], y[2 * i]) + product(x[2 * i + 1], y[2 * i + 1]);
            sum.v[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(sum.v[i]) + two);
        }
        return sum;
    }
    // 32 bytes as 16-bit integers
    LOWBIT_INLINE B widen(const std::int8_t* p) {
        std::int16_t wide[32];
        for (int i = 0; i < 32; ++i) wide[i] = p[i];
        B out;
        std::memcpy(out.v, wide, 64);
        return out;
    }
    LOWBIT_INLINE void store_shorts(std::int16_t* p, const I& v) {
        for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int16_t>(v.v[i]);
    }

    template <class T>  // F or B
    LOWBIT_INLINE I as_ints(const T& bits) {
        I out;
        std::memcpy(out.v, bits.v, 64);
        return out;
    }
    LOWBIT_INLINE B as_bytes(const I& v) {
        B out;
        std::memcpy(out.v, v.v, 64);
        return out;
    }
    LOWBIT_INLINE B all_bytes(std::int8_t v) {
        B out;
        std::memset(out.v, v, 64);
        return out;
    }
    LOWBIT_INLINE B add_bytes(B a, const B& b) {
        for (int i = 0; i < 64; ++i) a.v[i] = static_cast<std::uint8_t>(a.v[i] + b.v[i]);
        return a;
    }
    LOWBIT_INLINE void store_all_bytes(std::int8_t* p, const B& b) { std::memcpy(p, b.v, 64); }
    LOWBIT_INLINE F as_floats(const I& v) {
        F out;
        std::memcpy(out.v, v.v, 64);
        return out;
    }
    LOWBIT_INLINE I both(I a, I b) {
        return each<I>([&](int i) { return a.v[i] & b.v[i]; });
    }
    LOWBIT_INLINE I either(I a, I b) {
        return each<I>([&](int i) { return a.v[i] | b.v[i]; });
    }

    // Makes the compiler forget what it knows of a value.
    LOWBIT_INLINE void keep(B& b) {
#if defined(_MSC_VER)
        for (auto& byte : b.v) *static_cast<volatile std::uint8_t*>(&byte) = byte;
#else
        asm volatile("" : : "r"(b.v) : "memory");
#endif
    }
    LOWBIT_INLINE I all(std::int32_t v) {
        return each<I>([&](int) { return v; });
    }
    LOWBIT_INLINE I shift_left(I v, int bits) {
        return each<I>([&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(v.v[i]) << bits); });
    }
    LOWBIT_INLINE I shift_right(I v, int bits) {
        return each<I>([&](int i) { return v.v[i] >> bits; });
    }
    LOWBIT_INLINE I add(I a, I b) {
        return each<I>([&](int i) { return a.v[i] + b.v[i]; });
    }
    LOWBIT_INLINE I subtract(I a, I b) {
        return each<I>([&](int i) { return a.v[i] - b.v[i]; });
    }
    LOWBIT_INLINE F to_float(I v) {
        return each<F>([&](int i) { return static_cast<float>(v.v[i]); });
    }
    LOWBIT_INLINE I to_int(F v) {
        return each<I>([&](int i) { return static_cast<std::int32_t>(std::lrintf(v.v[i])); });
    }
    LOWBIT_INLINE I load_ints(const std::int32_t* p) {
        return each<I>([&](int i) { return p[i]; });
    }
    LOWBIT_INLINE void store_bytes(std::int8_t* p, I v) {
        for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(v.v[i]);
    }
    LOWBIT_INLINE std::int32_t sum(I v) {
        std::int32_t total = 0;
        for (const auto value : v.v) total += value;
        return total;
    }

    LOWBIT_INLINE F all(float v) {
        return each<F>([&](int) { return v; });
    }
    LOWBIT_INLINE F zero() { return all(0.0f); }
    LOWBIT_INLINE F load(const float* p) {
        return each<F>([&](int i) { return p[i]; });
    }
    LOWBIT_INLINE F load_some(const float* p, int n) {
        return each<F>([&](int i) { return i < n ? p[i] : 0.0f; });
    }
    LOWBIT_INLINE void store(float* p, F v) { std::memcpy(p, v.v, sizeof v.v); }
    LOWBIT_INLINE void store_some(float* p, F v, int n) {
        for (int i = 0; i < (n < 16 ? n : 16); ++i) p[i] = v.v[i];
    }
    LOWBIT_INLINE float from_bits(std::uint32_t bits) {
        float out;
        std::memcpy(&out, &bits, 4);
        return out;
    }
    LOWBIT_INLINE std::uint32_t bits_of(float v) {
        std::uint32_t out;
        std::memcpy(&out, &v, 4);
        return out;
    }
    // float16 and float32 share their layout but for the bias of the exponent; subnormals are scaled into the range.
    LOWBIT_INLINE float f16_to_float(std::uint16_t h) {
        const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
        if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
        return from_bits(sign | bits_of(from_bits(rest << 13) * 0x1p112f));
    }
    LOWBIT_INLINE std::uint16_t float_to_f16(float v) {
        const std::uint32_t bits = bits_of(v), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
        if (rest > 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7e00);
        if (rest >= 0x477ff000) return static_cast<std::uint16_t>(sign | 0x7c00);
        if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded fraction in the last bits
            return static_cast<std::uint16_t>(sign | (bits_of(from_bits(rest) + 0.5f) - bits_of(0.5f)));
        }
        return static_cast<std::uint16_t>(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
    }
    LOWBIT_INLINE F load_f16(const std::uint16_t* p) {
        return each<F>([&](int i) { return f16_to_float(p[i]); });
    }
    LOWBIT_INLINE void store_f16(std::uint16_t* p, F v) {
        for (int i = 0; i < 16; ++i) p[i] = float_to_f16(v.v[i]);
    }
    LOWBIT_INLINE F load_bf16(const std::uint16_t* p) {
        return each<F>([&](int i) { return from_bits(static_cast<std::uint32_t>(p[i]) << 16); });
    }
    LOWBIT_INLINE F add(F a, F b) {
        return each<F>([&](int i) { return a.v[i] + b.v[i]; });
    }
    LOWBIT_INLINE F multiply(F a, F b) {
        return each<F>([&](int i) { return a.v[i] * b.v[i]; });
    }
    LOWBIT_INLINE F divide(F a, F b) {
        return each<F>([&](int i) { return a.v[i] / b.v[i]; });
    }
    LOWBIT_INLINE F fma(F a, F b, F c) {
        return each<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
    }
    LOWBIT_INLINE F max(F a, F b) {
        return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
    }
    LOWBIT_INLINE F min(F a, F b) {
        return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
    }
    LOWBIT_INLINE F abs(F v) {
        return each<F>([&](int i) { return std::fabs(v.v[i]); });
    }
    LOWBIT_INLINE F root(F v) {
        return each<F>([&](int i) { return std::sqrt(v.v[i]); });
    }
    // x where v > bound, else y
    LOWBIT_INLINE F above(F v, F bound, F x, F y) {
        return each<F>([&](int i) { return v.v[i] > bound.v[i] ? x.v[i] : y.v[i]; });
    }
    // Lane by lane, the entry of the table that `at` names, from 0 to 15.
    LOWBIT_INLINE F entry(const F& table, const I& at) {
        return each<F>([&](int i) { return table.v[at.v[i]]; });
    }
    // a b + c, rounded once on every processor
    LOWBIT_INLINE F fused(F a, F b, F c) {
        return each<F>([&](int i) { return ::fmaf(a.v[i], b.v[i], c.v[i]); });
    }
    LOWBIT_INLINE F nearest(F v) {
        return each<F>([&](int i) { return std::nearbyintf(v.v[i]); });
    }
    LOWBIT_INLINE F times_power_of_two(F v, F n) {
        return each<F>([&](int i) { return std::ldexp(v.v[i], static_cast<int>(n.v[i])); });
    }
    LOWBIT_INLINE float sum(F v) {
        float total = 0;
        for (const float value : v.v) total += value;
        return total;
    }
    LOWBIT_INLINE float largest(F v) {
        float found = v.v[0];
        for (const float value : v.v) found = value > found ? value : found;
        return found;
    }
    LOWBIT_INLINE F within(F v, int first, int last, F other) {
        return each<F>([&](int i) { return i >= first && i < last ? v.v[i] : other.v[i]; });
    }
};

}  // namespace
}  // namespace lowbit
