#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "core/thread_pool.h"
#include "solvers/dispatch.h"
#include "solvers/solve.h"

namespace lowbit {
namespace {

using Matrix = Array<float, 2>;
using Mask = Array<std::uint8_t, 2>;
using Order = Array<std::int32_t, 1>;

GridLevels integer_levels(int lo, int hi) {
    require(lo < hi && hi - lo < 256 && lo >= -128 && hi <= 255, "integers from lo to hi, at most 256 of them");
    GridLevels levels;
    levels.lo = static_cast<float>(lo);
    levels.hi = static_cast<float>(hi);
    return levels;
}

GridLevels table_levels(const Array<float, 1>& level, const Array<float, 1>& bound, const Array<std::uint8_t, 1>& code) {
    const std::size_t count = level.shape(0);
    require(count >= 2 && count <= kMostLevels, "a table has 2 to 16 levels");
    require(bound.shape(0) + 1 == count && code.shape(0) == count, "a bound between two levels, and a code for each");
    GridLevels levels;
    levels.integers = false;
    levels.count = static_cast<int>(count);
    std::copy_n(level.data(), count, levels.level);
    std::copy_n(bound.data(), count - 1, levels.bound);
    std::copy_n(code.data(), count, levels.code);
    return levels;
}

using Table = std::tuple<Array<float, 1>, Array<float, 1>, Array<std::uint8_t, 1>>;

void make_levels(GridLevels* self, const std::optional<std::tuple<int, int>>& integers, const std::optional<Table>& table) {
    require(integers.has_value() != table.has_value(), "integers or a table");
    if (integers) {
        new (self) GridLevels(integer_levels(std::get<0>(*integers), std::get<1>(*integers)));
    } else {
        new (self) GridLevels(table_levels(std::get<0>(*table), std::get<1>(*table), std::get<2>(*table)));
    }
}

using Codes = Output<std::uint8_t, 2>;
using Errors = Output<double, 1>;

bool is_shaped(const Matrix& matrix, std::size_t rows, std::size_t cols) { return matrix.shape(0) == rows && matrix.shape(1) == cols; }

Problem make_problem(const GridLevels& levels, Offsets offsets, int group, const Matrix& target, const Matrix& scale,
                     const std::optional<Matrix>& offset, const Matrix& hessian, const Order& order, const std::optional<Mask>& still,
                     const Codes& codes, const Errors& error) {
    const std::size_t rows = target.shape(0), cols = target.shape(1);
    require(rows < (1u << 30) && cols > 0 && cols < (1u << 20) && group > 0, "a weight with columns, in groups of some");
    Problem problem{};
    problem.shape = {static_cast<int>(rows), static_cast<int>(cols), group};
    const std::size_t groups = problem.shape.groups();
    require(is_shaped(scale, rows, groups), "scales are [rows, groups]");
    require(offset.has_value() == (offsets != Offsets::none), "offsets are given where the format has them");
    require(!offset || is_shaped(*offset, rows, groups), "offsets are [rows, groups]");
    require(is_shaped(hessian, cols, cols), "matrices are [columns, columns]");
    require(order.shape(0) == cols, "the order has all columns");
    std::vector<bool> seen(cols);
    for (std::size_t i = 0; i < cols; ++i) {
        const std::int32_t k = order.data()[i];
        require(k >= 0 && static_cast<std::size_t>(k) < cols && !seen[k], "the order has each column once");
        seen[k] = true;
    }
    require(!still || (still->shape(0) == rows && still->shape(1) == cols), "a mask has the shape of the weight");
    require(codes.shape(0) == rows && codes.shape(1) == cols, "codes have the shape of the weight");
    require(error.shape(0) == rows, "an error for each row");
    problem.as = {levels, offsets, scale.data(), offset ? offset->data() : nullptr};
    problem.target = target.data();
    problem.hessian = hessian.data();
    problem.order = order.data();
    problem.still = still ? still->data() : nullptr;
    problem.codes = codes.data();
    problem.error = error.data();
    return problem;
}

Feed make_feed(const Matrix& root, const std::optional<Matrix>& shift, const Errors& start) {
    const std::size_t cols = root.shape(0);
    require(is_shaped(root, cols, cols) && (!shift || is_shaped(*shift, cols, cols)), "matrices are [columns, columns]");
    return {root.data(), shift ? shift->data() : nullptr, start.data()};
}

Store store_of(const std::string& name) {
    require(name == "fp32" || name == "fp16" || name == "bf16", "scales are refitted as fp32, fp16 or bf16");
    return name == "fp32" ? Store::fp32 : name == "fp16" ? Store::fp16 : Store::bf16;
}

void solve_arrays(ThreadPool& pool, const std::string& isa, const GridLevels& levels, Offsets offsets, int group, const Matrix& target,
                  const Output<float, 2>& scale, const std::optional<Output<float, 2>>& offset, const Matrix& hessian,
                  const Order& order, const std::optional<Mask>& still, const Codes& codes, const Errors& error,
                  const std::optional<std::tuple<Matrix, std::optional<Matrix>, Errors>>& feed, int rounds, bool refit,
                  bool signed_scales, const std::string& scale_store, const std::string& offset_store, std::size_t most_kept) {
    const Matrix scales(scale);
    std::optional<Matrix> offset_given;
    if (offset) offset_given.emplace(*offset);
    const Problem problem = make_problem(levels, offsets, group, target, scales, offset_given, hessian, order, still, codes, error);
    std::optional<Feed> first;
    if (feed) {
        const auto& [root, shift, start] = *feed;
        first = make_feed(root, shift, start);
        require(root.shape(0) == target.shape(1) && (!shift || shift->shape(0) == target.shape(1)), "matrices are [columns, columns]");
        require(start.shape(0) == target.shape(0), "an error for each row");
    }
    require(rounds >= 0, "rounds are counted from 0");
    require(!(refit && still && offsets == Offsets::minima), "minima beside zeros that stay are not refitted");
    const Polish polish{rounds, refit, store_of(scale_store), store_of(offset_store), signed_scales, scale.data(),
                        offset ? offset->data() : nullptr, most_kept};
    const SolverKernels& kernels = *solver_kernels_for(checked_kernels(isa).name);
    const nb::gil_scoped_release released;
    solve(pool, kernels, problem, first ? &*first : nullptr, rounds > 0 ? &polish : nullptr);
}

}  // namespace

void bind_solvers(nb::module_& m) {
    using namespace nb::literals;
    nb::enum_<Offsets>(m, "Offsets", "What is stored beside a scale: points in units of levels, or minima.")
        .value("none", Offsets::none)
        .value("points", Offsets::points)
        .value("minima", Offsets::minima);
    nb::class_<GridLevels>(m, "GridLevels", "What the codes of a format mean.")
        .def("__init__", &make_levels, "integers"_a.none() = nb::none(), "table"_a.none() = nb::none(),
             "integers: the lowest and the highest. table: ascending levels float32 [n], the largest number that goes to each but "
             "the last, and their codes uint8 [n].");
    m.def("solve", &solve_arrays, "pool"_a, "isa"_a, "levels"_a, "offsets"_a, "group"_a, "target"_a, "scale"_a.noconvert(),
          "offset"_a.none().noconvert(), "hessian"_a, "order"_a, "still"_a.none(), "codes"_a.noconvert(), "error"_a.noconvert(),
          nb::kw_only(), "feed"_a.none() = nb::none(), "rounds"_a = 0, "refit"_a = false, "signed_scales"_a = true,
          "scale_store"_a = "fp32", "offset_store"_a = "fp32", "most_kept"_a = std::size_t{24} << 20,
          "Codes uint8 [rows, cols] of target float32 [rows, cols] under scales [rows, groups], and the error under the hessian "
          "[cols, cols] of each row, float64. order int32 [cols]: in which columns are rounded; still uint8 [rows, cols]: zeros that "
          "stay. feed: (root R, upper triangular with H = R R', shift or None, both in that order; the error of nearest levels, "
          "which it fills), or None where codes are given. Then up to `rounds` of refitting scales (and minima) where `refit`, and "
          "choosing codes once more, for each row as long as that lowers its error. most_kept: bytes of products that 16 rows keep, "
          "beyond which they are computed again.");
}

}  // namespace lowbit
