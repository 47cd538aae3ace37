// One product with one weight, for models that the decoder does not know.
#pragma once

#include <memory>

#include "core/pool.h"
#include "engine/decoder.h"

namespace lowbit {

class Multiplier {
 public:
    Multiplier(std::shared_ptr<Pool> pool, const Kernels& kernels) : pool_(std::move(pool)), kernels_(kernels) {}

    // y [count, rows of w] = x [count, cols of w] W' + bias; bias [whole tiles] or null.
    void linear(const Linear& w, const Input& input, const float* x, int count, const float* bias, float* y);

    const Kernels& kernels() const { return kernels_; }

 private:
    std::shared_ptr<Pool> pool_;
    const Kernels& kernels_;
    RowsBuffer rows_;
    Buffer<float> divided_;
};

}  // namespace lowbit
