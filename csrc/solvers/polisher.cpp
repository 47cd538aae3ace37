#include "solvers/polisher.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/half.h"

namespace lowbit {

namespace {

constexpr int kLanes = kSweepLanes;
constexpr float kRidge = 1e-6f;

// What is read back of a value that is stored. One that would vanish is the least there is; one that is too large is NaN.
float stored(float value, Store store) {
    if (store == Store::fp32 || value == 0) return value;
    float found;
    if (store == Store::fp16) {
        found = half_to_float(float_to_half(value));
        if (found == 0) found = std::copysign(0x1p-24f, value);
    } else {
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
        std::memcpy(&found, &bits, 4);
        if (found == 0) found = std::copysign(0x1p-133f, value);
    }
    return std::isfinite(found) ? found : std::nanf("");
}

}  // namespace

Second::Second(const Problem& problem, bool minima) : cols(problem.shape.cols), stride(problem.shape.padded()), data(problem.hessian) {
    if (stride != cols) {
        padded.reserve(static_cast<std::size_t>(cols) * stride);
        std::memset(padded.data(), 0, padded.bytes());
        for (std::int64_t k = 0; k < cols; ++k) std::memcpy(padded.data() + k * stride, problem.hessian + k * cols, sizeof(float) * cols);
        data = padded.data();
    }
    blocks.reserve(static_cast<std::size_t>(cols) * kBlock);
    float* to = blocks.data();
    for (int begin = 0; begin < cols; begin += kBlock) {
        const int count = std::min(kBlock, cols - begin);
        for (int i = 0; i < count; ++i)
            for (int j = 0; j < count; ++j) *to++ = row(problem.order[begin + i])[problem.order[begin + j]];
    }
    if (!minima) return;
    sums.reserve(static_cast<std::size_t>(problem.shape.groups()) * stride);
    std::memset(sums.data(), 0, sums.bytes());
    for (std::int64_t k = 0; k < cols; ++k) {
        float* sum = sums.data() + k / problem.shape.group * stride;
        for (int j = 0; j < cols; ++j) sum[j] += row(k)[j];
    }
}

PolishTile::PolishTile(const Shape& shape, const Second& h, int unknowns, std::size_t kept)
    : scales(kLanes, shape.groups()),
      off(kLanes * h.stride),
      own_pulled(off.size()),
      level(off.size()),
      basis(off.size()),
      change(off.size()),
      products(kept),
      normal(static_cast<std::size_t>(unknowns) * unknowns * kLanes),
      right(static_cast<std::size_t>(unknowns) * kLanes),
      dots(static_cast<std::size_t>(shape.groups())),
      inner(kBlock * kLanes),
      levels(kBlock * kLanes),
      steps(kBlock * kLanes),
      still(kBlock * kLanes),
      best_level(off.size()),
      best_scale(static_cast<std::size_t>(shape.groups()) * kLanes),
      best_offset(best_scale.size()),
      from(std::max(2 * shape.groups(), shape.cols)),
      weights(from.size()) {}

Polisher::Polisher(const SolverKernels& kernels, const Problem& problem, const Polish& polish, const Second& h, bool keeps)
    : k_(kernels),
      p_(problem),
      polish_(polish),
      h_(h),
      groups_(problem.shape.groups()),
      minima_(problem.as.offsets == Offsets::minima),
      keeps_(keeps),
      group_(problem.shape.cols) {
    for (int i = 0; i < problem.shape.cols; ++i) group_[i] = problem.order[i] / problem.shape.group;
}

void Polisher::run(std::deque<PolishTile>& tiles, int first, float* pulled) const {
    const int count = std::min(static_cast<int>(tiles.size()), (p_.shape.rows - first + kLanes - 1) / kLanes);
    for (int i = 0; i < count; ++i) {
        PolishTile& t = tiles[i];
        t.first = first + i * kLanes;
        t.rows = std::min(kLanes, p_.shape.rows - t.first);
        load(t, pulled == nullptr ? nullptr : pulled + i * kLanes * h_.stride);
    }
    for (int round = 0; round < polish_.rounds; ++round) {
        if (polish_.refit) refit(tiles, count, round == 0);
        for (int i = 0; i < count; ++i)
            for (int r = 0; r < kLanes; ++r) tiles[i].error[r] = error_of(tiles[i], r);
        sweep(tiles, count);
        for (int i = 0; i < count; ++i)
            for (int r = 0; r < kLanes; ++r) {
                tiles[i].alive[r] = tiles[i].alive[r] && tiles[i].error[r] < tiles[i].best[r];
                if (tiles[i].alive[r]) keep(tiles[i], r);
            }
    }
    for (int i = 0; i < count; ++i) save(tiles[i]);
}

void Polisher::load(PolishTile& t, float* pulled) const {
    t.scales.fill(p_.shape, p_.as, t.first, t.rows);
    std::memset(t.off.data(), 0, t.off.bytes());
    std::memset(t.level.data(), 0, t.level.bytes());
    float of_code[256];
    for (int code = 0; code < 256; ++code) of_code[code] = level_of(p_.as.levels, static_cast<std::uint8_t>(code));
    for (int r = 0; r < t.rows; ++r) {
        const std::int64_t from = static_cast<std::int64_t>(t.first + r) * h_.cols, to = r * h_.stride;
        for (int g = 0; g < groups_; ++g) {
            const float scale = t.scales.scale(r, g), base = t.scales.base(r, g);
            for (int k = g * p_.shape.group; k < end_of(g); ++k) {
                t.level[to + k] = of_code[p_.codes[from + k]];
                t.off[to + k] = t.level[to + k] * scale + base - p_.target[from + k];
            }
        }
    }
    t.pulled = pulled == nullptr ? t.own_pulled.data() : pulled;
    const auto pull = [&](int r, int rows) {
        k_.multiply_add({t.off.data() + r * h_.stride, h_.stride, 1}, rows, h_.cols, h_.data, h_.stride, static_cast<int>(h_.stride),
                        t.pulled + r * h_.stride, h_.stride, true);
    };
    if (pulled == nullptr) pull(0, kLanes);
    for (int r = 0; r < kLanes; ++r) {
        if (std::isnan(t.pulled[r * h_.stride])) pull(r, 1);
        t.error[r] = error_of(t, r);
        t.alive[r] = r < t.rows;
        keep(t, r);
    }
}

int Polisher::end_of(int g) const { return std::min((g + 1) * p_.shape.group, h_.cols); }

double Polisher::error_of(const PolishTile& t, int r) const {
    const float *e = t.off.data() + r * h_.stride, *pulled = t.pulled + r * h_.stride;
    double sums[4] = {};
    for (int k = 0; k < h_.stride; k += 4)
        for (int i = 0; i < 4; ++i) sums[i] += static_cast<double>(e[k + i]) * pulled[k + i];
    return sums[0] + sums[1] + (sums[2] + sums[3]);
}

// Of the scales s_g of a row, with d_g its levels less the zero-point: A_gh = d_g' H d_h, and for the change of s that is sought
// the right side is -d_g' H (q - w). For minima the constant of each group is a second basis vector.
void Polisher::refit(std::deque<PolishTile>& tiles, int count, bool fresh) const {
    const int unknowns = minima_ ? 2 * groups_ : groups_;
    for (int i = 0; i < count; ++i) set_basis(tiles[i]);
    for (int g = 0; g < groups_; ++g)
        for (int i = 0; i < count; ++i) add_group(tiles[i], g, fresh);
    for (int i = 0; i < count; ++i) {
        PolishTile& t = tiles[i];
        const auto diagonal = [&](int j) { return t.normal.data() + (static_cast<std::int64_t>(j) * unknowns + j) * kLanes; };
        for (int r = 0; r < kLanes; ++r) {
            float trace = 0;
            for (int j = 0; j < unknowns; ++j) trace += diagonal(j)[r];
            const float ridge = kRidge * trace / static_cast<float>(unknowns) + 1e-30f;
            for (int j = 0; j < unknowns; ++j) diagonal(j)[r] += ridge;
        }
        k_.solve_symmetric(unknowns, t.normal.data(), t.right.data());
        for (int r = 0; r < kLanes; ++r) change_scales(t, r);
    }
}

void Polisher::set_basis(PolishTile& t) const {
    for (int r = 0; r < kLanes; ++r)
        for (int g = 0; g < groups_; ++g) {
            const float zero = p_.as.offsets == Offsets::points ? t.scales.offset(r, g) : 0;
            for (std::int64_t k = r * h_.stride + g * p_.shape.group, end = r * h_.stride + end_of(g); k < end; ++k) {
                const float basis = t.level[k] - zero;
                t.change[k] = basis - t.basis[k];
                t.basis[k] = basis;
            }
        }
}

// The row of A of one group, and its right side.
void Polisher::add_group(PolishTile& t, int g, bool fresh) const {
    const int begin = g * p_.shape.group, end = end_of(g), unknowns = minima_ ? 2 * groups_ : groups_;
    const std::int64_t stride = h_.stride;
    const auto normal = [&](int i, int j) { return t.normal.data() + (static_cast<std::int64_t>(i) * unknowns + j) * kLanes; };
    if (fresh || !keeps_) {
        // Half of A is all that is read; what is kept for the change of (Q - W) H is whole.
        const int cols = keeps_ ? static_cast<int>(stride) : (end + 15) / 16 * 16;
        k_.multiply_add({t.basis.data() + begin, stride, 1}, kLanes, end - begin, h_.row(begin), stride, cols, product(t, 0, g),
                        product(t, 1, g) - product(t, 0, g), true);
    } else {
        renew_product(t, g);
    }
    for (int r = 0; r < kLanes; ++r) {
        const float *basis = t.basis.data() + r * stride, *pulled = t.pulled + r * stride;
        k_.dots(product(t, r, g), basis, end, p_.shape.group, t.dots.data());
        for (int j = 0; j <= g; ++j) normal(g, j)[r] = t.dots[j];
        float pull;
        k_.dots(basis + begin, pulled + begin, end - begin, h_.cols, &pull);
        t.right[g * kLanes + r] = -pull;
        if (!minima_) continue;
        k_.dots(h_.sums.data() + g * stride, basis, h_.cols, p_.shape.group, t.dots.data());
        for (int j = 0; j < groups_; ++j) normal(groups_ + g, j)[r] = t.dots[j];
        float constant = 0;
        for (int k = begin; k < end; ++k) constant -= pulled[k];
        t.right[(groups_ + g) * kLanes + r] = constant;
        for (int j = 0; j <= g; ++j) {
            float sum = 0;
            for (int k = j * p_.shape.group; k < end_of(j); ++k) sum += h_.sums[g * stride + k];
            normal(groups_ + g, groups_ + j)[r] = sum;
        }
    }
}

// The product of a group with H under the codes that the sweep has changed: few, so that only their rows are added.
void Polisher::renew_product(PolishTile& t, int g) const {
    for (int r = 0; r < t.rows; ++r) {
        if (!t.alive[r]) continue;
        const float* change = t.change.data() + r * h_.stride;
        int changed = 0;
        for (int k = g * p_.shape.group; k < end_of(g); ++k) {
            if (change[k] == 0) continue;
            t.from[changed] = h_.row(k);
            t.weights[changed++] = change[k];
        }
        if (changed != 0) k_.add_rows(t.from.data(), t.weights.data(), changed, static_cast<int>(h_.stride), product(t, r, g));
    }
}

float* Polisher::product(PolishTile& t, int r, int g) const {
    return t.products.data() + ((keeps_ ? static_cast<std::int64_t>(g) * kLanes : 0) + r) * product_stride(p_.shape);
}

// The solution as it is stored; then Q - W and its product with H follow.
void Polisher::change_scales(PolishTile& t, int r) const {
    float* off = t.off.data() + r * h_.stride;
    float* change = t.change.data() + r * h_.stride;
    int count = 0;
    std::memset(change, 0, sizeof(float) * h_.stride);
    for (int g = 0; g < groups_; ++g) {
        const float before = t.scales.scale(r, g), low = t.scales.offset(r, g);
        float scale = stored(before + t.right[g * kLanes + r], polish_.scale_store), offset = low;
        const bool dead = before == 0 && (!minima_ || low == 0);
        // A group whose levels are all 0 says nothing of its scale; a scale that turned 0 would lose the group for good.
        if (!(std::isfinite(scale) && scale != 0) || dead || (scale < 0 && !polish_.signed_scales)) scale = before;
        if (minima_) {
            offset = inverse_of(scale) == 0 ? 0 : low + t.right[(groups_ + g) * kLanes + r];
            offset = stored(offset, polish_.offset_store);
            if (!std::isfinite(offset) || dead) offset = low;
        }
        t.scales.set(p_.as.offsets, r, g, scale, offset);
        const float by = scale - before, also = minima_ ? offset - low : 0;
        if (by == 0 && also == 0) continue;
        const float* basis = t.basis.data() + r * h_.stride;
        for (int k = g * p_.shape.group; k < end_of(g); ++k) {
            change[k] = by * basis[k] + also;
            off[k] += change[k];
        }
        if (!keeps_) continue;
        t.from[count] = product(t, r, g);
        t.weights[count++] = by;
        if (!minima_) continue;
        t.from[count] = h_.sums.data() + g * h_.stride;
        t.weights[count++] = also;
    }
    float* pulled = t.pulled + r * h_.stride;
    if (keeps_) {
        k_.add_rows(t.from.data(), t.weights.data(), count, static_cast<int>(h_.stride), pulled);
    } else if (r == kLanes - 1) {  // of all rows at once
        k_.multiply_add({t.change.data(), h_.stride, 1}, kLanes, h_.cols, h_.data, h_.stride, static_cast<int>(h_.stride),
                        t.pulled, h_.stride, false);
    }
}

// Block by block, and all tiles in one, because what follows from a change is a row of H, which they share.
void Polisher::sweep(std::deque<PolishTile>& tiles, int count) const {
    const float* block = h_.blocks.data();
    for (int begin = 0; begin < h_.cols; begin += kBlock) {
        const int columns = std::min(kBlock, h_.cols - begin);
        for (int i = 0; i < count; ++i) sweep_block(tiles[i], begin, columns, block);
        block += static_cast<std::int64_t>(columns) * columns;
    }
}

void Polisher::sweep_block(PolishTile& t, int begin, int count, const float* block) const {
    const std::int32_t* order = p_.order + begin;
    for (int r = 0; r < kLanes; ++r)
        for (int i = 0; i < count; ++i) {
            t.inner[i * kLanes + r] = t.pulled[r * h_.stride + order[i]];
            t.levels[i * kLanes + r] = t.level[r * h_.stride + order[i]];
            if (p_.still == nullptr) continue;
            t.still[i * kLanes + r] = r < t.rows && p_.still[static_cast<std::int64_t>(t.first + r) * h_.cols + order[i]];
        }
    const Columns columns{count, group_.data() + begin, p_.still == nullptr ? nullptr : t.still.data()};
    k_.sweep_columns(p_.as.levels, columns, t.scales.view(), block, t.inner.data(), t.levels.data(), t.steps.data(), t.error);
    for (int r = 0; r < t.rows; ++r) {
        if (!t.alive[r]) continue;
        int changed = 0;
        for (int i = 0; i < count; ++i) {
            const float steps = t.steps[i * kLanes + r];
            if (steps == 0) continue;
            const float by = steps * t.scales.scale(r, group_[begin + i]);
            t.level[r * h_.stride + order[i]] = t.levels[i * kLanes + r];
            t.off[r * h_.stride + order[i]] += by;
            t.from[changed] = h_.row(order[i]);
            t.weights[changed++] = by;
        }
        if (changed != 0) k_.add_rows(t.from.data(), t.weights.data(), changed, static_cast<int>(h_.stride), t.pulled + r * h_.stride);
    }
}

void Polisher::keep(PolishTile& t, int r) const {
    std::memcpy(t.best_level.data() + r * h_.stride, t.level.data() + r * h_.stride, sizeof(float) * h_.stride);
    for (int g = 0; g < groups_; ++g) {
        t.best_scale[r * groups_ + g] = t.scales.scale(r, g);
        t.best_offset[r * groups_ + g] = t.scales.offset(r, g);
    }
    t.best[r] = t.error[r];
}

void Polisher::save(PolishTile& t) const {
    for (int r = 0; r < t.rows; ++r) {
        const std::int64_t row = t.first + r;
        encode(p_.as.levels, t.best_level.data() + r * h_.stride, 1, h_.cols, p_.codes + row * h_.cols);
        for (int g = 0; g < groups_; ++g) {
            polish_.scale[row * groups_ + g] = t.best_scale[r * groups_ + g];
            if (polish_.offset != nullptr) polish_.offset[row * groups_ + g] = t.best_offset[r * groups_ + g];
        }
        p_.error[row] = t.best[r];
    }
}

}  // namespace lowbit
