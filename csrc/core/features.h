// What the processor can do, asked once.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

namespace lowbit {

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

} // namespace lowbit
