// The only file that knows Python: casts, the GIL, the map of errors. No logic.
#include "casts.h"
#include "devices.h"
#include "errors.h"
#include "generation.h"
#include "quantizer.h"
#include "scoring.h"
#include "session.h"
#include "vocabulary.h"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numeric>
#include <optional>
#include <regex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using reap::Session;
using reap::SessionOptions;

namespace {

// Runs `work` without the GIL; Ctrl-C is looked for at each of the collector's stops and raised as Python's own exception.
template <typename Work>
auto run(Session & session, Work && work) {
    std::optional<py::error_already_set> signal;
    session.set_poll([&signal] {
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() == 0) {
            return false;
        }
        signal.emplace();
        return true;
    });
    try {
        const py::gil_scoped_release released;
        return work();
    } catch (const reap::Interrupted &) {
        throw std::move(*signal);
    }
}

void profile_batch(Session & session, const Ids & tokens, const Ids & positions, const Ids & sequences, const Ids & groups) {
    const py::ssize_t n = tokens.size();
    if (n == 0 || positions.size() != n || sequences.size() != n || groups.size() != n) {
        throw reap::UsageError("a batch needs as many positions, sequences and groups as it has tokens, and at least one");
    }
    const reap::TokenBatch batch{tokens.data(), positions.data(), sequences.data(), static_cast<size_t>(n)};
    run(session, [&] { session.profile_batch(batch, groups.data()); });
}

void forward(Session & session, const Ids & tokens, bool all_logits) {
    std::vector<int32_t> positions(static_cast<size_t>(tokens.size()));
    std::iota(positions.begin(), positions.end(), 0);
    const std::vector<int32_t> sequences(positions.size(), 0);
    const reap::TokenBatch batch{tokens.data(), positions.data(), sequences.data(), positions.size()};
    run(session, [&] { session.forward(batch, all_logits); });
}

// Layer -> its arrays.
py::dict capture(Session & session, const Ids & tokens, const std::vector<int> & layers, bool experts) {
    std::vector<int32_t> positions(static_cast<size_t>(tokens.size()));
    std::iota(positions.begin(), positions.end(), 0);
    const std::vector<int32_t> sequences(positions.size(), 0);
    const reap::TokenBatch batch{tokens.data(), positions.data(), sequences.data(), positions.size()};
    const auto found = run(session, [&] { return session.capture(batch, layers, experts); });
    const auto size = [](size_t n) { return static_cast<py::ssize_t>(n); };
    py::dict result;
    for (const auto & [number, layer] : found) {
        py::dict arrays;
        arrays["stream"] = to_numpy(layer.stream, {tokens.size(), size(layer.n_embd)});
        if (experts) {
            arrays["ids"] = to_numpy(layer.ids, {tokens.size(), size(layer.n_used)});
            arrays["gates"] = to_numpy(layer.gates, {tokens.size(), size(layer.n_used)});
            arrays["inputs"] = to_numpy(layer.inputs, {tokens.size(), size(layer.n_used), size(layer.n_ff)});
            arrays["gate_before"] = layer.gate_before;
        }
        result[py::int_(number)] = arrays;
    }
    return result;
}

void set_adapters(Session & session, const py::iterable & paths) {
    const std::vector<std::string> bytes = to_paths(paths);
    const py::gil_scoped_release released;
    session.set_adapters(bytes);
}

py::dict sums(const Session & session, size_t group) {
    if (group >= session.n_groups()) {
        throw py::index_error("group");
    }
    const reap::Sums sums = session.sums(group);
    const auto n_layers = static_cast<py::ssize_t>(sums.total_tokens.size());
    const auto n_experts = static_cast<py::ssize_t>(session.n_experts());
    py::dict result;
    reap::for_each_field([&](const auto & field) {
        result[field.name] = to_numpy(sums.*field.values, field.per_expert ? std::vector<py::ssize_t>{n_layers, n_experts} : std::vector{n_layers});
    });
    return result;
}

void restore(Session & session, size_t group, const py::dict & arrays, int64_t n_units) {
    reap::Sums sums;
    reap::for_each_field([&](const auto & field) { from_numpy(arrays, field.name, sums.*field.values); });
    session.restore(group, sums, n_units);
}

py::dict collector_stats(const Session & session) {
    const reap::CollectorStats & stats = session.collector().stats();
    py::dict result;
    result["seconds"] = stats.seconds;
    result["bytes_read"] = static_cast<double>(session.collector().bytes_read());
    result["stops"] = static_cast<double>(stats.stops);
    result["batches"] = static_cast<double>(stats.batches);
    return result;
}

