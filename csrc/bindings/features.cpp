#include "core/features.h"

#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "kernels/dispatch.h"

namespace lowbit {
namespace {

nb::dict features_dict() {
    const Features &f = features();
    nb::dict flags, caches, missing, found;
    for (const Flag &flag : f.flags) flags[nb::cast(flag.name)] = flag.usable;
    caches["l1d"] = f.l1d;
    caches["l2"] = f.l2;
    caches["l3"] = f.l3;
    // What keeps each set from being used: its own flags and those of the sets that it contains.
    for (const InstructionSet &set : instruction_sets()) {
        nb::list names;
        for (const std::string_view flag : set.needs)
            if (!f.has(flag)) names.append(flag);
        missing[nb::cast(set.name)] = names;
    }
    found["flags"] = flags;
    found["caches"] = caches;
    found["cores"] = f.cores;
    found["missing"] = missing;
    return found;
}

} // namespace

void bind_features(nb::module_ &m) {
    m.def("features", &features_dict,
          "Of this processor: 'flags' (usable or not), 'caches' (bytes; 0 where not known), 'cores' (that this process "
          "may use), 'missing' (for each set of kernels the flags it lacks).");
    m.def(
        "isas",
        [] {
            std::vector<std::string_view> names;
            for (const InstructionSet &set : supported()) names.push_back(set.name);
            return names;
        },
        "Sets of kernels that run here, best first; the last is 'portable'.");
}

} // namespace lowbit
