// Error feedback, column by column: the loop that GPTQ and its descendants share.
#pragma once

#include <vector>

#include "solvers/solve.h"

namespace lowbit {

// What one thread needs for a tile of kFeedLanes rows. All [cols, kFeedLanes], in the order of rounding but for `off`.
struct FeedTile {
    explicit FeedTile(const Shape& shape);

    LaneScales scales;
    Buffer<float> w, nearest, found, off, product, fed, moved, errors;
    Buffer<std::uint8_t> still, codes;  // codes [cols]
};

class Feeder {
 public:
    Feeder(const SolverKernels& kernels, const Problem& problem, const Feed& feed);

    // Rows from `first` on, as many as there are up to kFeedLanes. pulled [kFeedLanes, stride], where it is not null: (Q - W) H
    // of each row, or NaN first where that is not known.
    void run(FeedTile& tile, int first, float* pulled, std::int64_t stride) const;

 private:
    void load(FeedTile& tile, int first, int rows) const;
    void columns(FeedTile& tile, double* squares) const;
    void quadratic(FeedTile& tile, const Buffer<float>& levels, double* out) const;
    void off(FeedTile& tile, const Buffer<float>& levels) const;
    void pull(FeedTile& tile, float* pulled, std::int64_t stride) const;

    const SolverKernels& k_;
    const Problem& p_;
    const Feed& f_;
    std::vector<int> group_;  // of the columns in the order of rounding
};

}  // namespace lowbit
