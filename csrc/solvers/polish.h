// Scales refitted and codes chosen once more, as long as that lowers the error of a row.
#pragma once

#include "core/thread_pool.h"
#include "solvers/quantized.h"

namespace lowbit {

// How scales and minima are kept.
enum class Store : std::uint8_t { fp32, fp16, bf16 };

// One round: all scales of a row (and its minima) become the least-squares answer for its codes, where `refit`; then one sweep of
// exact coordinate descent over its codes. A row keeps what it had, and has no further round, where that does not lower its error.
struct Polish {
    Shape shape;
    Grouped as;
    const float* target;   // [rows, cols]
    const float* hessian;  // [cols, cols]
    const std::int32_t* order;
    const std::uint8_t* still;
    int rounds;
    bool refit;
    Store scale_store, offset_store;
    bool signed_scales;    // whether a negative scale may be stored
    std::uint8_t* codes;   // [rows, cols]: before and after
    float* scale;          // [rows, groups]: before and after
    float* offset;         // the same, or null
    double* error;         // [rows]
};

void polish(ThreadPool& pool, const SolverKernels& kernels, const Polish& job);

}  // namespace lowbit
