#include "bindings/weights.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "kernels/pack.h"
#include "kernels/multiplier.h"

namespace lowbit {
namespace {

using Codes = Array<std::uint8_t, 2>;
using Scales = Array<float, 2>;
using Source = std::tuple<Codes, Scales, std::optional<Scales>>;

// Where the rows of each source go: one after another, or alternately where they are a pair.
struct Places {
    int first, step;
};

std::vector<Places> places_of(const std::vector<int>& rows, bool paired) {
    std::vector<Places> places;
    if (paired) {
        require(rows.size() == 2 && rows[0] == rows[1], "a pair is two weights of the same shape");
        require(rows[0] % kTile == 0, "a pair has whole tiles of 16 rows");
        return {{0, 2}, {1, 2}};
    }
    int tile = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        require(i + 1 == rows.size() || rows[i] % kTile == 0, "weights but the last have whole tiles of 16 rows");
        places.push_back({tile, 1});
        tile += (rows[i] + kTile - 1) / kTile;
    }
    return places;
}

std::uint8_t all_bits(const std::uint8_t* codes, std::size_t count) {
    std::uint8_t all = 0;
    for (std::size_t i = 0; i < count; ++i) all |= codes[i];
    return all;
}

Weight pack(int bits, int group, int zero, const std::vector<Source>& sources, const std::optional<Array<std::uint8_t, 1>>& table,
            bool paired, int segment) {
    const nb::gil_scoped_release released;  // several are packed side by side
    require(!sources.empty(), "no weights to pack");
    require(bits == 4 || bits == 8, "codes have 4 or 8 bits");
    require(!table || (bits == 4 && table->shape(0) == 16), "a table has 16 entries, for codes of 4 bits");
    Layout layout;
    layout.code = bits == 8 ? Code::u8 : table ? Code::table4 : Code::u4;
    layout.cols = static_cast<int>(std::get<0>(sources[0]).shape(1));
    layout.group = group;
    layout.segment = segment;
    layout.zero = zero;
    layout.paired = paired;
    layout.table = table ? table->data() : nullptr;
    std::vector<int> rows;
    const std::size_t groups = group == 0 ? 1 : (layout.cols + group - 1) / group;
    for (const auto& [codes, scale, minimum] : sources) {
        require(static_cast<int>(codes.shape(1)) == layout.cols, "weights of different width");
        require(scale.shape(0) == codes.shape(0) && scale.shape(1) == groups, "scales are [rows, groups]");
        require(!minimum || (minimum->shape(0) == codes.shape(0) && minimum->shape(1) == groups), "minima are [rows, groups]");
        rows.push_back(static_cast<int>(codes.shape(0)));
        layout.rows += rows.back();
        layout.minimum = layout.minimum || minimum.has_value();
        layout.wide_scale = layout.wide_scale || !fits_half(scale.data(), scale.size()) ||
                            (minimum && !fits_half(minimum->data(), minimum->size()));
        if (bits == 4) {
            require(all_bits(codes.data(), codes.size()) < 16, "a code of 4 bits is below 16");
        }
    }
    const auto places = places_of(rows, paired);
    auto packed = std::make_shared<PackedWeight>(make_weight(layout));
    for (std::size_t i = 0; i < sources.size(); ++i) {
        const auto& [codes, scale, minimum] = sources[i];
        fill(*packed, places[i].first, places[i].step, rows[i], codes.data(), scale.data(), minimum ? minimum->data() : nullptr);
    }
    return {packed};
}

Weight pack_floats(const std::string& type, const std::vector<nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>>& sources,
                   bool paired) {
    const nb::gil_scoped_release released;
    require(!sources.empty(), "no weights to pack");
    require(type == "f32" || type == "f16" || type == "bf16", "float weights are f32, f16 or bf16");
    Layout layout;
    layout.code = type == "f32" ? Code::f32 : type == "f16" ? Code::f16 : Code::bf16;
    layout.cols = static_cast<int>(sources[0].shape(1));
    layout.paired = paired;
    std::vector<int> rows;
    for (const auto& values : sources) {
        require(static_cast<int>(values.shape(1)) == layout.cols, "weights of different width");
        require(values.dtype().bits == (type == "f32" ? 32 : 16), "values have the size of their type");
        rows.push_back(static_cast<int>(values.shape(0)));
        layout.rows += rows.back();
    }
    const auto places = places_of(rows, paired);
    auto packed = std::make_shared<PackedWeight>(make_weight(layout));
    for (std::size_t i = 0; i < sources.size(); ++i)
        fill_floats(*packed, places[i].first, places[i].step, rows[i], sources[i].data());
    return {packed};
}

// Of memory that PyTorch owns: handing tensors over as arrays takes longer than a product with a small weight.
void multiply(Multiplier& self, const Factor& factor, std::uintptr_t x, int rows, std::uintptr_t y, Value type, std::uintptr_t bias) {
    require(rows >= 0 && (rows == 0 || (x != 0 && y != 0)), "x and y are addresses of [rows, columns] and [rows, rows of the weight]");
    const nb::gil_scoped_release released;
    self.linear(factor, type, reinterpret_cast<const void*>(x), rows, reinterpret_cast<const void*>(bias), reinterpret_cast<void*>(y));
}

// The same of arrays, checked.
void multiply_arrays(Multiplier& self, const Factor& factor, const Array<float, 2>& x, const Output<float, 2>& y,
                     const std::optional<Array<float, 1>>& bias) {
    const PackedWeight& w = *factor.weight;
    require(static_cast<int>(x.shape(1)) == w.cols, "x is [rows, columns of the weight]");
    require(y.shape(0) == x.shape(0) && static_cast<int>(y.shape(1)) == w.rows, "y is [rows of x, rows of the weight]");
    require(!bias || static_cast<int>(bias->shape(0)) == w.rows, "a bias for each row");
    const nb::gil_scoped_release released;
    self.linear(factor, Value::f32, x.data(), static_cast<int>(x.shape(0)), bias ? bias->data() : nullptr, y.data());
}

void make_activations(ActivationSpec* self, int bits, bool per_token, float static_scale, const Vector& divisor) {
    require(bits == 8 || bits == 15, "activations have 8 bits or 15");
    require(static_scale >= 0, "a static scale is positive, or 0 where scales are found");
    new (self) ActivationSpec{bits, per_token, static_scale, floats_of(divisor)};
}

void make_factor(Factor* self, const Weight& weight, const std::optional<ActivationSpec>& activations,
                 const std::optional<Weight>& residual) {
    const PackedWeight& w = *weight.packed;
    Factor factor{weight.packed, residual ? residual->packed : nullptr, activations.value_or(ActivationSpec{})};
    const std::vector<float>& divisor = factor.activations.divisor;
    require(!w.paired, "a pair is multiplied by the decoder only");
    require(divisor.empty() || static_cast<int>(divisor.size()) == w.cols, "a divisor for each column");
    require(divisor.empty() || !is_float(w.code), "float weights take no divisor");
    require(!residual || fits(w, *residual->packed), "a residual weight has the weight's shape, and its segments");
    new (self) Factor(std::move(factor));
}

using Addresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;

void make_pool(ThreadPool* self, int threads, const std::optional<Addresses>& openmp) {
    if (!openmp) {
        new (self) ThreadPool(threads);
        return;
    }
    const auto [parallel, count, index] = *openmp;
    require(parallel != 0 && count != 0 && index != 0, "addresses of GOMP_parallel, omp_get_num_threads, omp_get_thread_num");
    OpenMp borrowed;
    borrowed.parallel = reinterpret_cast<decltype(borrowed.parallel)>(parallel);
    borrowed.count = reinterpret_cast<decltype(borrowed.count)>(count);
    borrowed.index = reinterpret_cast<decltype(borrowed.index)>(index);
    new (self) ThreadPool(threads, borrowed);
}

}  // namespace

