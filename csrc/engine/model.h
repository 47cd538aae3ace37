// A decoder of the Llama family as plain numbers and packed weights.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/buffer.h"
#include "kernels/linear.h"

namespace lowbit {

// How the activations in front of a weight are rounded.
struct Input {
    int planes = 2;     // 1: 8 bits. 2: 15 bits, which stands for activations that are not rounded
    bool whole = false;  // one scale a token, not one a token and segment
    float fixed = 0;     // > 0: the scale of all tokens, found on calibration text
    std::vector<float> divisor;  // [cols], or empty: x / divisor comes first (SmoothQuant)

    bool operator==(const Input&) const = default;
};

// A weight in its place: columns of the result from `offset` on.
struct Part {
    std::shared_ptr<const Linear> weight;
    std::shared_ptr<const Linear> rest;  // a second weight that is added, or none: what rounding the first one's table left
    Input input;
    Buffer<float> bias;  // whole tiles, or empty
    int offset = 0;
};

// Weights that multiply the same activations: q, k and v, or gate and up, or one alone.
struct Product {
    std::vector<Part> parts;
    int cols = 0;   // of the input
    int width = 0;  // of the result
};

struct Layer {
    Buffer<float> attention_norm, mlp_norm;            // before; empty: none
    Buffer<float> attention_post_norm, mlp_post_norm;  // of what is added to the residual; empty: none
    Buffer<float> query_norm, key_norm;                // [head_dim], or of all heads together, or empty
    Product qkv, output, gate_up, down;
    int rope = 0;    // which table of frequencies; -1: none
    int window = 0;  // positions that a token sees; 0: all
};

struct Rope {
    std::vector<float> inverse_frequency;  // [rotary / 2]
    float factor = 1;                      // of cosines and sines
    bool interleaved = false;              // pairs (0, 1), (2, 3), ... instead of (i, i + rotary / 2)
};

struct Model {
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
    std::vector<Rope> ropes;
    std::vector<Layer> layers;
    std::shared_ptr<const Linear> embedding;
    Buffer<float> final_norm;
    Product head;

    int query_width() const { return heads * head_dim; }
    int key_width() const { return key_heads * head_dim; }
};

}  // namespace lowbit
