#include "kernels/dispatch.h"

#include <algorithm>

#include "core/features.h"
#include "kernels/isa_families.h"

namespace lowbit {

#define LOWBIT_ISA(name, family, extends, flags, gcc, msvc) LOWBIT_ON_##family(extern const Kernels kernels_##name;)
#include "kernels/isas.def"
#undef LOWBIT_ISA

namespace {

// The words of `flags` after those that the set `extends` needs.
std::vector<std::string_view> joined(const std::vector<InstructionSet>& before, std::string_view extends, std::string_view flags) {
    std::vector<std::string_view> all;
    for (const InstructionSet& set : before)
        if (set.name == extends) all = set.needs;
    while (!flags.empty()) {
        const std::size_t end = std::min(flags.find(' '), flags.size());
        all.push_back(flags.substr(0, end));
        flags.remove_prefix(std::min(end + 1, flags.size()));
    }
    return all;
}

std::vector<InstructionSet> read_list() {
    std::vector<InstructionSet> sets;
    const Kernels* kernels = nullptr;
#define LOWBIT_ISA(name, family, extends, flags, gcc, msvc)   \
    kernels = nullptr;                                         \
    LOWBIT_ON_##family(kernels = &kernels_##name;)             \
    sets.push_back({#name, joined(sets, #extends, flags), kernels});
#include "kernels/isas.def"
#undef LOWBIT_ISA
    std::reverse(sets.begin(), sets.end());
    return sets;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> all = read_list();
    return all;
}

const std::vector<InstructionSet>& supported() {
    static const std::vector<InstructionSet> found = [] {
        std::vector<InstructionSet> sets = instruction_sets();
        std::erase_if(sets, [](const InstructionSet& set) {
            const auto usable = [](std::string_view flag) { return features().has(flag); };
            return set.kernels == nullptr || !std::all_of(set.needs.begin(), set.needs.end(), usable);
        });
        return sets;
    }();
    return found;
}

const Kernels* kernels_for(std::string_view isa) {
    for (const InstructionSet& set : supported())
        if (isa.empty() || isa == set.name) return set.kernels;
    return nullptr;
}

}  // namespace lowbit
