#include "solvers/polish.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>

#include "core/half.h"

namespace lowbit {

namespace {

constexpr int kLanes = kSweepLanes;
constexpr std::size_t kMostKept = std::size_t{48} << 20;  // bytes of the products of groups with H that a thread keeps
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

// H with rows of whole vectors, and of the order of rounding the blocks on its diagonal.
struct Second {
    Second(const Polish& job) : cols(job.shape.cols), stride(job.shape.padded()), data(job.hessian) {
        if (stride != cols) {
            padded.reserve(static_cast<std::size_t>(cols) * stride);
            std::memset(padded.data(), 0, padded.bytes());
            for (std::int64_t k = 0; k < cols; ++k) std::memcpy(padded.data() + k * stride, job.hessian + k * cols, sizeof(float) * cols);
            data = padded.data();
        }
        blocks.reserve(static_cast<std::size_t>(cols) * kBlock);
        float* to = blocks.data();
        for (int begin = 0; begin < cols; begin += kBlock) {
            const int count = std::min(kBlock, cols - begin);
            for (int i = 0; i < count; ++i)
                for (int j = 0; j < count; ++j) *to++ = row(job.order[begin + i])[job.order[begin + j]];
        }
        if (job.as.offsets != Offsets::minima || !job.refit) return;
        const int groups = job.shape.groups();
        sums.reserve(static_cast<std::size_t>(groups) * stride);
        std::memset(sums.data(), 0, sums.bytes());
        for (std::int64_t k = 0; k < cols; ++k) {
            float* to = sums.data() + k / job.shape.group * stride;
            for (int j = 0; j < cols; ++j) to[j] += row(k)[j];
        }
    }
    const float* row(std::int64_t k) const { return data + k * stride; }

    int cols;
    std::int64_t stride;
    const float* data;
    Buffer<float> padded, blocks;
    Buffer<float> sums;  // [groups, stride]: of the rows of each group, which is what its constant is multiplied with
};

// What one thread needs for kLanes rows: [kLanes, stride] each, unless it says otherwise.
struct Tile {
    Tile(const Shape& shape, const Second& h, int unknowns, std::size_t kept)
        : scales(kLanes, shape.groups()),
          off(kLanes * h.stride),
          pulled(off.size()),
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
          rows(std::max(2 * shape.groups(), shape.cols)),
          weights(rows.size()) {}

    LaneScales scales;
    Buffer<float> off, pulled;     // Q - W, and (Q - W) H
    Buffer<float> level, basis;    // of the codes; the same less the zero-point
    Buffer<float> change;
    Buffer<float> products;        // [kLanes, groups, stride]: of the basis of each group with H; or of one group
    Buffer<float> normal, right;   // [unknowns, unknowns, kLanes], [unknowns, kLanes]
    Buffer<float> dots;
    Buffer<float> inner, levels, steps;  // [kBlock, kLanes]
    Buffer<std::uint8_t> still;
    Buffer<float> best_level, best_scale, best_offset;
    std::vector<const float*> rows;
    std::vector<float> weights;
    double best[kLanes], error[kLanes];
    bool alive[kLanes];
};

class Polisher {
 public:
    Polisher(const SolverKernels& kernels, const Polish& job, const Second& h, bool keeps)
        : k_(kernels), job_(job), h_(h), groups_(job.shape.groups()), group_(job.shape.cols), keeps_(keeps) {
        for (int i = 0; i < job.shape.cols; ++i) group_[i] = job.order[i] / job.shape.group;
    }

    void run(Tile& t, int first) const {
        const int rows = std::min(kLanes, job_.shape.rows - first);
        load(t, first, rows);
        k_.multiply_add({t.off.data(), h_.stride, 1}, kLanes, h_.cols, h_.data, h_.stride, static_cast<int>(h_.stride), t.pulled.data(),
                        h_.stride);
        for (int r = 0; r < kLanes; ++r) {
            t.error[r] = error_of(t, r);
            t.alive[r] = r < rows;
            keep(t, r);
        }
        for (int round = 0; round < job_.rounds && std::any_of(t.alive, t.alive + kLanes, [](bool a) { return a; }); ++round) {
            if (job_.refit) refit(t, round == 0);
            for (int r = 0; r < kLanes; ++r) t.error[r] = error_of(t, r);
            sweep(t, first, rows);
            const bool again = round + 1 < job_.rounds;
            if (job_.refit && keeps_ && again) renew_products(t);
            for (int r = 0; r < kLanes; ++r) {
                t.alive[r] = t.alive[r] && t.error[r] < t.best[r];
                if (t.alive[r]) keep(t, r);
            }
        }
        save(t, first, rows);
    }

