#include "core/buffer.h"

#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lowbit {

namespace {
constexpr std::size_t kLine = 64;
[[maybe_unused]] constexpr std::size_t kHuge = std::size_t{1} << 21;

[[maybe_unused]] std::size_t padded(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
}  // namespace

#if defined(LOWBIT_SANITIZE)

// To the byte, so that the sanitizer sees what is read beyond.
void* allocate(std::size_t bytes) {
    if (bytes == 0) return nullptr;
    void* memory = ::operator new(bytes, std::align_val_t{kLine});
    std::memset(memory, 0, bytes);
    return memory;
}

void release(void* memory, std::size_t) noexcept {
    if (memory != nullptr) ::operator delete(memory, std::align_val_t{kLine});
}

#elif defined(__linux__)

// Straight from the system: pages arrive zeroed, and go back as soon as they are released.
void* allocate(std::size_t bytes) {
    if (bytes == 0) return nullptr;
    void* memory = mmap(nullptr, padded(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    // One huge page spares 512 entries of the TLB; small buffers would only waste it.
    if (bytes >= kHuge) madvise(memory, padded(bytes), MADV_HUGEPAGE);
    return memory;
}

void release(void* memory, std::size_t bytes) noexcept {
    if (memory != nullptr) munmap(memory, padded(bytes));
}

#else

void* allocate(std::size_t bytes) {
    if (bytes == 0) return nullptr;
    void* memory = ::operator new(padded(bytes), std::align_val_t{kLine});
    std::memset(memory, 0, padded(bytes));
    return memory;
}

void release(void* memory, std::size_t) noexcept {
    if (memory != nullptr) ::operator delete(memory, std::align_val_t{kLine});
}

#endif

}  // namespace lowbit
