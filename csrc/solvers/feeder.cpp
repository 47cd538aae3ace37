#include "solvers/feeder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lowbit {

namespace {

constexpr int kLanes = kFeedLanes;
constexpr int kDeep = 64;  // columns of H that are multiplied at a time

std::size_t size_of(const Shape& shape) { return static_cast<std::size_t>(shape.cols) * kLanes; }

}  // namespace

FeedTile::FeedTile(const Shape& shape)
    : scales(kLanes, shape.groups()),
      w(size_of(shape)),
      nearest(size_of(shape)),
      found(size_of(shape)),
      off(size_of(shape)),
      product(size_of(shape)),
      fed(size_of(shape)),
      moved(size_of(shape)),
      errors(static_cast<std::size_t>(kBlock) * kLanes),
      still(size_of(shape)),
      codes(static_cast<std::size_t>(shape.cols)) {}

Feeder::Feeder(const SolverKernels& kernels, const Problem& problem, const Feed& feed)
    : k_(kernels), p_(problem), f_(feed), group_(problem.shape.cols) {
    for (int i = 0; i < problem.shape.cols; ++i) group_[i] = problem.order[i] / problem.shape.group;
}

void Feeder::run(FeedTile& tile, int first, float* pulled, std::int64_t stride) const {
    const int rows = std::min(kLanes, p_.shape.rows - first), cols = p_.shape.cols;
    tile.scales.fill(p_.shape, p_.as, first, rows);
    load(tile, first, rows);
    k_.round_columns(p_.as.levels, {cols, group_.data(), nullptr}, tile.scales.view(), tile.w.data(), tile.nearest.data());
    double start[kLanes], error[kLanes] = {};
    quadratic(tile, tile.nearest, start);
    columns(tile, error);
    if (f_.shift != nullptr) {  // the sum of squares is no error then
        load(tile, first, rows);
        quadratic(tile, tile.found, error);
    }
    if (pulled != nullptr) pull(tile, pulled, stride);
    for (int lane = 0; lane < rows; ++lane) {
        const bool kept = f_.shift == nullptr && start[lane] <= error[lane];
        f_.start[first + lane] = start[lane];
        p_.error[first + lane] = kept ? start[lane] : error[lane];
        if (kept && pulled != nullptr) pulled[lane * stride] = std::nanf("");
        encode(p_.as.levels, (kept ? tile.nearest : tile.found).data() + lane, kLanes, cols, tile.codes.data());
        std::uint8_t* codes = p_.codes + static_cast<std::int64_t>(first + lane) * cols;
        for (int i = 0; i < cols; ++i) codes[p_.order[i]] = tile.codes[i];
    }
}

void Feeder::load(FeedTile& tile, int first, int rows) const {
    const int cols = p_.shape.cols;
    if (rows < kLanes) std::memset(tile.w.data(), 0, tile.w.bytes());
    for (int begin = 0; begin < cols; begin += 16) {  // few enough that what is written stays in the first cache
        const int end = std::min(begin + 16, cols);
        for (int lane = 0; lane < rows; ++lane) {
            const std::int64_t row = static_cast<std::int64_t>(first + lane) * cols;
            for (int i = begin; i < end; ++i) {
                const std::int64_t at = static_cast<std::int64_t>(i) * kLanes + lane;
                tile.w[at] = p_.target[row + p_.order[i]];
                if (p_.still != nullptr) tile.still[at] = p_.still[row + p_.order[i]];
            }
        }
    }
}

