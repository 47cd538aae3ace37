// What calibration computes in pairs of bfloat16 numbers, compiled for processors that multiply them in vectors. On others PyTorch is
// as fast, or faster, where there are units for matrices (AMX); so it has no line in isas.def.
#pragma once

#if defined(LOWBIT_X86) && !defined(_MSC_VER) && (defined(__clang__) || __GNUC__ >= 10)
#define LOWBIT_HAS_BF16 1
#include <immintrin.h>

#include <cstdint>
#define LOWBIT_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace lowbit {

// Whether this processor multiplies pairs of bfloat16 numbers into float32 sums, has nothing that is faster, and this build
// uses it.
bool multiplies_bfloat16();

#ifdef LOWBIT_HAS_BF16
namespace {

constexpr int kLanes = 16;

LOWBIT_BF16 inline __mmask16 first_lanes(int count) {
    return count >= kLanes ? __mmask16{0xffff} : static_cast<__mmask16>(count <= 0 ? 0u : (1u << count) - 1);
}

LOWBIT_BF16 inline __m512 widened(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// sums [kHigh][kVectors] += sum over pairs of a[row] b[lane]; a, b: pairs of bfloat16 in 32 bits. Row `r` of a begins
// r * a_row further; the next pair is a_pair, b_pair further.
template <int kHigh, int kVectors>
LOWBIT_BF16 inline void add_products(__m512 (&sums)[kHigh][kVectors], const std::uint32_t* a, std::int64_t a_row,
                                     std::int64_t a_pair, const std::uint32_t* b, std::int64_t b_pair, int pairs) {
    for (int p = 0; p < pairs; ++p, a += a_pair, b += b_pair) {
        __m512bh right[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kHigh; ++r) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * a_row]));
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
        }
    }
}

}  // namespace
#endif

}  // namespace lowbit
