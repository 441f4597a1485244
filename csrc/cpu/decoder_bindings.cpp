#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/bindings.h"
#include "cpu/decoder.h"
#include "cpu/borrowed.h"
#include "cpu/released.h"

namespace py = pybind11;

namespace shallow {
namespace {

constexpr const char* kParts[kPartCount] = {"embedding",  "norms",   "qkv",  "rope",
                                            "attention",  "combine", "o",    "up",
                                            "activation", "down",    "head", "wait"};

template <class Value>
Value named(const std::string& name, std::initializer_list<std::pair<const char*, Value>> known,
            const char* what) {
    for (const auto& [key, value] : known)
        if (name == key) return value;
    throw std::invalid_argument("unknown " + std::string(what) + " '" + name + "'");
}

Rules rules_from(const py::dict& fields) {
    const auto size = [&](const char* name) { return fields[name].cast<std::int64_t>(); };
    const auto real = [&](const char* name) { return fields[name].cast<float>(); };
    const auto flag = [&](const char* name) { return fields[name].cast<bool>(); };
    const auto text = [&](const char* name) { return fields[name].cast<std::string>(); };
    Rules r{};
    r.hidden = size("hidden_size");
    r.vocab = size("vocab_size");
    r.heads = size("heads");
    r.kv_heads = size("kv_heads");
    r.head_dim = size("head_dim");
    r.ffn = size("ffn_size");
    r.max_context = size("max_context");
    r.norm_eps = real("norm_eps");
    r.attention_scale = real("attention_scale");
    r.attention_softcap = real("attention_softcap");
    r.logit_softcap = real("logit_softcap");
    r.embedding_scale = real("embedding_scale");
    r.centred = text("norm") == "layer";
    r.gated = flag("gated");
    r.parallel = flag("parallel");
    r.qk_norm = named<QkNorm>(text("qk_norm"),
                              {{"", QkNorm::none}, {"head", QkNorm::head}, {"all", QkNorm::all}},
                              "qk_norm");
    r.activation = named<Activation>(text("activation"),
                                     {{"silu", Activation::silu},
                                      {"gelu", Activation::gelu},
                                      {"gelu_tanh", Activation::gelu_tanh},
                                      {"relu", Activation::relu}},
                                     "activation");
    r.mode = mode_from_name(text("mode"));
    return r;
}

// Matrices share ownership with Python; vectors are float32 and are copied.
Weights weights_from(const py::dict& matrices, const py::dict& vectors) {
    Weights weights;
    for (const auto& [role, matrix] : matrices) {
        auto owner = std::make_shared<py::object>(py::reinterpret_borrow<py::object>(matrix));
        weights.matrices[role.cast<std::string>()] =
            std::shared_ptr<const TiledMatrix>(owner, matrix.cast<const TiledMatrix*>());
    }
    for (const auto& [role, vector] : vectors) {
        const auto tensor = vector.cast<TensorTuple>();
        const auto size = std::get<1>(tensor);
        const auto name = role.cast<std::string>();
        const auto* const data =
            static_cast<const float*>(Borrowed(tensor, name.c_str()).of("float32", size));
        weights.vectors[name].assign(data, data + size);
    }
    return weights;
}

std::int64_t run(Decoder& decoder, Call& call, const Tensor& lengths,
                 const std::vector<TensorTuple>& angles) {
    call.lengths = static_cast<std::int64_t*>(
        Borrowed(lengths, "lengths").need("int64", call.batch * decoder.slots()));
    for (const TensorTuple& table : angles) {
        const std::int64_t size = std::get<1>(table);
        call.angles.push_back(
            static_cast<const float*>(Borrowed(table, "angles").of("float32", size)));
        call.angle_sizes.push_back(size);
    }
    Released released;
    return decoder.forward(call, [&] {
        const Released::Held held(released);
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    });
}

std::int64_t forward(Decoder& decoder, KvCache& cache, const Tensor& tokens, std::int64_t batch,
                     std::int64_t steps, const Tensor& lengths, const Tensor& chosen,
                     const std::vector<TensorTuple>& angles, bool all, const Tensor& logits) {
    if (batch < 1 || steps < 1) throw std::invalid_argument("tokens");
    Call call;
    call.cache = &cache;
    call.tokens =
        static_cast<const std::int64_t*>(Borrowed(tokens, "tokens").need("int64", batch * steps));
    call.batch = batch;
    call.steps = steps;
    call.chosen = static_cast<const std::uint8_t*>(
        Borrowed(chosen, "chosen").of("bool", batch * decoder.slots()));
    call.all = all;
    call.logits = static_cast<float*>(
        Borrowed(logits, "logits")
            .need("float32", batch * (all ? steps : 1) * decoder.model().rules.vocab));
    return run(decoder, call, lengths, angles);
}

void stream(Decoder& decoder, KvCache& cache, const Tensor& tokens, std::int64_t batch,
            std::int64_t steps, const Tensor& lengths, const Tensor& chosen,
            const std::vector<TensorTuple>& angles, const Tensor& entering, const Tensor& leaving,
            const Tensor& logits) {
    if (batch < 1 || steps < 1) throw std::invalid_argument("tokens");
    const std::int64_t count = batch * steps;
    const Rules& rules = decoder.model().rules;
    Call call;
    call.cache = &cache;
    call.tokens = static_cast<const std::int64_t*>(Borrowed(tokens, "tokens").need("int64", count));
    call.batch = batch;
    call.steps = steps;
    call.chosen = static_cast<const std::uint8_t*>(
        Borrowed(chosen, "chosen").need("bool", batch * decoder.slots()));
    call.entering = static_cast<const float*>(
        Borrowed(entering, "entering").of("float32", count * rules.hidden));
    call.leaving =
        static_cast<float*>(Borrowed(leaving, "leaving").of("float32", count * rules.hidden));
    call.all = true;
    call.logits =
        static_cast<float*>(Borrowed(logits, "logits").of("float32", count * rules.vocab));
    if (!call.leaving == !call.logits) throw std::invalid_argument("leaving or logits");
    run(decoder, call, lengths, angles);
}

std::vector<std::int64_t> greedy(Decoder& decoder, KvCache& cache,
                                 const std::vector<std::int64_t>& tokens, const Tensor& lengths,
                                 const std::vector<TensorTuple>& angles, std::int64_t steps) {
    if (steps < 1 || tokens.size() % static_cast<std::size_t>(steps))
        throw std::invalid_argument("tokens");
    std::vector<std::int64_t> best(tokens.size());
    Call call;
    call.cache = &cache;
    call.tokens = tokens.data();
    call.batch = static_cast<std::int64_t>(tokens.size()) / steps;
    call.steps = steps;
    call.all = true;
    call.best = best.data();
    best.resize(static_cast<std::size_t>(run(decoder, call, lengths, angles)));
    return best;
}

// Of the first thread by part, seconds; what each part reads of the weights in a step, bytes.
py::dict times(Decoder& decoder) {
    const Times measured = [&] {
        const Released free;
        return decoder.times();
    }();
    py::dict seconds, bytes;
    for (int i = 0; i < kPartCount; ++i) seconds[kParts[i]] = measured.seconds[i];
    std::int64_t qkv = 0, o = 0, up = 0, down = 0;
    for (const Layer& layer : decoder.model().layers) {
        qkv += layer.qkv.nbytes(), o += layer.o.nbytes();
        up += layer.up.nbytes(), down += layer.down.nbytes();
    }
    bytes["qkv"] = qkv, bytes["o"] = o, bytes["up"] = up, bytes["down"] = down;
    bytes["head"] = decoder.model().head.nbytes();
    return py::dict(py::arg("seconds") = seconds, py::arg("bytes") = bytes,
                    py::arg("whole") = measured.whole);
}

}  // namespace
}  // namespace shallow

