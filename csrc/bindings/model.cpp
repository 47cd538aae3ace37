// The description of a decoder as typed objects: a name that is misspelt or missing is a TypeError in Python.
#include "engine/model.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <utility>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/weights.h"

namespace lowbit {
namespace {

// What Python holds, as the model holds it: nothing changes it any more.
template <class T>
std::vector<std::shared_ptr<const T>> constant(const std::vector<std::shared_ptr<T>>& values) {
    return {values.begin(), values.end()};
}

void make_part(PartSpec* self, const Weight& weight, const std::optional<Weight>& residual, const ActivationSpec& activations,
               const Vector& bias, int offset) {
    PartSpec part;
    part.weight = weight.packed;
    if (residual) part.residual = residual->packed;
    part.activations = activations;
    part.bias = vector_of(bias);
    part.offset = offset;
    check(part);
    new (self) PartSpec(std::move(part));
}

void make_projection(ProjectionSpec* self, int cols, int width, const std::vector<std::shared_ptr<PartSpec>>& parts) {
    ProjectionSpec projection{constant(parts), cols, width};
    check(projection);
    new (self) ProjectionSpec(std::move(projection));
}

void make_mlp(MlpSpec* self, const ProjectionSpec& gate_up, const ProjectionSpec& down) {
    MlpSpec mlp{gate_up, down};
    check(mlp);
    new (self) MlpSpec(std::move(mlp));
}

void make_experts(ExpertsSpec* self, const ProjectionSpec& router, const std::vector<std::shared_ptr<MlpSpec>>& experts, int top_k,
                  bool normalized) {
    ExpertsSpec mixture{router, constant(experts), top_k, normalized};
    check(mixture);
    new (self) ExpertsSpec(std::move(mixture));
}

void make_layer(LayerSpec* self, const ProjectionSpec& qkv, const ProjectionSpec& output, std::shared_ptr<MlpSpec> mlp,
                std::shared_ptr<ExpertsSpec> experts, const Vector& attention_norm, const Vector& mlp_norm,
                const Vector& attention_post_norm, const Vector& mlp_post_norm, const Vector& query_norm, const Vector& key_norm,
                int rope, int window) {
    LayerSpec layer;
    layer.qkv = qkv;
    layer.output = output;
    layer.mlp = std::move(mlp);
    layer.experts = std::move(experts);
    layer.attention_norm = vector_of(attention_norm);
    layer.mlp_norm = vector_of(mlp_norm);
    layer.attention_post_norm = vector_of(attention_post_norm);
    layer.mlp_post_norm = vector_of(mlp_post_norm);
    layer.query_norm = vector_of(query_norm);
    layer.key_norm = vector_of(key_norm);
    layer.rope = rope;
    layer.window = window;
    new (self) LayerSpec(std::move(layer));
}

void make_model(ModelSpec* self, int width, int heads, int key_heads, int head_dim, int vocabulary, float epsilon,
                float attention_scale, float attention_soft_cap, float logit_soft_cap, float logit_scale, float embedding_scale,
                float residual_scale, Gate gate, const Weight& embedding, const Vector& final_norm, const ProjectionSpec& head,
                const std::vector<std::shared_ptr<LayerSpec>>& layers) {
    ModelSpec m;
    m.width = width;
    m.heads = heads;
    m.key_heads = key_heads;
    m.head_dim = head_dim;
    m.vocabulary = vocabulary;
    m.epsilon = epsilon;
    m.attention_scale = attention_scale;
    m.attention_soft_cap = attention_soft_cap;
    m.logit_soft_cap = logit_soft_cap;
    m.logit_scale = logit_scale;
    m.embedding_scale = embedding_scale;
    m.residual_scale = residual_scale;
    m.gate = gate;
    m.embedding = embedding.packed;
    m.final_norm = vector_of(final_norm);
    m.head = head;
    m.layers = constant(layers);
    new (self) ModelSpec(std::move(m));
}

// Every packed weight, in the order of layers; an embedding that is the head as well twice.
std::vector<Weight> weights_of(const ModelSpec& m) {
    std::vector<Weight> all = {{m.embedding}};
    const auto add = [&](const ProjectionSpec& projection) {
        for (const auto& part : projection.parts) {
            all.push_back({part->weight});
            if (part->residual) all.push_back({part->residual});
        }
    };
    const auto add_mlp = [&](const MlpSpec& mlp) {
        add(mlp.gate_up);
        add(mlp.down);
    };
    for (const auto& layer : m.layers) {
        add(layer->qkv);
        add(layer->output);
        if (layer->mlp) add_mlp(*layer->mlp);
        if (!layer->experts) continue;
        add(layer->experts->router);
        for (const auto& expert : layer->experts->experts) add_mlp(*expert);
    }
    add(m.head);
    return all;
}

void make_rope(RopeSpec* self, const Array<float, 1>& inverse_frequency, float factor, bool interleaved) {
    new (self) RopeSpec{floats_of(inverse_frequency), factor, interleaved};
}

}  // namespace

void bind_model(nb::module_& m) {
    using namespace nb::literals;
    nb::enum_<Gate>(m, "Gate", "The activation function of an MLP's gate.")
        .value("silu", Gate::silu)
        .value("gelu_tanh", Gate::gelu_tanh)
        .value("gelu", Gate::gelu);
    nb::class_<PartSpec>(m, "PartSpec", "A packed weight in its place in a projection.")
        .def("__init__", &make_part, nb::kw_only(), "weight"_a, "residual"_a.none() = nb::none(), "activations"_a,
             "bias"_a.none() = nb::none(), "offset"_a = 0,
             "residual: a second weight that is added. bias float32 [rows]. offset: the first column of the result that it gives.");
    nb::class_<ProjectionSpec>(m, "ProjectionSpec", "One to three parts that multiply the same activations.")
        .def("__init__", &make_projection, nb::kw_only(), "cols"_a, "width"_a, "parts"_a,
             "cols: of the input. width: of the result, which the parts fill.");
    nb::class_<MlpSpec>(m, "MlpSpec", "down(act(gate(x)) * up(x))")
        .def("__init__", &make_mlp, nb::kw_only(), "gate_up"_a, "down"_a,
             "gate_up: one part, packed as a pair, as wide as down reads; or gate and up one after the other, twice as wide.");
    nb::class_<ExpertsSpec>(m, "ExpertsSpec", "A sparse mixture of MLPs: a router, and experts of which a token takes some.")
        .def("__init__", &make_experts, nb::kw_only(), "router"_a, "experts"_a, "top_k"_a, "normalized"_a,
             "router: as wide as there are experts. top_k: experts of a token. normalized: their probabilities are divided by "
             "their sum.");
    nb::class_<LayerSpec>(m, "LayerSpec", "One layer of a decoder.")
        .def("__init__", &make_layer, nb::kw_only(), "qkv"_a, "output"_a, "mlp"_a.none() = nb::none(),
             "experts"_a.none() = nb::none(), "attention_norm"_a.none() = nb::none(), "mlp_norm"_a.none() = nb::none(),
             "attention_post_norm"_a.none() = nb::none(), "mlp_post_norm"_a.none() = nb::none(),
             "query_norm"_a.none() = nb::none(), "key_norm"_a.none() = nb::none(), "rope"_a, "window"_a,
             "mlp or experts: the one that there is. Norms are float32 [width]; None: none. query_norm and key_norm: [head_dim] "
             "for each head, or all heads together, [heads * head_dim] and [key_heads * head_dim]. rope: an index, -1 for none. "
             "window: positions that a token sees, 0 for all.");
    nb::class_<RopeSpec>(m, "RopeSpec", "Rotary positions.")
        .def("__init__", &make_rope, nb::kw_only(), "inverse_frequency"_a, "factor"_a = 1.0f, "interleaved"_a = false,
             "inverse_frequency float32 [channels / 2]. factor: of cosines and sines. interleaved: pairs (0, 1), (2, 3), ... turn "
             "together, not (i, i + channels / 2).");
    nb::class_<ModelSpec>(m, "ModelSpec", "A decoder without its ropes.")
        .def("__init__", &make_model, nb::kw_only(), "width"_a, "heads"_a, "key_heads"_a, "head_dim"_a, "vocabulary"_a, "epsilon"_a,
             "attention_scale"_a, "attention_soft_cap"_a = 0.0f, "logit_soft_cap"_a = 0.0f, "logit_scale"_a = 1.0f,
             "embedding_scale"_a = 1.0f, "residual_scale"_a = 1.0f, "gate"_a, "embedding"_a, "final_norm"_a.none(), "head"_a,
             "layers"_a)
        .def_prop_ro("weights", &weights_of, "All packed weights, in order.");
}

}  // namespace lowbit
