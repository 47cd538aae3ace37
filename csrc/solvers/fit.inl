// A fit over many blocks.
#pragma once

#include "solvers/fit_affine.inl"
#include "solvers/fit_symmetric.inl"

namespace lowbit {
namespace {

constexpr int kRunOfZeros = 16, kFewZeros = 4;  // zeros that are meant: solvers/zeros.py

struct Place {
    std::int64_t begin, count, column;  // elements of a block, and the column of the first
};

LOWBIT_INLINE Place place_of(const Matrix& m, const Blocks& blocks, std::int64_t block) {
    const std::int64_t row = block / blocks.per_row, column = block % blocks.per_row * blocks.size;
    const std::int64_t left = m.cols - column;
    return {row * m.cols + column, left < blocks.size ? left : blocks.size, column};
}

std::uint8_t has_many_zeros(const float* x, std::int64_t count) {
    std::int64_t zeros = 0, run = 0, longest = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        run = x[i] == 0 ? run + 1 : 0;
        zeros += x[i] == 0;
        longest = run > longest ? run : longest;
    }
    const std::int64_t share = count / 4 > kFewZeros ? count / 4 : kFewZeros;
    return zeros >= share || longest >= kRunOfZeros;
}

// Reads a block into x, and what its errors count into v; at every `step`-th place, so that blocks can lie side by side.
LOWBIT_INLINE void read_block(const Matrix& m, const Importance& importance, const Place& at, float* row, float* x, float* v,
                              int step, bool weighed) {
    read_floats(m, at.begin, at.count, row);
    for (std::int64_t i = 0; i < at.count; ++i) x[i * step] = row[i];
    if (!weighed) return;
    if (importance.values != nullptr) {
        const float* given = importance.values + (importance.by_column ? at.column : at.begin);
        for (std::int64_t i = 0; i < at.count; ++i) v[i * step] = given[i];
    } else {
        for (std::int64_t i = 0; i < at.count; ++i) v[i * step] = !importance.magnitude ? 1.0f : row[i] < 0 ? -row[i] : row[i];
    }
}

// Fits what has been read: a block in every lane, or one block in all.
template <bool side_by_side>
void fit_read(const Fit& f, const Work& w, F& scale, F& offset, F& constant, F& largest) {
    F low = Simd::load(w.x), high = low;
    for (int i = 1; i < w.steps; ++i) {
        const F x = Simd::load(w.x + 16 * i);
        low = Simd::min(low, x);
        high = Simd::max(high, x);
    }
    if constexpr (!side_by_side) {
        high = Simd::all(Simd::largest(high));
        low = Simd::all(-Simd::largest(negative(low)));
    }
    const F nan = Simd::all(NAN);
    constant = Simd::above(high, low, nan, low);
    offset = Simd::zero();
    if (f.offset != OffsetKind::none) {
        const Affine a = f.kind == FitKind::search ? search_affine<side_by_side>(f, w, low, high, largest)
                                                   : by_range(f, low, high, largest);
        scale = a.scale;
        offset = a.offset;
    } else if (f.kind == FitKind::absmax) {
        scale = Simd::divide(Simd::max(high, negative(low)), Simd::all(f.reach));
    } else if (f.grid.table) {
        scale = search_scale<side_by_side>(f, w, Table(f.grid), peak_of<side_by_side>(w));
    } else {
        scale = search_scale<side_by_side>(f, w, Integers(f.grid), peak_of<side_by_side>(w));
    }
}

LOWBIT_INLINE void put(const float (&lanes)[4][16], int lane, std::int64_t block, const Fitted& out, Seen& seen) {
    out.scale[block] = lanes[0][lane];
    if (out.offset != nullptr) out.offset[block] = lanes[1][lane];
    out.constant[block] = lanes[2][lane];
    seen.constant |= lanes[2][lane] == lanes[2][lane];
}

Seen fit(const Fit& f, const Matrix& m, const Importance& importance, const Blocks& blocks, std::int64_t first, std::int64_t last,
         const Fitted& out, float* memory) {
    Seen seen;
    const bool small = blocks.size <= kSmall, weighed = f.kind == FitKind::search;
    const std::int64_t padded = (blocks.size + 15) / 16 * 16, room = small ? 16 * kSmall : padded;
    float *x = memory, *v = memory + room, *spare = memory + 2 * room, *row = memory + 3 * room;
    F largest = Simd::zero();
    alignas(64) float lanes[4][16];
    std::int64_t block = first;
    while (block < last) {
        const Place at = place_of(m, blocks, block);
        std::int64_t taken[16];
        int count = 0;
        std::int64_t next = block;
        F scale, offset, constant;
        if (small) {
            // Blocks of one length together: those that follow up to a shorter one, or a short one alone.
            for (; next < last && count < 16; ++next) {
                const Place one = place_of(m, blocks, next);
                if (one.count != at.count) break;
                read_block(m, importance, one, row, x + count, v + count, 16, weighed);
                if (out.zeros != nullptr) seen.zeros |= (out.zeros[next] = has_many_zeros(row, one.count)) != 0;
                taken[count++] = next;
            }
            const int steps = static_cast<int>(at.count);
            for (int lane = count; lane < 16; ++lane)
                for (int i = 0; i < steps; ++i) {
                    x[16 * i + lane] = x[16 * i];
                    v[16 * i + lane] = v[16 * i];
                }
            fit_read<true>(f, {x, v, spare, steps}, scale, offset, constant, largest);
        } else {
            read_block(m, importance, at, row, x, v, 1, weighed);
            const std::int64_t whole = (at.count + 15) / 16 * 16;
            for (std::int64_t i = at.count; i < whole; ++i) {  // what is there already, and counts for nothing
                x[i] = x[at.count - 1];
                v[i] = 0;
            }
            if (out.zeros != nullptr) seen.zeros |= (out.zeros[block] = has_many_zeros(row, at.count)) != 0;
            fit_read<false>(f, {x, v, spare, static_cast<int>(whole / 16)}, scale, offset, constant, largest);
            taken[count++] = next++;
        }
        Simd::store(lanes[0], scale);
        Simd::store(lanes[1], offset);
        Simd::store(lanes[2], constant);
        for (int lane = 0; lane < count; ++lane) put(lanes, lane, taken[lane], out, seen);
        block = next;
    }
    seen.fits = Simd::largest(largest) <= 1.0f;
    return seen;
}

// The largest magnitudes alone; whether all is finite.
bool finite_peaks(const Matrix& m, const Blocks& blocks, std::int64_t first, std::int64_t last, float* out, float* row,
                                bool mark) {
    F odd = Simd::zero();
    Place at = place_of(m, blocks, first);
    for (std::int64_t block = first; block < last; ++block) {
        const float* x = row;
        if (m.type == Type::f32) x = static_cast<const float*>(m.values) + at.begin;
        else read_floats(m, at.begin, at.count, row);
        F most = Simd::zero();
        if (mark) odd = Simd::zero();
        for (std::int64_t i = 0; i < at.count; i += 16) {
            const std::int64_t left = at.count - i;
            const F v = left >= 16 ? Simd::load(x + i) : Simd::load_some(x + i, static_cast<int>(left));
            most = Simd::max(Simd::abs(v), most);
            odd = Simd::fused(v, Simd::zero(), odd);
        }
        out[block] = Simd::largest(most) + (mark ? Simd::sum(odd) : 0.0f);
        at.begin += at.count;
        at.column = at.column + at.count == m.cols ? 0 : at.column + at.count;
        at.count = m.cols - at.column < blocks.size ? m.cols - at.column : blocks.size;
    }
    return Simd::sum(odd) == 0;
}

void peaks(const Matrix& m, const Blocks& blocks, std::int64_t first, std::int64_t last, float* out, float* row) {
    if (!finite_peaks(m, blocks, first, last, out, row, false)) finite_peaks(m, blocks, first, last, out, row, true);
}

}  // namespace
}  // namespace lowbit
