// The MLPs of a decoder: one for all tokens, or a mixture of experts of which a token takes some.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/decoder.h"

namespace lowbit {

namespace {

// sum += share * values. Not inlined: two copies might be compiled to different roundings.
[[gnu::noinline]] void add_share(float* sum, const float* values, float share, int width) {
    for (int k = 0; k < width; ++k) sum[k] += share * values[k];
}

// Softmax over `count` logits, in place.
void softmax(float* values, int count) {
    const float maximum = *std::max_element(values, values + count);
    float sum = 0;
    for (int i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - maximum);
    for (int i = 0; i < count; ++i) values[i] /= sum;
}

// The `top_k` most probable of `count` experts, the first of those that are alike, and their shares: in the order of their
// indices, which is the order in which they are added. Any experts, but none twice, where probabilities are NaN.
void choose(const float* probability, int count, int top_k, bool normalized, int* chosen, float* share) {
    float sum = 0;
    for (int n = 0; n < top_k; ++n) {
        int best = -1;
        for (int e = 0; e < count; ++e) {
            const bool taken = std::find(chosen, chosen + n, e) != chosen + n;
            if (!taken && (best < 0 || probability[e] > probability[best])) best = e;
        }
        chosen[n] = best;
        sum += probability[best];
    }
    std::sort(chosen, chosen + top_k);
    for (int n = 0; n < top_k; ++n) share[n] = normalized ? probability[chosen[n]] / sum : probability[chosen[n]];
}

}  // namespace

// y [count, width] = addend + the MLP of what row(i, scratch) gives.
void Decoder::run_mlp(const Span& span, const MlpSpec& mlp, const RowSource& row, float* y, const float* addend,
                      const ProjectionSpec* next) {
    const ModelSpec& m = *model_;
    project(span, mlp.gate_up, row, span.scratch.mlp.data(), mlp_stride_, m.gate, nullptr, &mlp.down);
    const auto hidden = [&](int i, float* out) -> const float* {
        const float* values = span.scratch.mlp.data() + std::int64_t{i} * mlp_stride_;
        if (mlp.paired()) return values;
        std::memcpy(out, values, sizeof(float) * mlp.down.cols);
        kernels_.gate(m.gate, out, values + mlp.gate_up.parts[1]->offset, mlp.down.cols);
        return out;
    };
    project(span, mlp.down, hidden, y, padded(m.width), Gate::none, addend, next);
}

// Which experts each token takes; `routing` of the span is theirs from here on.
void Decoder::route(const Span& span, const ExpertsSpec& mixture, const RowSource& row) {
    const int count = static_cast<int>(mixture.experts.size()), top_k = mixture.top_k, stride = padded(count);
    const int width = padded(model_->width);
    Routing& routing = span.scratch.routing;
    project(span, mixture.router, row, routing.logits.data(), stride, Gate::none, nullptr, nullptr);
    span.worker.share(0, span.count, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            float* logits = routing.logits.data() + i * stride;
            softmax(logits, count);
            choose(logits, count, top_k, mixture.normalized, routing.chosen.data() + i * top_k, routing.share.data() + i * top_k);
            std::memset(span.scratch.added.data() + i * width, 0, sizeof(float) * width);
        }
    });
    span.worker.barrier();
    if (span.worker.index() == 0 || span.worker.count() == 1) {
        // Rows are counted, then put in place: those of an expert stand together, in the order of their tokens. What was left
        // out, because the forward ends, was not chosen either.
        const int slots = span.worker.cancelled() ? 0 : span.count * top_k;
        int* begin = routing.begin.data();
        std::fill(begin, begin + count + 2, 0);
        for (int s = 0; s < slots; ++s) ++begin[routing.chosen[s] + 2];
        for (int e = 0; e < count; ++e) begin[e + 2] += begin[e + 1];
        for (int s = 0; s < slots; ++s) routing.slots[begin[routing.chosen[s] + 1]++] = s;
    }
    span.worker.barrier();
}

// scratch.added [count, width] = the sum over the experts of each token. Every weight is read once, for all rows that take it;
// a token's experts are added in the order of their indices, so that the sum depends neither on other tokens nor on threads.
void Decoder::run_experts(const Span& span, const ExpertsSpec& mixture, const RowSource& row, const ProjectionSpec* next) {
    const int count = static_cast<int>(mixture.experts.size()), top_k = mixture.top_k, width = model_->width;
    route(span, mixture, row);
    Routing& routing = span.scratch.routing;
    for (int e = 0; e < count; ++e) {
        const int first = routing.begin[e], rows = routing.begin[e + 1] - first;
        if (rows == 0) continue;
        const int* slots = routing.slots.data() + first;
        const auto taken = [&](int i, float* out) { return row.get(row.self, slots[i] / top_k, out); };
        int after = e + 1;
        while (after < count && routing.begin[after] == routing.begin[after + 1]) ++after;
        const Span those{span.worker, span.scratch, 0, rows, 0, 0};
        run_mlp(those, *mixture.experts[e], taken, routing.results.data(), nullptr,
                after < count ? &mixture.experts[after]->gate_up : next);
        span.worker.share(0, rows, 4, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) {
                add_share(span.scratch.added.data() + std::int64_t{slots[i] / top_k} * padded(width),
                          routing.results.data() + i * padded(width), routing.share[slots[i]], width);
            }
        });
        span.worker.barrier();
    }
}

}  // namespace lowbit