 private:
    void load(Tile& t, int first, int rows) const {
        t.scales.fill(job_.shape, job_.as, first, rows);
        std::memset(t.off.data(), 0, t.off.bytes());
        std::memset(t.pulled.data(), 0, t.pulled.bytes());
        std::memset(t.level.data(), 0, t.level.bytes());
        float of_code[256];
        for (int code = 0; code < 256; ++code) of_code[code] = level_of(job_.as.levels, static_cast<std::uint8_t>(code));
        for (int r = 0; r < rows; ++r) {
            const std::int64_t from = static_cast<std::int64_t>(first + r) * h_.cols, to = r * h_.stride;
            for (int g = 0; g < groups_; ++g) {
                const float scale = t.scales.scale(r, g), base = t.scales.base(r, g);
                for (int k = g * job_.shape.group; k < end_of(g); ++k) {
                    t.level[to + k] = of_code[job_.codes[from + k]];
                    t.off[to + k] = t.level[to + k] * scale + base - job_.target[from + k];
                }
            }
        }
    }

    int end_of(int g) const { return std::min((g + 1) * job_.shape.group, h_.cols); }

    double error_of(const Tile& t, int r) const {
        const float *e = t.off.data() + r * h_.stride, *pulled = t.pulled.data() + r * h_.stride;
        double sums[4] = {};
        for (int k = 0; k < h_.stride; k += 4)
            for (int i = 0; i < 4; ++i) sums[i] += static_cast<double>(e[k + i]) * pulled[k + i];
        return sums[0] + sums[1] + (sums[2] + sums[3]);
    }

    // Of the scales s_g of a row, with d_g its levels less the zero-point: A_gh = d_g' H d_h, and for the change of s that is sought
    // the right side is -d_g' H (q - w). For minima the constant of each group is a second basis vector.
    void refit(Tile& t, bool fresh) const {
        const bool minima = job_.as.offsets == Offsets::minima;
        const int unknowns = minima ? 2 * groups_ : groups_;
        const std::int64_t stride = h_.stride;
        for (int r = 0; r < kLanes; ++r)
            for (int g = 0; g < groups_; ++g) {
                const float zero = job_.as.offsets == Offsets::points ? t.scales.offset(r, g) : 0;
                for (int k = g * job_.shape.group; k < end_of(g); ++k) t.basis[r * stride + k] = t.level[r * stride + k] - zero;
            }
        const auto normal = [&](int i, int j) { return t.normal.data() + (static_cast<std::int64_t>(i) * unknowns + j) * kLanes; };
        for (int g = 0; g < groups_; ++g) {
            if (fresh || !keeps_) multiply_group(t, g);
            for (int r = 0; r < kLanes; ++r) {
                const float *basis = t.basis.data() + r * stride, *pulled = t.pulled.data() + r * stride;
                const int begin = g * job_.shape.group;
                k_.dots(product(t, r, g), basis, end_of(g), job_.shape.group, t.dots.data());
                for (int j = 0; j <= g; ++j) normal(g, j)[r] = t.dots[j];
                k_.dots(basis + begin, pulled + begin, end_of(g) - begin, h_.cols, &t.right[g * kLanes + r]);
                t.right[g * kLanes + r] *= -1;
                if (!minima) continue;
                k_.dots(h_.sums.data() + g * stride, basis, h_.cols, job_.shape.group, t.dots.data());
                for (int j = 0; j < groups_; ++j) normal(groups_ + g, j)[r] = t.dots[j];
                float constant = 0;
                for (int k = begin; k < end_of(g); ++k) constant -= pulled[k];
                t.right[(groups_ + g) * kLanes + r] = constant;
                for (int j = 0; j <= g; ++j) {
                    float sum = 0;
                    for (int k = j * job_.shape.group; k < end_of(j); ++k) sum += h_.sums[g * stride + k];
                    normal(groups_ + g, groups_ + j)[r] = sum;
                }
            }
        }
        for (int r = 0; r < kLanes; ++r) {
            float trace = 0;
            for (int i = 0; i < unknowns; ++i) trace += normal(i, i)[r];
            const float ridge = kRidge * trace / static_cast<float>(unknowns) + 1e-30f;
            for (int i = 0; i < unknowns; ++i) normal(i, i)[r] += ridge;
        }
        k_.solve_symmetric(unknowns, t.normal.data(), t.right.data());
        for (int r = 0; r < kLanes; ++r) change_scales(t, r);
    }

