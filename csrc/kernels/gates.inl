// Gated activations of an MLP (Shazeer 2020): act(a) * b.
#pragma once

#include "kernels/kernels.h"
#include "kernels/math.inl"

namespace lowbit {
namespace {

F gated(Gate gate, F a, F b) {
    switch (gate) {
        case Gate::silu:
            a = Simd::multiply(a, sigmoid(a));
            break;
        case Gate::gelu_tanh: {
            const F cubic = Simd::fma(Simd::multiply(Simd::multiply(a, a), a), Simd::all(0.044715f), a);
            const F t = hyperbolic_tangent(Simd::multiply(cubic, Simd::all(0.7978845608f)));
            a = Simd::multiply(Simd::multiply(a, Simd::all(0.5f)), Simd::add(t, Simd::all(1.0f)));
            break;
        }
        case Gate::gelu: {
            const F e = error_function(Simd::multiply(a, Simd::all(0.7071067812f)));
            a = Simd::multiply(Simd::multiply(a, Simd::all(0.5f)), Simd::add(e, Simd::all(1.0f)));
            break;
        }
        case Gate::none:
            break;
    }
    return Simd::multiply(a, b);
}

void gate(Gate kind, float* a, const float* b, int n) {
    for (int i = 0; i < n; i += kTile) {
        const F v = gated(kind, Simd::load_some(a + i, n - i), Simd::load_some(b + i, n - i));
        Simd::store_some(a + i, v, n - i);
    }
}

}  // namespace
}  // namespace lowbit
