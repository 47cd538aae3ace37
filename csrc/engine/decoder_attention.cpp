// The part of a decoder that looks at other tokens: rotations, the cache, attention in splits.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include "engine/decoder.h"

namespace lowbit {

namespace {

// Sums of exp(score - maximum): times values, and alone.
template <class T>
struct Attended {
    T* out;
    T *maximum, *sum;
};

// Adds a split to what was attended before it. Every split of every sequence goes through here, in order, whoever computed
// it, so that logits depend neither on the other sequences of a batch nor on the number of threads. Not inlined: two copies
// might be compiled to different roundings.
[[gnu::noinline]] void join(const Attended<float>& to, const Attended<const float>& split, int head_dim) {
    if (*split.sum == 0) return;
    if (*to.sum == 0) {
        std::memcpy(to.out, split.out, sizeof(float) * head_dim);
        *to.maximum = *split.maximum;
        *to.sum = *split.sum;
        return;
    }
    const float highest = std::max(*to.maximum, *split.maximum);
    const float old = std::exp(*to.maximum - highest), more = std::exp(*split.maximum - highest);
    for (int d = 0; d < head_dim; ++d) to.out[d] = old * to.out[d] + more * split.out[d];
    *to.sum = old * *to.sum + more * *split.sum;
    *to.maximum = highest;
}

}  // namespace

void Decoder::rotate(const RopeSpec& rope, const float* angles, float* head) const {
    const int half = static_cast<int>(rope.inverse_frequency.size());
    if (!rope.interleaved) return kernels_.rotate(head, angles, half);
    for (int i = 0; i < half; ++i) {
        float &a = head[2 * i], &b = head[2 * i + 1];
        const float before = a;
        a = before * angles[i] - b * angles[half + i];
        b = b * angles[i] + before * angles[half + i];
    }
}

// Norms that weigh the queries of all heads as one row, and the keys. A single head is left to `rotate_and_append`.
void Decoder::norm_together(const Span& span, const LayerSpec& layer) {
    const ModelSpec& m = *model_;
    const auto wide = [&](const Buffer<float>& norm) { return static_cast<int>(norm.size()) > m.head_dim; };
    if (!wide(layer.query_norm) && !wide(layer.key_norm)) return;
    span.worker.share(1, std::int64_t{span.count} * 2, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const bool keys = i % 2 == 1;
            float* row = qkv_.data() + (span.first + i / 2) * qkv_stride_ + (keys ? m.query_width() : 0);
            const Buffer<float>& norm = keys ? layer.key_norm : layer.query_norm;
            if (wide(norm)) kernels_.rms_norm(row, norm.data(), static_cast<int>(norm.size()), m.epsilon, row);
        }
    });
    span.worker.barrier();
}

void Decoder::rotate_and_append(const Span& span, int index, const Tokens& tokens, KVCache& cache) {
    const ModelSpec& m = *model_;
    const LayerSpec& layer = *m.layers[index];
    AttentionShape shape;
    shape.head_dim = m.head_dim;
    shape.format = cache.format();
    const int heads = m.heads + m.key_heads;
    norm_together(span, layer);
    span.worker.share(0, std::int64_t{span.count} * heads, span.count == 1 ? 2 : heads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t t = span.first + i / heads;
            const int h = static_cast<int>(i % heads), key_head = h - m.heads;
            float* head = qkv_.data() + t * qkv_stride_ + h * m.head_dim;
            const Buffer<float>& norm = key_head < 0 ? layer.query_norm : layer.key_norm;
            if (static_cast<int>(norm.size()) == m.head_dim) kernels_.rms_norm(head, norm.data(), m.head_dim, m.epsilon, head);
            if (layer.rope >= 0) {
                const RopeSpec& rope = ropes_[layer.rope];
                rotate(rope, angles_[layer.rope].data() + t * 2 * rope.inverse_frequency.size(), head);
            }
            if (key_head >= 0) {
                const float* value = qkv_.data() + t * qkv_stride_ + (m.heads + m.key_heads + key_head) * m.head_dim;
                const auto append = [&] {
                    return kernels_.append(shape, cache.at(index, tokens.sequence[t], key_head), head, value, tokens.position[t]);
                };
                if (!append() && !(cache.add_halves() && append())) no_memory_.store(true, std::memory_order_relaxed);
            }
        }
    });
    span.worker.barrier();
}

