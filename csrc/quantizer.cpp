#include "quantizer.h"

#include "errors.h"
#include "log_sink.h"

#include "llama.h"

#include <cstdio>
#include <cstring>

namespace reap {

namespace {

// the names that llama-quantize takes
const std::map<std::string, llama_ftype> TYPES = {
    {"F32", LLAMA_FTYPE_ALL_F32},
    {"F16", LLAMA_FTYPE_MOSTLY_F16},
    {"BF16", LLAMA_FTYPE_MOSTLY_BF16},
    {"Q8_0", LLAMA_FTYPE_MOSTLY_Q8_0},
    {"Q6_K", LLAMA_FTYPE_MOSTLY_Q6_K},
    {"Q5_K", LLAMA_FTYPE_MOSTLY_Q5_K_M},
    {"Q5_K_M", LLAMA_FTYPE_MOSTLY_Q5_K_M},
    {"Q5_K_S", LLAMA_FTYPE_MOSTLY_Q5_K_S},
    {"Q5_0", LLAMA_FTYPE_MOSTLY_Q5_0},
    {"Q5_1", LLAMA_FTYPE_MOSTLY_Q5_1},
    {"Q4_K", LLAMA_FTYPE_MOSTLY_Q4_K_M},
    {"Q4_K_M", LLAMA_FTYPE_MOSTLY_Q4_K_M},
    {"Q4_K_S", LLAMA_FTYPE_MOSTLY_Q4_K_S},
    {"Q4_0", LLAMA_FTYPE_MOSTLY_Q4_0},
    {"Q4_1", LLAMA_FTYPE_MOSTLY_Q4_1},
    {"Q3_K", LLAMA_FTYPE_MOSTLY_Q3_K_M},
    {"Q3_K_L", LLAMA_FTYPE_MOSTLY_Q3_K_L},
    {"Q3_K_M", LLAMA_FTYPE_MOSTLY_Q3_K_M},
    {"Q3_K_S", LLAMA_FTYPE_MOSTLY_Q3_K_S},
    {"Q2_K", LLAMA_FTYPE_MOSTLY_Q2_K},
    {"Q2_K_S", LLAMA_FTYPE_MOSTLY_Q2_K_S},
    {"Q2_0", LLAMA_FTYPE_MOSTLY_Q2_0},
    {"Q1_0", LLAMA_FTYPE_MOSTLY_Q1_0},
    {"IQ4_NL", LLAMA_FTYPE_MOSTLY_IQ4_NL},
    {"IQ4_XS", LLAMA_FTYPE_MOSTLY_IQ4_XS},
    {"IQ3_M", LLAMA_FTYPE_MOSTLY_IQ3_M},
    {"IQ3_S", LLAMA_FTYPE_MOSTLY_IQ3_S},
    {"IQ3_XS", LLAMA_FTYPE_MOSTLY_IQ3_XS},
    {"IQ3_XXS", LLAMA_FTYPE_MOSTLY_IQ3_XXS},
    {"IQ2_M", LLAMA_FTYPE_MOSTLY_IQ2_M},
    {"IQ2_S", LLAMA_FTYPE_MOSTLY_IQ2_S},
    {"IQ2_XS", LLAMA_FTYPE_MOSTLY_IQ2_XS},
    {"IQ2_XXS", LLAMA_FTYPE_MOSTLY_IQ2_XXS},
    {"IQ1_M", LLAMA_FTYPE_MOSTLY_IQ1_M},
    {"IQ1_S", LLAMA_FTYPE_MOSTLY_IQ1_S},
    {"TQ1_0", LLAMA_FTYPE_MOSTLY_TQ1_0},
    {"TQ2_0", LLAMA_FTYPE_MOSTLY_TQ2_0},
    {"MXFP4_MOE", LLAMA_FTYPE_MOSTLY_MXFP4_MOE},
    {"COPY", LLAMA_FTYPE_ALL_F32},
};

bool can_be_given(ggml_type type) {
    return ggml_type_name(type) != nullptr && ggml_blck_size(type) > 0 && ggml_type_size(type) > 0;
}

ggml_type tensor_type(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        if (can_be_given(type) && name == ggml_type_name(type)) {
            return type;
        }
    }
    throw UsageError("the engine has no tensor type '" + name + "'");
}

// What llama.cpp's parameters point to, alive as long as they are.
struct Parameters {
    std::vector<llama_model_imatrix_data>     imatrix;
    std::vector<llama_model_kv_override>      metadata;
    std::vector<llama_model_tensor_override>  tensor_types;
    llama_model_quantize_params               values = llama_model_quantize_default_params();

