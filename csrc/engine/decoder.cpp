#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/prefetch.h"

namespace lowbit {

namespace {

constexpr int kRowBlock = 96;       // rows of activations that stay in the second cache
constexpr int kAhead = 8192;        // bytes of a weight that are fetched before they are needed
constexpr int kQueryRows = 48;      // queries that share one pass over keys, unless one token has more

// Columns of padded results: whole tiles, so that rows begin at cache lines.
int padded(int width) { return (width + kTile - 1) / kTile * kTile; }

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
    rows.segment = weight.segment;
    rows.segments = weight.segment > 0 ? weight.padded_cols / weight.segment : 0;
    const std::size_t segments = static_cast<std::size_t>(count) * rows.segments;
    for (int plane = 0; plane < planes; ++plane) {
        q[plane].reserve(static_cast<std::size_t>(count) * weight.padded_cols);
        minus[plane].reserve(segments);
        rows.q[plane] = q[plane].data();
        rows.minus[plane] = minus[plane].data();
    }
    scale.reserve(segments);
    total.reserve(segments);
    rows.scale = scale.data();
    rows.total = total.data();
}

Decoder::Decoder(std::shared_ptr<const Model> model, std::shared_ptr<Pool> pool, const Kernels& kernels)
    : model_(std::move(model)), pool_(std::move(pool)), kernels_(kernels) {
    const Model& m = *model_;
    qkv_width_ = padded(m.query_width() + 2 * m.key_width());
    for (const Layer& layer : m.layers) {
        mlp_columns_ = std::max(mlp_columns_, padded(layer.gate_up.width));
        hidden_ = std::max({hidden_, layer.qkv.cols, layer.output.cols, layer.gate_up.cols, layer.down.cols});
    }
    hidden_ = padded(std::max(hidden_, m.width));
    angles_.resize(m.ropes.size());
    query_rows_ = std::max(kQueryRows, m.heads / m.key_heads);
    own_.resize(pool_->threads());
    for (Own& own : own_) {
        own.row = Buffer<float>(2 * hidden_);
        own.queries = Buffer<float>(static_cast<std::size_t>(query_rows_) * 3 * m.head_dim);
        own.scores = Buffer<float>(6 * 64);
        own.extremes = Buffer<float>(4 * query_rows_);
        own.first.resize(query_rows_);
        own.last.resize(query_rows_);
    }
}

void Decoder::prepare(int count, int wanted, int longest) {
    const Model& m = *model_;
    const std::size_t n = count;
    x_.reserve(n * padded(m.width));
    qkv_.reserve(n * qkv_width_);
    mlp_.reserve(n * mlp_columns_);
    added_.reserve(n * padded(m.width));
    normed_.reserve(std::max<std::size_t>(n, wanted) * hidden_);
    for (std::size_t i = 0; i < m.ropes.size(); ++i) angles_[i].reserve(n * 2 * m.ropes[i].inverse_frequency.size());
    // Where there are fewer queries than threads can share, the pieces are shared too.
    const std::int64_t shares = static_cast<std::int64_t>(items_.size()) * m.key_heads;
    chunks_ = shares < 4 * pool_->threads() ? (longest + kPiece - 1) / kPiece : 1;
    part_out_.reserve(n * chunks_ * m.query_width());
    part_max_.reserve(n * chunks_ * m.heads);
    part_sum_.reserve(n * chunks_ * m.heads);
}

void Decoder::forward(const Tokens& tokens, Cache& cache, float* logits) {
    const Model& m = *model_;
    items_.clear();
    const int together = std::max(1, query_rows_ / (m.heads / m.key_heads));
    int longest = 0;
    for (int t = 0; t < tokens.count; ++t) {
        longest = std::max(longest, tokens.position[t] + 1);
        const bool joins = t > 0 && tokens.sequence[t] == tokens.sequence[t - 1] && items_.back().count < together;
        if (joins) {
            ++items_.back().count;
        } else {
            items_.push_back({t, 1});
        }
    }
    prepare(tokens.count, tokens.wanted_count, longest);
    pool_->run([&](Member& member) { run(member, tokens, cache, logits); });
}

void Decoder::embed(Member& member, const Tokens& tokens) {
    const Model& m = *model_;
    member.share(0, tokens.count, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) {
            float* row = x_.data() + t * padded(m.width);
            kernels_.unpack_row(*m.embedding, tokens.ids[t], row);
            if (m.embedding_scale != 1) {
                for (int i = 0; i < m.width; ++i) row[i] *= m.embedding_scale;
            }
            for (std::size_t i = 0; i < m.ropes.size(); ++i) {
                const auto& frequencies = m.ropes[i].inverse_frequency;
                float* angles = angles_[i].data() + t * 2 * frequencies.size();
                for (std::size_t j = 0; j < frequencies.size(); ++j) {
                    // The angle in float32, as models are trained with it.
                    const float angle = static_cast<float>(tokens.position[t]) * frequencies[j];
                    angles[j] = static_cast<float>(std::cos(static_cast<double>(angle))) * m.ropes[i].factor;
                    angles[frequencies.size() + j] =
                        static_cast<float>(std::sin(static_cast<double>(angle))) * m.ropes[i].factor;
                }
            }
        }
    });
    member.barrier();
}

