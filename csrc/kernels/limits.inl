// What this processor could do at best, to hold speeds against.
#pragma once

#include <utility>

#include "kernels/simd.h"

namespace lowbit {
namespace {

// The sums of one tile of a product: a row of them for each x. Indices are constants from the start, because an array that
// is indexed by a loop stays in memory.
template <int... r>
LOWBIT_INLINE void dots(I (&sums)[2 * sizeof...(r)], B (&w)[2], const B (&x)[sizeof...(r)], std::integer_sequence<int, r...>) {
    Simd::keep(w[0]);
    Simd::keep(w[1]);
    ((sums[2 * r] = Simd::dot_small(sums[2 * r], w[0], x[r]), sums[2 * r + 1] = Simd::dot_small(sums[2 * r + 1], w[1], x[r])), ...);
}

template <int... i>
LOWBIT_INLINE I added(const I (&sums)[sizeof...(i)], std::integer_sequence<int, i...>) {
    I total = Simd::all(0);
    ((total = Simd::add(total, sums[i])), ...);
    return total;
}

// Dot products of bytes that wait for nothing; returns how many products of two bytes they were. rounds: a
// multiple of 4.
std::int64_t peak(std::int64_t rounds) {
    // As many sums as fit into registers, and enough that each may take its time.
    constexpr int kX = Simd::kRows * Simd::kTiles / 2;
    alignas(64) static const std::uint8_t bytes[64] = {1};
    static const std::int8_t four[4] = {1, 1, 1, 1};
    B w[2] = {Simd::load_bytes(bytes), Simd::load_bytes(bytes)}, x[kX];
    I sums[2 * kX];
    // Nothing is known of the values, so that no product is computed once for all rounds, or for two sums.
    const auto begin = [&]<int... r>(std::integer_sequence<int, r...>) {
        ((x[r] = Simd::four_bytes(four), Simd::keep(x[r]), sums[2 * r] = sums[2 * r + 1] = Simd::all(0)), ...);
    };
    constexpr auto all_x = std::make_integer_sequence<int, kX>{};
    begin(all_x);
    for (std::int64_t i = 0; i < rounds; i += 4) {  // several in a loop, which moves registers at its end
        dots(sums, w, x, all_x);
        dots(sums, w, x, all_x);
        dots(sums, w, x, all_x);
        dots(sums, w, x, all_x);
    }
    return rounds * 2 * kX * 64 + (Simd::sum(added(sums, std::make_integer_sequence<int, 2 * kX>{})) == -1);
}

// Reads memory from end to end; returns something that depends on all of it.
std::int64_t read(const std::uint8_t* from, std::int64_t bytes) {
    I sums[4] = {Simd::all(0), Simd::all(0), Simd::all(0), Simd::all(0)};
    for (std::int64_t at = 0; at + 256 <= bytes; at += 256) {
        for (int i = 0; i < 4; ++i) {
            Simd::prefetch(from + at + 64 * i + 8192);
            sums[i] = Simd::add(sums[i], Simd::load_ints(reinterpret_cast<const std::int32_t*>(from + at + 64 * i)));
        }
    }
    return Simd::sum(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
}

}  // namespace
}  // namespace lowbit
