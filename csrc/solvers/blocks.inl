// Blocks in registers. Small ones lie side by side, one in each lane, so that sixteen are fitted at once and no sum runs
// across lanes; of a large one sixteen elements at a time are in the lanes.
#pragma once

#include <math.h>  // macros of C: infinity and NaN

#include "kernels/simd.h"
#include "solvers/fits.h"

namespace lowbit {
namespace {

constexpr std::int64_t kSmall = 128;  // elements of a block that has a lane of its own
constexpr int kRun = 64;              // vectors of a large block that are summed in float32

// n values from the index-th on, as float32
LOWBIT_INLINE void read_floats(const Matrix& m, std::int64_t index, std::int64_t n, float* out) {
    std::int64_t i = 0;
    if (m.type == Type::f32) {
        const float* p = static_cast<const float*>(m.values) + index;
        for (; i < n; ++i) out[i] = p[i];
        return;
    }
    const std::uint16_t* p = static_cast<const std::uint16_t*>(m.values) + index;
    if (m.type == Type::bf16) {
        for (; i + 16 <= n; i += 16) Simd::store(out + i, Simd::load_bf16(p + i));
    } else {
        for (; i + 16 <= n; i += 16) Simd::store(out + i, Simd::load_f16(p + i));
    }
    if (i < n) {
        std::uint16_t last[16] = {};
        for (int k = 0; k < n - i; ++k) last[k] = p[i + k];
        Simd::store_some(out + i, m.type == Type::bf16 ? Simd::load_bf16(last) : Simd::load_f16(last), static_cast<int>(n - i));
    }
}

// One block, or sixteen: vectors of elements, of what their errors count, and memory for as many again.
struct Work {
    float* x;
    float* v;
    float* spare;
    int steps;
};

LOWBIT_INLINE double across(F lanes) {
    alignas(64) float v[16];
    Simd::store(v, lanes);
    double total = 0;
    for (const float value : v) total += value;
    return total;
}

// Sums over all elements of a block, in every lane that belongs to it: term(i, sums) adds those of vector i.
template <bool side_by_side, int n, class Term>
LOWBIT_INLINE void totals(int steps, F (&out)[n], const Term& term) {
    if constexpr (side_by_side) {
        for (int k = 0; k < n; ++k) out[k] = Simd::zero();
        for (int i = 0; i < steps; ++i) term(i, out);
    } else {
        double whole[n] = {};
        for (int first = 0; first < steps; first += kRun) {
            F part[n];
            for (int k = 0; k < n; ++k) part[k] = Simd::zero();
            const int last = least(first + kRun, steps);
            for (int i = first; i < last; ++i) term(i, part);
            for (int k = 0; k < n; ++k) whole[k] += across(part[k]);
        }
        for (int k = 0; k < n; ++k) out[k] = Simd::all(static_cast<float>(whole[k]));
    }
}

// 1 / s, and 0 where that overflows.
LOWBIT_INLINE F inverse(F s) {
    const F i = Simd::divide(Simd::all(1.0f), s);
    return Simd::above(Simd::abs(i), Simd::all(3.4028235e38f), Simd::zero(), i);
}

LOWBIT_INLINE float inverse(float s) {
    const float i = 1.0f / s;
    return i <= 3.4028235e38f && i >= -3.4028235e38f ? i : 0.0f;
}

LOWBIT_INLINE F negative(F v) { return Simd::multiply(v, Simd::all(-1.0f)); }
LOWBIT_INLINE F subtract(F a, F b) { return Simd::add(a, negative(b)); }

class Integers {
 public:
    explicit Integers(const Levels& levels) : lo_(Simd::all(levels.lo)), hi_(Simd::all(levels.hi)) {}
    LOWBIT_INLINE_MEMBER F round(F x) const { return Simd::min(Simd::max(Simd::nearest(x), lo_), hi_); }
    LOWBIT_INLINE_MEMBER F round(F x, F& code) const {
        const F level = round(x);
        code = subtract(level, lo_);
        return level;
    }

 private:
    F lo_, hi_;
};

class Table {
 public:
    explicit Table(const Levels& levels)
        : levels_(Simd::load(levels.levels)), bounds_(Simd::load(levels.bounds)), codes_(Simd::load(levels.codes)),
          middle_(Simd::all(levels.bounds[7])) {}
    LOWBIT_INLINE_MEMBER F round(F x) const { return Simd::entry(levels_, place(x)); }
    LOWBIT_INLINE_MEMBER F round(F x, F& code) const {
        const I at = place(x);
        code = Simd::entry(codes_, at);
        return Simd::entry(levels_, at);
    }

 private:
    // Four halvings.
    LOWBIT_INLINE_MEMBER I place(F x) const {
        F at = Simd::above(x, middle_, Simd::all(8.0f), Simd::zero());
        for (const float step : {4.0f, 2.0f, 1.0f}) {
            const F bound = Simd::entry(bounds_, Simd::to_int(Simd::add(at, Simd::all(step - 1))));
            at = Simd::above(x, bound, Simd::add(at, Simd::all(step)), at);
        }
        return Simd::to_int(at);
    }
    F levels_, bounds_, codes_, middle_;
};

}  // namespace
}  // namespace lowbit
