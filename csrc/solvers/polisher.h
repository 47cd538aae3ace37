// Scales refitted and codes chosen once more, as long as that lowers the error of a row.
#pragma once

#include <deque>
#include <vector>

#include "solvers/solve.h"

namespace lowbit {

// H with rows of whole vectors, and of the order of rounding the blocks on its diagonal.
struct Second {
    Second(const Problem& problem, bool minima);
    const float* row(std::int64_t k) const { return data + k * stride; }

    int cols;
    std::int64_t stride;
    const float* data;
    Buffer<float> padded, blocks;
    Buffer<float> sums;  // [groups, stride], for minima: of the rows of each group, which is what its constant is multiplied with
};

// What one thread needs for kSweepLanes rows: [kSweepLanes, stride] each, unless it says otherwise.
struct PolishTile {
    PolishTile(const Shape& shape, const Second& h, int unknowns, std::size_t kept);

    int first = 0, rows = 0;  // of the weight
    LaneScales scales;
    Buffer<float> off;             // Q - W
    float* pulled = nullptr;       // (Q - W) H, which is given where feedback found it
    Buffer<float> own_pulled;
    Buffer<float> level, basis;    // of the codes; the same less the zero-point
    Buffer<float> change;          // of the basis since the products were computed; then of Q
    Buffer<float> products;        // [groups, kSweepLanes, product_stride]: of the basis of each group with H; or of one group
    Buffer<float> normal, right;   // [unknowns, unknowns, kSweepLanes], [unknowns, kSweepLanes]
    Buffer<float> dots;
    Buffer<float> inner, levels, steps;  // [kBlock, kSweepLanes]
    Buffer<std::uint8_t> still;
    Buffer<float> best_level, best_scale, best_offset;
    std::vector<const float*> from;
    std::vector<float> weights;
    double best[kSweepLanes], error[kSweepLanes];
    bool alive[kSweepLanes];
};

// A line more than the columns take: rows that are a multiple of a page apart would share the same few places of a cache.
inline std::int64_t product_stride(const Shape& shape) { return shape.padded() + 16; }

class Polisher {
 public:
    // `keeps`: whether a tile has memory for the products of all groups of its rows.
    Polisher(const SolverKernels& kernels, const Problem& problem, const Polish& polish, const Second& h, bool keeps);

    // As many tiles of rows as there are from `first` on, side by side, so that what is read of H serves all of them. pulled
    // [rows, stride] as a Feeder left it, or null.
    void run(std::deque<PolishTile>& tiles, int first, float* pulled) const;

 private:
    void load(PolishTile& t, float* pulled) const;
    int end_of(int g) const;
    double error_of(const PolishTile& t, int r) const;
    void refit(std::deque<PolishTile>& tiles, int count, bool fresh) const;
    void set_basis(PolishTile& t) const;
    void add_group(PolishTile& t, int g, bool fresh) const;
    float* product(PolishTile& t, int r, int g) const;
    void change_scales(PolishTile& t, int r) const;
    void renew_product(PolishTile& t, int g) const;
    void sweep(std::deque<PolishTile>& tiles, int count) const;
    void sweep_block(PolishTile& t, int begin, int count, const float* block) const;
    void keep(PolishTile& t, int r) const;
    void save(PolishTile& t) const;

    const SolverKernels& k_;
    const Problem& p_;
    const Polish& polish_;
    const Second& h_;
    int groups_;
    bool minima_, keeps_;
    std::vector<int> group_;  // of the columns in the order of rounding
};

}  // namespace lowbit
