// Arrays that come from Python, checked.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/buffer.h"
#include "kernels/linear.h"

namespace lowbit {

namespace nb = nanobind;

template <class T, int dims>
using Array = nb::ndarray<const T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;

template <class T, int dims>
using Output = nb::ndarray<T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;

// A copy, with zeros up to whole tiles; nothing for None.
inline Buffer<float> vector_of(const nb::handle& value) {
    if (value.is_none()) return {};
    const auto array = nb::cast<Array<float, 1>>(value);
    Buffer<float> out((array.shape(0) + kTile - 1) / kTile * kTile);
    for (std::size_t i = 0; i < array.shape(0); ++i) out[i] = array.data()[i];
    return out;
}

inline void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

}  // namespace lowbit
