#include "solvers/quantizer.h"

#include <algorithm>
#include <atomic>
#include <string_view>
#include <vector>

#include "core/buffer.h"
#include "kernels/isa_families.h"

namespace lowbit {

#define LOWBIT_ISA(name, family, extends, flags, gcc, msvc) LOWBIT_ON_##family(extern const Fitters fitters_##name;)
#include "kernels/isas.def"
#undef LOWBIT_ISA

const Fitters& fitters_of(const Kernels& kernels) {
    const std::string_view wanted = kernels.name;
    const Fitters* found = &fitters_portable;
#define LOWBIT_ISA(name, family, extends, flags, gcc, msvc) LOWBIT_ON_##family(if (wanted == #name) found = &fitters_##name;)
#include "kernels/isas.def"
#undef LOWBIT_ISA
    return *found;
}

namespace {

constexpr std::int64_t kShare = 1 << 14;  // elements of what one thread takes at a time

// body(share, memory) for each share, by whoever is free.
template <class Body>
void share_out(ThreadPool& pool, std::int64_t shares, std::int64_t floats, const Body& body) {
    pool.run([&](Worker& worker) {
        Buffer<float> memory;
        worker.share(0, shares, 1, [&](std::int64_t first, std::int64_t last) {
            memory.reserve(static_cast<std::size_t>(floats));
            for (std::int64_t share = first; share < last; ++share) body(share, memory.data());
        });
    });
}

std::int64_t shares_of(std::int64_t items, std::int64_t each) { return (items + each - 1) / each; }

}  // namespace

Seen fit_blocks(const Fitters& fitters, ThreadPool& pool, const Fit& fit, const Matrix& m, const Importance& importance,
                const Blocks& blocks, const Fitted& out) {
    const std::int64_t count = m.rows * blocks.per_row;
    const std::int64_t each = std::max<std::int64_t>(1, kShare / blocks.size / 16) * 16 / (blocks.size > 128 ? 16 : 1);
    std::atomic<bool> fits{true}, constant{false}, zeros{false};
    share_out(pool, shares_of(count, each), fit_memory(blocks.size), [&](std::int64_t share, float* memory) {
        const Seen seen = fitters.fit(fit, m, importance, blocks, share * each, std::min(count, (share + 1) * each), out, memory);
        if (!seen.fits) fits = false;
        if (seen.constant) constant = true;
        if (seen.zeros) zeros = true;
    });
    return {fits, constant, zeros};
}

Squares round_blocks(const Fitters& fitters, ThreadPool& pool, const Levels& levels, const Matrix& m, const Blocks& blocks,
                     const Steps& steps, int bits, std::uint8_t* codes, std::int64_t row_bytes) {
    const std::int64_t each = std::max<std::int64_t>(1, kShare / std::max<std::int64_t>(1, m.cols));
    const std::int64_t shares = shares_of(m.rows, each);
    std::vector<Squares> found(static_cast<std::size_t>(shares));
    share_out(pool, shares, 2 * m.cols + 64, [&](std::int64_t share, float* memory) {
        found[static_cast<std::size_t>(share)] = fitters.round(levels, m, blocks, steps, bits, share * each,
                                                               std::min(m.rows, (share + 1) * each), codes, row_bytes, memory);
    });
    Squares total;
    for (const Squares& one : found) {
        total.weight += one.weight;
        total.error += one.error;
    }
    return total;
}

void block_peaks(const Fitters& fitters, ThreadPool& pool, const Matrix& m, const Blocks& blocks, float* peaks) {
    const std::int64_t count = m.rows * blocks.per_row, each = std::max<std::int64_t>(1, kShare / blocks.size);
    share_out(pool, shares_of(count, each), blocks.size + 16, [&](std::int64_t share, float* memory) {
        fitters.peaks(m, blocks, share * each, std::min(count, (share + 1) * each), peaks, memory);
    });
}

}  // namespace lowbit