py::array_t<float> logits(Session & session, const Ids & tokens, size_t first) {
    const std::vector<int32_t> ids = to_vector(tokens);
    const std::vector<float> values = run(session, [&] { return reap::logits(session, ids, first); });
    return to_numpy(values, {static_cast<py::ssize_t>(ids.size() - first), session.n_vocab()});
}

py::array_t<double> log_probs(Session & session, const Ids & tokens, size_t first) {
    const std::vector<int32_t> ids = to_vector(tokens);
    const std::vector<double> values = run(session, [&] { return reap::log_probs(session, ids, first); });
    return to_numpy(values, {static_cast<py::ssize_t>(values.size())});
}

py::dict predictions(const reap::Predictions & found) {
    const auto n = static_cast<py::ssize_t>(found.next.size());
    const py::ssize_t k = n == 0 ? 0 : static_cast<py::ssize_t>(found.log_probs.size()) / n;
    py::dict result;
    result["next"] = to_numpy(found.next, {n});
    result["best"] = to_numpy(found.best, {n});
    result["log_probs"] = to_numpy(found.log_probs, {n, k});
    result["rest"] = to_numpy(found.rest, {n});
    if (!found.ids.empty()) {
        result["ids"] = to_numpy(found.ids, {n, k});
    }
    return result;
}

py::dict predict_top(Session & session, const Ids & tokens, size_t first, size_t n_top) {
    const std::vector<int32_t> window = to_vector(tokens);
    return predictions(run(session, [&] { return reap::predict_top(session, window, first, n_top); }));
}

py::dict predict_ids(Session & session, const Ids & tokens, size_t first, const Ids & ids) {
    if (ids.ndim() != 2) {
        throw reap::UsageError("ids has " + std::to_string(ids.ndim()) + " axes, expected 2");
    }
    const std::vector<int32_t> window = to_vector(tokens), wanted = to_vector(ids);
    const auto n_ids = static_cast<size_t>(ids.shape(1));
    return predictions(run(session, [&] { return reap::predict_ids(session, window, first, wanted, n_ids); }));
}

using AsQuestion = std::pair<Ids, std::vector<Ids>>;

std::vector<std::vector<std::pair<double, bool>>> score_continuations(Session & session, const std::vector<AsQuestion> & asked) {
    std::vector<reap::Question> questions;
    for (const auto & [context, continuations] : asked) {
        questions.push_back({to_vector(context), {}});
        for (const Ids & continuation : continuations) {
            questions.back().continuations.push_back(to_vector(continuation));
        }
    }
    std::vector<std::vector<std::pair<double, bool>>> result;
    for (const auto & scores : run(session, [&] { return reap::score_continuations(session, questions); })) {
        auto & found = result.emplace_back();
        for (const reap::ContinuationScore & score : scores) {
            found.emplace_back(score.log_prob, score.greedy);
        }
    }
    return result;
}

using AsPrompt = std::tuple<Ids, size_t, uint32_t, std::vector<std::string>>;

py::list generate(Session & session, const std::vector<AsPrompt> & asked, float temperature, int32_t top_k, float top_p, float min_p) {
    std::vector<reap::Prompt> prompts;
    for (const auto & [tokens, n_new, seed, stops] : asked) {
        prompts.push_back({to_vector(tokens), n_new, seed, stops});
    }
    const reap::Sampling sampling{temperature, top_k, top_p, min_p};
    py::list result;
    for (const reap::Continuation & found : run(session, [&] { return reap::generate(session, prompts, sampling); })) {
        const char * ended = found.ended == reap::Ended::TEXT ? "text" : found.ended == reap::Ended::STOP ? "stop" : "length";
        result.append(py::make_tuple(to_numpy(found.tokens, {static_cast<py::ssize_t>(found.tokens.size())}), ended));
    }
    return result;
}

// By layer that selects its experts by token id: (tokens, Σ v [n_experts], Σ v·w [n_experts, n_experts]) of the router's values.
py::dict router_likeness(const Session & session) {
    py::dict found;
    for (const auto & [layer, likeness] : session.collector().likeness()) {
        const auto & sums = likeness.sums();
        const auto n = static_cast<py::ssize_t>(likeness.n_experts());
        auto products = to_numpy(sums.products, {n, n});
        auto both = products.mutable_unchecked<2>();
        for (py::ssize_t i = 0; i < n; ++i) {
            for (py::ssize_t j = 0; j < i; ++j) {
                both(j, i) = both(i, j);
            }
        }
        found[py::int_(layer)] = py::make_tuple(sums.n_tokens, to_numpy(sums.values, {n}), products);
    }
    return found;
}

