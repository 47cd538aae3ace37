#include "kernels/multiplier.h"

#include <algorithm>
#include <cstring>

#include "core/half.h"

namespace lowbit {

namespace {

constexpr int kRowBlock = 96;  // rows of activations that stay in the second cache

float bf16_to_float(std::uint16_t v) {
    const std::uint32_t bits = std::uint32_t{v} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

std::uint16_t float_to_bf16(float v) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

std::int64_t size_of(Value type) { return type == Value::f32 ? 4 : 2; }

const void* at(Value type, const void* values, std::int64_t index) {
    return static_cast<const char*>(values) + index * size_of(type);
}

void to_floats(Value type, const void* from, int count, float* to) {
    const auto* halves = static_cast<const std::uint16_t*>(from);
    if (type == Value::f32) {
        std::memcpy(to, from, sizeof(float) * static_cast<std::size_t>(count));
    } else if (type == Value::bf16) {
        for (int i = 0; i < count; ++i) to[i] = bf16_to_float(halves[i]);
    } else {
        for (int i = 0; i < count; ++i) to[i] = half_to_float(halves[i]);
    }
}

void from_floats(Value type, const float* from, int count, std::uint16_t* to) {
    if (type == Value::bf16) {
        for (int i = 0; i < count; ++i) to[i] = float_to_bf16(from[i]);
    } else {
        for (int i = 0; i < count; ++i) to[i] = float_to_half(from[i]);
    }
}

}  // namespace

void Multiplier::linear(const Factor& factor, Value type, const void* x, int count, const void* bias, void* y) {
    if (count == 0) return;
    const std::lock_guard one(callers_);
    const PackedWeight& w = *factor.weight;
    const ActivationSpec& spec = factor.activations;
    const bool floats = is_float(w.code), plain = type == Value::f32;
    rows_.shape(w, spec.digits(), count);
    Activations& rows = rows_.rows;
    rows.values = static_cast<const float*>(x);
    rows.stride = w.cols;
    if (floats && !plain) {
        values_.reserve(static_cast<std::size_t>(count) * w.cols);
        rows.values = values_.data();
    }
    auto* results = static_cast<float*>(y);
    if (!plain) {
        results_.reserve(static_cast<std::size_t>(count) * w.rows);
        results = results_.data();
    }
    Epilogue first, second;
    if (bias != nullptr) {
        bias_.reserve(static_cast<std::size_t>(w.tiles()) * kTile);
        to_floats(type, bias, w.rows, bias_.data());
        first.bias = bias_.data();
    }
    second.addend = results;

    // Row `i` as float32, divided.
    const auto row_of = [&](Worker& worker, std::int64_t i) {
        const void* from = at(type, x, i * w.cols);
        if (plain && spec.divisor.empty()) return static_cast<const float*>(from);
        Buffer<float>& own = rows_of_thread_[worker.index()];
        own.reserve(w.cols);
        to_floats(type, from, w.cols, own.data());
        for (std::size_t k = 0; k < spec.divisor.size(); ++k) own[k] /= spec.divisor[k];
        return static_cast<const float*>(own.data());
    };
    const int blocks = (count + kRowBlock - 1) / kRowBlock, pairs = (w.tiles() + 1) / 2;
    pool_->run([&](Worker& worker) {
        if (!floats || !plain) {
            worker.share(0, count, 4, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i) {
                    if (floats) {
                        to_floats(type, at(type, x, i * w.cols), w.cols, values_.data() + i * w.cols);
                    } else {
                        kernels_.quantize(row_of(worker, i), w.cols, rows, static_cast<int>(i), spec.static_scale, spec.per_token);
                    }
                }
            });
            worker.barrier();
        }
        const int grain = std::clamp(pairs / (4 * worker.count()), 1, 16);
        const std::int64_t groups = (pairs + grain - 1) / grain;
        worker.share(1, groups * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t share = begin; share < end; ++share) {
                const int t0 = static_cast<int>(share / blocks) * grain * 2, m0 = static_cast<int>(share % blocks) * kRowBlock;
                const int t1 = std::min(t0 + 2 * grain, w.tiles()), m1 = std::min(m0 + kRowBlock, count);
                kernels_.linear(w, rows, m0, m1, t0, t1, first, results, w.rows);
                if (factor.residual) kernels_.linear(*factor.residual, rows, m0, m1, t0, t1, second, results, w.rows);
                if (plain) continue;
                const int begin_column = t0 * kTile, columns = std::min(t1 * kTile, w.rows) - begin_column;
                for (std::int64_t m = m0; m < m1; ++m) {
                    const std::int64_t index = m * w.rows + begin_column;
                    from_floats(type, results + index, columns, static_cast<std::uint16_t*>(y) + index);
                }
            }
        });
    });
}

}  // namespace lowbit
