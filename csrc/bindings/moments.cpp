#include <nanobind/stl/optional.h>

#include "kernels/moments.h"

#include "bindings/arrays.h"
#include "bindings/bindings.h"

namespace lowbit {
namespace {

using Matrix = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>;

Rows rows_of(const Matrix& values) {
    const bool floats = values.dtype() == nb::dtype<float>(), halves = values.dtype() == nb::dtype<std::uint16_t>();
    require(floats || halves, "rows are float32, or bfloat16 as uint16");
    return {values.data(), halves};
}

void add(ThreadPool& pool, const Matrix& x, const Output<float, 2>& products, const Output<float, 1>& largest,
         const Output<float, 1>& sizes, const std::optional<Matrix>& y, const std::optional<Output<float, 2>>& drift) {
    const std::size_t width = x.shape(1);
    require(multiplies_bfloat16(), "this processor does not multiply bfloat16 numbers");
    require(width > 0 && width < 1u << 20 && x.shape(0) < 1u << 30, "too many rows, or none or too many columns");
    const auto square = [&](const Output<float, 2>& sums) { return sums.shape(0) == width && sums.shape(1) == width; };
    require(square(products) && (!drift || square(*drift)), "sums of products are as wide and as high as x is wide");
    require(largest.shape(0) == width && sizes.shape(0) == width, "a sum for each column of x");
    require(y.has_value() == drift.has_value(), "y and its sums come together");
    require(!y || (y->shape(0) == x.shape(0) && y->shape(1) == width), "y has another shape than x");
    const Rows first = rows_of(x), second = y ? rows_of(*y) : Rows{};
    const MomentSums sums{products.data(), drift ? drift->data() : nullptr, largest.data(), sizes.data()};
    const nb::gil_scoped_release released;
    add_moments(pool, static_cast<int>(x.shape(0)), static_cast<int>(width), first, second, sums);
}

}  // namespace

void bind_moments(nb::module_& m) {
    m.def("multiplies_bfloat16", &multiplies_bfloat16, "Whether add_moments and causal_attention work here, and nothing else is faster.");
    m.def("add_moments", &add, nb::arg("pool"), nb::arg("x"), nb::arg("products"), nb::arg("largest"), nb::arg("sizes"),
          nb::arg("y") = nb::none(), nb::arg("drift") = nb::none(),
          "Adds x' x to the upper triangle of `products`, (y - x)' x to `drift`, |x| to `sizes`, and takes the largest |x| into "
          "`largest`. x and y - x are rounded to bfloat16; rows are float32, or bfloat16 as uint16.");
}

}  // namespace lowbit
