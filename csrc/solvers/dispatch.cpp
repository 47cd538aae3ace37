#include "solvers/dispatch.h"

#include "kernels/dispatch.h"
#include "kernels/isa_families.h"

namespace lowbit {

#define LOWBIT_ISA(name, family, extends, flags, gcc, msvc) LOWBIT_ON_##family(extern const SolverKernels solver_kernels_##name;)
#include "kernels/isas.def"
#undef LOWBIT_ISA

const SolverKernels* solver_kernels_for(std::string_view isa) {
    const Kernels* runs = kernels_for(isa);
    if (runs == nullptr) return nullptr;
    const std::string_view best = runs->name;
#define LOWBIT_ISA(name, family, extends, flags, gcc, msvc) LOWBIT_ON_##family(if (best == #name) return &solver_kernels_##name;)
#include "kernels/isas.def"
#undef LOWBIT_ISA
    return nullptr;
}

}  // namespace lowbit