    float* product(Tile& t, int r, int g) const {
        return t.products.data() + (keeps_ ? static_cast<std::int64_t>(r) * groups_ + g : r) * h_.stride;
    }

    void multiply_group(Tile& t, int g) const {
        const std::int64_t begin = static_cast<std::int64_t>(g) * job_.shape.group, step = product(t, 1, g) - product(t, 0, g);
        for (int r = 0; r < kLanes; ++r) std::memset(product(t, r, g), 0, sizeof(float) * h_.stride);
        k_.multiply_add({t.basis.data() + begin, h_.stride, 1}, kLanes, end_of(g) - static_cast<int>(begin), h_.row(begin), h_.stride,
                        static_cast<int>(h_.stride), product(t, 0, g), step);
    }

    // The solution as it is stored; then Q - W and its product with H follow.
    void change_scales(Tile& t, int r) const {
        const bool minima = job_.as.offsets == Offsets::minima;
        float* off = t.off.data() + r * h_.stride;
        float* change = t.change.data() + r * h_.stride;
        int count = 0;
        std::memset(change, 0, sizeof(float) * h_.stride);
        for (int g = 0; g < groups_; ++g) {
            const float before = t.scales.scale(r, g), low = t.scales.offset(r, g);
            float scale = stored(before + t.right[g * kLanes + r], job_.scale_store), offset = low;
            const bool dead = before == 0 && (!minima || low == 0);
            // A group whose levels are all 0 says nothing of its scale; a scale that turned 0 would lose the group for good.
            if (!(std::isfinite(scale) && scale != 0) || dead || (scale < 0 && !job_.signed_scales)) scale = before;
            if (minima) {
                offset = inverse_of(scale) == 0 ? 0 : low + t.right[(groups_ + g) * kLanes + r];
                offset = stored(offset, job_.offset_store);
                if (!std::isfinite(offset) || dead) offset = low;
            }
            t.scales.set(job_.as.offsets, r, g, scale, offset);
            const float by = scale - before, also = minima ? offset - low : 0;
            if (by == 0 && also == 0) continue;
            const float* basis = t.basis.data() + r * h_.stride;
            for (int k = g * job_.shape.group; k < end_of(g); ++k) {
                change[k] = by * basis[k] + also;
                off[k] += change[k];
            }
            if (!keeps_) continue;
            t.rows[count] = product(t, r, g);
            t.weights[count++] = by;
            if (!minima) continue;
            t.rows[count] = h_.sums.data() + g * h_.stride;
            t.weights[count++] = also;
        }
        float* pulled = t.pulled.data() + r * h_.stride;
        if (keeps_) {
            k_.add_rows(t.rows.data(), t.weights.data(), count, static_cast<int>(h_.stride), pulled);
        } else if (r == kLanes - 1) {  // of all rows at once
            k_.multiply_add({t.change.data(), h_.stride, 1}, kLanes, h_.cols, h_.data, h_.stride, static_cast<int>(h_.stride),
                            t.pulled.data(), h_.stride);
        }
    }

