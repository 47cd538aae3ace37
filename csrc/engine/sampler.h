// Picks the next token.
#pragma once

#include <cstdint>
#include <vector>

namespace lowbit {

struct Sampling {
    double temperature = 0;  // 0: the likeliest token
    int top_k = 0;           // 0: all
    double top_p = 1;
    double min_p = 0;
    double repetition_penalty = 1;  // Keskar et al. 2019: logits of tokens seen before are divided by it, or multiplied
};

// Random numbers that are the same on every machine: splitmix64 (Steele, Lea and Flood 2014).
class Random {
 public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    double uniform() {  // in [0, 1)
        state_ += 0x9e3779b97f4a7c15;
        std::uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
    }

 private:
    std::uint64_t state_;
};

// One of [0, vocabulary). Changes `logits`. `seen`: which tokens the sequence has, one byte each, or null.
// Penalty, temperature, top-k, top-p and min-p apply in this order.
std::int32_t sample(float* logits, int vocabulary, const Sampling& how, const std::uint8_t* seen, Random& random);

}  // namespace lowbit