    explicit Parameters(const QuantizeOptions & options) {
        const auto found = TYPES.find(options.type);
        if (found == TYPES.end()) {
            throw UsageError("the engine cannot quantise to '" + options.type + "'");
        }
        values.ftype = found->second;
        values.only_copy = options.type == "COPY";
        values.nthread = options.threads;
        values.allow_requantize = options.allow_requantize;
        values.pure = options.pure;
        values.quantize_output_tensor = options.quantize_output;
        if (!options.output_tensor_type.empty()) {
            values.output_tensor_type = tensor_type(options.output_tensor_type);
        }
        if (!options.token_embedding_type.empty()) {
            values.token_embedding_type = tensor_type(options.token_embedding_type);
        }
        for (const auto & [pattern, type] : options.tensor_types) {
            tensor_types.push_back({pattern.c_str(), tensor_type(type)});
        }
        for (const auto & [name, data] : options.imatrix) {
            imatrix.push_back({name.c_str(), data.data(), data.size()});
        }
        for (const auto & [key, value] : options.metadata) {
            metadata.push_back(pair(key, value));
        }
        // each list ends with an entry without a name, and where it is empty there is none
        if (!tensor_types.empty()) {
            tensor_types.push_back({nullptr, GGML_TYPE_COUNT});
            values.tt_overrides = tensor_types.data();
        }
        if (!imatrix.empty()) {
            imatrix.push_back({nullptr, nullptr, 0});
            values.imatrix = imatrix.data();
        }
        if (!metadata.empty()) {
            metadata.emplace_back();
            values.kv_overrides = metadata.data();
        }
    }
    Parameters(const Parameters &) = delete;
    Parameters & operator=(const Parameters &) = delete;

  private:
    static llama_model_kv_override pair(const std::string & key, const std::variant<std::string, int64_t> & value) {
        llama_model_kv_override result{};
        std::snprintf(result.key, sizeof result.key, "%s", key.c_str());
        if (const auto * text = std::get_if<std::string>(&value)) {
            result.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
            std::snprintf(result.val_str, sizeof result.val_str, "%s", text->c_str());
        } else {
            result.tag = LLAMA_KV_OVERRIDE_TYPE_INT;
            result.val_i64 = std::get<int64_t>(value);
        }
        return result;
    }
};

// Hears in the log which tensors fell back (src/llama-quant.cpp, tensor_type_fallback: one line, in pieces).
class FallbackListener {
  public:
    void hear(const std::string & text) {
        char tensor[128] = "";
        char type[32] = "";
        if (std::sscanf(text.c_str(), "warning: %127s - ncols %*d not divisible by %*d (required for type %31[^)]", tensor, type) == 2) {
            under_way_ = {tensor, type, ""};
        } else if (!under_way_.tensor.empty() && std::sscanf(text.c_str(), "-> falling back to %31s", type) == 1) {
            under_way_.got = type;
            found_.push_back(std::move(under_way_));
            under_way_ = {};
        }
    }

    std::vector<Fallback> found() const { return found_; }

  private:
    Fallback              under_way_;
    std::vector<Fallback> found_;
};

void run(const QuantizeOptions & options, const llama_model_quantize_params & values, const LogListener & listener) {
    clear_log();
    const ListenToLog listening(listener);
    if (llama_model_quantize(options.input.c_str(), options.output.c_str(), &values) != 0) {
        throw EngineError("llama.cpp could not quantise '" + options.input + "': " + log_tail());
    }
}

}  // namespace

std::map<std::string, int> quantize_types() {
    return {TYPES.begin(), TYPES.end()};
}

std::vector<std::string> tensor_types() {
    std::vector<std::string> names;
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        if (can_be_given(static_cast<ggml_type>(i))) {
            names.emplace_back(ggml_type_name(static_cast<ggml_type>(i)));
        }
    }
    return names;
}

double quantized_size(const QuantizeOptions & options) {
    Parameters parameters(options);
    parameters.values.dry_run = true;
    double mebibytes = 0;
    run(options, parameters.values, [&mebibytes](const std::string & text) {
        const size_t found = text.find("quant size  =");  // src/llama-quant.cpp, llama_model_quantize_impl
        if (found != std::string::npos) {
            std::sscanf(text.c_str() + found, "quant size  = %lf MiB", &mebibytes);
        }
    });
    return mebibytes * 1024 * 1024;
}

std::vector<Fallback> quantize(const QuantizeOptions & options, const std::function<void(int, int)> & progress) {
    const Parameters parameters(options);
    FallbackListener fallbacks;
    run(options, parameters.values, [&](const std::string & text) {
        int begun = 0;
        int total = 0;
        if (std::sscanf(text.c_str(), "[%d/%d]", &begun, &total) == 2) {  // the same place
            progress(begun, total);
        }
        fallbacks.hear(text);
    });
    return fallbacks.found();
}

}  // namespace reap
