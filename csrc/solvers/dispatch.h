// The solvers' kernels by the name of an instruction set.
#pragma once

#include <string_view>

#include "solvers/kernels.h"

namespace lowbit {

// The best for an empty name; null for what this build or processor lacks.
const SolverKernels* solver_kernels_for(std::string_view isa);

}  // namespace lowbit