// y = product of what row(i, scratch) gives for each of `count` rows. One row is prepared by every thread for itself,
// which is cheaper than waiting for another; several are shared. Ends at a barrier. next: the product after this.
template <class Row>
void Decoder::multiply(Member& member, const Product& product, int count, const Row& row, float* y,
                       std::int64_t stride, Gate gate, const float* residual, const Product* next) {
    Own& own = own_[member.index()];
    const bool alone = count == 1;
    std::vector<RowsBuffer>& buffers = alone ? own.rows : shared_;
    // Parts that round their input alike share it.
    const std::size_t parts = product.parts.size();
    std::size_t kind_of[8], representative[8], kinds = 0;
    for (std::size_t i = 0; i < parts; ++i) {
        const Part& part = product.parts[i];
        std::size_t kind = 0;
        for (; kind < kinds; ++kind) {
            const Part& other = product.parts[representative[kind]];
            if (other.weight->segment == part.weight->segment && other.weight->padded_cols == part.weight->padded_cols &&
                other.input == part.input)
                break;
        }
        if (kind == kinds) representative[kinds++] = i;
        kind_of[i] = kind;
    }
    if (alone || member.index() == 0) {
        if (buffers.size() < kinds) buffers.resize(kinds);
        for (std::size_t kind = 0; kind < kinds; ++kind) {
            const Part& part = product.parts[representative[kind]];
            buffers[kind].shape(*part.weight, part.input.planes, count);
        }
    }
    if (!alone) member.barrier();

    const bool keeps = std::any_of(product.parts.begin(), product.parts.end(),
                                   [](const Part& part) { return is_float(part.weight->code); });
    const auto prepare_row = [&](std::int64_t i, float* scratch, float* kept) {
        const float* values = row(static_cast<int>(i), scratch);
        if (keeps && values != kept) std::memcpy(kept, values, sizeof(float) * product.cols);
        for (std::size_t kind = 0; kind < kinds; ++kind) {
            const Part& part = product.parts[representative[kind]];
            if (is_float(part.weight->code)) continue;
            const float* from = values;
            if (!part.input.divisor.empty()) {
                float* divided = scratch + hidden_;
                for (int k = 0; k < product.cols; ++k) divided[k] = values[k] / part.input.divisor[k];
                from = divided;
            }
            kernels_.quantize(from, product.cols, buffers[kind].rows, static_cast<int>(i), part.input.fixed,
                              part.input.whole);
        }
    };
    const float* values = own.row.data();
    if (alone) {
        prepare_row(0, own.row.data(), own.row.data());
    } else {
        member.share(0, count, 4, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) prepare_row(i, own.row.data(), normed_.data() + i * hidden_);
        });
        member.barrier();
        values = normed_.data();
    }

    const int blocks = (count + kRowBlock - 1) / kRowBlock;
    for (std::size_t i = 0; i < parts; ++i) {
        const Part& part = product.parts[i];
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
            if (!part.rest) return;
            Epilogue more;
            more.residual = y + part.offset;
            kernels_.linear(*part.rest, rows, m0, m1, t0, t1, more, y + part.offset, stride);
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
            for (std::int64_t share = begin; share < end; ++share) {
                const std::int64_t first = share / blocks * grain;
                const int m0 = static_cast<int>(share % blocks) * kRowBlock;
                run(first, std::min(first + grain, pairs), m0, std::min(m0 + kRowBlock, count));
            }
        });
    }
    if (alone && next != nullptr) fetch_ahead(*next->parts.front().weight, member);
    member.barrier();
}

