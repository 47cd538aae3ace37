#include "solvers/feed.h"

#include <algorithm>
#include <cstring>
#include <deque>

namespace lowbit {

namespace {

constexpr int kLanes = kFeedLanes;
constexpr int kDeep = 64;  // columns of H that are multiplied at a time

// What one thread needs for a tile of kLanes rows. All [cols, kLanes], in the order of rounding but for `off`.
struct Tile {
    explicit Tile(const Shape& shape)
        : scales(kLanes, shape.groups()),
          w(size(shape)),
          nearest(size(shape)),
          found(size(shape)),
          off(size(shape)),
          product(size(shape)),
          errors(static_cast<std::size_t>(kBlock) * kLanes),
          still(size(shape)) {}
    static std::size_t size(const Shape& shape) { return static_cast<std::size_t>(shape.cols) * kLanes; }

    LaneScales scales;
    Buffer<float> w, nearest, found, off, product, errors;
    Buffer<std::uint8_t> still;
};

class Feeder {
 public:
    Feeder(const SolverKernels& kernels, const Feed& feed, const std::vector<int>& group) : k_(kernels), f_(feed), group_(group) {}

    void run(Tile& tile, int first) const {
        const int rows = std::min(kLanes, f_.shape.rows - first), cols = f_.shape.cols;
        tile.scales.fill(f_.shape, f_.as, first, rows);
        load(tile, first, rows);
        k_.round_columns(f_.as.levels, {cols, group_.data(), nullptr}, tile.scales.view(), tile.w.data(), tile.nearest.data());
        double start[kLanes], error[kLanes] = {};
        quadratic(tile, tile.nearest, start);
        columns(tile, error);
        if (f_.shift != nullptr) {  // the sum of squares is no error then
            load(tile, first, rows);
            quadratic(tile, tile.found, error);
        }
        for (int lane = 0; lane < rows; ++lane) {
            const bool kept = f_.shift == nullptr && start[lane] <= error[lane];
            f_.start[first + lane] = start[lane];
            f_.error[first + lane] = kept ? start[lane] : error[lane];
            const float* from = (kept ? tile.nearest : tile.found).data() + lane;
            std::uint8_t* codes = f_.codes + static_cast<std::int64_t>(first + lane) * cols;
            for (int i = 0; i < cols; ++i) codes[f_.order[i]] = code_of(f_.as.levels, from[static_cast<std::int64_t>(i) * kLanes]);
        }
    }

 private:
    void load(Tile& tile, int first, int rows) const {
        const int cols = f_.shape.cols;
        if (rows < kLanes) std::memset(tile.w.data(), 0, tile.w.bytes());
        for (int begin = 0; begin < cols; begin += 16) {  // few enough that what is written stays in the first cache
            const int end = std::min(begin + 16, cols);
            for (int lane = 0; lane < rows; ++lane) {
                const std::int64_t row = static_cast<std::int64_t>(first + lane) * cols;
                for (int i = begin; i < end; ++i) {
                    const std::int64_t at = static_cast<std::int64_t>(i) * kLanes + lane;
                    tile.w[at] = f_.weight[row + f_.order[i]];
                    if (f_.still != nullptr) tile.still[at] = f_.still[row + f_.order[i]];
                }
            }
        }
    }

    void columns(Tile& tile, double* squares) const {
        const std::int64_t cols = f_.shape.cols;
        for (int begin = 0; begin < cols; begin += kBlock) {
            const int count = std::min<int>(kBlock, static_cast<int>(cols) - begin), end = begin + count;
            const std::uint8_t* still = f_.still == nullptr ? nullptr : tile.still.data() + begin * kLanes;
            const float *u = f_.upper + begin * cols, *p = f_.shift == nullptr ? nullptr : f_.shift + begin * cols;
            float* inner = tile.w.data() + begin * kLanes;
            float* rest = tile.w.data() + end * kLanes;
            k_.feed_columns(f_.as.levels, {count, group_.data() + begin, still}, tile.scales.view(), u + begin,
                            p == nullptr ? nullptr : p + begin, cols, inner, tile.found.data() + begin * kLanes, tile.errors.data(),
                            squares);
            const int left = static_cast<int>(cols) - end;
            k_.multiply_add({u + end, 1, cols}, left, count, tile.errors.data(), kLanes, kLanes, rest, kLanes);
            if (p != nullptr) k_.multiply_add({p + end, 1, cols}, left, count, inner, kLanes, kLanes, rest, kLanes);
        }
    }

    // e H e' for each row, of which half of H suffices: it is symmetric.
    void quadratic(Tile& tile, const Buffer<float>& levels, double* out) const {
        const std::int64_t cols = f_.shape.cols;
        off(tile, levels);
        for (int lane = 0; lane < kLanes; ++lane) out[lane] = 0;
        // The columns of a block with each other, and twice those with all that follow.
        std::memset(tile.product.data(), 0, tile.product.bytes());
        for (int begin = 0; begin < cols; begin += kDeep) {
            const int count = std::min<int>(kDeep, static_cast<int>(cols) - begin), end = begin + count;
            const float* e = tile.off.data() + begin * kLanes;
            const float* h = f_.hessian + begin * cols;
            alignas(64) float own[kDeep * kLanes] = {};
            k_.multiply_add({h + begin, 1, cols}, count, count, e, kLanes, kLanes, own, kLanes);
            k_.multiply_add({h + end, 1, cols}, static_cast<int>(cols) - end, count, e, kLanes, kLanes,
                            tile.product.data() + end * kLanes, kLanes);
            for (int i = 0; i < count; ++i) {
                const float* also = tile.product.data() + (begin + i) * kLanes;
                for (int lane = 0; lane < kLanes; ++lane) {
                    const int at = i * kLanes + lane;
                    out[lane] += static_cast<double>(e[at]) * (own[at] + 2.0 * also[lane]);
                }
            }
        }
    }

    // What these levels are off, in the order that the weight has.
    void off(Tile& tile, const Buffer<float>& levels) const {
        const GroupScales scales = tile.scales.view();
        for (int i = 0; i < f_.shape.cols; ++i) {
            const std::int64_t at = static_cast<std::int64_t>(i) * kLanes;
            const float *from = levels.data() + at, *w = tile.w.data() + at;
            const float *scale = scales.scale + group_[i] * kLanes, *base = scales.base + group_[i] * kLanes;
            float* to = tile.off.data() + static_cast<std::int64_t>(f_.order[i]) * kLanes;
            for (int lane = 0; lane < kLanes; ++lane) to[lane] = from[lane] * scale[lane] + base[lane] - w[lane];
        }
    }

    const SolverKernels& k_;
    const Feed& f_;
    const std::vector<int>& group_;
};

}  // namespace

void feed_errors(ThreadPool& pool, const SolverKernels& kernels, const Feed& feed) {
    if (feed.shape.rows == 0) return;
    std::vector<int> group(feed.shape.cols);
    for (int i = 0; i < feed.shape.cols; ++i) group[i] = feed.order[i] / feed.shape.group;
    std::deque<Tile> tiles;
    for (int i = 0; i < pool.threads(); ++i) tiles.emplace_back(feed.shape);
    const Feeder feeder(kernels, feed, group);
    pool.run([&](Worker& worker) {
        worker.share(0, (feed.shape.rows + kLanes - 1) / kLanes, 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t tile = begin; tile < end; ++tile) feeder.run(tiles[worker.index()], static_cast<int>(tile) * kLanes);
        });
    });
}

}  // namespace lowbit
