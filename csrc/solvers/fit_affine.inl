// Fits with an offset: src/lowbit/solvers/fits/minmax.py and search.py. An offset is in levels here: x ~ scale (level - offset).
#pragma once

#include "solvers/blocks.inl"
#include "solvers/stores.inl"

namespace lowbit {
namespace {

struct Affine {
    F scale, offset;
};

// The scale and offset as they are read back (solvers/fitting.py, as_stored).
Affine as_stored(const Fit& fit, Affine a, F& largest) {
    a.scale = read_back(a.scale, fit.scale_store, largest);
    const F nothing = Simd::zero();
    switch (fit.offset) {
        case OffsetKind::none: break;
        case OffsetKind::nested:
            if (fit.spans_zero) a.offset = Simd::max(a.offset, nothing);
            break;
        case OffsetKind::grid:
            a.offset = Simd::min(Simd::max(Simd::nearest(a.offset), Simd::all(fit.grid.lo)), Simd::all(fit.grid.hi));
            break;
        case OffsetKind::whole:
            a.offset = Simd::min(Simd::max(Simd::nearest(a.offset), Simd::all(-2147483648.0f)), Simd::all(2147483520.0f));
            break;
        case OffsetKind::real: a.offset = read_back(a.offset, fit.offset_store, largest); break;
        case OffsetKind::minimum: {
            const F minimum = read_back(Simd::multiply(negative(a.scale), a.offset), fit.offset_store, largest);
            const F kept = Simd::divide(negative(minimum), a.scale);
            // NaN and infinity: the size is not below this
            a.offset = Simd::above(Simd::all(INFINITY), Simd::abs(kept), kept, a.offset);
            break;
        }
    }
    return a;
}

// The lowest value on the lowest level, and the highest on the highest.
Affine by_range(const Fit& fit, F low, F high, F& largest) {
    const F nothing = Simd::zero();
    if (fit.spans_zero) {
        low = Simd::min(low, nothing);
        high = Simd::max(high, nothing);
    }
    F scale = Simd::divide(subtract(high, low), Simd::all(fit.grid.hi - fit.grid.lo));
    scale = Simd::above(scale, nothing, scale, Simd::all(1.0f));
    scale = read_back(scale, fit.scale_store, largest);
    return {scale, subtract(Simd::all(fit.grid.lo), Simd::divide(low, scale))};
}

template <bool side_by_side>
F error_of(const Work& w, const Integers& grid, const Affine& a) {
    const F by_step = inverse(a.scale), minus = negative(a.offset);
    F sums[1];
    totals<side_by_side>(w.steps, sums, [&](int i, F(&sum)[1]) {
        const F x = Simd::load(w.x + 16 * i), v = Simd::load(w.v + 16 * i);
        const F level = grid.round(Simd::add(Simd::multiply(x, by_step), a.offset));
        const F off = subtract(Simd::multiply(Simd::add(level, minus), a.scale), x);
        sum[0] = Simd::fused(Simd::multiply(off, off), v, sum[0]);
    });
    return sums[0];
}

// Least squares for scale and offset under the levels of (scale, offset); for the scale alone where the offset is whole.
template <bool side_by_side>
Affine refitted(const Fit& fit, const Work& w, const Integers& grid, const Affine& a, F v_sum, F vx_sum) {
    const F by_step = inverse(a.scale), nothing = Simd::zero();
    const bool whole = fit.offset == OffsetKind::grid || fit.offset == OffsetKind::whole;
    const F shift = whole ? negative(a.offset) : nothing;
    F sums[3];
    totals<side_by_side>(w.steps, sums, [&](int i, F(&sum)[3]) {
        const F x = Simd::load(w.x + 16 * i), v = Simd::load(w.v + 16 * i);
        const F d = Simd::add(grid.round(Simd::add(Simd::multiply(x, by_step), a.offset)), shift);
        const F vd = Simd::multiply(v, d);
        sum[0] = Simd::add(sum[0], vd);
        sum[1] = Simd::fused(vd, d, sum[1]);
        sum[2] = Simd::fused(vd, x, sum[2]);
    });
    if (whole) {
        const F best = Simd::max(Simd::divide(sums[2], sums[1]), nothing);
        return {Simd::above(sums[1], nothing, best, a.scale), a.offset};
    }
    const F det = subtract(Simd::multiply(v_sum, sums[1]), Simd::multiply(sums[0], sums[0]));
    const F slope = Simd::divide(subtract(Simd::multiply(v_sum, sums[2]), Simd::multiply(sums[0], vx_sum)), det);
    const F minimum = Simd::divide(subtract(vx_sum, Simd::multiply(slope, sums[0])), v_sum);
    const F enough = Simd::multiply(Simd::multiply(v_sum, sums[1]), Simd::all(1e-12f));
    const F positive = Simd::above(slope, nothing, det, negative(Simd::all(1.0f)));
    const F offset = Simd::divide(negative(minimum), slope);
    return {Simd::above(positive, enough, slope, a.scale), Simd::above(positive, enough, offset, a.offset)};
}

template <bool side_by_side>
Affine search_affine(const Fit& fit, const Work& w, F low, F high, F& largest) {
    const Integers grid(fit.grid);
    F sums[2];
    totals<side_by_side>(w.steps, sums, [&](int i, F(&sum)[2]) {
        const F x = Simd::load(w.x + 16 * i), v = Simd::load(w.v + 16 * i);
        sum[0] = Simd::add(sum[0], v);
        sum[1] = Simd::fused(v, x, sum[1]);
    });
    Affine best = as_stored(fit, by_range(fit, low, high, largest), largest);
    F error = error_of<side_by_side>(w, grid, best);
    for (int i = 0; i < fit.factor_count + 3; ++i) {  // the range, parts of it, and twice what is best so far
        Affine a = best;
        if (i <= fit.factor_count) {
            const F factor = Simd::all(i == 0 ? 1.0f : fit.factors[i - 1]);
            a = as_stored(fit, by_range(fit, Simd::multiply(low, factor), Simd::multiply(high, factor), largest), largest);
        }
        a = as_stored(fit, refitted<side_by_side>(fit, w, grid, a, sums[0], sums[1]), largest);
        const F e = error_of<side_by_side>(w, grid, a);
        best.scale = Simd::above(error, e, a.scale, best.scale);
        best.offset = Simd::above(error, e, a.offset, best.offset);
        error = Simd::above(error, e, e, error);
    }
    return best;
}

}  // namespace
}  // namespace lowbit
