#include "session_options.h"

#include "errors.h"

#include "ggml.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <regex>
#include <thread>

namespace reap {

namespace {

// Those that llama.cpp's own programs take (common/arg.cpp, kv_cache_types): others end the process.
constexpr ggml_type CACHE_TYPES[] = {GGML_TYPE_F32,  GGML_TYPE_F16,    GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                                     GGML_TYPE_Q4_1, GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1};

constexpr int    MAX_TOKENS = 1 << 30;     // of a context; the engine rounds up, in 32 bits
constexpr size_t MAX_PATTERN = 1024;       // bytes of a regular expression, whose compiler calls itself
constexpr size_t MAX_OVERRIDE_TEXT = 127;  // llama_model_kv_override has 128 bytes, the last of them zero

ggml_type cache_type(const std::string & name) {
    std::string known;
    for (const ggml_type type : CACHE_TYPES) {
        if (name == ggml_type_name(type)) {
            return type;
        }
        known += (known.empty() ? "" : ", ") + std::string(ggml_type_name(type));
    }
    throw UsageError("the engine has no cache type '" + name + "'; there is " + known);
}

llama_flash_attn_type flash_attention(const std::string & name) {
    static const std::map<std::string, llama_flash_attn_type> types = {
        {"auto", LLAMA_FLASH_ATTN_TYPE_AUTO}, {"on", LLAMA_FLASH_ATTN_TYPE_ENABLED}, {"off", LLAMA_FLASH_ATTN_TYPE_DISABLED}};
    const auto found = types.find(name);
    if (found == types.end()) {
        throw UsageError("flash attention is 'auto', 'on' or 'off', not '" + name + "'");
    }
    return found->second;
}

void check_range(const char * name, int value, int least, int most) {
    if (value < least || value > most) {
        throw UsageError(std::string(name) + " is " + std::to_string(value) + ", expected " + std::to_string(least) + " to " + std::to_string(most));
    }
}

void check_pattern(const std::string & pattern) {
    if (pattern.empty() || pattern.size() > MAX_PATTERN || pattern.find('\0') != std::string::npos) {
        throw UsageError("a pattern of " + std::to_string(pattern.size()) + " bytes for tensors' names, expected 1 to " + std::to_string(MAX_PATTERN));
    }
    try {
        const std::regex compiled(pattern);
    } catch (const std::regex_error & error) {
        throw UsageError("'" + pattern + "' is not a regular expression: " + error.what());
    }
}

template <typename Number, typename Parse>
Number parsed(const std::string & text, const char * kind, const std::string & key, Parse parse) {
    char * end = nullptr;
    errno = 0;
    const Number value = parse(text.c_str(), &end);
    if (text.empty() || end != text.c_str() + text.size() || errno != 0) {
        throw UsageError("the override of " + key + " is '" + text + "', expected " + kind);
    }
    return value;
}

llama_model_kv_override metadata_override(const std::array<std::string, 3> & entry) {
    const auto & [key, type, value] = entry;
    if (key.empty() || key.size() > MAX_OVERRIDE_TEXT || key.find('\0') != std::string::npos) {
        throw UsageError("an override's key has " + std::to_string(key.size()) + " bytes, expected 1 to " + std::to_string(MAX_OVERRIDE_TEXT));
    }
    llama_model_kv_override result{};
    std::snprintf(result.key, sizeof result.key, "%s", key.c_str());
    if (type == "int") {
        result.tag = LLAMA_KV_OVERRIDE_TYPE_INT;
        result.val_i64 = parsed<int64_t>(value, "a whole number", key, [](const char * text, char ** end) { return std::strtoll(text, end, 10); });
    } else if (type == "float") {
        result.tag = LLAMA_KV_OVERRIDE_TYPE_FLOAT;
        result.val_f64 = parsed<double>(value, "a number", key, [](const char * text, char ** end) { return std::strtod(text, end); });
        // an epsilon below zero ends the process on the engine's own threads
        if (!std::isfinite(result.val_f64) || (result.val_f64 < 0 && key.find("epsilon") != std::string::npos)) {
            throw UsageError("the override of " + key + " is '" + value + "', expected a finite number" + (std::isfinite(result.val_f64) ? " of at least 0" : ""));
        }
    } else if (type == "bool") {
        if (value != "true" && value != "false") {
            throw UsageError("the override of " + key + " is '" + value + "', expected true or false");
        }
        result.tag = LLAMA_KV_OVERRIDE_TYPE_BOOL;
        result.val_bool = value == "true";
    } else if (type == "str") {
        if (value.size() > MAX_OVERRIDE_TEXT || value.find('\0') != std::string::npos) {
            throw UsageError("the override of " + key + " has " + std::to_string(value.size()) + " bytes, expected at most " + std::to_string(MAX_OVERRIDE_TEXT));
        }
        result.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
        std::snprintf(result.val_str, sizeof result.val_str, "%s", value.c_str());
    } else {
        throw UsageError("the override of " + key + " has the type '" + type + "', expected int, float, bool or str");
    }
    return result;
}

// The whole number at a key of the model's metadata; `otherwise` where there is none.
int64_t metadata_number(const llama_model * model, const std::string & key, int64_t otherwise) {
    char text[32];
    const int32_t n = llama_model_meta_val_str(model, key.c_str(), text, sizeof text);
    return n > 0 && n < static_cast<int32_t>(sizeof text) ? std::strtoll(text, nullptr, 10) : otherwise;
}

}  // namespace

std::vector<std::string> kv_cache_types() {
    std::vector<std::string> names;
    for (const ggml_type type : CACHE_TYPES) {
        names.emplace_back(ggml_type_name(type));
    }
    return names;
}

void check(const SessionOptions & options) {
    if (options.model_path.empty() || options.model_path.find('\0') != std::string::npos) {
        throw UsageError("the model's path is empty or has a zero byte in it");
    }
    check_range("ctx_size", options.ctx_size, 0, MAX_TOKENS);
    check_range("batch_size", options.batch_size, 0, MAX_TOKENS);
    check_range("ubatch_size", options.ubatch_size, 0, MAX_TOKENS);
    check_range("n_sequences", options.n_sequences, 1, MAX_TOKENS);
    check_range("cache_size", options.cache_size, 0, MAX_TOKENS);
    check_range("threads", options.threads, 0, GGML_MAX_N_THREADS);
    check_range("prediction_layer", options.prediction_layer, -1, MAX_TOKENS);
    cache_type(options.type_k);
    cache_type(options.type_v);
    flash_attention(options.flash_attn);
    for (const auto & [pattern, type] : options.override_tensors) {
        check_pattern(pattern);
    }
    for (const auto & entry : options.kv_overrides) {
        metadata_override(entry);
    }
}

SessionOptions resolved(const SessionOptions & options, const llama_model * model) {
    SessionOptions o = options;
    if (o.ctx_size == 0) {
        o.ctx_size = std::clamp(llama_model_n_ctx_train(model), 1, MAX_TOKENS);
    }
    // a recurrent state is kept per sequence, and its batches are cut into equal parts
    const bool recurrent = llama_model_is_recurrent(model) || llama_model_is_hybrid(model);
    o.n_sequences = recurrent ? 1 : std::clamp(o.n_sequences, 1, static_cast<int>(llama_max_parallel_sequences()));
    if (o.n_sequences == 1) {  // a context gives no room for more
        o.ubatch_size = std::min(o.ubatch_size, o.ctx_size);
        o.batch_size = std::min(o.batch_size, o.ctx_size);
    }
    o.ubatch_size = std::max(2, o.ubatch_size);  // the survey runs two tokens in one graph
    o.batch_size = std::max(o.batch_size, o.ubatch_size);
    // llama_context asserts that its outputs hold a token of every sequence
    o.n_sequences = std::min(o.n_sequences, o.ubatch_size);
    if (o.threads == 0) {
        o.threads = std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, GGML_MAX_N_THREADS);
    }
    return o;
}

