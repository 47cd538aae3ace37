#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace lowbit {

namespace {

constexpr int kOwnBytes = 5 << 17;  // of a thread's second cache, for what one projection leaves to the next
constexpr int kOwnRows = 48;        // rows that are worth reading all weights for
constexpr int kLeastRows = 16;      // of the last spans, which end the waiting
constexpr int kEven = 48;           // rows of whole blocks, of projections and of attention
constexpr int kSpans = 0;           // the counter of spans
constexpr int kQueryRows = 48;      // queries that share one pass over keys, unless one token has more

}  // namespace

Decoder::Decoder(std::shared_ptr<const ModelSpec> model, std::vector<RopeSpec> ropes, std::shared_ptr<ThreadPool> pool,
                 const Kernels& kernels)
    : model_(std::move(model)), ropes_(std::move(ropes)), pool_(std::move(pool)), kernels_(kernels) {
    const ModelSpec& m = *model_;
    qkv_stride_ = padded(m.query_width() + 2 * m.key_width());
    const auto fit = [&](const MlpSpec& mlp) {
        mlp_stride_ = std::max(mlp_stride_, padded(mlp.gate_up.width));
        hidden_ = std::max({hidden_, mlp.gate_up.cols, mlp.down.cols});
    };
    for (const auto& layer : m.layers) {
        hidden_ = std::max({hidden_, layer->qkv.cols, layer->output.cols});
        if (layer->mlp) fit(*layer->mlp);
        if (!layer->experts) continue;
        for (const auto& expert : layer->experts->experts) fit(*expert);
        experts_ = std::max(experts_, static_cast<int>(layer->experts->experts.size()));
        top_k_ = std::max(top_k_, layer->experts->top_k);
    }
    hidden_ = padded(std::max(hidden_, m.width));
    angles_.resize(ropes_.size());
    query_rows_ = std::max(kQueryRows, m.heads / m.key_heads);
    threads_.resize(pool_->threads());
    for (PerThread& own : threads_) {
        own.row = Buffer<float>(2 * hidden_);
        own.queries = Buffer<float>(static_cast<std::size_t>(query_rows_) * 4 * m.head_dim);
        own.scores = Buffer<float>(attention_memory(query_rows_, m.head_dim));
        own.extremes = Buffer<float>(6 * query_rows_);
        own.first.resize(query_rows_);
        own.last.resize(query_rows_);
    }
}

void Decoder::prepare(int count, int wanted, int longest) {
    const ModelSpec& m = *model_;
    const std::size_t n = count;
    x_.reserve(n * padded(m.width));
    qkv_.reserve(n * qkv_stride_);
    for (std::size_t i = 0; i < ropes_.size(); ++i) angles_[i].reserve(n * 2 * ropes_[i].inverse_frequency.size());
    // Where there are fewer queries than threads can share, the splits are shared too.
    const std::int64_t shares = static_cast<std::int64_t>(query_blocks_.size()) * m.key_heads;
    splits_ = shares < 4 * pool_->threads() ? (longest + kSplit - 1) / kSplit : 1;
    divide_into_spans(count);
    const auto reserve = [&](Scratch& scratch, std::size_t rows) {
        scratch.mlp.reserve(rows * mlp_stride_);
        scratch.added.reserve(rows * padded(m.width));
        scratch.split_out.reserve(rows * splits_ * m.query_width());
        scratch.split_max.reserve(rows * splits_ * m.heads);
        scratch.split_sum.reserve(rows * splits_ * m.heads);
        scratch.normed.reserve(rows * hidden_);
        if (experts_ == 0) return;
        scratch.routing.logits.reserve(rows * padded(experts_));
        scratch.routing.chosen.reserve(rows * top_k_);
        scratch.routing.share.reserve(rows * top_k_);
        scratch.routing.slots.reserve(rows * top_k_);
        scratch.routing.begin.reserve(experts_ + 2);
        scratch.routing.results.reserve(rows * padded(m.width));
    };
    if (spans_.empty()) reserve(shared_, n);
    int longest_span = 0;
    for (const SpanRange& share : spans_) longest_span = std::max(longest_span, share.count);
    if (longest_span > 0) {
        for (PerThread& own : threads_) reserve(own.scratch, longest_span);
    }
    shared_.normed.reserve(static_cast<std::size_t>(wanted) * hidden_);
}

