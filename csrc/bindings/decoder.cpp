#include "engine/decoder.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <map>
#include <optional>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/weights.h"
#include "engine/sampler.h"

namespace lowbit {
namespace {

template <class T>
T get(const nb::dict& values, const char* key) {
    return nb::cast<T>(values[key]);
}

Gate gate_of(const std::string& name) {
    static const std::map<std::string, Gate> known = {
        {"silu", Gate::silu}, {"gelu_tanh", Gate::gelu_tanh}, {"gelu", Gate::gelu}};
    const auto found = known.find(name);
    require(found != known.end(), "no gate " + name + "; there are silu, gelu_tanh and gelu");
    return found->second;
}

Product product_of(const nb::dict& values) {
    Product product;
    product.cols = get<int>(values, "cols");
    product.width = get<int>(values, "width");
    for (const nb::handle item : nb::cast<nb::list>(values["parts"])) {
        const auto from = nb::cast<nb::dict>(item);
        Part part;
        part.weight = get<Weight>(from, "weight").linear;
        if (!from["rest"].is_none()) part.rest = get<Weight>(from, "rest").linear;
        part.input.planes = get<int>(from, "planes");
        part.input.whole = get<bool>(from, "whole");
        part.input.fixed = get<float>(from, "fixed");
        if (!from["divisor"].is_none()) {
            const auto divisor = get<Array<float, 1>>(from, "divisor");
            part.input.divisor.assign(divisor.data(), divisor.data() + divisor.shape(0));
        }
        part.bias = vector_of(from["bias"]);
        part.offset = get<int>(from, "offset");
        require(part.weight->cols == product.cols, "weights of a product have the width of its input");
        require(part.input.planes == 1 || part.input.planes == 2, "activations have one plane of 8 bits, or two");
        require(!part.rest || fits(*part.weight, *part.rest), "the rest of a weight has its shape, and its segments; a pair has none");
        product.parts.push_back(std::move(part));
    }
    require(!product.parts.empty() && product.parts.size() <= 3, "a product has one to three parts");
    return product;
}

Layer layer_of(const nb::dict& values) {
    Layer layer;
    layer.attention_norm = vector_of(values["attention_norm"]);
    layer.mlp_norm = vector_of(values["mlp_norm"]);
    layer.attention_post_norm = vector_of(values["attention_post_norm"]);
    layer.mlp_post_norm = vector_of(values["mlp_post_norm"]);
    layer.query_norm = vector_of(values["query_norm"]);
    layer.key_norm = vector_of(values["key_norm"]);
    layer.qkv = product_of(get<nb::dict>(values, "qkv"));
    layer.output = product_of(get<nb::dict>(values, "output"));
    layer.gate_up = product_of(get<nb::dict>(values, "gate_up"));
    layer.down = product_of(get<nb::dict>(values, "down"));
    layer.rope = get<int>(values, "rope");
    layer.window = get<int>(values, "window");
    return layer;
}

void check(const Model& m) {
    require(m.heads > 0 && m.key_heads > 0 && m.heads % m.key_heads == 0, "heads are a multiple of key heads");
    require(m.head_dim > 0 && m.head_dim % kTile == 0 && m.head_dim <= 512, "head_dim is a multiple of 16 up to 512");
    require(m.embedding->cols == m.width && m.embedding->rows >= m.vocabulary, "the embedding is [vocabulary, width]");
    require(m.head.cols == m.width && m.head.width == m.vocabulary, "the head is [vocabulary, width]");
    for (const Layer& layer : m.layers) {
        require(layer.rope < static_cast<int>(m.ropes.size()), "no such table of rotations");
        require(layer.qkv.cols == m.width && layer.gate_up.cols == m.width, "a layer reads what the model is wide");
        require(layer.qkv.width == m.query_width() + 2 * m.key_width(), "q, k and v have the width of their heads");
        require(layer.output.cols == m.query_width() && layer.output.width == m.width, "the output has the model's width");
        require(layer.down.width == m.width, "down has the model's width");
        const bool paired = layer.gate_up.parts.size() == 1;
        require(paired == layer.gate_up.parts[0].weight->paired, "one weight for gate and up is a pair");
        require(paired ? layer.gate_up.width == layer.down.cols : layer.gate_up.width == 2 * layer.down.cols,
                "gate and up are what down reads");
        for (const auto& [norm, width] : {std::pair{&layer.query_norm, m.query_width()}, {&layer.key_norm, m.key_width()}})
            require(norm->size() == 0 || static_cast<int>(norm->size()) == m.head_dim || static_cast<int>(norm->size()) == width,
                    "norms of queries and keys are as wide as a head, or as all of them");
    }
    for (const Rope& rope : m.ropes)
        require(2 * static_cast<int>(rope.inverse_frequency.size()) <= m.head_dim, "a rotation turns at most a head");
}

Model model_of(const nb::dict& values) {
    Model m;
    m.width = get<int>(values, "width");
    m.heads = get<int>(values, "heads");
    m.key_heads = get<int>(values, "key_heads");
    m.head_dim = get<int>(values, "head_dim");
    m.vocabulary = get<int>(values, "vocabulary");
    m.epsilon = get<float>(values, "epsilon");
    m.attention_scale = get<float>(values, "attention_scale");
    m.attention_soft_cap = get<float>(values, "attention_soft_cap");
    m.logit_soft_cap = get<float>(values, "logit_soft_cap");
    m.logit_scale = get<float>(values, "logit_scale");
    m.embedding_scale = get<float>(values, "embedding_scale");
    m.residual_scale = get<float>(values, "residual_scale");
    m.gate = gate_of(get<std::string>(values, "gate"));
    for (const nb::handle item : get<nb::list>(values, "ropes")) {
        const auto from = nb::cast<nb::dict>(item);
        const auto frequency = get<Array<float, 1>>(from, "inverse_frequency");
        Rope rope;
        rope.inverse_frequency.assign(frequency.data(), frequency.data() + frequency.shape(0));
        rope.factor = get<float>(from, "factor");
        rope.interleaved = get<bool>(from, "interleaved");
        m.ropes.push_back(std::move(rope));
    }
    for (const nb::handle item : get<nb::list>(values, "layers")) m.layers.push_back(layer_of(nb::cast<nb::dict>(item)));
    m.embedding = get<Weight>(values, "embedding").linear;
    m.final_norm = vector_of(values["final_norm"]);
    m.head = product_of(get<nb::dict>(values, "head"));
    check(m);
    return m;
}

// Runs Python's handlers of signals, such as that of Ctrl-C, while a forward goes on: now and then, as it takes the
// interpreter from other threads. Python runs them in its main thread only, so no other asks.
class Signals {
 public:
    Signals() {
        const nb::object main = nb::module_::import_("threading").attr("main_thread")();
        if (nb::cast<unsigned long>(main.attr("ident")) != PyThread_get_thread_ident()) next_ = Clock::time_point::max();
    }

