// Fits and rounding over a matrix, its blocks shared among threads. Shares are the same for any number of threads.
#pragma once

#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "solvers/fits.h"

namespace lowbit {

// The fitters of the instruction set whose kernels these are.
const Fitters& fitters_of(const Kernels&);

Seen fit_blocks(const Fitters&, ThreadPool&, const Fit&, const Matrix&, const Importance&, const Blocks&, const Fitted&);

// codes: rows of `row_bytes`.
Squares round_blocks(const Fitters&, ThreadPool&, const Levels&, const Matrix&, const Blocks&, const Steps&, int bits,
                     std::uint8_t* codes, std::int64_t row_bytes);

void block_peaks(const Fitters&, ThreadPool&, const Matrix&, const Blocks&, float* peaks);

}  // namespace lowbit
