#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "core/thread_pool.h"
#include "solvers/feed.h"
#include "solvers/polish.h"

namespace lowbit {
namespace {

using Matrix = Array<float, 2>;
using Mask = Array<std::uint8_t, 2>;
using Order = Array<std::int32_t, 1>;

Levels integer_levels(int lo, int hi) {
    require(lo < hi && hi - lo < 256 && lo >= -128 && hi <= 255, "integers from lo to hi, at most 256 of them");
    Levels levels;
    levels.lo = static_cast<float>(lo);
    levels.hi = static_cast<float>(hi);
    return levels;
}

Levels table_levels(const Array<float, 1>& level, const Array<float, 1>& bound, const Array<std::uint8_t, 1>& code) {
    const std::size_t count = level.shape(0);
    require(count >= 2 && count <= kMostLevels, "a table has 2 to 16 levels");
    require(bound.shape(0) + 1 == count && code.shape(0) == count, "a bound between two levels, and a code for each");
    Levels levels;
    levels.integers = false;
    levels.count = static_cast<int>(count);
    std::copy_n(level.data(), count, levels.level);
    std::copy_n(bound.data(), count - 1, levels.bound);
    std::copy_n(code.data(), count, levels.code);
    return levels;
}

// That all belong to one weight of this shape.
Shape checked_shape(const Matrix& weight, int group, std::size_t scale_rows, std::size_t scale_cols, const Matrix& hessian,
                    const Order& order, const std::optional<Mask>& still) {
    require(weight.shape(0) < (1u << 30) && weight.shape(1) < (1u << 24), "a weight of fewer rows and columns");
    const Shape shape{static_cast<int>(weight.shape(0)), static_cast<int>(weight.shape(1)), group};
    const std::size_t cols = weight.shape(1);
    require(group > 0 && cols > 0, "a group has columns");
    require(scale_rows == weight.shape(0) && static_cast<int>(scale_cols) == shape.groups(), "scales are [rows, groups]");
    require(hessian.shape(0) == cols && hessian.shape(1) == cols, "matrices are [columns, columns]");
    require(order.shape(0) == cols, "the order has all columns");
    std::vector<bool> seen(cols);
    for (std::size_t i = 0; i < cols; ++i) {
        const std::int32_t k = order.data()[i];
        require(k >= 0 && static_cast<std::size_t>(k) < cols && !seen[k], "the order has each column once");
        seen[k] = true;
    }
    require(!still || (still->shape(0) == weight.shape(0) && still->shape(1) == cols), "a mask has the shape of the weight");
    return shape;
}

void check_offsets(Offsets offsets, bool given, std::size_t rows, std::size_t groups, std::size_t found_rows, std::size_t found_groups) {
    require(given == (offsets != Offsets::none), "offsets are given where the format has them");
    require(!given || (rows == found_rows && groups == found_groups), "offsets are [rows, groups]");
}

void feed_arrays(ThreadPool& pool, const std::string& isa, const Levels& levels, Offsets offsets, int group, const Matrix& weight,
                 const Matrix& scale, const std::optional<Matrix>& offset, const Matrix& hessian, const Matrix& upper,
                 const std::optional<Matrix>& shift, const Order& order, const std::optional<Mask>& still,
                 const Output<std::uint8_t, 2>& codes, const Output<double, 1>& start, const Output<double, 1>& error) {
    Feed feed{};
    feed.shape = checked_shape(weight, group, scale.shape(0), scale.shape(1), hessian, order, still);
    check_offsets(offsets, offset.has_value(), scale.shape(0), scale.shape(1), offset ? offset->shape(0) : 0, offset ? offset->shape(1) : 0);
    const std::size_t cols = weight.shape(1);
    require(upper.shape(0) == cols && upper.shape(1) == cols, "matrices are [columns, columns]");
    require(!shift || (shift->shape(0) == cols && shift->shape(1) == cols), "matrices are [columns, columns]");
    require(codes.shape(0) == weight.shape(0) && codes.shape(1) == cols, "codes have the shape of the weight");
    require(start.shape(0) == weight.shape(0) && error.shape(0) == weight.shape(0), "an error for each row");
    feed.as = {levels, offsets, scale.data(), offset ? offset->data() : nullptr};
    feed.weight = weight.data();
    feed.hessian = hessian.data();
    feed.upper = upper.data();
    feed.shift = shift ? shift->data() : nullptr;
    feed.order = order.data();
    feed.still = still ? still->data() : nullptr;
    feed.codes = codes.data();
    feed.start = start.data();
    feed.error = error.data();
    const SolverKernels& kernels = checked_kernels(isa).solver;
    const nb::gil_scoped_release released;
    feed_errors(pool, kernels, feed);
}

Store store_of(const std::string& name) {
    require(name == "fp32" || name == "fp16" || name == "bf16", "scales are refitted as fp32, fp16 or bf16");
    return name == "fp32" ? Store::fp32 : name == "fp16" ? Store::fp16 : Store::bf16;
}

void polish_arrays(ThreadPool& pool, const std::string& isa, const Levels& levels, Offsets offsets, int group, const Matrix& target,
                   const Output<float, 2>& scale, const std::optional<Output<float, 2>>& offset, const Matrix& hessian,
                   const Order& order, const std::optional<Mask>& still, const Output<std::uint8_t, 2>& codes,
                   const Output<double, 1>& error, int rounds, bool refit, bool signed_scales, const std::string& scale_store,
                   const std::string& offset_store) {
    Polish job{};
    job.shape = checked_shape(target, group, scale.shape(0), scale.shape(1), hessian, order, still);
    check_offsets(offsets, offset.has_value(), scale.shape(0), scale.shape(1), offset ? offset->shape(0) : 0, offset ? offset->shape(1) : 0);
    require(codes.shape(0) == target.shape(0) && codes.shape(1) == target.shape(1), "codes have the shape of the weight");
    require(error.shape(0) == target.shape(0), "an error for each row");
    require(rounds >= 0, "rounds are counted from 0");
    require(!(refit && still && offsets == Offsets::minima), "minima beside zeros that stay are not refitted");
    job.as = {levels, offsets, scale.data(), offset ? offset->data() : nullptr};
    job.target = target.data();
    job.hessian = hessian.data();
    job.order = order.data();
    job.still = still ? still->data() : nullptr;
    job.rounds = rounds;
    job.refit = refit;
    job.scale_store = store_of(scale_store);
    job.offset_store = store_of(offset_store);
    job.signed_scales = signed_scales;
    job.codes = codes.data();
    job.scale = scale.data();
    job.offset = offset ? offset->data() : nullptr;
    job.error = error.data();
    const SolverKernels& kernels = checked_kernels(isa).solver;
    const nb::gil_scoped_release released;
    polish(pool, kernels, job);
}

}  // namespace

void bind_solvers(nb::module_& m) {
    using namespace nb::literals;
    nb::enum_<Offsets>(m, "Offsets", "What is stored beside a scale: points in units of levels, or minima.")
        .value("none", Offsets::none)
        .value("points", Offsets::points)
        .value("minima", Offsets::minima);
    nb::class_<Levels>(m, "Levels", "What the codes of a format mean.")
        .def_static("integers", &integer_levels, "lo"_a, "hi"_a)
        .def_static("table", &table_levels, "level"_a, "bound"_a, "code"_a,
                    "Ascending levels float32 [n], the largest number that goes to each but the last, and their codes uint8 [n].");
    m.def("feed_errors", &feed_arrays, "pool"_a, "isa"_a, "levels"_a, "offsets"_a, "group"_a, "weight"_a, "scale"_a,
          "offset"_a.none(), "hessian"_a, "upper"_a, "shift"_a.none(), "order"_a, "still"_a.none(), "codes"_a.noconvert(),
          "start"_a.noconvert(), "error"_a.noconvert(),
          "Rounds weight float32 [rows, cols] column by column in `order` int32 [cols]; fills codes uint8 [rows, cols], and for "
          "each row the error under the hessian [cols, cols] of the nearest levels and of the codes, float64. upper, shift: in "
          "that order. still uint8 [rows, cols]: zeros that stay.");
    m.def("polish", &polish_arrays, "pool"_a, "isa"_a, "levels"_a, "offsets"_a, "group"_a, "target"_a, "scale"_a.noconvert(),
          "offset"_a.none().noconvert(), "hessian"_a, "order"_a, "still"_a.none(), "codes"_a.noconvert(), "error"_a.noconvert(),
          "rounds"_a, "refit"_a, "signed_scales"_a, "scale_store"_a, "offset_store"_a,
          "Refits scales (and minima) and chooses codes once more, in place, for each row as long as that lowers its error.");
}

}  // namespace lowbit
