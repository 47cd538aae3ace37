// Fits without an offset: src/lowbit/solvers/fits/absmax.py and search.py.
#pragma once

#include "solvers/blocks.inl"

namespace lowbit {
namespace {

// The element of largest magnitude, with its sign; of several the first.
template <bool side_by_side>
F peak_of(const Work& w) {
    F most = Simd::all(-1.0f), peak = Simd::zero();
    for (int i = 0; i < w.steps; ++i) {
        const F x = Simd::load(w.x + 16 * i), size = Simd::abs(x);
        peak = Simd::above(size, most, x, peak);
        most = Simd::above(size, most, size, most);
    }
    if constexpr (side_by_side) return peak;
    const float largest = Simd::largest(most);
    int at = 0;
    while (w.x[at] != largest && w.x[at] != -largest) ++at;  // what is finite is there
    return Simd::all(w.x[at]);
}

// Rounds under the scale s; the scale that is best for these levels, and its error. With r = x - s q and d the change of the
// scale, sum v (x - (s + d) q)^2 = sum v r^2 - 2 d sum v r q + d^2 sum v q^2: nothing cancels, as it does in the sums of x.
template <bool side_by_side, class Grid>
void refit(const Work& w, const Grid& grid, F s, bool signed_scale, F& error, F& best) {
    const F by_step = inverse(s), minus = negative(s);
    F sums[3];
    totals<side_by_side>(w.steps, sums, [&](int i, F(&sum)[3]) {
        const F x = Simd::load(w.x + 16 * i), v = Simd::load(w.v + 16 * i);
        const F q = grid.round(Simd::multiply(x, by_step));
        const F r = Simd::fused(minus, q, x);
        const F vq = Simd::multiply(v, q);
        sum[0] = Simd::fused(Simd::multiply(v, r), r, sum[0]);
        sum[1] = Simd::fused(vq, r, sum[1]);
        sum[2] = Simd::fused(vq, q, sum[2]);
    });
    const F nothing = Simd::zero();
    const F change = Simd::above(sums[2], nothing, Simd::divide(sums[1], sums[2]), nothing);
    best = Simd::add(s, change);
    F d = change;
    if (!signed_scale) {
        best = Simd::max(best, nothing);
        d = subtract(best, s);
    }
    // rr - d (2 rq - d qq)
    error = Simd::fused(negative(d), Simd::fused(negative(d), sums[2], Simd::add(sums[1], sums[1])), sums[0]);
}

// How much of sum v x^2 the best scale for the levels under s explains: (sum v x q)^2 / sum v q^2. w.spare has v x.
template <bool side_by_side, class Grid>
F explained(const Work& w, const Grid& grid, F s, bool signed_scale) {
    const F by_step = inverse(s), nothing = Simd::zero();
    F sums[2];
    totals<side_by_side>(w.steps, sums, [&](int i, F(&sum)[2]) {
        const F q = grid.round(Simd::multiply(Simd::load(w.x + 16 * i), by_step));
        sum[0] = Simd::fused(Simd::load(w.spare + 16 * i), q, sum[0]);
        sum[1] = Simd::fused(Simd::multiply(Simd::load(w.v + 16 * i), q), q, sum[1]);
    });
    const F share = Simd::above(sums[1], nothing, Simd::divide(Simd::multiply(sums[0], sums[0]), sums[1]), nothing);
    return signed_scale ? share : Simd::above(sums[0], nothing, share, nothing);
}

template <bool side_by_side, class Grid>
F search_scale(const Fit& fit, const Work& w, const Grid& grid, F peak) {
    const F by_range = Simd::divide(Simd::abs(peak), Simd::all(fit.reach));
    const F start = fit.two_signs ? Simd::divide(peak, Simd::all(fit.extreme)) : by_range;
    F error = Simd::all(INFINITY), scale = start;
    const auto attempt = [&](F s) {
        F e, better;
        refit<side_by_side>(w, grid, s, fit.signed_scale, e, better);
        scale = Simd::above(error, e, better, scale);
        error = Simd::above(error, e, e, error);
    };
    const int count = fit.factor_count, tries = 2 + count + (fit.two_signs ? (count + 1) / 2 : 0);
    const auto candidate = [&](int i) {
        const int k = i - 2;
        if (i == 0) return by_range;
        if (i == 1) return start;
        return Simd::multiply(start, Simd::all(k < count ? fit.factors[k] : -fit.factors[2 * (k - count)]));
    };
    // With few levels the error is a large enough part of the whole that what is left of it shows in what is explained, to some
    // 1e-5 of it, at half the work.
    int exact = tries;
    if (fit.grid.table || fit.grid.hi - fit.grid.lo < 16) {
        for (int i = 0; i < w.steps; ++i)
            Simd::store(w.spare + 16 * i, Simd::multiply(Simd::load(w.x + 16 * i), Simd::load(w.v + 16 * i)));
        F most = Simd::all(-1.0f);
        for (int i = 0; i < tries; ++i) {
            const F s = candidate(i), share = explained<side_by_side>(w, grid, s, fit.signed_scale);
            scale = Simd::above(share, most, s, scale);
            most = Simd::above(share, most, share, most);
        }
        exact = 1;
    }
    for (int i = 0; i < exact + 2; ++i)  // the last two refine what is best
        attempt(exact == 1 || i >= exact ? scale : candidate(i));
    return scale;
}

}  // namespace
}  // namespace lowbit
