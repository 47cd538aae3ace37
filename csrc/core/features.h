// What the processor can do, asked once.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

namespace lowbit {

// Sets of instructions that kernels are compiled for; each contains those before it.
enum class Isa { portable, avx2, avx512, avx512vnni };

// One instruction flag, named as in /proc/cpuinfo. `usable`: the processor has it and the system saves its registers.
struct Flag {
    std::string_view name;
    bool usable;
};

struct Features {
    std::vector<Flag> flags;
    // Bytes of the caches that one core sees; 0 where the system does not say.
    std::size_t l1d = 0, l2 = 0, l3 = 0;
    // Logical processors that this process may use.
    unsigned cores = 1;

    bool has(std::string_view name) const;
};

const Features &features();

std::string_view name(Isa isa);
// The flags that kernels of `isa` need beyond those of the set before it.
std::vector<std::string_view> needs(Isa isa);
// Sets that this processor runs and this build contains, best first; the last is portable.
std::vector<Isa> supported();
Isa best_isa();

} // namespace lowbit
