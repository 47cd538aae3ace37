#include "engine/multiplier.h"

#include <algorithm>

namespace lowbit {

void Multiplier::linear(const Linear& w, const Input& input, const float* x, int count, const float* bias, float* y) {
    constexpr int kRowBlock = 96;
    if (count == 0) return;
    if (!input.divisor.empty()) {
        divided_.reserve(static_cast<std::size_t>(count) * w.cols);
        for (std::int64_t i = 0; i < count; ++i)
            for (int k = 0; k < w.cols; ++k) divided_[i * w.cols + k] = x[i * w.cols + k] / input.divisor[k];
        x = divided_.data();
    }
    rows_.shape(w, input.planes, count);
    Rows& rows = rows_.rows;
    rows.values = x;
    rows.stride = w.cols;
    Epilogue e;
    e.bias = bias;
    const int blocks = (count + kRowBlock - 1) / kRowBlock, pairs = (w.tiles() + 1) / 2;
    pool_->run([&](Member& member) {
        if (!is_float(w.code)) {
            member.share(0, count, 4, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i)
                    kernels_.quantize(x + i * w.cols, w.cols, rows, static_cast<int>(i), input.fixed, input.whole);
            });
            member.barrier();
        }
        const int grain = std::clamp(pairs / (4 * member.count()), 1, 16);
        const std::int64_t groups = (pairs + grain - 1) / grain;
        member.share(1, groups * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t share = begin; share < end; ++share) {
                const int t0 = static_cast<int>(share / blocks) * grain * 2, m0 = static_cast<int>(share % blocks) * kRowBlock;
                kernels_.linear(w, rows, m0, std::min(m0 + kRowBlock, count), t0, std::min(t0 + 2 * grain, w.tiles()), e, y,
                                w.rows);
            }
        });
    });
}

}  // namespace lowbit
