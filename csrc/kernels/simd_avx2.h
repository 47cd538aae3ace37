// Sixteen lanes in two registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/inline.h"

namespace lowbit {
namespace {

struct Simd {
    struct I {
        __m256i a, b;
    };
    struct F {
        __m256 a, b;
    };
    using B = I;
    static constexpr int kRows = 2;
    static constexpr int kTiles = 1;

    LOWBIT_INLINE I pair(__m256i v) { return {v, v}; }
    LOWBIT_INLINE F pair(__m256 v) { return {v, v}; }
    LOWBIT_INLINE __m256i halves_of(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

    LOWBIT_INLINE B load_bytes(const std::uint8_t* p) { return {halves_of(p), halves_of(p + 32)}; }
    LOWBIT_INLINE __m256i low(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    LOWBIT_INLINE __m256i high(__m256i v) { return low(_mm256_srli_epi16(v, 4)); }
    LOWBIT_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    LOWBIT_INLINE B low_nibbles(B v) { return {low(v.a), low(v.b)}; }
    LOWBIT_INLINE B high_nibbles(B v) { return {high(v.a), high(v.b)}; }
    LOWBIT_INLINE B load_table(const std::uint8_t* p) {
        return pair(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
    }
    LOWBIT_INLINE B look_up(B table, B nibbles) {
        return {_mm256_shuffle_epi8(table.a, nibbles.a), _mm256_shuffle_epi8(table.b, nibbles.b)};
    }
    LOWBIT_INLINE B four_bytes(const std::int8_t* p) {
        return pair(_mm256_set1_epi32(*reinterpret_cast<const std::int32_t*>(p)));
    }
    LOWBIT_INLINE __m256i dot_half(__m256i sum, __m256i w, __m256i x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
    }
    // Two products of whole bytes do not fit into 16 bits; of half bytes they do.
    LOWBIT_INLINE __m256i dot_whole(__m256i sum, __m256i w, __m256i x) {
        const __m256i upper = _mm256_madd_epi16(_mm256_maddubs_epi16(high(w), x), _mm256_set1_epi16(16));
        return _mm256_add_epi32(dot_half(sum, low(w), x), upper);
    }
    LOWBIT_INLINE I dot_small(I sum, B w, B x) { return {dot_half(sum.a, w.a, x.a), dot_half(sum.b, w.b, x.b)}; }
    LOWBIT_INLINE I dot(I sum, B w, B x) { return {dot_whole(sum.a, w.a, x.a), dot_whole(sum.b, w.b, x.b)}; }

    // sum + two products of signed 16-bit integers
    LOWBIT_INLINE I dot_pairs(I sum, B x, B y) {
        return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(x.b, y.b))};
    }
    // 32 bytes as 16-bit integers
    LOWBIT_INLINE B widen(const std::int8_t* p) {
        const __m256i bytes = halves_of(p);
        return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1))};
    }
    LOWBIT_INLINE void store_shorts(std::int16_t* p, I v) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
    }

    LOWBIT_INLINE I as_ints(B v) { return v; }
    LOWBIT_INLINE I as_ints(F v) { return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}; }
    LOWBIT_INLINE B as_bytes(I v) { return v; }
    LOWBIT_INLINE B all_bytes(std::int8_t v) { return pair(_mm256_set1_epi8(v)); }
    LOWBIT_INLINE B add_bytes(B x, B y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
    LOWBIT_INLINE void store_all_bytes(std::int8_t* p, B v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.b);
    }
    LOWBIT_INLINE F as_floats(I v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
    LOWBIT_INLINE I both(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
    LOWBIT_INLINE I either(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }

    // Makes the compiler forget what it knows of a value.
    LOWBIT_INLINE void keep(I& v) { asm volatile("" : "+x"(v.a), "+x"(v.b)); }
    LOWBIT_INLINE I all(std::int32_t v) { return pair(_mm256_set1_epi32(v)); }
    LOWBIT_INLINE I shift_left(I v, int bits) {
        const __m128i n = _mm_cvtsi32_si128(bits);
        return {_mm256_sll_epi32(v.a, n), _mm256_sll_epi32(v.b, n)};
    }
    LOWBIT_INLINE I shift_right(I v, int bits) {
        const __m128i n = _mm_cvtsi32_si128(bits);
        return {_mm256_sra_epi32(v.a, n), _mm256_sra_epi32(v.b, n)};
    }
    LOWBIT_INLINE I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
    LOWBIT_INLINE I subtract(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
    LOWBIT_INLINE F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
    LOWBIT_INLINE I to_int(F v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
    LOWBIT_INLINE I load_ints(const std::int32_t* p) { return {halves_of(p), halves_of(p + 8)}; }
    LOWBIT_INLINE void store_bytes(std::int8_t* p, I v) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }
    LOWBIT_INLINE std::int32_t sum(I v) {
        const __m256i x = _mm256_add_epi32(v.a, v.b);
        __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
        y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1));
        return _mm_cvtsi128_si32(y);
    }

    LOWBIT_INLINE F all(float v) { return pair(_mm256_set1_ps(v)); }
    LOWBIT_INLINE F zero() { return pair(_mm256_setzero_ps()); }
    LOWBIT_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    LOWBIT_INLINE F load_some(const float* p, int n) {
        if (n >= 16) return load(p);
        float whole[16] = {};
        for (int i = 0; i < n; ++i) whole[i] = p[i];
        return load(whole);
    }
    LOWBIT_INLINE void store(float* p, F v) {
        _mm256_storeu_ps(p, v.a);
        _mm256_storeu_ps(p + 8, v.b);
    }
    LOWBIT_INLINE void store_some(float* p, F v, int n) {
        if (n >= 16) return store(p, v);
        float whole[16];
        store(whole, v);
        for (int i = 0; i < n; ++i) p[i] = whole[i];
    }
    LOWBIT_INLINE __m128i eight_halves(const std::uint16_t* p) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    }
    LOWBIT_INLINE F load_f16(const std::uint16_t* p) {
        return {_mm256_cvtph_ps(eight_halves(p)), _mm256_cvtph_ps(eight_halves(p + 8))};
    }
    LOWBIT_INLINE void store_f16(std::uint16_t* p, F v) {
        constexpr int nearest_even = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.a, nearest_even));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.b, nearest_even));
    }
    LOWBIT_INLINE __m256 widened(__m128i v) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    }
    LOWBIT_INLINE F load_bf16(const std::uint16_t* p) { return {widened(eight_halves(p)), widened(eight_halves(p + 8))}; }
    LOWBIT_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    LOWBIT_INLINE F multiply(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    LOWBIT_INLINE F divide(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    LOWBIT_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    LOWBIT_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    LOWBIT_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    LOWBIT_INLINE F abs(F v) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, v.a), _mm256_andnot_ps(sign, v.b)};
    }
    LOWBIT_INLINE F root(F v) { return {_mm256_sqrt_ps(v.a), _mm256_sqrt_ps(v.b)}; }
    // x where v > bound, else y
    LOWBIT_INLINE F above(F v, F bound, F x, F y) {
        return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(v.a, bound.a, _CMP_GT_OQ)),
                _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(v.b, bound.b, _CMP_GT_OQ))};
    }
    LOWBIT_INLINE __m256 entry_half(F table, __m256i at) {
        const __m256 above = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // the bit that says 8, as a sign
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.a, at), _mm256_permutevar8x32_ps(table.b, at), above);
    }
    // Lane by lane, the entry of the table that `at` names, from 0 to 15.
    LOWBIT_INLINE F entry(F table, I at) { return {entry_half(table, at.a), entry_half(table, at.b)}; }
    // a b + c, rounded once on every processor
    LOWBIT_INLINE F fused(F x, F y, F z) { return fma(x, y, z); }
    LOWBIT_INLINE F nearest(F v) {
        constexpr int nearest_even = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(v.a, nearest_even), _mm256_round_ps(v.b, nearest_even)};
    }
    LOWBIT_INLINE __m256 scaled(__m256 v, __m256 n) {
        const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(v, _mm256_castsi256_ps(bits));
    }
    // v 2^n for whole n in [-126, 127]
    LOWBIT_INLINE F times_power_of_two(F v, F n) { return {scaled(v.a, n.a), scaled(v.b, n.b)}; }
    LOWBIT_INLINE float sum(F v) {
        const __m256 x = _mm256_add_ps(v.a, v.b);
        __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_add_ps(y, _mm_movehl_ps(y, y));
        y = _mm_add_ss(y, _mm_movehdup_ps(y));
        return _mm_cvtss_f32(y);
    }
    LOWBIT_INLINE float largest(F v) {
        const __m256 x = _mm256_max_ps(v.a, v.b);
        __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_max_ps(y, _mm_movehl_ps(y, y));
        y = _mm_max_ss(y, _mm_movehdup_ps(y));
        return _mm_cvtss_f32(y);
    }
    LOWBIT_INLINE F within(F v, int first, int last, F other) {
        if (first <= 0 && last >= 16) return v;
        float values[16], others[16];
        store(values, v);
        store(others, other);
        for (int i = 0; i < 16; ++i)
            if (i < first || i >= last) values[i] = others[i];
        return load(values);
    }
};

}  // namespace
}  // namespace lowbit
