// Attention of whole windows of text to themselves, in bfloat16, for calibration.
#pragma once

#include <cstdint>

#include "core/thread_pool.h"
#include "kernels/bfloat16.h"

namespace lowbit {

struct CausalShape {
    int windows = 0, heads = 0, key_heads = 0, tokens = 0, width = 0;  // width: of a head, even
    float scale = 1;
};

// out = softmax(scale Q K' + causal mask) V: operands and results bfloat16 [windows, heads or key_heads, tokens, width]; scores,
// softmax and sums float32, probabilities rounded to bfloat16. The same for any number of threads. Only where
// multiplies_bfloat16().
void causal_attention(ThreadPool& pool, const CausalShape& shape, const std::uint16_t* q, const std::uint16_t* k,
                      const std::uint16_t* v, std::uint16_t* out);

}  // namespace lowbit