// x += norm(added)
void Decoder::add_normed(Member& member, int count, const Buffer<float>& norm) {
    const Model& m = *model_;
    member.share(0, count, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) {
            float *x = x_.data() + t * padded(m.width), *added = added_.data() + t * padded(m.width);
            if (norm.size() > 0) kernels_.rms_norm(added, norm.data(), m.width, m.epsilon, added);
            for (int i = 0; i < m.width; ++i) x[i] += m.residual_scale * added[i];
        }
    });
    member.barrier();
}

void Decoder::run(Member& member, const Tokens& tokens, Cache& cache, float* logits) {
    const Model& m = *model_;
    const int count = tokens.count, stride = padded(m.width);
    const auto normed = [&](const Buffer<float>& norm) {
        return [this, &m, &norm, stride](int i, float* scratch) -> const float* {
            const float* x = x_.data() + std::int64_t{i} * stride;
            if (norm.size() == 0) return x;
            kernels_.rms_norm(x, norm.data(), m.width, m.epsilon, scratch);
            return scratch;
        };
    };
    // Added to the residual stream at once, unless something happens to it before.
    const auto add = [&](const Product& product, const Buffer<float>& norm, const auto& row, const Product* next) {
        const bool plain = norm.size() == 0 && m.residual_scale == 1;
        multiply(member, product, count, row, plain ? x_.data() : added_.data(), stride, Gate::none,
                 plain ? x_.data() : nullptr, next);
        if (!plain) add_normed(member, count, norm);
    };

    embed(member, tokens);
    for (std::size_t i = 0; i < m.layers.size(); ++i) {
        const Layer& layer = m.layers[i];
        multiply(member, layer.qkv, count, normed(layer.attention_norm), qkv_.data(), qkv_width_, Gate::none, nullptr,
                 &layer.output);
        rotate_and_append(member, layer, static_cast<int>(i), tokens, cache);
        attend(member, layer, static_cast<int>(i), tokens, cache);
        add(layer.output, layer.attention_post_norm, [this](int t, float* scratch) { return attended(t, scratch); },
            &layer.gate_up);

        multiply(member, layer.gate_up, count, normed(layer.mlp_norm), mlp_.data(), mlp_columns_, m.gate, nullptr,
                 &layer.down);
        const bool paired = layer.gate_up.parts.size() == 1;
        add(layer.down, layer.mlp_post_norm, [&](int t, float* scratch) -> const float* {
            const float* row = mlp_.data() + std::int64_t{t} * mlp_columns_;
            if (paired) return row;
            std::memcpy(scratch, row, sizeof(float) * layer.down.cols);
            kernels_.gate(m.gate, scratch, row + layer.gate_up.parts[1].offset, layer.down.cols);
            return scratch;
        }, i + 1 < m.layers.size() ? &m.layers[i + 1].qkv : &m.head);
    }
    if (tokens.wanted_count == 0) return;
    const auto last = normed(m.final_norm);
    multiply(member, m.head, tokens.wanted_count, [&](int i, float* scratch) { return last(tokens.wanted[i], scratch); },
             logits, m.vocabulary, Gate::none, nullptr, nullptr);
    if (m.logit_soft_cap > 0 || m.logit_scale != 1) {
        const std::int64_t total = std::int64_t{tokens.wanted_count} * m.vocabulary;
        member.share(0, total, 4096, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) {
                float v = logits[i] * m.logit_scale;
                if (m.logit_soft_cap > 0) v = m.logit_soft_cap * std::tanh(v / m.logit_soft_cap);
                logits[i] = v;
            }
        });
        member.barrier();
    }
}

}  // namespace lowbit