// With flash attention the engine looks at this itself (llama_init_from_model); without it, it ends the process.
void check_cache(const SessionOptions & options, const llama_model * model) {
    char architecture[128] = "";
    llama_model_meta_val_str(model, "general.architecture", architecture, sizeof architecture);
    const int64_t otherwise = llama_model_n_embd(model) / std::max(1, llama_model_n_head(model));
    for (const auto & [name, kind] : {std::pair(options.type_k, "key_length"), std::pair(options.type_v, "value_length")}) {
        const int64_t block = ggml_blck_size(cache_type(name));
        for (const char * variant : {"", "_mla", "_swa"}) {
            const int64_t width = metadata_number(model, std::string(architecture) + ".attention." + kind + variant, otherwise);
            if (width % block != 0) {
                throw UsageError("the model's attention heads have " + std::to_string(width) + " values, which a cache of type " + name +
                                 " (blocks of " + std::to_string(block) + ") cannot hold; f16 can");
            }
        }
    }
}

ModelParameters::ModelParameters(const SessionOptions & options, const DevicesLock & lock) {
    DeviceChoice choice = choose_devices(lock, options.devices, options.rpc);
    devices_ = std::move(choice.devices);
    devices_.push_back(nullptr);
    if (choice.is_set) {
        values.devices = devices_.data();
    }
    for (const auto & [pattern, type] : options.override_tensors) {
        buffers_.push_back({pattern.c_str(), find_buffer_type(lock, type)});
    }
    if (options.head_on_host) {
        const ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        buffers_.push_back({"^(output|token_embd)", ggml_backend_dev_buffer_type(cpu)});
    }
    buffers_.push_back({nullptr, nullptr});
    values.tensor_buft_overrides = buffers_.data();
    for (const auto & entry : options.kv_overrides) {
        metadata_.push_back(metadata_override(entry));
    }
    if (!metadata_.empty()) {
        metadata_.emplace_back();  // the list ends with an entry without a key
        values.kv_overrides = metadata_.data();
    }
    values.n_gpu_layers = std::max(-1, options.gpu_layers);
    values.load_mode = options.use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    values.use_extra_bufts = options.repack;
    values.load_mtp = options.prediction_layer >= 0;
}

int cache_size(const SessionOptions & options) {
    // sequences that share a batch share the cache as well: one long window, or one batch of short ones
    return options.n_sequences > 1 ? std::max({options.ctx_size, options.batch_size, options.cache_size}) : std::max(2, options.ctx_size);
}

llama_context_params context_parameters(const SessionOptions & options) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<uint32_t>(cache_size(options));
    params.n_batch = static_cast<uint32_t>(options.batch_size);
    params.n_ubatch = static_cast<uint32_t>(options.ubatch_size);
    params.n_seq_max = static_cast<uint32_t>(options.n_sequences);
    params.kv_unified = options.n_sequences > 1;
    params.n_threads = params.n_threads_batch = options.threads;
    params.flash_attn_type = flash_attention(options.flash_attn);
    params.type_k = cache_type(options.type_k);
    params.type_v = cache_type(options.type_v);
    params.no_perf = true;
    return params;
}

}  // namespace reap
