#include "kernels/simd_portable.h"

#include "kernels/linear.inl"
#include "kernels/vector.inl"
#include "kernels/attention.inl"
#include "kernels/limits.inl"
#include "kernels/table.inl"

namespace lowbit {
extern const Kernels kernels_portable;
const Kernels kernels_portable = table_of("portable");
}  // namespace lowbit
