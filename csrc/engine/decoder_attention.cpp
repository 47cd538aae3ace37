// The part of a decoder that looks at other tokens: rotations, the cache, attention in splits.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <utility>

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
    const KVLayer& how = cache.layer(index);
    const AttentionShape shape = shape_of(index, how.keys, how.values), exact = shape_of(index, {}, {});
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
            if (how.keys.rotate) kernels_.hadamard(head, m.head_dim);
            if (key_head < 0) continue;
            float* value = qkv_.data() + t * qkv_stride_ + (m.heads + m.key_heads + key_head) * m.head_dim;
            if (how.values.rotate) kernels_.hadamard(value, m.head_dim);
            const int position = tokens.position[t], sequence = tokens.sequence[t];
            const auto append = [&] { return kernels_.append(shape, cache.at(index, sequence, key_head), head, value, position); };
            if (!append() && !(cache.add_halves() && append())) no_memory_.store(true, std::memory_order_relaxed);
            if (!how.exact_beside()) continue;
            const KeyValues beside = cache.exact_at(index, sequence, key_head);
            if (position < how.sinks) kernels_.append(exact, beside, head, value, position);
            if (how.has_recent()) kernels_.append(exact, beside, head, value, cache.ring_at(index, position));
        }
    });
    span.worker.barrier();
}

// Stores the groups of tokens that share scales and whose last one is among these.
void Decoder::complete_groups(Worker& worker, int index, const Tokens& tokens, KVCache& cache) {
    const KVLayer& how = cache.layer(index);
    if (how.tokens() == 1) return;
    const ModelSpec& m = *model_;
    worker.share(1, std::int64_t{tokens.count} * m.key_heads, m.key_heads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const int t = static_cast<int>(i / m.key_heads), key_head = static_cast<int>(i % m.key_heads);
            const int last = tokens.position[t], sequence = tokens.sequence[t];
            const auto complete = [&](const KVSide& keys, const KVSide& values, int count) {
                if (count == 1 || (last + 1) % count != 0) return;
                const int first = last + 1 - count;
                kernels_.complete(shape_of(index, keys, values), cache.at(index, sequence, key_head),
                                  cache.exact_at(index, sequence, key_head), cache.ring_at(index, first), first);
            };
            complete(how.keys, {}, how.keys.tokens);
            complete({}, how.values, how.values.tokens);
        }
    });
    worker.barrier();
}

AttentionShape Decoder::shape_of(int, const KVSide& keys, const KVSide& values) const {
    const ModelSpec& m = *model_;
    return {m.head_dim, m.heads / m.key_heads, m.attention_scale, m.attention_soft_cap, keys, values};
}

// One split for the queries of a block, which lie in `own.queries`: positions as they are stored, and those that a query reads
// exactly, each by itself and joined in the order of positions.
void Decoder::attend_split(const QueryBlock& block, int key_head, int split, int index, const Tokens& tokens, KVCache& cache,
                           PerThread& own, float* out, float* maximum, float* sum) {
    const ModelSpec& m = *model_;
    const LayerSpec& layer = *m.layers[index];
    const KVLayer& how = cache.layer(index);
    const int group = m.heads / m.key_heads, rows = block.count * group, sequence = tokens.sequence[block.token];
    float *q = own.queries.data(), *part = q + 3 * query_rows_ * m.head_dim;
    float *part_maximum = own.extremes.data() + 4 * query_rows_, *part_sum = part_maximum + query_rows_;
    bool any = false;
    // range(position): what a query there sees of this part; back: from positions to those of the store.
    const auto attend_part = [&](const AttentionShape& shape, const KeyValues& kv, int back, const auto& range) {
        int lowest = INT_MAX;
        for (int r = 0; r < rows; ++r) {
            const int position = tokens.position[block.token + r / group];
            const int first = layer.window > 0 ? std::max(0, position + 1 - layer.window) : 0;
            const auto [from, to] = range(position, std::max(first, split * kSplit), std::min(position + 1, (split + 1) * kSplit));
            own.first[r] = from - back;
            own.last[r] = to - back;
            if (from < to) lowest = std::min(lowest, from - back);
        }
        if (lowest == INT_MAX) return;
        for (int r = 0; r < rows; ++r) {  // that see nothing of it: blocks are counted from the first that some query sees
            if (own.first[r] >= own.last[r]) own.first[r] = own.last[r] = lowest;
        }
        kernels_.attend(shape, kv, q, rows, own.first.data(), own.last.data(), any ? part : out, any ? part_maximum : maximum,
                        any ? part_sum : sum, own.scores.data());
        for (int r = 0; r < rows && any; ++r)
            join({out + r * m.head_dim, maximum + r, sum + r}, {part + r * m.head_dim, part_maximum + r, part_sum + r}, m.head_dim);
        any = true;
    };
    using Range = std::pair<int, int>;
    const AttentionShape stored = shape_of(index, how.keys, how.values);
    if (!how.exact_beside()) {
        attend_part(stored, cache.at(index, sequence, key_head), 0, [](int, int from, int to) { return Range(from, to); });
    } else {
        const AttentionShape shape = shape_of(index, {}, {});
        const KeyValues exact = cache.exact_at(index, sequence, key_head);
        const auto recent = [&](int position) { return std::max(how.sinks, how.has_recent() ? how.first_recent(position) : position + 1); };
        if (split * kSplit < how.sinks)
            attend_part(shape, exact, 0, [&](int, int from, int to) { return Range(from, std::min(to, how.sinks)); });
        attend_part(stored, cache.at(index, sequence, key_head), 0,
                    [&](int position, int from, int to) { return Range(std::max(from, how.sinks), std::min(to, recent(position))); });
        if (how.has_recent()) {
            const int ring = cache.ring(index);
            const int first = std::max(split * kSplit, recent(tokens.position[block.token]));
            const int last = std::min((split + 1) * kSplit, tokens.position[block.token + block.count - 1] + 1);
            for (int turn = first / ring; turn * ring < last; ++turn) {
                attend_part(shape, exact, turn * ring - cache.sinks(index), [&](int position, int from, int to) {
                    return Range(std::max({from, recent(position), turn * ring}), std::min(to, (turn + 1) * ring));
                });
            }
        }
    }
    if (any) return;
    std::fill(out, out + static_cast<std::size_t>(rows) * m.head_dim, 0.0f);
    std::fill(maximum, maximum + rows, 0.0f);
    std::fill(sum, sum + rows, 0.0f);
}