void set_kept(Session & session, const std::optional<reap::RouterMask::Kept> & kept, const reap::RouterMask::Substitutes & substitutes) {
    run(session, [&] { session.set_kept(kept, substitutes); });
}

// Owner: Session or Vocabulary
template <typename Owner>
py::array_t<int32_t> tokenize(const Owner & owner, const py::bytes & text, bool add_special, bool parse_special) {
    const std::string bytes = text;
    std::vector<int32_t> ids;
    {
        const py::gil_scoped_release released;
        ids = owner.tokenizer().tokenize(bytes, add_special, parse_special);
    }
    return to_numpy(ids, {static_cast<py::ssize_t>(ids.size())});
}

bool sees_the_future(Session & session) {
    return run(session, [&] { return reap::sees_the_future(session); });
}

template <typename Owner>
std::optional<py::str> chat_template(const Owner & owner) {
    const std::optional<std::string> text = owner.chat_template();
    return text ? std::optional<py::str>(to_text(*text)) : std::nullopt;
}

py::list devices(const std::vector<std::string> & answering) {
    reap::start_engine();
    py::list result;
    for (const reap::DeviceInfo & info : reap::list_devices(answering)) {
        py::dict device;
        device["name"] = to_text(info.name);
        device["description"] = to_text(info.description);
        device["kind"] = info.kind;
        device["buffer_type"] = to_text(info.buffer_type);
        device["free_bytes"] = info.free_bytes;
        device["total_bytes"] = info.total_bytes;
        result.append(device);
    }
    return result;
}

py::list backends() {
    reap::start_engine();
    py::list result;
    for (const reap::BackendInfo & info : reap::list_backends()) {
        py::dict backend;
        backend["name"] = to_text(info.name);
        backend["library"] = from_path(info.library);
        backend["n_devices"] = info.n_devices;
        result.append(backend);
    }
    return result;
}

void load_backends(const py::object & folder) {
    const std::string path = to_path(folder);
    const py::gil_scoped_release released;
    reap::start_engine();
    reap::load_backends(path);
}

void serve_rpc(const std::string & endpoint, int threads) {
    reap::start_engine();
    const py::gil_scoped_release released;
    reap::serve_rpc(endpoint, threads);
}

// `progress` runs inside the engine, which must not see an exception of Python's: it is kept, and raised when the engine is done.
py::dict quantize(const reap::QuantizeOptions & options, const py::function & progress) {
    reap::start_engine();
    std::optional<py::error_already_set> failure;
    std::vector<reap::Fallback> fallbacks;
    {
        const py::gil_scoped_release released;
        fallbacks = reap::quantize(options, [&](int begun, int total) {
            const py::gil_scoped_acquire gil;
            try {
                if (!failure) {
                    progress(begun, total);
                }
            } catch (py::error_already_set & error) {
                failure.emplace(std::move(error));
            }
        });
    }
    if (failure) {
        throw std::move(*failure);
    }
    py::list fell_back;
    for (const reap::Fallback & fallback : fallbacks) {
        fell_back.append(py::make_tuple(to_text(fallback.tensor), to_text(fallback.wanted), to_text(fallback.got)));
    }
    py::dict result;
    result["fallbacks"] = fell_back;
    return result;
}

double quantized_size(const reap::QuantizeOptions & options) {
    reap::start_engine();
    const py::gil_scoped_release released;
    return reap::quantized_size(options);
}

// One name of `reap.errors`, raised with a message that may not be UTF-8.
void raise(const char * type, const std::string & message) {
    PyErr_SetObject(py::module_::import("reap.errors").attr(type).ptr(), to_text(message).ptr());
}

void register_errors() {
    py::register_exception_translator([](std::exception_ptr pending) {
        try {
            if (pending) {
                std::rethrow_exception(pending);
            }
        } catch (const reap::UnsupportedError & error) {
            raise("UnsupportedModelError", error.what());
        } catch (const reap::EngineError & error) {
            raise("EngineError", error.what());
        } catch (const reap::UsageError & error) {
            raise("UsageError", error.what());
        } catch (const std::bad_alloc &) {
            raise("EngineError", "there is not enough memory; a smaller ctx-size, ubatch-size or cache type needs less");
        } catch (const std::logic_error & error) {  // what the C++ library throws inside the engine: at(), stoi(), a length
            raise("EngineError", std::string("the engine failed: ") + error.what());
        } catch (const std::regex_error & error) {
            raise("EngineError", std::string("the engine failed: ") + error.what());
        }
    });
}

