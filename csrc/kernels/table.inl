// The table of this instruction set.
#pragma once

#include "kernels/attention.inl"
#include "kernels/gates.inl"
#include "kernels/hadamard.inl"
#include "kernels/kernels.h"
#include "kernels/kv_append.inl"
#include "kernels/limits.inl"
#include "kernels/linear.inl"
#include "kernels/quantize.inl"
#include "kernels/rows.inl"

namespace lowbit {
namespace {
constexpr Kernels table_of(const char* name) {
    return {name, quantize, linear, rms_norm, gate, rotate, attend, append, complete, hadamard, unpack_row, peak, read};
}
}  // namespace
}  // namespace lowbit
