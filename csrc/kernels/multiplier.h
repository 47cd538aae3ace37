// One product with one weight, for models that the decoder does not know.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/activations.h"
#include "kernels/kernels.h"
#include "kernels/packed_weight.h"

namespace lowbit {

// The type of activations, bias and result.
enum class Value : std::uint8_t { f32, f16, bf16 };

// A weight, and what becomes of its input. residual: a second weight of the same layout whose product is added to that of the
// first, which is how levels that 8 bits do not hold are held by 16.
struct Factor {
    std::shared_ptr<const PackedWeight> weight, residual;
    ActivationSpec activations;
};

class Multiplier {
 public:
    Multiplier(std::shared_ptr<ThreadPool> pool, const Kernels& kernels)
        : pool_(std::move(pool)), kernels_(kernels), rows_of_thread_(pool_->threads()) {}

    // y [count, rows of w] = x [count, cols of w] W' + bias [rows of w] or null, all of one type. Callers wait for each
    // other.
    void linear(const Factor& factor, Value type, const void* x, int count, const void* bias, void* y);

    const Kernels& kernels() const { return kernels_; }

 private:
    std::shared_ptr<ThreadPool> pool_;
    const Kernels& kernels_;
    std::mutex callers_;
    ActivationsBuffer rows_;
    std::vector<Buffer<float>> rows_of_thread_;
    Buffer<float> values_, results_, bias_;
};

}  // namespace lowbit
