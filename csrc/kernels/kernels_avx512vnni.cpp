#define LOWBIT_VNNI
#include "kernels/simd_avx512.h"

#include "kernels/linear.inl"
#include "kernels/vector.inl"
#include "kernels/attention.inl"
#include "kernels/limits.inl"
#include "kernels/table.inl"

namespace lowbit {
extern const Kernels kernels_avx512vnni;
const Kernels kernels_avx512vnni = table_of("avx512vnni");
}  // namespace lowbit