void Feeder::columns(FeedTile& tile, double* squares) const {
    const std::int64_t cols = p_.shape.cols;
    std::memset(tile.fed.data(), 0, tile.fed.bytes());
    for (int begin = 0; begin < cols; begin += kBlock) {
        const int count = std::min<int>(kBlock, static_cast<int>(cols) - begin), end = begin + count;
        const std::uint8_t* still = p_.still == nullptr ? nullptr : tile.still.data() + begin * kLanes;
        const float *root = f_.root + begin * cols, *p = f_.shift == nullptr ? nullptr : f_.shift + begin * cols;
        float* inner = tile.w.data() + begin * kLanes;
        k_.feed_columns(p_.as.levels, {count, group_.data() + begin, still}, tile.scales.view(), root + begin,
                        p == nullptr ? nullptr : p + begin, cols, inner, tile.fed.data() + begin * kLanes,
                        tile.found.data() + begin * kLanes, tile.errors.data(), tile.moved.data() + begin * kLanes, squares);
        const int left = static_cast<int>(cols) - end;
        k_.multiply_add({root + end, 1, cols}, left, count, tile.errors.data(), kLanes, kLanes, tile.fed.data() + end * kLanes, kLanes, false);
        if (p != nullptr) k_.multiply_add({p + end, 1, cols}, left, count, inner, kLanes, kLanes, tile.w.data() + end * kLanes, kLanes, false);
    }
}

// e H e' for each row, of which half of H suffices: it is symmetric.
void Feeder::quadratic(FeedTile& tile, const Buffer<float>& levels, double* out) const {
    const std::int64_t cols = p_.shape.cols;
    off(tile, levels);
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = 0;
    // The columns of a block with each other, and twice those with all that follow.
    for (int begin = 0; begin < cols; begin += kDeep) {
        const int count = std::min<int>(kDeep, static_cast<int>(cols) - begin), end = begin + count;
        const float* e = tile.off.data() + begin * kLanes;
        const float* h = p_.hessian + begin * cols;
        alignas(64) float own[kDeep * kLanes];
        k_.multiply_add({h + begin, 1, cols}, count, count, e, kLanes, kLanes, own, kLanes, true);
        k_.multiply_add({h + end, 1, cols}, static_cast<int>(cols) - end, count, e, kLanes, kLanes,
                        tile.product.data() + end * kLanes, kLanes, begin == 0);
        for (int i = 0; i < count; ++i) {
            const float* also = tile.product.data() + (begin + i) * kLanes;  // nothing yet of the first block
            for (int lane = 0; lane < kLanes; ++lane) {
                const int at = i * kLanes + lane;
                out[lane] += static_cast<double>(e[at]) * (own[at] + (begin == 0 ? 0.0 : 2.0 * also[lane]));
            }
        }
    }
}

// What these levels are off, in the order that the weight has.
void Feeder::off(FeedTile& tile, const Buffer<float>& levels) const {
    const GroupScales scales = tile.scales.view();
    for (int i = 0; i < p_.shape.cols; ++i) {
        const std::int64_t at = static_cast<std::int64_t>(i) * kLanes;
        const float *from = levels.data() + at, *w = tile.w.data() + at;
        const float *scale = scales.scale + group_[i] * kLanes, *base = scales.base + group_[i] * kLanes;
        float* to = tile.off.data() + static_cast<std::int64_t>(p_.order[i]) * kLanes;
        for (int lane = 0; lane < kLanes; ++lane) to[lane] = from[lane] * scale[lane] + base[lane] - w[lane];
    }
}

// (Q - W) H = -d R' for d = e R, the errors as they were moved on. H = R R', of which half is zero.
void Feeder::pull(FeedTile& tile, float* pulled, std::int64_t stride) const {
    const std::int64_t cols = p_.shape.cols;
    std::memset(tile.product.data(), 0, tile.product.bytes());
    for (int begin = 0; begin < cols; begin += kDeep) {
        const int count = std::min<int>(kDeep, static_cast<int>(cols) - begin);
        k_.multiply_add({f_.root + begin, cols, 1}, begin + count, count, tile.moved.data() + begin * kLanes, kLanes, kLanes,
                        tile.product.data(), kLanes, false);
    }
    for (int i = 0; i < cols; ++i)
        for (int lane = 0; lane < kLanes; ++lane)
            pulled[lane * stride + p_.order[i]] = -tile.product[static_cast<std::int64_t>(i) * kLanes + lane];
}

}  // namespace lowbit