void bind_weights(nb::module_& m) {
    using namespace nb::literals;
    nb::class_<ThreadPool>(m, "ThreadPool", "Threads that run kernels; they sleep while there is nothing to do.")
        .def("__init__", &make_pool, nb::arg("threads"), nb::arg("openmp").none() = nb::none(),
             "openmp: addresses of GOMP_parallel, omp_get_num_threads and omp_get_thread_num, to borrow the threads of "
             "that runtime instead.")
        .def_prop_ro("threads", &ThreadPool::threads);
    nb::class_<Weight>(m, "Weight", "A weight [rows, cols] packed for the kernels.")
        .def_prop_ro("rows", [](const Weight& w) { return w.packed->rows; })
        .def_prop_ro("cols", [](const Weight& w) { return w.packed->cols; })
        .def_prop_ro("segment", [](const Weight& w) { return w.packed->segment; }, "Columns of activations with one scale.")
        .def_prop_ro("nbytes", [](const Weight& w) { return w.packed->data.bytes(); })
        .def("unpack_row",
             [](const Weight& w, int row, const Output<float, 1>& out) {
                 require(row >= 0 && row < w.packed->rows, "no such row");
                 require(static_cast<int>(out.shape(0)) == w.packed->cols, "a row has as many values as the weight columns");
                 kernels_for("")->unpack_row(*w.packed, row, out.data());
             },
             nb::arg("row"), nb::arg("out").noconvert());
    m.def("pack", &pack, nb::arg("bits"), nb::arg("group"), nb::arg("zero"), nb::arg("sources"), nb::arg("table").none() = nb::none(),
          nb::arg("paired") = false, nb::arg("segment") = 0,
          "Packs (codes uint8 [rows, cols], scale float32 [rows, groups], minimum float32 [rows, groups] or None) one after "
          "another: w = scale * (level - zero) + minimum, level the code or its entry in `table` uint8 [16]. group 0: the row.");
    m.def("pack_floats", &pack_floats, nb::arg("type"), nb::arg("sources"), nb::arg("paired") = false,
          "Packs values [rows, cols] of type 'f32', 'f16' or 'bf16' (given as 16-bit integers) one after another.");
    nb::enum_<Value>(m, "Value", "A type of activations.").value("f32", Value::f32).value("f16", Value::f16).value("bf16", Value::bf16);
    nb::class_<ActivationSpec>(m, "ActivationSpec", "How the activations in front of a weight are rounded.")
        .def("__init__", &make_activations, nb::kw_only(), "bits"_a = 15, "per_token"_a = false, "static_scale"_a = 0.0f,
             "divisor"_a.none() = nb::none(),
             "bits: 8; or 15, as good as not rounded. per_token: one scale for a token, not for each segment. static_scale: the "
             "scale of all tokens, 0 where it is found. divisor float32 [cols]: x / divisor comes first.");
    nb::class_<Factor>(m, "Factor", "A weight and what becomes of its input.")
        .def("__init__", &make_factor, nb::arg("weight"), nb::arg("activations").none() = nb::none(),
             nb::arg("residual").none() = nb::none(),
             "activations: 15 bits when None. residual: a second weight, added: what rounding the first one's levels left.")
        .def_prop_ro("nbytes", [](const Factor& f) {
            return f.weight->data.bytes() + (f.residual ? f.residual->data.bytes() : 0);
        });
    nb::class_<Multiplier>(m, "Multiplier", "Multiplies with packed weights; several callers wait for each other.")
        .def("__init__",
             [](Multiplier* self, std::shared_ptr<ThreadPool> pool, const std::string& isa) {
                 new (self) Multiplier(std::move(pool), checked_kernels(isa));
             },
             nb::arg("pool"), nb::arg("isa") = "")
        .def_prop_ro("isa", [](const Multiplier& self) { return self.kernels().name; })
        .def("linear", &multiply_arrays, nb::arg("factor"), nb::arg("x").noconvert(), nb::arg("y").noconvert(),
             nb::arg("bias").none() = nb::none(), "y [n, rows] = x [n, cols] W' + bias, float32.")
        .def("linear_at", &multiply, nb::arg("factor"), nb::arg("x"), nb::arg("rows"), nb::arg("y"), nb::arg("type"),
             nb::arg("bias") = 0, "The same at addresses, unchecked; bias 0: none. All of one type.");
}

}  // namespace lowbit