// A thread that takes some tokens through a layer by itself finds what it wrote in its own cache, and waits for others once
// a layer. Wider models leave no room there for enough rows, and their weights would be read too often, as those of experts
// would, of which each is for some tokens only.
void Decoder::divide_into_spans(int count) {
    spans_.clear();
    if (experts_ > 0) return;
    const int threads = pool_->threads();
    const int most = static_cast<int>(std::min<std::int64_t>(kOwnBytes / (std::int64_t{4} * mlp_stride_), 96));
    if (most < kOwnRows || count < threads * kOwnRows) return;
    // From the last tokens, which attend to most, in ever smaller spans: threads end together.
    int end = count;
    std::size_t block = query_blocks_.size();
    while (end > 0) {
        int size = std::clamp(end / (2 * threads), kLeastRows, most);
        if (size > kEven) size -= size % kEven;
        std::size_t from = block;
        int rows = 0;
        while (from > 0 && (rows == 0 || rows + query_blocks_[from - 1].count <= size)) rows += query_blocks_[--from].count;
        spans_.push_back({end - rows, rows, static_cast<int>(from), static_cast<int>(block - from)});
        end -= rows;
        block = from;
    }
}

bool Decoder::forward(const Tokens& tokens, KVCache& cache, float* logits, const std::function<bool()>& interrupted) {
    const ModelSpec& m = *model_;
    query_blocks_.clear();
    const int together = std::max(1, query_rows_ / (m.heads / m.key_heads));
    int longest = 0;
    for (int t = 0; t < tokens.count; ++t) {
        longest = std::max(longest, tokens.position[t] + 1);
        const bool joins = t > 0 && tokens.sequence[t] == tokens.sequence[t - 1] && query_blocks_.back().count < together;
        if (joins) {
            ++query_blocks_.back().count;
        } else {
            query_blocks_.push_back({t, 1});
        }
    }
    prepare(tokens.count, tokens.wanted_count, longest);
    interrupted_ = &interrupted;
    stopped_ = false;
    no_memory_ = false;
    pool_->run([&](Worker& worker) { run(worker, tokens, cache, logits); });
    if (no_memory_) throw std::bad_alloc();
    return !stopped_;
}

// The first worker is the thread that called.
void Decoder::check_interrupt(Worker& worker) {
    if (worker.index() != 0 || stopped_ || !(*interrupted_)()) return;
    stopped_ = true;
    worker.cancel();
}

void Decoder::embed(Worker& worker, const Tokens& tokens) {
    const ModelSpec& m = *model_;
    worker.share(0, tokens.count, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) {
            float* row = x_.data() + t * padded(m.width);
            kernels_.unpack_row(*m.embedding, tokens.ids[t], row);
            if (m.embedding_scale != 1) {
                for (int i = 0; i < m.width; ++i) row[i] *= m.embedding_scale;
            }
            for (std::size_t i = 0; i < ropes_.size(); ++i) {
                const auto& frequencies = ropes_[i].inverse_frequency;
                float* angles = angles_[i].data() + t * 2 * frequencies.size();
                for (std::size_t j = 0; j < frequencies.size(); ++j) {
                    // The angle in float32, as models are trained with it.
                    const float angle = static_cast<float>(tokens.position[t]) * frequencies[j];
                    angles[j] = static_cast<float>(std::cos(static_cast<double>(angle))) * ropes_[i].factor;
                    angles[frequencies.size() + j] =
                        static_cast<float>(std::sin(static_cast<double>(angle))) * ropes_[i].factor;
                }
            }
        }
    });
    worker.barrier();
}

// x += norm(added)
void Decoder::add_normed(const Span& span, const Buffer<float>& norm) {
    const ModelSpec& m = *model_;
    span.worker.share(0, span.count, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            float *x = x_.data() + (span.first + i) * padded(m.width), *added = span.scratch.added.data() + i * padded(m.width);
            if (norm.size() > 0) kernels_.rms_norm(added, norm.data(), m.width, m.epsilon, added);
            for (int k = 0; k < m.width; ++k) x[k] += m.residual_scale * added[k];
        }
    });
    span.worker.barrier();
}

// Row `row` of the residual stream, normed.
const float* Decoder::normed(const Buffer<float>& norm, std::int64_t row, float* out) const {
    const ModelSpec& m = *model_;
    const float* x = x_.data() + row * padded(m.width);
    if (norm.size() == 0) return x;
    kernels_.rms_norm(x, norm.data(), m.width, m.epsilon, out);
    return out;
}