void Decoder::attend(const Span& span, int index, const Tokens& tokens, KVCache& cache) {
    const ModelSpec& m = *model_;
    const LayerSpec& layer = *m.layers[index];
    PerThread& own = threads_[span.worker.index()];
    Scratch& scratch = span.scratch;
    AttentionShape shape;
    shape.head_dim = m.head_dim;
    shape.group = m.heads / m.key_heads;
    shape.scale = m.attention_scale;
    shape.soft_cap = m.attention_soft_cap;
    shape.format = cache.format();
    const auto first_of = [&](int t) { return layer.window > 0 ? std::max(0, tokens.position[t] + 1 - layer.window) : 0; };
    const std::int64_t shares = std::int64_t{span.blocks} * m.key_heads * splits_;
    span.worker.share(1, shares, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t share = begin; share < end; ++share) {
            const int own_split = static_cast<int>(share % splits_), key_head = static_cast<int>(share / splits_ % m.key_heads);
            const QueryBlock& block = query_blocks_[span.first_block + share / splits_ / m.key_heads];
            const int rows = block.count * shape.group;
            float* q = own.queries.data();
            float *out = q + query_rows_ * m.head_dim, *split = out + query_rows_ * m.head_dim;
            float *maximum = own.extremes.data(), *sum = maximum + query_rows_;
            float *split_maximum = sum + query_rows_, *split_sum = split_maximum + query_rows_;
            int begin_of_all = INT_MAX, end_of_all = 0;
            for (int r = 0; r < rows; ++r) {
                const int t = block.token + r / shape.group, h = key_head * shape.group + r % shape.group;
                std::memcpy(q + r * m.head_dim, qkv_.data() + std::int64_t{t} * qkv_stride_ + h * m.head_dim,
                            sizeof(float) * m.head_dim);
                end_of_all = std::max(end_of_all, tokens.position[t] + 1);
                begin_of_all = std::min(begin_of_all, first_of(t));
            }
            const bool shared = splits_ > 1;
            const int s0 = shared ? own_split : begin_of_all / kSplit, s1 = shared ? own_split : (end_of_all - 1) / kSplit;
            for (int s = s0; s <= s1; ++s) {
                for (int r = 0; r < rows; ++r) {
                    const int t = block.token + r / shape.group;
                    own.first[r] = std::max(first_of(t), s * kSplit);
                    own.last[r] = std::min(tokens.position[t] + 1, (s + 1) * kSplit);
                }
                const bool first = s == s0;  // of these: nothing to join it to
                kernels_.attend(shape, cache.at(index, tokens.sequence[block.token], key_head), q, rows, own.first.data(),
                                own.last.data(), first ? out : split, first ? maximum : split_maximum,
                                first ? sum : split_sum, own.scores.data());
                for (int r = 0; r < rows && !first; ++r) {
                    join({out + r * m.head_dim, maximum + r, sum + r},
                         {split + r * m.head_dim, split_maximum + r, split_sum + r}, m.head_dim);
                }
            }
            for (int r = 0; r < rows; ++r) {
                const int t = block.token + r / shape.group, h = key_head * shape.group + r % shape.group;
                const std::int64_t at = (std::int64_t{t - span.first} * splits_ + own_split) * m.heads + h;
                std::memcpy(scratch.split_out.data() + at * m.head_dim, out + r * m.head_dim, sizeof(float) * m.head_dim);
                scratch.split_max[at] = maximum[r];
                scratch.split_sum[at] = sum[r];
            }
        }
    });
    span.worker.barrier();
}

// What all heads of a token attended to, its splits joined: out [heads, head_dim].
const float* Decoder::attended(const Span& span, int row, float* out) const {
    const ModelSpec& m = *model_;
    const Scratch& scratch = span.scratch;
    for (int h = 0; h < m.heads; ++h) {
        float* head = out + h * m.head_dim;
        float maximum = 0, sum = 0;
        for (int s = 0; s < splits_; ++s) {
            const std::int64_t at = (std::int64_t{row} * splits_ + s) * m.heads + h;
            join({head, &maximum, &sum},
                 {scratch.split_out.data() + at * m.head_dim, &scratch.split_max[at], &scratch.split_sum[at]}, m.head_dim);
        }
        for (int d = 0; d < m.head_dim; ++d) head[d] /= sum;
    }
    return out;
}

}  // namespace lowbit
