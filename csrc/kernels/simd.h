// The instruction set that this file is compiled for: kernels.cpp.in names its header, and without a name it is the portable
// one. Everything here and in the .inl files belongs to one translation unit, so that sets cannot be mixed up.
#pragma once

#include "kernels/packed_weight.h"
#ifdef LOWBIT_SIMD
#include LOWBIT_SIMD
#else
#include "kernels/simd_portable.h"
#endif

namespace lowbit {
namespace {

using I = Simd::I;  // 16 integers of 32 bits
using F = Simd::F;  // 16 numbers in float32
using B = Simd::B;  // 64 bytes

// std::min is an inline function that files with fewer instructions would share.
LOWBIT_INLINE int least(int a, int b) { return a < b ? a : b; }

}  // namespace
}  // namespace lowbit
