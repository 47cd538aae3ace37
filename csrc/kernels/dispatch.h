// Which instruction sets there are, and which of them this processor runs.
#pragma once

#include <string_view>
#include <vector>

#include "kernels/kernels.h"

namespace lowbit {

struct InstructionSet {
    std::string_view name;
    std::vector<std::string_view> needs;  // flags of the processor, those of the sets that it extends among them
    const Kernels* kernels;               // null where this build has none
};

// All that isas.def names, best first; the last is portable.
const std::vector<InstructionSet>& instruction_sets();

// Those that this build contains and this processor runs, best first.
const std::vector<InstructionSet>& supported();

// By name, or the best for an empty one; null for what this build or processor lacks.
const Kernels* kernels_for(std::string_view isa);

}  // namespace lowbit
