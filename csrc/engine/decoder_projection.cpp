// Projections of a decoder: rows are rounded once for all weights that want them alike, then shared among threads.
#include <algorithm>
#include <cstring>

#include "core/prefetch.h"
#include "engine/decoder.h"

namespace lowbit {

namespace {

constexpr int kRowBlock = 96;  // rows of activations that stay in the second cache
constexpr int kAhead = 8192;   // bytes of a weight that are fetched before they are needed

std::int64_t pairs_of(const PackedWeight& w) { return (w.tiles() + 1) / 2; }

// Where this worker begins with the weight: memory works while it waits for the others and prepares its row.
void fetch_ahead(const PackedWeight& w, const Worker& worker) {
    const std::uint8_t* from = w.tile(static_cast<int>(2 * worker.own_begin(pairs_of(w))));
    const std::uint8_t* end = w.data.data() + w.data.bytes();
    for (int i = 0; i < kAhead && from + i < end; i += 64) prefetch(from + i);
}

}  // namespace

// y = the projection of what row(i, scratch) gives for each row of the span, plus `addend` where that is given. One row is prepared by every thread for itself,
// which is cheaper than waiting for another; several are shared. Ends at a barrier. next: the projection after this.
void Decoder::project(const Span& span, const ProjectionSpec& projection, const RowSource& row, float* y, std::int64_t stride,
                       Gate gate, const float* addend, const ProjectionSpec* next) {
    Worker& worker = span.worker;
    PerThread& own = threads_[worker.index()];
    const int count = span.count;
    const bool alone = count == 1;
    std::vector<ActivationsBuffer>& buffers = alone ? own.activations : span.scratch.activations;
    // Parts that round their input alike share it.
    const std::size_t parts = projection.parts.size();
    std::size_t kind_of[8], representative[8], kinds = 0;
    for (std::size_t i = 0; i < parts; ++i) {
        const PartSpec& part = *projection.parts[i];
        std::size_t kind = 0;
        for (; kind < kinds; ++kind) {
            const PartSpec& other = *projection.parts[representative[kind]];
            if (other.weight->segment == part.weight->segment && other.weight->padded_cols == part.weight->padded_cols &&
                other.weight->zero == part.weight->zero && other.activations == part.activations)
                break;
        }
        if (kind == kinds) representative[kinds++] = i;
        kind_of[i] = kind;
    }
    if (alone || worker.count() == 1 || worker.index() == 0) {
        if (buffers.size() < kinds) buffers.resize(kinds);
        for (std::size_t kind = 0; kind < kinds; ++kind) {
            const PartSpec& part = *projection.parts[representative[kind]];
            buffers[kind].shape(*part.weight, part.activations.digits(), count);
        }
    }
    if (!alone) worker.barrier();

    const bool keeps = std::any_of(projection.parts.begin(), projection.parts.end(),
                                   [](const auto& part) { return is_float(part->weight->code); });
    const auto prepare_row = [&](std::int64_t i, float* scratch, float* kept) {
        const float* values = row.get(row.self, static_cast<int>(i), scratch);
        if (keeps && values != kept) std::memcpy(kept, values, sizeof(float) * projection.cols);
        for (std::size_t kind = 0; kind < kinds; ++kind) {
            const PartSpec& part = *projection.parts[representative[kind]];
            if (is_float(part.weight->code)) continue;
            const float* from = values;
            if (!part.activations.divisor.empty()) {
                float* divided = scratch + hidden_;
                for (int k = 0; k < projection.cols; ++k) divided[k] = values[k] / part.activations.divisor[k];
                from = divided;
            }
            kernels_.quantize(from, projection.cols, buffers[kind].rows, static_cast<int>(i), part.activations.static_scale,
                              part.activations.per_token);
        }
    };
    const float* values = own.row.data();
    if (alone) {
        prepare_row(0, own.row.data(), own.row.data());
    } else {
        worker.share(0, count, 4, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) prepare_row(i, own.row.data(), span.scratch.normed.data() + i * hidden_);
        });
        worker.barrier();
        values = span.scratch.normed.data();
    }

    const int blocks = (count + kRowBlock - 1) / kRowBlock;
    for (std::size_t i = 0; i < parts; ++i) {
        const PartSpec& part = *projection.parts[i];
        const PackedWeight& w = *part.weight;
        Activations activations = buffers[kind_of[i]].rows;
        activations.values = values;
        activations.stride = hidden_;
        Epilogue e;
        e.bias = part.bias.size() > 0 ? part.bias.data() : nullptr;
        e.addend = addend != nullptr ? addend + part.offset : nullptr;
        e.gate = gate;
        const std::int64_t pairs = pairs_of(w);
        const auto run = [&](std::int64_t first, std::int64_t last, int m0, int m1) {
            const int t0 = static_cast<int>(2 * first), t1 = std::min(static_cast<int>(2 * last), w.tiles());
            kernels_.linear(w, activations, m0, m1, t0, t1, e, y + part.offset, stride);
            if (!part.residual) return;
            Epilogue more;
            more.addend = y + part.offset;
            kernels_.linear(*part.residual, activations, m0, m1, t0, t1, more, y + part.offset, stride);
        };
        // A loop has a counter of its own until the next barrier; a projection has at most three parts.
        const int counter = 1 + static_cast<int>(i) % 3;
        // Enough shares for threads of different speed, few enough that weights are read in long runs.
        const std::int64_t grain = std::clamp<std::int64_t>(pairs / (4 * worker.count()), 1, 16);
        if (alone) {
            worker.share_in_runs(counter, pairs, std::max<std::int64_t>(grain / 2, 1),
                                 [&](std::int64_t first, std::int64_t last) { run(first, last, 0, 1); });
            continue;
        }
        const std::int64_t groups = (pairs + grain - 1) / grain;
        worker.share(counter, groups * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
            check_interrupt(worker);
            for (std::int64_t share = begin; share < end; ++share) {
                const std::int64_t first = share / blocks * grain;
                const int m0 = static_cast<int>(share % blocks) * kRowBlock;
                run(first, std::min(first + grain, pairs), m0, std::min(m0 + kRowBlock, count));
            }
        });
    }
    if (alone && next != nullptr) fetch_ahead(*next->parts.front()->weight, worker);
    worker.barrier();
}

}  // namespace lowbit
