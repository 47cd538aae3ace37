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

KVFormat format_of(const std::string& name) {
    require(name == "int16" || name == "int8", "no cache of " + name + "; there are int16 and int8");
    return name == "int8" ? KVFormat::int8 : KVFormat::int16;
}

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
             [](KVCache* self, const Decoder& decoder, int sequences, int capacity, const std::string& format) {
                 const ModelSpec& model = decoder.model();
                 new (self) KVCache(static_cast<int>(model.layers.size()), model.key_heads, model.head_dim, sequences, capacity,
                                    format_of(format));
             },
             nb::arg("decoder"), nb::arg("sequences"), nb::arg("capacity"), nb::arg("format") = "int16",
             "capacity: positions of each sequence, rounded up to whole blocks. format: 'int16' or 'int8'.")
        .def_prop_ro("sequences", &KVCache::sequences)
        .def_prop_ro("capacity", &KVCache::capacity)
        .def_prop_ro("bytes_per_position", &KVCache::bytes_per_position);
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