    // Whether a handler raised an error. The interpreter is not held.
    bool look() {
        if (Clock::now() < next_) return false;
        const nb::gil_scoped_acquire held;
        if (PyErr_CheckSignals() != 0) error_.emplace();
        next_ = Clock::now() + kPause;
        return error_.has_value();
    }

    void raise() {
        if (error_) throw std::move(*error_);
    }

 private:
    using Clock = std::chrono::steady_clock;
    static constexpr auto kPause = std::chrono::milliseconds(50);

    Clock::time_point next_ = Clock::now() + kPause;
    std::optional<nb::python_error> error_;
};

using Ids = Array<std::int32_t, 1>;

void forward(Decoder& self, Cache& cache, const Ids& ids, const Ids& sequence, const Ids& position, const Ids& wanted,
             const Output<float, 2>& logits) {
    const int count = static_cast<int>(ids.shape(0));
    require(count > 0, "no tokens");
    require(sequence.shape(0) == ids.shape(0) && position.shape(0) == ids.shape(0), "a sequence and a position for each token");
    require(logits.shape(0) == wanted.shape(0) && static_cast<int>(logits.shape(1)) == self.model().vocabulary,
            "logits are [wanted tokens, vocabulary]");
    for (int i = 0; i < count; ++i) {
        require(ids.data()[i] >= 0 && ids.data()[i] < self.model().vocabulary, "a token outside of the vocabulary");
        require(sequence.data()[i] >= 0 && sequence.data()[i] < cache.sequences(), "a sequence that the cache does not hold");
        require(position.data()[i] >= 0 && position.data()[i] < cache.capacity(), "a position beyond the cache");
    }
    for (std::size_t i = 0; i < wanted.shape(0); ++i)
        require(wanted.data()[i] >= 0 && wanted.data()[i] < count, "a wanted token that is not there");
    Tokens tokens;
    tokens.count = count;
    tokens.ids = ids.data();
    tokens.sequence = sequence.data();
    tokens.position = position.data();
    tokens.wanted = wanted.data();
    tokens.wanted_count = static_cast<int>(wanted.shape(0));
    Signals signals;
    {
        const nb::gil_scoped_release released;
        if (self.forward(tokens, cache, logits.data(), [&] { return signals.look(); })) return;
    }
    signals.raise();
}

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<Cache>(m, "Cache", "Keys and values of several sequences.")
        .def("__init__",
             [](Cache* self, const Decoder& decoder, int sequences, int capacity, bool int8) {
                 const Model& model = decoder.model();
                 new (self) Cache(static_cast<int>(model.layers.size()), model.key_heads, model.head_dim, sequences, capacity, int8);
             },
             nb::arg("decoder"), nb::arg("sequences"), nb::arg("capacity"), nb::arg("int8") = false)
        .def_prop_ro("sequences", &Cache::sequences)
        .def_prop_ro("capacity", &Cache::capacity)
        .def_prop_ro("bytes_per_position", &Cache::bytes_per_position);
    nb::class_<Decoder>(m, "Decoder", "A model of the Llama family. One forward at a time.")
        .def("__init__",
             [](Decoder* self, const nb::dict& model, std::shared_ptr<Pool> pool, const std::string& isa) {
                 const Kernels* kernels = kernels_for(isa);
                 require(kernels != nullptr, "no kernels for " + isa + " on this processor; isas() names those that run here");
                 new (self) Decoder(std::make_shared<Model>(model_of(model)), std::move(pool), *kernels);
             },
             nb::arg("model"), nb::arg("pool"), nb::arg("isa") = "")
        .def("forward", &forward, nb::arg("cache"), nb::arg("ids").noconvert(), nb::arg("sequence").noconvert(),
             nb::arg("position").noconvert(), nb::arg("wanted").noconvert(), nb::arg("logits").noconvert(),
             "Runs tokens (int32: ids, their sequences and positions) and writes the logits [len(wanted), vocabulary] of the "
             "tokens whose indices are wanted. Tokens of one sequence stand together, in order. An error that a handler of "
             "signals raises meanwhile, as that of Ctrl-C does, ends it; run the same tokens again then.");
    nb::class_<Random>(m, "Random", "Random numbers, the same on every machine.").def(nb::init<std::uint64_t>(), nb::arg("seed"));
    m.def(
        "sample",
        [](const Output<float, 1>& logits, Random& random, const nb::object& seen, double temperature, int top_k, double top_p,
           double min_p, double repetition_penalty) {
            const Sampling how{temperature, top_k, top_p, min_p, repetition_penalty};
            const std::uint8_t* marks = nullptr;
            if (!seen.is_none()) {
                const auto array = nb::cast<Array<std::uint8_t, 1>>(seen);
                require(array.shape(0) == logits.shape(0), "a mark for each token of the vocabulary");
                marks = array.data();
            }
            return sample(logits.data(), static_cast<int>(logits.shape(0)), how, marks, random);
        },
        nb::arg("logits").noconvert(), nb::arg("random"), nb::arg("seen").none() = nb::none(), nb::arg("temperature") = 0.0,
        nb::arg("top_k") = 0, nb::arg("top_p") = 1.0, nb::arg("min_p") = 0.0, nb::arg("repetition_penalty") = 1.0,
        "The next token; changes `logits` float32 [vocabulary]. seen: uint8 [vocabulary], for the penalty.");
}

}  // namespace lowbit
