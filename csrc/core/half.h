// float16 without instructions for it.
#pragma once

#include <cstdint>
#include <cstring>

namespace lowbit {

inline float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16, absolute = h & 0x7fff;
    std::uint32_t bits = absolute << 13;
    float value;
    if (absolute >= 0x7c00) {
        bits = 0x7f800000 | ((absolute & 0x3ff) << 13);
        std::memcpy(&value, &bits, 4);
    } else {
        std::memcpy(&value, &bits, 4);
        value *= 0x1p112f;  // the biases of the exponents differ by 112, for subnormal numbers too
    }
    std::memcpy(&bits, &value, 4);
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
}

// To the nearest, ties to even.
inline std::uint16_t float_to_half(float v) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const std::uint32_t sign = (bits >> 16) & 0x8000, absolute = bits & 0x7fffffff;
    if (absolute > 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7e00);
    if (absolute >= 0x477ff000) return static_cast<std::uint16_t>(sign | 0x7c00);
    if (absolute < 0x38800000) {  // subnormal: added to 0.5, the rounded fraction is in the last bits
        float magnitude;
        std::memcpy(&magnitude, &absolute, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return static_cast<std::uint16_t>(sign | (bits - 0x3f000000));
    }
    return static_cast<std::uint16_t>(sign | ((absolute - 0x38000000 + 0xfff + ((absolute >> 13) & 1)) >> 13));
}

}  // namespace lowbit
