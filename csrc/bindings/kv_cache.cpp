// How keys and values are stored, as typed objects.
#include "engine/kv_cache.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/arrays.h"
#include "bindings/bindings.h"

namespace lowbit {
namespace {

KVFit fit_of(const std::string& name) {
    if (name == "absmax") return KVFit::absmax;
    if (name == "minmax") return KVFit::minmax;
    require(name == "norm", "a fit is absmax, minmax or norm");
    return KVFit::norm;
}

KVOffset offset_of(const std::string& name) {
    if (name == "none") return KVOffset::none;
    if (name == "min") return KVOffset::minimum;
    require(name == "zero", "an offset is none, min or zero");
    return KVOffset::zero;
}

void make_side(KVSide* self, int bits, int low, int count, const std::vector<int>& levels, const std::vector<float>& bounds, float unit, int group,
               int tokens, const std::string& offset, const std::string& fit, float reach, bool rotate) {
    KVSide s;
    s.bits = bits;
    s.low = low;
    s.count = count;
    s.unit = unit;
    s.group = group;
    s.tokens = tokens;
    s.offset = offset_of(offset);
    s.fit = fit_of(fit);
    s.reach = reach;
    s.rotate = rotate;
    s.uniform = levels.empty();
    require(s.uniform || (static_cast<int>(levels.size()) == count && count <= 16), "up to 16 levels, `count` of them");
    require(s.uniform || static_cast<int>(bounds.size()) + 1 == count, "a bound between two levels");
    for (int k = 0; k < 16 && bits <= 4; ++k) {
        const int level = s.uniform ? low + k : k < count ? levels[k] : 0;
        require(level >= -128 && level <= 127, "levels are whole numbers of a byte");
        s.levels[k] = static_cast<std::int8_t>(level);
    }
    for (std::size_t k = 0; k < bounds.size() && !s.uniform; ++k) s.bounds[k] = bounds[k];
    new (self) KVSide(s);
}

}  // namespace

void bind_kv_cache(nb::module_& m) {
    nb::class_<KVSide>(m, "KVSide", "How the keys, or the values, of one layer are stored.")
        .def("__init__", &make_side, nb::kw_only(), nb::arg("bits") = 16, nb::arg("low") = 0, nb::arg("count") = 0,
             nb::arg("levels") = std::vector<int>(), nb::arg("bounds") = std::vector<float>(), nb::arg("unit") = 1.0f, nb::arg("group") = 0,
             nb::arg("tokens") = 1, nb::arg("offset") = "none", nb::arg("fit") = "absmax", nb::arg("reach") = 1.0f, nb::arg("rotate") = false,
             "bits: of a code; 16: integers of 16 bits, and nothing of what follows but rotate. low, count: levels that are whole numbers "
             "one after another; or levels, ascending, with the largest number that goes to each but the last in bounds, all times unit. "
             "group: channels that share a scale, all where 0; tokens: 32 or 64 that share one for each channel, with group 1. offset: "
             "none, min or zero, with the fit minmax; without one absmax or norm, where reach is what the largest magnitude becomes.");
    nb::class_<KVLayer>(m, "KVLayer", "How one layer is stored, and which positions are read exactly.")
        .def("__init__", [](KVLayer* self, const KVSide& keys, const KVSide& values, int sinks, int recent) {
                 new (self) KVLayer{keys, values, sinks, recent};
             }, nb::kw_only(), nb::arg("keys"), nb::arg("values"), nb::arg("sinks") = 0, nb::arg("recent") = 0);
}

}  // namespace lowbit
