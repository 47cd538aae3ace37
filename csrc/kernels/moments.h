// Second moments of the inputs of a layer, in bfloat16: what calibration adds up over its text.
#pragma once

#include <cstdint>

#include "core/thread_pool.h"
#include "kernels/bfloat16.h"

namespace lowbit {

// Rows of floats [tokens, width], in float32 or bfloat16.
struct Rows {
    const void* values = nullptr;
    bool halves = false;  // bfloat16
};

// What is added to; all [width] or [width, width], in float32.
struct MomentSums {
    float* products = nullptr;  // x' x, of which the upper triangle counts; what lies below it may hold anything
    float* drift = nullptr;     // (y - x)' x; null where there is no y
    float* largest = nullptr;   // |x|
    float* sizes = nullptr;     // the sum of |x|
};

// Adds `tokens` rows of x, rounded to bfloat16, and of y less them, rounded as well. Products are exact, sums float32. Each number
// is computed by one thread, in an order that does not depend on how many there are. Only where multiplies_bfloat16().
void add_moments(ThreadPool& pool, int tokens, int width, const Rows& x, const Rows& y, const MomentSums& sums);

}  // namespace lowbit
