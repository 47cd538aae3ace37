#include "solvers/dispatch.h"

#include "kernels/dispatch.h"

namespace lowbit {

// What stands in a line of isas.def for a family of processors that is not this one is left out.
#define LOWBIT_ON_any(...) __VA_ARGS__
#ifdef LOWBIT_X86
#define LOWBIT_ON_x86(...) __VA_ARGS__
#else
#define LOWBIT_ON_x86(...)
#endif

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