void define_session_options(py::module_ & m) {
    py::class_<SessionOptions> options(m, "SessionOptions");
    options.def(py::init<>());
    def_path(options, "model_path", &SessionOptions::model_path);
    options.def_readwrite("model_bytes", &SessionOptions::model_bytes)
        .def_readwrite("ctx_size", &SessionOptions::ctx_size)
        .def_readwrite("batch_size", &SessionOptions::batch_size)
        .def_readwrite("ubatch_size", &SessionOptions::ubatch_size)
        .def_readwrite("n_sequences", &SessionOptions::n_sequences)
        .def_readwrite("cache_size", &SessionOptions::cache_size)
        .def_readwrite("threads", &SessionOptions::threads)
        .def_readwrite("gpu_layers", &SessionOptions::gpu_layers)
        .def_readwrite("devices", &SessionOptions::devices)
        .def_readwrite("override_tensors", &SessionOptions::override_tensors)
        .def_readwrite("kv_overrides", &SessionOptions::kv_overrides)
        .def_readwrite("rpc", &SessionOptions::rpc)
        .def_property(
            "adapters", [](const SessionOptions & self) { return from_paths(self.adapters); },
            [](SessionOptions & self, const py::iterable & paths) { self.adapters = to_paths(paths); })
        .def_readwrite("type_k", &SessionOptions::type_k)
        .def_readwrite("type_v", &SessionOptions::type_v)
        .def_readwrite("flash_attn", &SessionOptions::flash_attn)
        .def_readwrite("prediction_layer", &SessionOptions::prediction_layer)
        .def_readwrite("use_mmap", &SessionOptions::use_mmap)
        .def_readwrite("repack", &SessionOptions::repack)
        .def_readwrite("head_on_host", &SessionOptions::head_on_host)
        .def_readwrite("reduce_on_device", &SessionOptions::reduce_on_device)
        .def_readwrite("stop_early", &SessionOptions::stop_early);
}

void define_quantizer(py::module_ & m) {
    using reap::QuantizeOptions;
    py::class_<QuantizeOptions> options(m, "QuantizeOptions");
    options.def(py::init<>());
    def_path(options, "input", &QuantizeOptions::input);
    def_path(options, "output", &QuantizeOptions::output);
    options.def_readwrite("type", &QuantizeOptions::type)
        .def_readwrite("threads", &QuantizeOptions::threads)
        .def_readwrite("allow_requantize", &QuantizeOptions::allow_requantize)
        .def_readwrite("pure", &QuantizeOptions::pure)
        .def_readwrite("quantize_output", &QuantizeOptions::quantize_output)
        .def_readwrite("output_tensor_type", &QuantizeOptions::output_tensor_type)
        .def_readwrite("token_embedding_type", &QuantizeOptions::token_embedding_type)
        .def_readwrite("tensor_types", &QuantizeOptions::tensor_types)
        .def_readwrite("metadata", &QuantizeOptions::metadata)
        .def(
            "set_imatrix",
            [](QuantizeOptions & self, const std::string & name, const py::array_t<float, py::array::c_style> & values) {
                self.imatrix[name].assign(values.data(), values.data() + values.size());
            },
            py::arg("name"), py::arg("values"));
    m.def("quantize_types", &reap::quantize_types);
    m.def("tensor_types", &reap::tensor_types);
    m.def("quantized_size", &quantized_size, py::arg("options"));
    m.def("quantize", &quantize, py::arg("options"), py::arg("progress"));
}

void define_devices(py::module_ & m) {
    m.def("devices", &devices, py::arg("answering"));
    m.def("rpc_servers", &reap::rpc_servers);
    m.def("backends", &backends);
    m.def("load_backends", &load_backends, py::arg("folder"));
    m.def("serve_rpc", &serve_rpc, py::arg("endpoint"), py::arg("threads"));
    m.def("kv_cache_types", &reap::kv_cache_types);
}

using SessionClass = py::class_<Session>;