void Decoder::before_attention(const Span& span, int index, const Tokens& tokens, KVCache& cache) {
    const LayerSpec& layer = *model_->layers[index];
    project(span, layer.qkv, [&](int i, float* out) { return normed(layer.attention_norm, span.first + i, out); },
             qkv_.data() + std::int64_t{span.first} * qkv_stride_, qkv_stride_, Gate::none, nullptr, &layer.output);
    rotate_and_append(span, index, tokens, cache);
}

void Decoder::attention_and_after(const Span& span, int index, const Tokens& tokens, KVCache& cache) {
    const ModelSpec& m = *model_;
    const LayerSpec& layer = *m.layers[index];
    const int stride = padded(m.width);
    float* x = x_.data() + std::int64_t{span.first} * stride;
    // Results are added to the residual stream at once, unless something happens to them before.
    const auto at_once = [&](const Buffer<float>& norm) { return norm.size() == 0 && m.residual_scale == 1; };

    attend(span, index, tokens, cache);
    const bool plain = at_once(layer.attention_post_norm);
    const bool rotated = cache.layer(index).values.rotate;
    project(span, layer.output, [&](int i, float* out) { return attended(span, i, rotated, out); }, plain ? x : span.scratch.added.data(),
             stride, Gate::none, plain ? x : nullptr, layer.mlp ? &layer.mlp->gate_up : &layer.experts->router);
    if (!plain) add_normed(span, layer.attention_post_norm);

    const ProjectionSpec* next = index + 1 < static_cast<int>(m.layers.size()) ? &m.layers[index + 1]->qkv : &m.head;
    const auto row = [&](int i, float* out) { return normed(layer.mlp_norm, span.first + i, out); };
    const bool dense = layer.mlp != nullptr, plain_mlp = dense && at_once(layer.mlp_post_norm);
    if (dense) {
        run_mlp(span, *layer.mlp, row, plain_mlp ? x : span.scratch.added.data(), plain_mlp ? x : nullptr, next);
    } else {
        run_experts(span, *layer.experts, row, next);
    }
    if (!plain_mlp) add_normed(span, layer.mlp_post_norm);
}

void Decoder::read_head(Worker& worker, const Tokens& tokens, float* logits) {
    const ModelSpec& m = *model_;
    if (tokens.wanted_count == 0) return;
    const Span span{worker, shared_, 0, tokens.wanted_count, 0, 0};
    project(span, m.head, [&](int i, float* out) { return normed(m.final_norm, tokens.wanted[i], out); }, logits,
             m.vocabulary, Gate::none, nullptr, nullptr);
    if (m.logit_soft_cap == 0 && m.logit_scale == 1) return;
    const std::int64_t total = std::int64_t{tokens.wanted_count} * m.vocabulary;
    worker.share(0, total, 4096, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            float v = logits[i] * m.logit_scale;
            if (m.logit_soft_cap > 0) v = m.logit_soft_cap * std::tanh(v / m.logit_soft_cap);
            logits[i] = v;
        }
    });
    worker.barrier();
}

void Decoder::run(Worker& worker, const Tokens& tokens, KVCache& cache, float* logits) {
    const int layers = static_cast<int>(model_->layers.size());
    // What lies between two layers' attention: keys of all tokens are in the cache before any is looked for.
    const auto stage = [&](const Span& span, int i) {
        if (i > 0) attention_and_after(span, i - 1, tokens, cache);
        if (i < layers) before_attention(span, i, tokens, cache);
    };
    embed(worker, tokens);
    for (int i = 0; i <= layers; ++i) {
        if (spans_.empty()) {
            stage({worker, shared_, 0, tokens.count, 0, static_cast<int>(query_blocks_.size())}, i);
            if (i < layers) complete_groups(worker, i, tokens, cache);
            continue;
        }
        worker.share(kSpans, static_cast<std::int64_t>(spans_.size()), 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t k = begin; k < end; ++k) {
                const SpanRange& share = spans_[k];
                Worker self = worker.alone();
                stage({self, threads_[worker.index()].scratch, share.first, share.count, share.first_block, share.blocks}, i);
            }
        });
        worker.barrier();
        if (i < layers) complete_groups(worker, i, tokens, cache);
    }
    read_head(worker, tokens, logits);
}

}  // namespace lowbit
