// Arrays that come from Python, checked.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "kernels/dispatch.h"
#include "kernels/packed_weight.h"

namespace lowbit {

namespace nb = nanobind;

template <class T, int dims>
using Array = nb::ndarray<const T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;

template <class T, int dims>
using Output = nb::ndarray<T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;

using Vector = std::optional<Array<float, 1>>;

inline std::vector<float> floats_of(const Vector& values) {
    if (!values) return {};
    return {values->data(), values->data() + values->shape(0)};
}

// A copy, with zeros up to whole tiles; nothing for None.
inline Buffer<float> vector_of(const Vector& values) {
    if (!values) return {};
    Buffer<float> out((values->shape(0) + kTile - 1) / kTile * kTile);
    for (std::size_t i = 0; i < values->shape(0); ++i) out[i] = values->data()[i];
    return out;
}

inline void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

// The kernels of an instruction set by name, the best for an empty one. std::invalid_argument where they do not run here.
inline const Kernels& checked_kernels(const std::string& isa) {
    const Kernels* kernels = kernels_for(isa);
    require(kernels != nullptr, "no kernels for " + isa + " on this processor; isas() names those that run here");
    return *kernels;
}

}  // namespace lowbit
