// Error feedback, column by column: the loop that GPTQ and its descendants share.
#pragma once

#include "core/thread_pool.h"
#include "solvers/quantized.h"

namespace lowbit {

// Matrices [cols, cols]; `upper` U and `shift` P (null: none) in the order of `order` [cols], `hessian` H as the weight is. Codes
// are those of feedback or, where there is no shift, of round-to-nearest for rows where its error is no larger.
// start, error [rows]: e H e' of the nearest levels and of the codes.
struct Feed {
    Shape shape;
    Grouped as;
    const float* weight;  // [rows, cols]
    const float* hessian;
    const float* upper;
    const float* shift;
    const std::int32_t* order;
    const std::uint8_t* still;  // [rows, cols]: zeros that stay; null: none
    std::uint8_t* codes;        // [rows, cols]
    double* start;
    double* error;
};

void feed_errors(ThreadPool& pool, const SolverKernels& kernels, const Feed& feed);

}  // namespace lowbit
