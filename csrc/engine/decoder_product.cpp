// Products of a decoder: rows are rounded once for all weights that want them alike, then shared among threads.
#include <algorithm>
#include <cstring>

#include "core/prefetch.h"
#include "engine/decoder.h"

namespace lowbit {

namespace {

constexpr int kRowBlock = 96;       // rows of activations that stay in the second cache
constexpr int kAhead = 8192;        // bytes of a weight that are fetched before they are needed

std::int64_t pairs_of(const Linear& w) { return (w.tiles() + 1) / 2; }

// Where this member begins with the weight: memory works while it waits for the others and prepares its row.
void fetch_ahead(const Linear& w, const Member& member) {
    const std::uint8_t* from = w.tile(static_cast<int>(2 * member.own_begin(pairs_of(w))));
    const std::uint8_t* end = w.data.data() + w.data.bytes();
    for (int i = 0; i < kAhead && from + i < end; i += 64) prefetch(from + i);
}

}  // namespace

void RowsBuffer::shape(const Linear& weight, int planes, int count) {
    rows.count = count;
    rows.planes = planes;
    rows.padded_cols = weight.padded_cols;
    rows.zero = weight.zero > 0 ? weight.zero : 1;
    rows.segment = weight.segment;
    rows.segments = weight.segment > 0 ? weight.padded_cols / weight.segment : 0;
    const std::size_t segments = static_cast<std::size_t>(count) * rows.segments;
    for (int plane = 0; plane < planes; ++plane) {
        q[plane].reserve(static_cast<std::size_t>(count) * weight.padded_cols);
        start[plane].reserve(segments);
        rows.q[plane] = q[plane].data();
        rows.start[plane] = start[plane].data();
        if (planes == 1) continue;
        rest[plane].reserve(static_cast<std::size_t>(count) * weight.padded_cols);
        rest_start[plane].reserve(segments);
        rows.rest[plane] = rest[plane].data();
        rows.rest_start[plane] = rest_start[plane].data();
    }
    scale.reserve(segments);
    total.reserve(segments);
    rows.scale = scale.data();
    rows.total = total.data();
    if (planes == 1) return;
    rest_scale.reserve(segments);
    spread.reserve(count);
    rows.rest_scale = rest_scale.data();
    rows.spread = spread.data();
}

// y = product of what row(i, scratch) gives for each of `count` rows. One row is prepared by every thread for itself,
// which is cheaper than waiting for another; several are shared. Ends at a barrier. next: the product after this.
void Decoder::multiply(const Span& span, const ProjectionSpec& product, const RowSource& row, float* y, std::int64_t stride,
                       Gate gate, const float* residual, const ProjectionSpec* next) {
    Member& member = span.member;
    Own& own = own_[member.index()];
    const int count = span.count;
    const bool alone = count == 1;
    std::vector<RowsBuffer>& buffers = alone ? own.rows : span.scratch.rows;
    // Parts that round their input alike share it.
    const std::size_t parts = product.parts.size();
    std::size_t kind_of[8], representative[8], kinds = 0;
    for (std::size_t i = 0; i < parts; ++i) {
        const PartSpec& part = *product.parts[i];
        std::size_t kind = 0;
        for (; kind < kinds; ++kind) {
            const PartSpec& other = *product.parts[representative[kind]];
            if (other.weight->segment == part.weight->segment && other.weight->padded_cols == part.weight->padded_cols &&
                other.weight->zero == part.weight->zero && other.activations == part.activations)
                break;
        }
        if (kind == kinds) representative[kinds++] = i;
        kind_of[i] = kind;
    }
    if (alone || member.count() == 1 || member.index() == 0) {
        if (buffers.size() < kinds) buffers.resize(kinds);
        for (std::size_t kind = 0; kind < kinds; ++kind) {
            const PartSpec& part = *product.parts[representative[kind]];
            buffers[kind].shape(*part.weight, part.activations.bits == 8 ? 1 : 2, count);
        }
    }
    if (!alone) member.barrier();

    const bool keeps = std::any_of(product.parts.begin(), product.parts.end(),
                                   [](const auto& part) { return is_float(part->weight->code); });
    const auto prepare_row = [&](std::int64_t i, float* scratch, float* kept) {
        const float* values = row.get(row.self, static_cast<int>(i), scratch);
        if (keeps && values != kept) std::memcpy(kept, values, sizeof(float) * product.cols);
        for (std::size_t kind = 0; kind < kinds; ++kind) {
            const PartSpec& part = *product.parts[representative[kind]];
            if (is_float(part.weight->code)) continue;
            const float* from = values;
            if (!part.activations.divisor.empty()) {
                float* divided = scratch + hidden_;
                for (int k = 0; k < product.cols; ++k) divided[k] = values[k] / part.activations.divisor[k];
                from = divided;
            }
            kernels_.quantize(from, product.cols, buffers[kind].rows, static_cast<int>(i), part.activations.static_scale,
                              part.activations.per_token);
        }
    };
    const float* values = own.row.data();
    if (alone) {
        prepare_row(0, own.row.data(), own.row.data());
    } else {
        member.share(0, count, 4, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) prepare_row(i, own.row.data(), span.scratch.normed.data() + i * hidden_);
        });
        member.barrier();
        values = span.scratch.normed.data();
    }

    const int blocks = (count + kRowBlock - 1) / kRowBlock;
    for (std::size_t i = 0; i < parts; ++i) {
        const PartSpec& part = *product.parts[i];
        const Linear& w = *part.weight;
        Rows rows = buffers[kind_of[i]].rows;
        rows.values = values;
        rows.stride = hidden_;
        Epilogue e;
        e.bias = part.bias.size() > 0 ? part.bias.data() : nullptr;
        e.residual = residual != nullptr ? residual + part.offset : nullptr;
        e.gate = gate;
        const std::int64_t pairs = pairs_of(w);
        const auto run = [&](std::int64_t first, std::int64_t last, int m0, int m1) {
            const int t0 = static_cast<int>(2 * first), t1 = std::min(static_cast<int>(2 * last), w.tiles());
            kernels_.linear(w, rows, m0, m1, t0, t1, e, y + part.offset, stride);
            if (!part.residual) return;
            Epilogue more;
            more.residual = y + part.offset;
            kernels_.linear(*part.residual, rows, m0, m1, t0, t1, more, y + part.offset, stride);
        };
        // A loop has a counter of its own until the next barrier; a product has at most three parts.
        const int counter = 1 + static_cast<int>(i) % 3;
        // Enough shares for threads of different speed, few enough that weights are read in long pieces.
        const std::int64_t grain = std::clamp<std::int64_t>(pairs / (4 * member.count()), 1, 16);
        if (alone) {
            member.share_in_runs(counter, pairs, std::max<std::int64_t>(grain / 2, 1),
                                 [&](std::int64_t first, std::int64_t last) { run(first, last, 0, 1); });
            continue;
        }
        const std::int64_t groups = (pairs + grain - 1) / grain;
        member.share(counter, groups * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
            look(member);
            for (std::int64_t share = begin; share < end; ++share) {
                const std::int64_t first = share / blocks * grain;
                const int m0 = static_cast<int>(share % blocks) * kRowBlock;
                run(first, std::min(first + grain, pairs), m0, std::min(m0 + kRowBlock, count));
            }
        });
    }
    if (alone && next != nullptr) fetch_ahead(*next->parts.front()->weight, member);
    member.barrier();
}

}  // namespace lowbit
