// Sixteen lanes in one register. With LOWBIT_VNNI, four products of bytes are summed in one instruction.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/inline.h"

namespace lowbit {
namespace {

struct Simd {
    using I = __m512i;  // 16 x int32
    using F = __m512;   // 16 x float32
    using B = __m512i;  // 64 bytes
    static constexpr int kRows = 6;      // rows and tiles whose sums stay in registers
    static constexpr int kTiles = 2;

    LOWBIT_INLINE B load_bytes(const std::uint8_t* p) { return _mm512_load_si512(p); }
    LOWBIT_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    LOWBIT_INLINE B low_nibbles(B b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
    LOWBIT_INLINE B high_nibbles(B b) { return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15)); }
    LOWBIT_INLINE B load_table(const std::uint8_t* p) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
    }
    LOWBIT_INLINE B look_up(B table, B nibbles) { return _mm512_shuffle_epi8(table, nibbles); }
    LOWBIT_INLINE B four_bytes(const std::int8_t* p) {
        return _mm512_set1_epi32(*reinterpret_cast<const std::int32_t*>(p));
    }

    // sum + four products of unsigned bytes of w (at most 15) and signed bytes of x
#ifdef LOWBIT_VNNI
    LOWBIT_INLINE I dot_small(I sum, B w, B x) { return _mm512_dpbusd_epi32(sum, w, x); }
    LOWBIT_INLINE I dot(I sum, B w, B x) { return _mm512_dpbusd_epi32(sum, w, x); }
#else
    LOWBIT_INLINE I dot_small(I sum, B w, B x) {
        return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
    }
    // Two products of whole bytes do not fit into 16 bits; of half bytes they do.
    LOWBIT_INLINE I dot(I sum, B w, B x) {
        const I high = _mm512_madd_epi16(_mm512_maddubs_epi16(high_nibbles(w), x), _mm512_set1_epi16(16));
        return _mm512_add_epi32(dot_small(sum, low_nibbles(w), x), high);
    }
#endif

    // sum + two products of signed 16-bit integers
#ifdef LOWBIT_VNNI
    LOWBIT_INLINE I dot_pairs(I sum, B a, B b) { return _mm512_dpwssd_epi32(sum, a, b); }
#else
    LOWBIT_INLINE I dot_pairs(I sum, B a, B b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
#endif
    // 32 bytes as 16-bit integers
    LOWBIT_INLINE B widen(const std::int8_t* p) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    LOWBIT_INLINE void store_shorts(std::int16_t* p, I v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(v));
    }

    LOWBIT_INLINE I as_ints(B v) { return v; }
    LOWBIT_INLINE I as_ints(F v) { return _mm512_castps_si512(v); }
    LOWBIT_INLINE B as_bytes(I v) { return v; }
    LOWBIT_INLINE B all_bytes(std::int8_t v) { return _mm512_set1_epi8(v); }
    LOWBIT_INLINE B add_bytes(B a, B b) { return _mm512_add_epi8(a, b); }
    LOWBIT_INLINE void store_all_bytes(std::int8_t* p, B v) { _mm512_storeu_si512(p, v); }
    LOWBIT_INLINE F as_floats(I v) { return _mm512_castsi512_ps(v); }
    LOWBIT_INLINE I both(I a, I b) { return _mm512_and_si512(a, b); }
    LOWBIT_INLINE I either(I a, I b) { return _mm512_or_si512(a, b); }

    // Makes the compiler forget what it knows of a value.
    LOWBIT_INLINE void keep(I& v) { asm volatile("" : "+v"(v)); }
    LOWBIT_INLINE I all(std::int32_t v) { return _mm512_set1_epi32(v); }
    LOWBIT_INLINE I shift_left(I v, int bits) { return _mm512_sll_epi32(v, _mm_cvtsi32_si128(bits)); }
    LOWBIT_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
    LOWBIT_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
    LOWBIT_INLINE I to_int(F v) { return _mm512_cvtps_epi32(v); }
    LOWBIT_INLINE I load_ints(const std::int32_t* p) { return _mm512_loadu_si512(p); }
    LOWBIT_INLINE void store_bytes(std::int8_t* p, I v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v));
    }
    LOWBIT_INLINE std::int32_t sum(I v) { return _mm512_reduce_add_epi32(v); }
    LOWBIT_INLINE I shift_right(I v, int bits) { return _mm512_sra_epi32(v, _mm_cvtsi32_si128(bits)); }
    LOWBIT_INLINE I subtract(I a, I b) { return _mm512_sub_epi32(a, b); }

    LOWBIT_INLINE F all(float v) { return _mm512_set1_ps(v); }
    LOWBIT_INLINE F zero() { return _mm512_setzero_ps(); }
    LOWBIT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    LOWBIT_INLINE F load_some(const float* p, int n) {
        return n >= 16 ? load(p) : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
    }
    LOWBIT_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    LOWBIT_INLINE void store_some(float* p, F v, int n) {
        if (n >= 16) return store(p, v);
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
    }
    LOWBIT_INLINE F load_f16(const std::uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    LOWBIT_INLINE void store_f16(std::uint16_t* p, F v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    LOWBIT_INLINE F load_bf16(const std::uint16_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    LOWBIT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    LOWBIT_INLINE F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
    LOWBIT_INLINE F divide(F a, F b) { return _mm512_div_ps(a, b); }
    LOWBIT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    LOWBIT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    LOWBIT_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
    LOWBIT_INLINE F abs(F v) { return _mm512_abs_ps(v); }
    LOWBIT_INLINE F root(F v) { return _mm512_sqrt_ps(v); }
    // x where v > bound, else y
    LOWBIT_INLINE F above(F v, F bound, F x, F y) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(v, bound, _CMP_GT_OQ), y, x);
    }
    // Lane by lane, the entry of the table that `at` names, from 0 to 15.
    LOWBIT_INLINE F entry(F table, I at) { return _mm512_permutexvar_ps(at, table); }
    // a b + c, rounded once on every processor
    LOWBIT_INLINE F fused(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    LOWBIT_INLINE F nearest(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    LOWBIT_INLINE F times_power_of_two(F v, F n) { return _mm512_scalef_ps(v, n); }
    LOWBIT_INLINE float sum(F v) { return _mm512_reduce_add_ps(v); }
    LOWBIT_INLINE float largest(F v) { return _mm512_reduce_max_ps(v); }
    // v where first <= index of the lane < last, else `other`
    LOWBIT_INLINE F within(F v, int first, int last, F other) {
        const unsigned below = last >= 16 ? 0xffffu : (last <= 0 ? 0u : (1u << last) - 1);
        const unsigned under = first <= 0 ? 0u : (first >= 16 ? 0xffffu : (1u << first) - 1);
        return _mm512_mask_blend_ps(static_cast<__mmask16>(below & ~under), other, v);
    }
};

}  // namespace
}  // namespace lowbit
