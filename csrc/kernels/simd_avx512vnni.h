// Sixteen lanes in one register, and dot products in one instruction.
#pragma once

#define LOWBIT_VNNI
#include "kernels/simd_avx512.h"
