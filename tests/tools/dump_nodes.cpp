// Independent of reap: runs a model over token ids with nothing but llama.h and writes down what its experts computed, node by node,
// so that tests can add it up again. Can also remove experts while the model runs, by writing −inf over their router's values.
//
//     reap-dump-nodes [--prediction] MODEL SAMPLES OUT [LAYER:ID,ID,... ...]
//
// SAMPLES has one sample per line, token ids with spaces between. OUT is a sequence of records, the samples one after the other:
//     int32 sample, int32 length of the name, the name, int32 type (0: float32, 1: int32), int64[4] shape (innermost first), the values
// Written are all whole-named nodes `ffn_moe_*-LAYER` as they are computed, and at the end of each sample `logits`. With
// --prediction the multi-token-prediction block runs as well, on each token and the hidden state of the one before it (zeros for the
// first), as in llama.cpp's speculative decoding.
#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// llama.cpp's staging interface (src/llama-ext.h), as its common/speculative.cpp uses it
LLAMA_API void llama_set_embeddings_nextn(struct llama_context * ctx, bool value, bool masked);
LLAMA_API float * llama_get_embeddings_nextn(struct llama_context * ctx);

namespace {

struct State {
    std::ofstream out;
    int32_t sample = 0;
    std::map<int, std::vector<int>> removed;
};

// Layer of a node named `ffn_moe_<kind>-<layer>` and nothing after it, or -1. Views inherit names with a suffix.
int layer_of(const char * name) {
    const char * dash = std::strrchr(name, '-');
    if (std::strncmp(name, "ffn_moe_", 8) != 0 || dash == nullptr || dash[1] == '\0') {
        return -1;
    }
    char * end = nullptr;
    const long layer = std::strtol(dash + 1, &end, 10);
    return *end == '\0' ? static_cast<int>(layer) : -1;
}

void write_record(State & state, const std::string & name, int32_t type, const int64_t * shape, const void * values, size_t n_bytes) {
    const int32_t length = static_cast<int32_t>(name.size());
    state.out.write(reinterpret_cast<const char *>(&state.sample), sizeof(state.sample));
    state.out.write(reinterpret_cast<const char *>(&length), sizeof(length));
    state.out.write(name.data(), length);
    state.out.write(reinterpret_cast<const char *>(&type), sizeof(type));
    state.out.write(reinterpret_cast<const char *>(shape), 4 * sizeof(int64_t));
    state.out.write(static_cast<const char *>(values), static_cast<std::streamsize>(n_bytes));
}

// Element by element through the strides, however the tensor lies in memory.
void write_tensor(State & state, const std::string & name, const ggml_tensor * t) {
    if (t->type != GGML_TYPE_F32 && t->type != GGML_TYPE_I32) {
        return;
    }
    std::vector<uint8_t> packed(static_cast<size_t>(ggml_nelements(t)) * 4);
    size_t at = 0;
    for (int64_t i3 = 0; i3 < t->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < t->ne[2]; ++i2) {
            for (int64_t i1 = 0; i1 < t->ne[1]; ++i1) {
                for (int64_t i0 = 0; i0 < t->ne[0]; ++i0, at += 4) {
                    const size_t offset = static_cast<size_t>(i0) * t->nb[0] + static_cast<size_t>(i1) * t->nb[1] +
                                          static_cast<size_t>(i2) * t->nb[2] + static_cast<size_t>(i3) * t->nb[3];
                    std::memcpy(&packed[at], static_cast<const uint8_t *>(t->data) + offset, 4);
                }
            }
        }
    }
    write_record(state, name, t->type == GGML_TYPE_I32 ? 1 : 0, t->ne, packed.data(), packed.size());
}

// The removed experts' values become −inf where the router computes them, and again where a bias was added to probabilities.
void remove_experts(const State & state, const std::string & kind, int layer, ggml_tensor * t) {
    const auto found = state.removed.find(layer);
    if (found == state.removed.end() || (kind != "ffn_moe_logits" && kind != "ffn_moe_probs_biased")) {
        return;
    }
    const float minus_infinity = -std::numeric_limits<float>::infinity();
    for (int64_t token = 0; token < t->ne[1]; ++token) {
        for (const int expert : found->second) {
            const size_t offset = static_cast<size_t>(token) * t->nb[1] + static_cast<size_t>(expert) * t->nb[0];
            std::memcpy(static_cast<uint8_t *>(t->data) + offset, &minus_infinity, sizeof(minus_infinity));
        }
    }
}

bool on_node(ggml_tensor * t, bool ask, void * user_data) {
    auto & state = *static_cast<State *>(user_data);
    const int layer = layer_of(t->name);
    if (ask) {
        return layer >= 0;
    }
    const std::string name = t->name;
    const std::string kind = name.substr(0, name.rfind('-'));
    remove_experts(state, kind, layer, t);
    write_tensor(state, name, t);
    return true;
}

