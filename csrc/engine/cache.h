// Keys and values of several sequences. Memory is reserved for all positions and taken as they are reached.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "core/buffer.h"
#include "kernels/linear.h"

namespace lowbit {

class Cache {
 public:
    static constexpr int kBlock = 64;  // positions that attention reads at a time

    Cache(int layers, int key_heads, int head_dim, int sequences, int capacity, bool int8)
        : layers_(layers), key_heads_(key_heads), head_dim_(head_dim), sequences_(sequences), int8_(int8) {
        if (sequences < 1 || capacity < 1) throw std::invalid_argument("a cache of no sequences or positions");
        capacity_ = (capacity + kBlock - 1) / kBlock * kBlock;
        const std::size_t plane = static_cast<std::size_t>(capacity_) * head_dim_ * (int8_ ? 1 : 2);
        const std::size_t count = static_cast<std::size_t>(layers_) * key_heads_ * sequences_;
        plane_ = (plane + 63) / 64 * 64;
        keys_ = Buffer<std::uint8_t>(plane_ * count);
        values_ = Buffer<std::uint8_t>(plane_ * count);
        scales_ = Buffer<float>(2 * count * capacity_);
    }

    KeyValues at(int layer, int sequence, int key_head) {
        const std::size_t index = (static_cast<std::size_t>(sequence) * layers_ + layer) * key_heads_ + key_head;
        float* scales = scales_.data() + 2 * index * capacity_;
        return {keys_.data() + index * plane_, values_.data() + index * plane_, scales, scales + capacity_};
    }

    int sequences() const { return sequences_; }
    int capacity() const { return capacity_; }
    bool int8() const { return int8_; }
    // Bytes of one position of one sequence.
    std::int64_t bytes_per_position() const {
        return std::int64_t{2} * layers_ * key_heads_ * (head_dim_ * (int8_ ? 1 : 2) + 4);
    }

 private:
    int layers_, key_heads_, head_dim_, sequences_, capacity_ = 0;
    bool int8_;
    std::size_t plane_ = 0;
    Buffer<std::uint8_t> keys_, values_;
    Buffer<float> scales_;
};

}  // namespace lowbit
