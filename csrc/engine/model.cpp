#include "engine/model.h"

#include <stdexcept>
#include <string>

namespace lowbit {

namespace {

void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

std::size_t padded(int width) { return static_cast<std::size_t>(width + kTile - 1) / kTile * kTile; }

void check_norm(const Buffer<float>& norm, int width) {
    require(norm.size() == 0 || norm.size() == padded(width), "norms are as wide as what they norm");
}

void check(const LayerSpec& layer, const ModelSpec& m, int ropes) {
    require(layer.rope >= -1 && layer.rope < ropes, "a layer has a rope of the decoder's, or -1");
    require(layer.window >= 0, "a window is a number of positions, or 0");
    for (const Buffer<float>* norm : {&layer.attention_norm, &layer.mlp_norm, &layer.attention_post_norm, &layer.mlp_post_norm})
        check_norm(*norm, m.width);
    const auto check_heads = [&](const Buffer<float>& norm, int width) {
        const int found = static_cast<int>(norm.size());
        require(found == 0 || found == m.head_dim || found == width,
                "norms of queries and keys are as wide as a head, or as all of them");
    };
    check_heads(layer.query_norm, m.query_width());
    check_heads(layer.key_norm, m.key_width());
    require(layer.qkv.cols == m.width, "q, k and v read what the model is wide");
    require(layer.qkv.width == m.query_width() + 2 * m.key_width(), "q, k and v have the width of their heads");
    require(layer.output.cols == m.query_width() && layer.output.width == m.width, "the output has the model's width");
    require((layer.mlp == nullptr) != (layer.experts == nullptr), "a layer has an MLP, or experts");
    const auto check_width = [&](const MlpSpec& mlp) {
        require(mlp.gate_up.cols == m.width && mlp.down.width == m.width, "an MLP reads and gives what the model is wide");
    };
    if (layer.mlp) return check_width(*layer.mlp);
    require(layer.experts->router.cols == m.width, "a router reads what the model is wide");
    for (const auto& expert : layer.experts->experts) check_width(*expert);
}

}  // namespace

void check(const PartSpec& part) {
    const PackedWeight& w = *part.weight;
    const ActivationSpec& a = part.activations;
    require(part.offset >= 0, "an offset is a column");
    require(a.bits == 8 || a.bits == 15, "activations have 8 bits or 15");
    require(a.divisor.empty() || static_cast<int>(a.divisor.size()) == w.cols, "a divisor for each column");
    require(!part.residual || fits(w, *part.residual), "a residual weight has the weight's shape and segments; a pair has none");
    require(part.bias.size() == 0 || part.bias.size() == padded(w.rows), "a bias for each row");
}

void check(const ProjectionSpec& projection) {
    require(!projection.parts.empty() && projection.parts.size() <= 3, "a projection has one to three parts");
    for (const auto& part : projection.parts) {
        const int rows = part->weight->paired ? part->weight->rows / 2 : part->weight->rows;
        require(part->weight->cols == projection.cols, "weights of a projection have the width of its input");
        require(part->offset + rows <= projection.width, "weights of a projection fill columns of its result");
    }
}

void check(const MlpSpec& mlp) {
    require(mlp.gate_up.parts.size() <= 2, "gate and up are one weight or two");
    require(mlp.paired() == mlp.gate_up.parts[0]->weight->paired, "one weight for gate and up is a pair");
    require(mlp.paired() ? mlp.gate_up.width == mlp.down.cols : mlp.gate_up.width == 2 * mlp.down.cols,
            "gate and up are what down reads");
    require(mlp.paired() || mlp.gate_up.parts[1]->offset == mlp.down.cols, "up comes after gate");
}

void check(const ExpertsSpec& experts) {
    const int count = static_cast<int>(experts.experts.size());
    require(experts.router.width == count, "a router has a row for each expert");
    require(experts.top_k >= 1 && experts.top_k <= count, "a token takes at least one expert, at most all");
}

void check(const ModelSpec& m, const std::vector<RopeSpec>& ropes) {
    require(m.width > 0 && m.vocabulary > 0, "a model has a width and a vocabulary");
    require(m.heads > 0 && m.key_heads > 0 && m.heads % m.key_heads == 0, "heads are a multiple of key heads");
    require(m.head_dim > 0 && m.head_dim % kTile == 0 && m.head_dim <= 512, "head_dim is a multiple of 16 up to 512");
    require(m.embedding->cols == m.width && m.embedding->rows >= m.vocabulary, "the embedding is [vocabulary, width]");
    require(m.head.cols == m.width && m.head.width == m.vocabulary, "the head is [vocabulary, width]");
    check_norm(m.final_norm, m.width);
    for (const auto& layer : m.layers) check(*layer, m, static_cast<int>(ropes.size()));
    for (const RopeSpec& rope : ropes)
        require(2 * static_cast<int>(rope.inverse_frequency.size()) <= m.head_dim, "a rope turns at most a head");
}

}  // namespace lowbit
