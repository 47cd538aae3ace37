#include "kernels/bfloat16.h"

#include "core/features.h"

namespace lowbit {

bool multiplies_bfloat16() {
#ifdef LOWBIT_HAS_BF16
    static const bool found = features().has("avx512_bf16") && features().has("avx512f") && features().has("avx512bw") &&
                              features().has("avx512vl") && features().has("avx512dq") && !features().has("amx_bf16");
    return found;
#else
    return false;
#endif
}

}  // namespace lowbit