std::vector<std::vector<llama_token>> read_samples(const char * path) {
    std::ifstream in(path);
    std::vector<std::vector<llama_token>> samples;
    for (std::string line; std::getline(in, line);) {
        std::istringstream words(line);
        std::vector<llama_token> tokens;
        for (llama_token token; words >> token;) {
            tokens.push_back(token);
        }
        if (!tokens.empty()) {
            samples.push_back(tokens);
        }
    }
    if (samples.empty()) {
        throw std::runtime_error("no samples");
    }
    return samples;
}

std::map<int, std::vector<int>> read_removals(int n, char ** words) {
    std::map<int, std::vector<int>> removed;
    for (int i = 0; i < n; ++i) {
        std::string word = words[i];
        const size_t colon = word.find(':');
        std::istringstream ids(word.substr(colon + 1));
        for (std::string id; std::getline(ids, id, ',');) {
            removed[std::stoi(word.substr(0, colon))].push_back(std::stoi(id));
        }
    }
    return removed;
}

// hidden: for a prediction block [n_tokens][n_embd], otherwise null.
void decode(llama_context * context, const std::vector<llama_token> & tokens, float * hidden) {
    llama_memory_clear(llama_get_memory(context), true);
    llama_batch batch = llama_batch_init(static_cast<int32_t>(tokens.size()), 0, 1);
    batch.embd = hidden;
    batch.n_tokens = static_cast<int32_t>(tokens.size());
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        batch.token[i] = tokens[static_cast<size_t>(i)];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    const int32_t status = llama_decode(context, batch);
    llama_synchronize(context);
    batch.embd = nullptr; // not the batch's to free
    llama_batch_free(batch);
    if (status != 0) {
        throw std::runtime_error("decode failed with status " + std::to_string(status));
    }
}

void run_sample(State & state, llama_context * context, llama_context * prediction, const std::vector<llama_token> & tokens) {
    decode(context, tokens, nullptr);
    const llama_model * model = llama_get_model(context);
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<float> logits;
    for (int32_t i = 0; i < static_cast<int32_t>(tokens.size()); ++i) {
        const float * row = llama_get_logits_ith(context, i);
        logits.insert(logits.end(), row, row + n_vocab);
    }
    const int64_t shape[4] = {n_vocab, static_cast<int64_t>(tokens.size()), 1, 1};
    write_record(state, "logits", 0, shape, logits.data(), logits.size() * sizeof(float));
    if (prediction != nullptr) {
        const size_t n_embd = static_cast<size_t>(llama_model_n_embd_out(model)); // hyper-connections make it wider
        const float * hidden = llama_get_embeddings_nextn(context);
        std::vector<float> shifted(n_embd, 0.0f);
        shifted.insert(shifted.end(), hidden, hidden + (tokens.size() - 1) * n_embd);
        decode(prediction, tokens, shifted.data());
    }
    state.sample += 1;
}

void run(bool with_prediction, int argc, char ** argv) {
    State state;
    const auto samples = read_samples(argv[2]);
    state.removed = read_removals(argc - 4, argv + 4);
    size_t longest = 0;
    for (const auto & tokens : samples) {
        longest = std::max(longest, tokens.size());
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            std::fputs(text, stderr);
        }
    }, nullptr);
    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    ggml_backend_dev_t no_devices[] = {nullptr};
    model_params.devices = no_devices;
    model_params.load_mtp = with_prediction;
    llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (model == nullptr) {
        throw std::runtime_error("the model cannot be loaded");
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = static_cast<uint32_t>(longest);
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.cb_eval = on_node;
    params.cb_eval_user_data = &state;
    llama_context * context = llama_init_from_model(model, params);
    if (context == nullptr) {
        throw std::runtime_error("no context");
    }
    llama_context * prediction = nullptr;
    if (with_prediction) {
        llama_set_embeddings_nextn(context, true, false);
        params.ctx_type = LLAMA_CONTEXT_TYPE_MTP;
        prediction = llama_init_from_model(model, params);
        if (prediction == nullptr) {
            throw std::runtime_error("no context for the prediction block");
        }
    }
    state.out.open(argv[3], std::ios::binary);
    state.out.exceptions(std::ios::failbit | std::ios::badbit);
    for (const auto & tokens : samples) {
        run_sample(state, context, prediction, tokens);
    }
    state.out.close();
    if (prediction != nullptr) {
        llama_free(prediction);
    }
    llama_free(context);
    llama_model_free(model);
}

}  // namespace

int main(int argc, char ** argv) {
    const bool with_prediction = argc > 1 && std::string(argv[1]) == "--prediction";
    if (with_prediction) {
        argv += 1;
        argc -= 1;
    }
    if (argc < 4) {
        std::fputs("usage: reap-dump-nodes [--prediction] MODEL SAMPLES OUT [LAYER:ID,ID,... ...]\n", stderr);
        return 2;
    }
    try {
        run(with_prediction, argc, argv);
    } catch (const std::exception & error) {
        std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
        return 1;
    }
    return 0;
}
