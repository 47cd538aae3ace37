// What this processor could do at best, to hold speeds against.
#include "kernels/linear.h"

namespace lowbit {
namespace {

// Dot products of bytes that wait for nothing; returns how many products of two bytes they were.
std::int64_t peak(std::int64_t rounds) {
    constexpr int kSums = Simd::kRows > 2 ? 16 : 4;
    alignas(64) std::uint8_t bytes[64] = {1};
    alignas(64) std::int8_t four[4] = {1, 1, 1, 1};
    I sums[kSums];
    for (I& sum : sums) sum = Simd::all(0);
    const B w = Simd::load_bytes(bytes), x = Simd::four_bytes(four);
    for (std::int64_t i = 0; i < rounds; ++i) {
        for (I& sum : sums) sum = Simd::dot_small(sum, w, x);
        Simd::keep(sums);
    }
    I total = sums[0];
    for (const I& sum : sums) total = Simd::add(total, sum);
    return rounds * kSums * 64 + (Simd::sum(total) == -1);
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