void Decoder::attend(const Span& span, int index, const Tokens& tokens, KVCache& cache) {
    const ModelSpec& m = *model_;
    const LayerSpec& layer = *m.layers[index];
    PerThread& own = threads_[span.worker.index()];
    Scratch& scratch = span.scratch;
    const int group = m.heads / m.key_heads;
    const auto first_of = [&](int t) { return layer.window > 0 ? std::max(0, tokens.position[t] + 1 - layer.window) : 0; };
    const std::int64_t shares = std::int64_t{span.blocks} * m.key_heads * splits_;
    span.worker.share(1, shares, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t share = begin; share < end; ++share) {
            const int own_split = static_cast<int>(share % splits_), key_head = static_cast<int>(share / splits_ % m.key_heads);
            const QueryBlock& block = query_blocks_[span.first_block + share / splits_ / m.key_heads];
            const int rows = block.count * group;
            float* q = own.queries.data();
            float *out = q + query_rows_ * m.head_dim, *split = out + query_rows_ * m.head_dim;
            float *maximum = own.extremes.data(), *sum = maximum + query_rows_;
            float *split_maximum = sum + query_rows_, *split_sum = split_maximum + query_rows_;
            int begin_of_all = INT_MAX, end_of_all = 0;
            for (int r = 0; r < rows; ++r) {
                const int t = block.token + r / group, h = key_head * group + r % group;
                std::memcpy(q + r * m.head_dim, qkv_.data() + std::int64_t{t} * qkv_stride_ + h * m.head_dim,
                            sizeof(float) * m.head_dim);
                end_of_all = std::max(end_of_all, tokens.position[t] + 1);
                begin_of_all = std::min(begin_of_all, first_of(t));
            }
            const bool shared = splits_ > 1;
            const int s0 = shared ? own_split : begin_of_all / kSplit, s1 = shared ? own_split : (end_of_all - 1) / kSplit;
            for (int s = s0; s <= s1; ++s) {
                const bool first = s == s0;  // of these: nothing to join it to
                attend_split(block, key_head, s, index, tokens, cache, own, first ? out : split, first ? maximum : split_maximum,
                             first ? sum : split_sum);
                for (int r = 0; r < rows && !first; ++r) {
                    join({out + r * m.head_dim, maximum + r, sum + r},
                         {split + r * m.head_dim, split_maximum + r, split_sum + r}, m.head_dim);
                }
            }
            for (int r = 0; r < rows; ++r) {
                const int t = block.token + r / group, h = key_head * group + r % group;
                const std::int64_t at = (std::int64_t{t - span.first} * splits_ + own_split) * m.heads + h;
                std::memcpy(scratch.split_out.data() + at * m.head_dim, out + r * m.head_dim, sizeof(float) * m.head_dim);
                scratch.split_max[at] = maximum[r];
                scratch.split_sum[at] = sum[r];
            }
        }
    });
    span.worker.barrier();
}

// What all heads of a token attended to, its splits joined: out [heads, head_dim]. rotated: whether values were, and are turned back.
const float* Decoder::attended(const Span& span, int row, bool rotated, float* out) const {
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
        if (rotated) kernels_.hadamard(head, m.head_dim);
    }
    return out;
}

}  // namespace lowbit
