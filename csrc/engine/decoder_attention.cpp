// The part of a decoder that looks at other tokens: rotations, the cache, attention in pieces.
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

// Adds a piece to what was attended before it. Every piece of every sequence goes through here, in order, whoever computed
// it, so that logits depend neither on the other sequences of a batch nor on the number of threads. Not inlined: two copies
// might be compiled to different roundings.
[[gnu::noinline]] void join(const Attended<float>& to, const Attended<const float>& piece, int head_dim) {
    if (*piece.sum == 0) return;
    if (*to.sum == 0) {
        std::memcpy(to.out, piece.out, sizeof(float) * head_dim);
        *to.maximum = *piece.maximum;
        *to.sum = *piece.sum;
        return;
    }
    const float highest = std::max(*to.maximum, *piece.maximum);
    const float old = std::exp(*to.maximum - highest), more = std::exp(*piece.maximum - highest);
    for (int d = 0; d < head_dim; ++d) to.out[d] = old * to.out[d] + more * piece.out[d];
    *to.sum = old * *to.sum + more * *piece.sum;
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
    span.member.share(1, std::int64_t{span.count} * 2, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const bool keys = i % 2 == 1;
            float* row = qkv_.data() + (span.first + i / 2) * qkv_width_ + (keys ? m.query_width() : 0);
            const Buffer<float>& norm = keys ? layer.key_norm : layer.query_norm;
            if (wide(norm)) kernels_.rms_norm(row, norm.data(), static_cast<int>(norm.size()), m.epsilon, row);
        }
    });
    span.member.barrier();
}

void Decoder::rotate_and_append(const Span& span, int index, const Tokens& tokens, Cache& cache) {
    const ModelSpec& m = *model_;
    const LayerSpec& layer = *m.layers[index];
    AttentionShape shape;
    shape.head_dim = m.head_dim;
    shape.int8 = cache.int8();
    const int heads = m.heads + m.key_heads;
    norm_together(span, layer);
    span.member.share(0, std::int64_t{span.count} * heads, span.count == 1 ? 2 : heads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t t = span.first + i / heads;
            const int h = static_cast<int>(i % heads), key_head = h - m.heads;
            float* head = qkv_.data() + t * qkv_width_ + h * m.head_dim;
            const Buffer<float>& norm = key_head < 0 ? layer.query_norm : layer.key_norm;
            if (static_cast<int>(norm.size()) == m.head_dim) kernels_.rms_norm(head, norm.data(), m.head_dim, m.epsilon, head);
            if (layer.rope >= 0) {
                const RopeSpec& rope = ropes_[layer.rope];
                rotate(rope, angles_[layer.rope].data() + t * 2 * rope.inverse_frequency.size(), head);
            }
            if (key_head >= 0) {
                const float* value = qkv_.data() + t * qkv_width_ + (m.heads + m.key_heads + key_head) * m.head_dim;
                const auto append = [&] {
                    return kernels_.append(shape, cache.at(index, tokens.sequence[t], key_head), head, value, tokens.position[t]);
                };
                if (!append() && !(cache.widen() && append())) no_memory_.store(true, std::memory_order_relaxed);
            }
        }
    });
    span.member.barrier();
}

void Decoder::attend(const Span& span, int index, const Tokens& tokens, Cache& cache) {
    const ModelSpec& m = *model_;
    const LayerSpec& layer = *m.layers[index];
    Own& own = own_[span.member.index()];
    Scratch& scratch = span.scratch;
    AttentionShape shape;
    shape.head_dim = m.head_dim;
    shape.group = m.heads / m.key_heads;
    shape.scale = m.attention_scale;
    shape.soft_cap = m.attention_soft_cap;
    shape.int8 = cache.int8();
    const auto first_of = [&](int t) { return layer.window > 0 ? std::max(0, tokens.position[t] + 1 - layer.window) : 0; };
    const std::int64_t shares = std::int64_t{span.items} * m.key_heads * chunks_;
    span.member.share(1, shares, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t share = begin; share < end; ++share) {
            const int chunk = static_cast<int>(share % chunks_), key_head = static_cast<int>(share / chunks_ % m.key_heads);
            const Item& item = items_[span.first_item + share / chunks_ / m.key_heads];
            const int rows = item.count * shape.group;
            float* q = own.queries.data();
            float *out = q + query_rows_ * m.head_dim, *piece = out + query_rows_ * m.head_dim;
            float *maximum = own.extremes.data(), *sum = maximum + query_rows_;
            float *piece_maximum = sum + query_rows_, *piece_sum = piece_maximum + query_rows_;
            int begin_of_all = INT_MAX, end_of_all = 0;
            for (int r = 0; r < rows; ++r) {
                const int t = item.token + r / shape.group, h = key_head * shape.group + r % shape.group;
                std::memcpy(q + r * m.head_dim, qkv_.data() + std::int64_t{t} * qkv_width_ + h * m.head_dim,
                            sizeof(float) * m.head_dim);
                end_of_all = std::max(end_of_all, tokens.position[t] + 1);
                begin_of_all = std::min(begin_of_all, first_of(t));
            }
            const bool shared = chunks_ > 1;
            const int c0 = shared ? chunk : begin_of_all / kPiece, c1 = shared ? chunk : (end_of_all - 1) / kPiece;
            for (int c = c0; c <= c1; ++c) {
                for (int r = 0; r < rows; ++r) {
                    const int t = item.token + r / shape.group;
                    own.first[r] = std::max(first_of(t), c * kPiece);
                    own.last[r] = std::min(tokens.position[t] + 1, (c + 1) * kPiece);
                }
                const bool first = c == c0;  // of these: nothing to join it to
                kernels_.attend(shape, cache.at(index, tokens.sequence[item.token], key_head), q, rows, own.first.data(),
                                own.last.data(), first ? out : piece, first ? maximum : piece_maximum,
                                first ? sum : piece_sum, own.scores.data());
                for (int r = 0; r < rows && !first; ++r) {
                    join({out + r * m.head_dim, maximum + r, sum + r},
                         {piece + r * m.head_dim, piece_maximum + r, piece_sum + r}, m.head_dim);
                }
            }
            for (int r = 0; r < rows; ++r) {
                const int t = item.token + r / shape.group, h = key_head * shape.group + r % shape.group;
                const std::int64_t at = (std::int64_t{t - span.first} * chunks_ + chunk) * m.heads + h;
                std::memcpy(scratch.part_out.data() + at * m.head_dim, out + r * m.head_dim, sizeof(float) * m.head_dim);
                scratch.part_max[at] = maximum[r];
                scratch.part_sum[at] = sum[r];
            }
        }
    });
    span.member.barrier();
}

// What all heads of a token attended to, its pieces joined: out [heads, head_dim].
const float* Decoder::attended(const Span& span, int row, float* out) const {
    const ModelSpec& m = *model_;
    const Scratch& scratch = span.scratch;
    for (int h = 0; h < m.heads; ++h) {
        float* head = out + h * m.head_dim;
        float maximum = 0, sum = 0;
        for (int c = 0; c < chunks_; ++c) {
            const std::int64_t at = (std::int64_t{row} * chunks_ + c) * m.heads + h;
            join({head, &maximum, &sum},
                 {scratch.part_out.data() + at * m.head_dim, &scratch.part_max[at], &scratch.part_sum[at]}, m.head_dim);
        }
        for (int d = 0; d < m.head_dim; ++d) head[d] /= sum;
    }
    return out;
}

}  // namespace lowbit
