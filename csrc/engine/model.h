// The description of a decoder: plain numbers and packed weights, as Python gives them (bindings/model.cpp).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/buffer.h"
#include "kernels/kernels.h"

namespace lowbit {

// A packed weight in its place in a projection: columns of the result from `offset` on.
struct PartSpec {
    std::shared_ptr<const PackedWeight> weight;
    std::shared_ptr<const PackedWeight> residual;  // or none: a second weight that is added, what rounding the first one's table left
    ActivationSpec activations;
    Buffer<float> bias;  // whole tiles, or empty
    int offset = 0;
};

// Weights that multiply the same activations: q, k and v; gate and up; or one alone.
struct ProjectionSpec {
    std::vector<std::shared_ptr<const PartSpec>> parts;
    int cols = 0;   // of the input
    int width = 0;  // of the result
};

// down(act(gate(x)) * up(x))
struct MlpSpec {
    ProjectionSpec gate_up, down;

    bool paired() const { return gate_up.parts.size() == 1; }  // gate and up are one weight, whose result is down's input
};

// A sparse mixture of MLPs (Shazeer et al. 2017): a token takes the `top_k` experts that its router finds most probable, and
// their results are added, each times its probability.
struct ExpertsSpec {
    ProjectionSpec router;  // logits of the experts
    std::vector<std::shared_ptr<const MlpSpec>> experts;
    int top_k = 1;
    bool normalized = true;  // the probabilities of a token's experts are divided by their sum
};

struct LayerSpec {
    Buffer<float> attention_norm, mlp_norm;            // before; empty: none
    Buffer<float> attention_post_norm, mlp_post_norm;  // of what is added to the residual stream; empty: none
    Buffer<float> query_norm, key_norm;                // [head_dim], or of all heads together, or empty
    ProjectionSpec qkv, output;
    std::shared_ptr<const MlpSpec> mlp;          // this or
    std::shared_ptr<const ExpertsSpec> experts;  // that
    int rope = 0;    // which of the decoder's tables of frequencies; -1: none
    int window = 0;  // positions that a token sees; 0: all
};

// Rotary positions (Su et al. 2021).
struct RopeSpec {
    std::vector<float> inverse_frequency;  // [rotary / 2]
    float factor = 1;                      // of cosines and sines
    bool interleaved = false;              // pairs (0, 1), (2, 3), ... instead of (i, i + rotary / 2)
};

struct ModelSpec {
    int width = 0;
    int heads = 0;
    int key_heads = 0;
    int head_dim = 0;
    int vocabulary = 0;
    float epsilon = 1e-5f;
    float attention_scale = 1;
    float attention_soft_cap = 0;
    float logit_soft_cap = 0;
    float logit_scale = 1;
    float embedding_scale = 1;
    float residual_scale = 1;
    Gate gate = Gate::silu;
    std::vector<std::shared_ptr<const LayerSpec>> layers;
    std::shared_ptr<const PackedWeight> embedding;
    Buffer<float> final_norm;
    ProjectionSpec head;

    int query_width() const { return heads * head_dim; }
    int key_width() const { return key_heads * head_dim; }
};

// std::invalid_argument where the parts of a model do not fit together. Nothing that passes lets the decoder read or write
// outside of its memory.
void check(const PartSpec& part);
void check(const ProjectionSpec& projection);
void check(const MlpSpec& mlp);
void check(const ExpertsSpec& experts);
void check(const ModelSpec& model, const std::vector<RopeSpec>& ropes);

}  // namespace lowbit
