#include "kernels/causal.h"

#include "bindings/arrays.h"
#include "bindings/bindings.h"

namespace lowbit {
namespace {

using Halves = Array<std::uint16_t, 4>;

void attend(ThreadPool& pool, const Halves& q, const Halves& k, const Halves& v, float scale, const Output<std::uint16_t, 4>& out) {
    require(multiplies_bfloat16(), "this processor does not multiply bfloat16 numbers");
    for (std::size_t i = 0; i < 4; ++i) {
        require(q.shape(i) > 0 && q.shape(i) < 1u << 20, "no dimension is empty, or beyond a million");
        require(q.shape(i) == out.shape(i) && k.shape(i) == v.shape(i), "out has the shape of q, v that of k");
        require(i == 1 || q.shape(i) == k.shape(i), "q and k have the same windows, tokens and width");
    }
    require(k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0, "heads of k divide those of q");
    require(q.shape(3) % 2 == 0 && q.shape(3) <= 512, "heads have an even width up to 512");
    const auto size = [](const Halves& x, int i) { return static_cast<int>(x.shape(i)); };
    const CausalShape shape{size(q, 0), size(q, 1), size(k, 1), size(q, 2), size(q, 3), scale};
    const nb::gil_scoped_release released;
    causal_attention(pool, shape, q.data(), k.data(), v.data(), out.data());
}

}  // namespace

void bind_causal(nb::module_& m) {
    m.def("causal_attention", &attend, nb::arg("pool"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("scale"),
          nb::arg("out"),
          "out = softmax(scale q k' + causal mask) v, [windows, heads, tokens, width] of bfloat16 as uint16; k and v may have fewer "
          "heads, which divide those of q.");
}

}  // namespace lowbit