// What Session and Vocabulary have in common.
template <typename Owner>
void define_tokenizer(py::class_<Owner> & owner) {
    const auto of_tokenizer = [](auto get) { return [get](const Owner & self) { return std::invoke(get, self.tokenizer()); }; };
    owner.def_property_readonly("n_vocab", &Owner::n_vocab)
        .def_property_readonly("has_tokenizer", of_tokenizer(&reap::Tokenizer::exists))
        .def_property_readonly("add_bos", of_tokenizer(&reap::Tokenizer::add_bos))
        .def_property_readonly("add_eos", of_tokenizer(&reap::Tokenizer::add_eos))
        .def_property_readonly("bos", of_tokenizer(&reap::Tokenizer::bos))
        .def_property_readonly("eos", of_tokenizer(&reap::Tokenizer::eos))
        .def_property_readonly("chat_template", &chat_template<Owner>)
        .def("tokenize", &tokenize<Owner>, py::arg("text"), py::arg("add_special"), py::arg("parse_special"))
        .def("token_text", [](const Owner & self, int token) { return py::bytes(self.tokenizer().token_text(token)); }, py::arg("token"))
        .def("ends_generation", [](const Owner & self, int token) { return self.tokenizer().ends_generation(token); }, py::arg("token"));
}

void define_what_a_session_is(SessionClass & session) {
    define_tokenizer(session);
    session.def(py::init<const SessionOptions &>(), py::arg("options"), py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("n_ctx_train", &Session::n_ctx_train)
        .def_property_readonly("ctx_size", &Session::ctx_size)
        .def_property_readonly("batch_size", &Session::batch_size)
        .def_property_readonly("ubatch_size", &Session::ubatch_size)
        .def_property_readonly("n_sequences", &Session::n_sequences)
        .def_property_readonly("cache_size", &Session::cache_size)
        .def_property_readonly("threads", &Session::threads)
        .def("warnings", [](const Session & self) { return to_texts(self.warnings()); });
}

void define_vocabulary(py::module_ & m) {
    py::class_<reap::Vocabulary> vocabulary(m, "Vocabulary");
    vocabulary.def(py::init([](const py::object & path) {
                       const std::string bytes = to_path(path);
                       const py::gil_scoped_release released;
                       return std::make_unique<reap::Vocabulary>(bytes);
                   }),
                   py::arg("model_path"));
    define_tokenizer(vocabulary);
}

void define_what_a_session_does(SessionClass & session) {
    session
        .def(
            "start_profile",
            [](Session & self, const std::vector<int> & layers, size_t n_experts) {
                run(self, [&] { self.start_profile(layers, n_experts); });
            },
            py::arg("layers"), py::arg("n_experts"))
        .def("profile_batch", &profile_batch, py::arg("tokens"), py::arg("positions"), py::arg("sequences"), py::arg("groups"))
        .def("forward", &forward, py::arg("tokens"), py::arg("all_logits"))
        .def("commit", &Session::commit, py::arg("n_units"))
        .def("restore", &restore, py::arg("group"), py::arg("sums"), py::arg("n_units"))
        .def_property_readonly("units", &Session::units)
        .def("discard", &Session::discard)
        .def_property_readonly("n_groups", &Session::n_groups)
        .def("sums", &sums, py::arg("group"))
        .def("collector_stats", &collector_stats)
        .def("logits", &logits, py::arg("tokens"), py::arg("first"))
        .def("log_probs", &log_probs, py::arg("tokens"), py::arg("first"))
        .def("predict_top", &predict_top, py::arg("tokens"), py::arg("first"), py::arg("n_top"))
        .def("predict_ids", &predict_ids, py::arg("tokens"), py::arg("first"), py::arg("ids"))
        .def("score_continuations", &score_continuations, py::arg("questions"))
        .def("generate", &generate, py::arg("prompts"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"))
        .def("sees_the_future", &sees_the_future)
        .def("set_adapters", &set_adapters, py::arg("paths"))
        .def("capture", &capture, py::arg("tokens"), py::arg("layers"), py::arg("experts"))
        .def("router_likeness", &router_likeness)
        .def("set_kept", &set_kept, py::arg("kept").none(true), py::arg("substitutes") = reap::RouterMask::Substitutes());
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.attr("__llama_cpp_commit__") = REAP_LLAMA_CPP_COMMIT;
    register_errors();
    define_devices(m);
    define_session_options(m);
    define_quantizer(m);
    SessionClass session(m, "Session");
    define_what_a_session_is(session);
    define_what_a_session_does(session);
    define_vocabulary(m);
}
