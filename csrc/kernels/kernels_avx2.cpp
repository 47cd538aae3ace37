#include "kernels/simd_avx2.h"

#include "kernels/linear.inl"
#include "kernels/vector.inl"
#include "kernels/attention.inl"
#include "kernels/limits.inl"
#include "kernels/table.inl"

namespace lowbit {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = table_of("avx2");
}  // namespace lowbit
