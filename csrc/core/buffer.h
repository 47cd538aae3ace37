// Memory for packed weights, caches and scratch: aligned to a cache line, zeroed, huge pages where the system has them.
#pragma once

#include <cstddef>
#include <utility>

namespace lowbit {

void* allocate(std::size_t bytes);  // throws std::bad_alloc
void release(void* memory, std::size_t bytes) noexcept;

template <class T>
class Buffer {
 public:
    Buffer() = default;
    explicit Buffer(std::size_t count) : data_(static_cast<T*>(allocate(count * sizeof(T)))), count_(count) {}
    Buffer(Buffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(count_, other.count_);
        return *this;
    }
    ~Buffer() { release(data_, count_ * sizeof(T)); }

    T* data() { return data_; }
    const T* data() const { return data_; }
    std::size_t size() const { return count_; }
    std::size_t bytes() const { return count_ * sizeof(T); }
    T& operator[](std::size_t i) { return data_[i]; }
    const T& operator[](std::size_t i) const { return data_[i]; }

    // At least `count` elements; what was there is lost.
    void reserve(std::size_t count) {
        if (count > count_) *this = Buffer(count);
    }

 private:
    T* data_ = nullptr;
    std::size_t count_ = 0;
};

}  // namespace lowbit
