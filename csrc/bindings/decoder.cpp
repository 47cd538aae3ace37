#include "engine/decoder.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <optional>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/weights.h"
#include "engine/sampler.h"

namespace lowbit {
namespace {

// Runs Python's handlers of signals, such as that of Ctrl-C, while a forward goes on: now and then, as it takes the
// interpreter from other threads. Python runs them in its main thread only, so no other asks.
class Signals {
 public:
    Signals() {
        const nb::object main = nb::module_::import_("threading").attr("main_thread")();
        if (nb::cast<unsigned long>(main.attr("ident")) != PyThread_get_thread_ident()) next_ = Clock::time_point::max();
    }

    // Whether a handler raised an error. The interpreter is not held.
    bool check() {
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

void forward(Decoder& self, KVCache& cache, const Ids& ids, const Ids& sequence, const Ids& position, const Ids& wanted,
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
    for (int first = 0, i = 1; i <= count; ++i) {
        if (i < count && sequence.data()[i] == sequence.data()[first]) continue;
        require(!cache.in_pieces() || i - first <= KVCache::kPiece, "more tokens of a sequence than `piece`");
        require(cache.can_go_on(sequence.data()[first], position.data()[first]),
                "a position before which tokens are read exactly that the cache has no more; begin at position 0");
        first = i;
    }
    require(cache.layers() == static_cast<int>(self.model().layers.size()), "a cache of another model");
    for (int first = 0, i = 1; i <= count; ++i) {
        if (i < count && sequence.data()[i] == sequence.data()[first]) continue;
        cache.note(sequence.data()[first], position.data()[first], position.data()[i - 1] + 1);
        first = i;
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
        if (self.forward(tokens, cache, logits.data(), [&] { return signals.check(); })) return;
    }
    signals.raise();
}

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<KVCache>(m, "KVCache", "Keys and values of several sequences.")
        .def("__init__",
             [](KVCache* self, const Decoder& decoder, int sequences, int capacity, const std::vector<KVLayer>& layers) {
                 const ModelSpec& model = decoder.model();
                 std::vector<KVLayer> all = layers.empty() ? std::vector<KVLayer>(model.layers.size()) : layers;
                 require(all.size() == model.layers.size(), "a KVLayer for each layer of the model");
                 for (const KVLayer& layer : all) check(layer, model.head_dim);
                 new (self) KVCache(std::move(all), model.key_heads, model.head_dim, sequences, capacity);
             },
             nb::arg("decoder"), nb::arg("sequences"), nb::arg("capacity"), nb::arg("layers") = std::vector<KVLayer>(),
             "capacity: positions of each sequence, rounded up to whole blocks. layers: how each is stored; all in 16 bits where empty.")
        .def_prop_ro("sequences", &KVCache::sequences)
        .def_prop_ro("capacity", &KVCache::capacity)
        .def_prop_ro("bytes_per_position", &KVCache::bytes_per_position, "Of one sequence, as it is stored.")
        .def_prop_ro("exact_bytes", &KVCache::exact_bytes, "Of what one sequence keeps in 16 bits beside what is stored.")
        .def_prop_ro("piece", [](const KVCache& c) { return c.in_pieces() ? KVCache::kPiece : 0; },
                     "The most tokens of one sequence that a forward takes; 0: any number.")
        .def("can_go_on", [](const KVCache& c, int sequence, int position) {
                 require(sequence >= 0 && sequence < c.sequences(), "a sequence that the cache does not hold");
                 return position >= 0 && position < c.capacity() && c.can_go_on(sequence, position);
             }, nb::arg("sequence"), nb::arg("position"),
             "Whether a text of this sequence can go on from this position: what its tokens read exactly is still there.");
    nb::class_<Decoder>(m, "Decoder", "A model of the Llama family. One forward at a time.")
        .def("__init__",
             [](Decoder* self, std::shared_ptr<ModelSpec> model, const std::vector<RopeSpec>& ropes, std::shared_ptr<ThreadPool> pool,
                const std::string& isa) {
                 check(*model, ropes);
                 new (self) Decoder(std::move(model), ropes, std::move(pool), checked_kernels(isa));
             },
             nb::arg("model"), nb::arg("ropes"), nb::arg("pool"), nb::arg("isa") = "",
             "ropes: those that the layers of the model name by index.")
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
