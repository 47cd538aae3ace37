// The GPTQ family once scales are fitted: codes by error feedback, and then polish. Rows of a weight depend on no other.
#pragma once

#include "core/thread_pool.h"
#include "solvers/quantized.h"

namespace lowbit {

// How scales and minima are kept.
enum class Store : std::uint8_t { fp32, fp16, bf16 };

// Matrices are [cols, cols]; errors are e H e' of each row e of what the codes are off.
struct Problem {
    Shape shape;
    Grouped as;                 // scales before any refit
    const float* target;        // [rows, cols]: what the codes are to resemble
    const float* hessian;       // H
    const std::int32_t* order;  // [cols]: in which columns are rounded
    const std::uint8_t* still;  // [rows, cols]: zeros that stay; null: none
    std::uint8_t* codes;        // [rows, cols]
    double* error;              // [rows]: of the codes
};

// Codes by feedback or, where there is no shift, of round-to-nearest for rows where its error is no larger. Both matrices in the
// order of rounding.
struct Feed {
    const float* root;   // R, upper triangular with H = R R'
    const float* shift;  // P of GPTAQ; null: none
    double* start;       // [rows]: the error of round-to-nearest
};

// Rounds of: all scales of a row (and its minima) become the least-squares answer for its codes, where `refit`; then one sweep of
// exact coordinate descent over its codes. A row keeps what it had, and has no further round, where that does not lower its error.
struct Polish {
    int rounds;
    bool refit;
    Store scale_store, offset_store;
    bool signed_scales;     // whether a negative scale may be stored
    float* scale;           // [rows, groups]: the result
    float* offset;          // the same, or null
    std::size_t most_kept;  // bytes of products of groups with H that 16 rows may keep from one step to the next
};

// `feed` null: codes are given; `polish` null: as they are after feedback.
void solve(ThreadPool& pool, const SolverKernels& kernels, const Problem& problem, const Feed* feed, const Polish* polish);

}  // namespace lowbit
