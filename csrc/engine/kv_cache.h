// Keys and values of several sequences. Memory is reserved for all positions and taken as they are reached.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#include "core/buffer.h"
#include "kernels/kernels.h"

namespace lowbit {

class KVCache {
 public:
    static constexpr int kBlock = 64;  // positions that attention reads at a time

    KVCache(int layers, int key_heads, int head_dim, int sequences, int capacity, KVFormat format)
        : layers_(layers), key_heads_(key_heads), head_dim_(head_dim), sequences_(sequences), format_(format) {
        if (sequences < 1 || capacity < 1) throw std::invalid_argument("a cache of no sequences or positions");
        capacity_ = (capacity + kBlock - 1) / kBlock * kBlock;
        const std::size_t stride = static_cast<std::size_t>(capacity_) * head_dim_ * bytes_of_element();
        const std::size_t count = static_cast<std::size_t>(layers_) * key_heads_ * sequences_;
        stride_ = (stride + 63) / 64 * 64;
        keys_ = Buffer<std::uint8_t>(stride_ * count);
        values_ = Buffer<std::uint8_t>(stride_ * count);
        scales_ = Buffer<float>(2 * count * capacity_);
    }

    KeyValues at(int layer, int sequence, int key_head) {
        const std::size_t index = (static_cast<std::size_t>(sequence) * layers_ + layer) * key_heads_ + key_head;
        float* scales = scales_.data() + 2 * index * capacity_;
        std::uint8_t *keys = keys_.data() + index * stride_, *values = values_.data() + index * stride_;
        KeyValues found{keys, values, keys, values, scales, scales + capacity_};
        if (format_ == KVFormat::int8) {
            std::uint8_t* halves = halves_.load(std::memory_order_acquire);
            found.key_halves = halves == nullptr ? nullptr : halves + 4 * index * stride_;
            found.value_halves = halves == nullptr ? nullptr : halves + (4 * index + 2) * stride_;
        }
        return found;
    }

    // Memory for the float16 of a cache in int8: reserved for all positions at once, and taken, as all else here, where it is
    // written. False where the system gives none.
    bool add_halves() {
        const std::lock_guard one(adding_);
        if (halves_.load(std::memory_order_relaxed) != nullptr) return true;
        try {
            float16_ = Buffer<std::uint8_t>(4 * keys_.size());
        } catch (const std::bad_alloc&) {
            return false;
        }
        halves_.store(float16_.data(), std::memory_order_release);
        return true;
    }

    int sequences() const { return sequences_; }
    int capacity() const { return capacity_; }
    KVFormat format() const { return format_; }
    // Bytes of one position of one sequence.
    std::int64_t bytes_per_position() const {
        return std::int64_t{2} * layers_ * key_heads_ * (head_dim_ * bytes_of_element() + 4);
    }

 private:
    int bytes_of_element() const { return format_ == KVFormat::int8 ? 1 : 2; }

    int layers_, key_heads_, head_dim_, sequences_, capacity_ = 0;
    KVFormat format_;
    std::size_t stride_ = 0;
    Buffer<std::uint8_t> keys_, values_, float16_;
    std::atomic<std::uint8_t*> halves_{nullptr};
    std::mutex adding_;
    Buffer<float> scales_;
};

}  // namespace lowbit