void bind_decoder(py::module_& m) {
    using namespace shallow;
    m.attr("KV_PAGE") = kPage;  // positions
    py::class_<KvCache>(m, "KvCache", "Keys and values by (sequence, slot), in pages.")
        .def(
            "reserve",
            [](KvCache& cache, std::int64_t length) {
                if (length < 0 || length > std::int64_t{1} << 40)
                    throw std::invalid_argument("length: expected a number of positions, found " +
                                                std::to_string(length));
                for (std::int64_t b = 0; b < cache.batch(); ++b)
                    for (std::int64_t s = 0; s < cache.slots(); ++s) cache.reserve(b, s, length);
            },
            py::arg("length"), "Makes room for that many positions everywhere.")
        .def_property_readonly("batch", &KvCache::batch)
        .def_property_readonly("nbytes", &KvCache::nbytes);
    py::class_<Decoder>(m, "Decoder", "A decoder over its kept layers, one call a step.")
        .def(py::init([](const py::dict& rules, const std::string& isa, int threads) {
                 return std::make_unique<Decoder>(rules_from(rules), isa_from_name(isa), threads);
             }),
             py::arg("rules"), py::arg("isa"), py::arg("threads"))
        .def(
            "set_outer",
            [](Decoder& decoder, const py::dict& matrices, const py::dict& vectors,
               const Tensor& embedding, std::int64_t rows, std::int64_t columns) {
                const Borrowed span(embedding, "embedding");
                const auto dtype = embedding ? span.dtype() : "float32";
                decoder.set_outer(weights_from(matrices, vectors),
                                  span.rows(dtype, rows, columns, columns), rows, columns,
                                  float_from_name(dtype));
            },
            py::arg("matrices"), py::arg("vectors"), py::arg("embedding"), py::arg("rows"),
            py::arg("columns"),
            "What is not in a layer, by role: matrices as tiles, float32 vectors, and rows of an\n"
            "embedding of floats, or None where \"embedding\" is among the matrices. Once. "
            "ValueError\n"
            "for what is absent or has not the model's sizes; nothing of it is kept then.")
        .def(
            "add_layer",
            [](Decoder& decoder, const py::dict& matrices, const py::dict& vectors,
               std::int64_t window, int rope, std::int64_t rope_dim) {
                decoder.add_layer(weights_from(matrices, vectors), window, rope, rope_dim);
            },
            py::arg("matrices"), py::arg("vectors"), py::arg("window"), py::arg("rope"),
            py::arg("rope_dim"),
            "Another layer behind those that are there; errors as set_outer's. window: positions "
            "that\n"
            "it sees, 0 for all; rope: which table of angles, -1 for none; rope_dim: how many "
            "values\n"
            "of a head it rotates.")
        .def(
            "new_cache",
            [](const Decoder& decoder, const std::string& dtype, std::int64_t batch) {
                return decoder.new_cache(named<KvType>(dtype,
                                                       {{"float32", KvType::float32},
                                                        {"float16", KvType::float16},
                                                        {"int8", KvType::int8}},
                                                       "cache dtype"),
                                         batch);
            },
            py::arg("dtype"), py::arg("batch"),
            "An empty KvCache of \"float32\", \"float16\" or \"int8\" for so many sequences.")
        .def("forward", &forward, py::arg("cache"), py::arg("tokens"), py::arg("batch"),
             py::arg("steps"), py::arg("lengths"), py::arg("chosen"), py::arg("angles"),
             py::arg("all"), py::arg("logits"),
             "tokens (B, T) int64, -1 to the left of shorter ones; lengths (B, S) int64, the "
             "filled\n"
             "positions, which it moves on; chosen (B, S) bool, the slots that run, or None for "
             "all;\n"
             "angles: a table (positions, rope_dim) float32 for each rope, cosines before sines.\n"
             "Writes logits (B, T or, unless `all`, 1, V) float32, those of padding left out, and\n"
             "returns how many rows it has written. ValueError, a word, for a call against the "
             "rules\n"
             "that engine/reference/decoder.py checks.")
        .def("stream", &stream, py::arg("cache"), py::arg("tokens"), py::arg("batch"),
             py::arg("steps"), py::arg("lengths"), py::arg("chosen"), py::arg("angles"),
             py::arg("entering"), py::arg("leaving"), py::arg("logits"),
             "The residual stream through the chosen slots: from `entering`, where that is given,\n"
             "to `leaving` or, where that is not, to the logits of every token.")
        .def("greedy", &greedy, py::arg("cache"), py::arg("tokens"), py::arg("lengths"),
             py::arg("angles"), py::arg("steps") = 1,
             "tokens (B * steps), row by row, -1 to the left of shorter ones. Returns for each "
             "real\n"
             "token, in order, the id of the largest logit behind it; -1 where that is not finite "
             "or\n"
             "one of the row is NaN.")
        // Without the interpreter, which a call between two chunks waits for.
        .def("measure", &Decoder::measure, py::arg("on"), py::call_guard<shallow::Released>(),
             "From now on, or no longer; clears what was measured.")
        .def("times", &times,
             "{\"seconds\": {part: of the first thread, while measured}, \"bytes\": {product: of\n"
             "weights a step reads}, \"whole\": seconds within calls}.")
        .def_property_readonly("nbytes", &Decoder::nbytes);
}