    void sweep(Tile& t, int first, int rows) const {
        const float* block = h_.blocks.data();
        for (int begin = 0; begin < h_.cols; begin += kBlock) {
            const int count = std::min(kBlock, h_.cols - begin);
            const std::int32_t* order = job_.order + begin;
            for (int r = 0; r < kLanes; ++r)
                for (int i = 0; i < count; ++i) {
                    t.inner[i * kLanes + r] = t.pulled[r * h_.stride + order[i]];
                    t.levels[i * kLanes + r] = t.level[r * h_.stride + order[i]];
                    if (job_.still == nullptr) continue;
                    t.still[i * kLanes + r] = r < rows && job_.still[static_cast<std::int64_t>(first + r) * h_.cols + order[i]];
                }
            const Columns columns{count, group_.data() + begin, job_.still == nullptr ? nullptr : t.still.data()};
            k_.sweep_columns(job_.as.levels, columns, t.scales.view(), block, t.inner.data(), t.levels.data(), t.steps.data(), t.error);
            block += static_cast<std::int64_t>(count) * count;
            for (int r = 0; r < rows; ++r) {
                int changed = 0;
                for (int i = 0; i < count; ++i) {
                    const float steps = t.steps[i * kLanes + r];
                    if (steps == 0) continue;
                    const float by = steps * t.scales.scale(r, group_[begin + i]);
                    t.level[r * h_.stride + order[i]] = t.levels[i * kLanes + r];
                    t.off[r * h_.stride + order[i]] += by;
                    t.rows[changed] = h_.row(order[i]);
                    t.weights[changed++] = by;
                }
                if (changed != 0) add(t, changed, t.pulled.data() + r * h_.stride);
            }
        }
    }

    void add(const Tile& t, int count, float* to) const {
        k_.add_rows(t.rows.data(), t.weights.data(), count, static_cast<int>(h_.stride), to);
    }

    // The products of groups with H under the codes that the sweep has changed: few, so that only their rows are added.
    void renew_products(Tile& t) const {
        for (int r = 0; r < kLanes; ++r) {
            if (!t.alive[r]) continue;
            const float *now = t.level.data() + r * h_.stride, *before = t.best_level.data() + r * h_.stride;
            for (int g = 0; g < groups_; ++g) {
                int changed = 0;
                for (int k = g * job_.shape.group; k < end_of(g); ++k) {
                    if (now[k] == before[k]) continue;
                    t.rows[changed] = h_.row(k);
                    t.weights[changed++] = now[k] - before[k];
                }
                if (changed != 0) add(t, changed, product(t, r, g));
            }
        }
    }

    void keep(Tile& t, int r) const {
        std::memcpy(t.best_level.data() + r * h_.stride, t.level.data() + r * h_.stride, sizeof(float) * h_.stride);
        for (int g = 0; g < groups_; ++g) {
            t.best_scale[r * groups_ + g] = t.scales.scale(r, g);
            t.best_offset[r * groups_ + g] = t.scales.offset(r, g);
        }
        t.best[r] = t.error[r];
    }

    void save(Tile& t, int first, int rows) const {
        for (int r = 0; r < rows; ++r) {
            const std::int64_t row = first + r;
            for (int k = 0; k < h_.cols; ++k)
                job_.codes[row * h_.cols + k] = code_of(job_.as.levels, t.best_level[r * h_.stride + k]);
            for (int g = 0; g < groups_; ++g) {
                job_.scale[row * groups_ + g] = t.best_scale[r * groups_ + g];
                if (job_.offset != nullptr) job_.offset[row * groups_ + g] = t.best_offset[r * groups_ + g];
            }
            job_.error[row] = t.best[r];
        }
    }

    const SolverKernels& k_;
    const Polish& job_;
    const Second& h_;
    int groups_;
    std::vector<int> group_;
    bool keeps_;
};

}  // namespace

void polish(ThreadPool& pool, const SolverKernels& kernels, const Polish& job) {
    if (job.shape.rows == 0) return;
    const Second h(job);
    const int unknowns = !job.refit ? 0 : job.as.offsets == Offsets::minima ? 2 * job.shape.groups() : job.shape.groups();
    const std::size_t of_one = kLanes * static_cast<std::size_t>(h.stride), of_all = of_one * job.shape.groups();
    const bool keeps = of_all * sizeof(float) <= kMostKept;
    std::deque<Tile> tiles;
    for (int i = 0; i < pool.threads(); ++i) tiles.emplace_back(job.shape, h, unknowns, !job.refit ? 0 : keeps ? of_all : of_one);
    const Polisher polisher(kernels, job, h, keeps);
    pool.run([&](Worker& worker) {
        worker.share(0, (job.shape.rows + kLanes - 1) / kLanes, 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t tile = begin; tile < end; ++tile) polisher.run(tiles[worker.index()], static_cast<int>(tile) * kLanes);
        });
    });
}

}  // namespace lowbit
