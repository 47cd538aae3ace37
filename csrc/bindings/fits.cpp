#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <limits>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "core/thread_pool.h"
#include "solvers/quantizer.h"

namespace lowbit {
namespace {

using Bytes = Array<std::uint8_t, 2>;

Type type_of(const std::string& name) {
    if (name == "fp32") return Type::f32;
    if (name == "fp16") return Type::f16;
    if (name == "bf16") return Type::bf16;
    require(name.empty(), "no type " + name + "; there are fp32, fp16 and bf16");
    return Type::none;
}

OffsetKind offset_of(const std::string& name) {
    const char* const names[] = {"", "grid", "int32", "float", "min", "nested"};
    for (int i = 0; i < 6; ++i)
        if (name == names[i]) return static_cast<OffsetKind>(i);
    throw std::invalid_argument("no offset " + name + "; there are grid, int32, float, min and nested");
}

using Entries = std::optional<std::vector<std::tuple<float, float, int>>>;

Levels levels_of(float lo, float hi, const Entries& entries) {
    const auto table = entries.value_or(std::vector<std::tuple<float, float, int>>{});
    Levels levels;
    levels.lo = lo;
    levels.hi = hi;
    levels.table = !table.empty();
    require(levels.table || (lo < hi && hi - lo < 256), "levels rise from lo to hi, 256 of them at most");
    require(table.size() <= 16, "a table has up to 16 levels");
    for (std::size_t i = 0; levels.table && i < 16; ++i) {
        const auto& [level, bound, code] = table[std::min(i, table.size() - 1)];
        require(code >= 0 && code < 256, "a code is a byte");
        levels.levels[i] = level;
        levels.bounds[i] = i + 1 < table.size() ? bound : std::numeric_limits<float>::infinity();
        levels.codes[i] = static_cast<float>(code);
    }
    return levels;
}

struct FitSpec {
    Fit fit;
    std::vector<float> factors;
};

void make_fit(FitSpec* self, const std::string& kind, const Levels& grid, const std::string& offset, const std::string& scale_store,
              const std::string& offset_store, bool spans_zero, bool signed_scale, bool two_signs, float reach, float extreme,
              const std::optional<std::vector<float>>& factors) {
    require(kind == "absmax" || kind == "minmax" || kind == "search", "no fit " + kind + "; there are absmax, minmax and search");
    Fit fit;
    fit.grid = grid;
    fit.kind = kind == "absmax" ? FitKind::absmax : kind == "minmax" ? FitKind::minmax : FitKind::search;
    fit.offset = offset_of(offset);
    fit.scale_store = type_of(scale_store);
    fit.offset_store = type_of(offset_store);
    fit.spans_zero = spans_zero;
    fit.signed_scale = signed_scale;
    fit.two_signs = two_signs;
    fit.reach = reach;
    fit.extreme = extreme;
    require((fit.offset == OffsetKind::none) != (fit.kind == FitKind::minmax) || fit.kind == FitKind::search,
            "absmax has no offset, and minmax has one");
    require(fit.offset == OffsetKind::none || !grid.table, "a table has no offset");
    require(reach != 0 && extreme != 0, "reach and extreme are levels other than zero");
    new (self) FitSpec{fit, factors.value_or(std::vector<float>{})};
}

// Where a matrix lies. Of memory that PyTorch owns: it has types that arrays have no name for.
Matrix matrix_of(std::uintptr_t address, const std::string& type, std::int64_t rows, std::int64_t cols) {
    require(rows >= 0 && cols >= 1 && (rows == 0 || address != 0), "a matrix has columns, and rows at an address");
    Matrix m{reinterpret_cast<const void*>(address), type_of(type), rows, cols};
    require(m.type != Type::none, "a matrix has a type");
    return m;
}

Blocks blocks_of(const Matrix& m, std::int64_t size) {
    require(size >= 1 && size <= m.cols, "a block has from one to all columns of a row");
    return {size, (m.cols + size - 1) / size};
}

std::tuple<bool, bool, bool> fit_matrix(const FitSpec& spec, ThreadPool& pool, const std::string& isa, std::uintptr_t x,
                                        const std::string& type, std::int64_t rows, std::int64_t cols, std::int64_t size,
                                        const Output<float, 1>& scale, const std::optional<Output<float, 1>>& offset,
                                        const Output<float, 1>& constant, const std::optional<Output<std::uint8_t, 1>>& zeros,
                                        const std::optional<Array<float, 1>>& importance, bool magnitude) {
    const Matrix m = matrix_of(x, type, rows, cols);
    const Blocks blocks = blocks_of(m, size);
    const std::size_t count = static_cast<std::size_t>(rows * blocks.per_row);
    require(scale.shape(0) == count && constant.shape(0) == count && (!offset || offset->shape(0) == count) &&
                (!zeros || zeros->shape(0) == count), "a scale, and whatever else is found, for each block");
    require(offset.has_value() == (spec.fit.offset != OffsetKind::none), "offsets where the fit has some");
    Importance weighs;
    weighs.magnitude = magnitude;
    if (importance) {
        weighs.by_column = importance->shape(0) == static_cast<std::size_t>(cols);
        require(weighs.by_column || importance->shape(0) == static_cast<std::size_t>(rows * cols),
                "importance for each column, or for each element");
        weighs.values = importance->data();
    }
    Fit fit = spec.fit;
    fit.factors = spec.factors.data();
    fit.factor_count = static_cast<int>(spec.factors.size());
    const Fitters& fitters = fitters_of(checked_kernels(isa));
    const nb::gil_scoped_release released;
    const Seen seen = fit_blocks(fitters, pool, fit, m, weighs, blocks,
                                 {scale.data(), offset ? offset->data() : nullptr, constant.data(), zeros ? zeros->data() : nullptr});
    return {seen.fits, seen.constant, seen.zeros};
}

std::tuple<double, double> round_matrix(const Levels& levels, ThreadPool& pool, const std::string& isa, std::uintptr_t x,
                                        const std::string& type, std::int64_t rows, std::int64_t cols, std::int64_t size,
                                        const Array<float, 1>& scale, const std::optional<Array<float, 1>>& offset, bool minimum,
                                        int bits, const Output<std::uint8_t, 1>& codes) {
    const Matrix m = matrix_of(x, type, rows, cols);
    const Blocks blocks = blocks_of(m, size);
    const std::size_t count = static_cast<std::size_t>(rows * blocks.per_row);
    require(scale.shape(0) == count && (!offset || offset->shape(0) == count), "a scale, and an offset, for each block");
    require(bits == -3 || (bits >= 0 && bits <= 8), "codes of up to 8 bits, or digits of base 3");
    const std::int64_t unit = bits == -3 ? 5 : 8;
    require(bits == 0 || bits == 8 || (bits == -3 ? cols % 5 == 0 : cols * bits % 8 == 0), "rows of packed codes fill whole bytes");
    const float most = bits == 0 ? 255.0f : bits == -3 ? 2.0f : static_cast<float>((1 << bits) - 1);
    for (int i = 0; levels.table && i < 16; ++i) require(levels.codes[i] <= most, "a code of the table does not fit these bits");
    require(levels.table || levels.hi - levels.lo <= most, "the grid does not fit these bits");
    const std::int64_t row_bytes = bits == 0 ? cols : bits == -3 ? cols / unit : cols * bits / 8;
    require(codes.shape(0) == static_cast<std::size_t>(rows * row_bytes), "as many bytes of codes as there are");
    const Fitters& fitters = fitters_of(checked_kernels(isa));
    const nb::gil_scoped_release released;
    const Squares found = round_blocks(fitters, pool, levels, m, blocks, {scale.data(), offset ? offset->data() : nullptr, minimum},
                                       bits, codes.data(), row_bytes);
    return {found.weight, found.error};
}

void peaks_of_matrix(ThreadPool& pool, const std::string& isa, std::uintptr_t x, const std::string& type, std::int64_t rows,
                     std::int64_t cols, std::int64_t size, const Output<float, 1>& peaks) {
    const Matrix m = matrix_of(x, type, rows, cols);
    const Blocks blocks = blocks_of(m, size);
    require(peaks.shape(0) == static_cast<std::size_t>(rows * blocks.per_row), "a peak for each block");
    const Fitters& fitters = fitters_of(checked_kernels(isa));
    const nb::gil_scoped_release released;
    block_peaks(fitters, pool, m, blocks, peaks.data());
}

}  // namespace

void bind_fits(nb::module_& m) {
    using namespace nb::literals;
    nb::class_<Levels>(m, "Levels", "The levels of a grid.")
        .def("__init__", [](Levels* self, float lo, float hi, const Entries& table) {
            new (self) Levels(levels_of(lo, hi, table));
        }, "lo"_a, "hi"_a, "table"_a.none() = nb::none(),
             "Whole numbers from lo to hi, or a table of up to 16 (level, the largest value that goes to it, code), ascending.");
    nb::class_<FitSpec>(m, "FitSpec", "A fit: how the scale and offset of a block are found.")
        .def("__init__", &make_fit, nb::kw_only(), "kind"_a, "grid"_a, "offset"_a = "", "scale_store"_a = "", "offset_store"_a = "",
             "spans_zero"_a = false, "signed_scale"_a = true, "two_signs"_a = false, "reach"_a = 1.0f, "extreme"_a = 1.0f,
             "factors"_a.none() = nb::none(),
             "kind: 'absmax', 'minmax' or 'search'. offset: '', 'grid', 'int32', 'float', 'min' or 'nested'. Stores: 'fp32', "
             "'fp16', 'bf16', or '' for what is not rounded here. factors: parts of the range that a search tries.");
    m.def("fit_blocks", &fit_matrix, "fit"_a, "pool"_a, "isa"_a, "x"_a, "type"_a, "rows"_a, "cols"_a, "size"_a, "scale"_a.noconvert(),
          "offset"_a.noconvert().none(), "constant"_a.noconvert(), "zeros"_a.noconvert().none(),
          "importance"_a.noconvert().none() = nb::none(), "magnitude"_a = false,
          "Scales and offsets (float32, one for each block of `size` columns) of the matrix at address x, 'fp32', 'fp16' or 'bf16'. "
          "constant: the value of a block that has one only, else NaN. zeros: blocks with zeros that are meant. importance: by "
          "column or element; without it |x| (magnitude) or 1. Returns whether all fits its type, and whether there are constant "
          "blocks, and blocks with many zeros. It must be finite.");
    m.def("round_blocks", &round_matrix, "levels"_a, "pool"_a, "isa"_a, "x"_a, "type"_a, "rows"_a, "cols"_a, "size"_a,
          "scale"_a.noconvert(), "offset"_a.noconvert().none(), "minimum"_a, "bits"_a, "codes"_a.noconvert(),
          "Codes of the matrix at x under stored scales and offsets, packed in `bits`; 0: a byte each, -3: five base 3 digits a "
          "byte. minimum: offsets are values, not levels. Returns the sums of x^2 and of (x - its value)^2.");
    m.def("block_peaks", &peaks_of_matrix, "pool"_a, "isa"_a, "x"_a, "type"_a, "rows"_a, "cols"_a, "size"_a, "peaks"_a.noconvert(),
          "The largest magnitude of each block of the matrix at x; NaN where it holds anything that is not finite.");
}

}  // namespace lowbit
