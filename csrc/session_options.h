// What a session is opened with, checked before llama.cpp sees it (it ends the process where it meets what it did not expect), and in
// llama.cpp's own words.
#pragma once

#include "devices.h"

#include "llama.h"

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace reap {

struct SessionOptions {
    std::string model_path;        // bytes, as the file system has them
    uint64_t    model_bytes = 0;   // of its files, which are mapped
    int  ctx_size = 2048;          // tokens of one sequence; 0: what the model was trained with
    int  batch_size = 0;           // tokens of one decode; 0: ubatch_size
    int  ubatch_size = 512;
    int  n_sequences = 1;          // that may share a batch; 1 where the model does not allow it
    int  cache_size = 0;           // tokens that all sequences together have room for, where there are several; at least ctx_size and batch_size
    int  threads = 0;              // 0: the cores of the machine
    int  gpu_layers = -1;          // negative: all
    std::vector<std::string> devices;
    std::vector<std::pair<std::string, std::string>> override_tensors;  // (regular expression, buffer type)
    std::vector<std::array<std::string, 3>>          kv_overrides;      // (key of the model's metadata, int | float | bool | str, value)
    std::vector<std::string> rpc;  // "host:port"
    std::vector<std::string> adapters;  // paths as bytes of LoRA adapters, each in full force
    std::string type_k = "f16";    // of kv_cache_types()
    std::string type_v = "f16";
    std::string flash_attn = "auto";
    int  prediction_layer = -1;    // the block of experts that predicts the token after the next, where it is to be profiled; -1: none
    bool use_mmap = true;
    bool repack = true;
    // the output head stays in host memory: a profile stops before it, and its logits would be read back from the device all the same
    bool head_on_host = false;
    // for comparison: read whole outputs from devices; run the graph to its end
    bool reduce_on_device = true;
    bool stop_early = true;
};

// The types that the engine can keep the cache in.
std::vector<std::string> kv_cache_types();

// UsageError where an option cannot be, whatever the model.
void check(const SessionOptions & options);

// The same with what the model decides: sizes that were left open, and those that it does not allow.
SessionOptions resolved(const SessionOptions & options, const llama_model * model);

// Tokens that all sequences of a context together have room for, of resolved options.
int cache_size(const SessionOptions & options);

// UsageError where this model cannot have a cache of these types.
void check_cache(const SessionOptions & options, const llama_model * model);

// What llama_model_load_from_file is given, alive as long as it.
class ModelParameters {
  public:
    ModelParameters(const SessionOptions & options, const DevicesLock & lock);
    ModelParameters(const ModelParameters &) = delete;
    ModelParameters & operator=(const ModelParameters &) = delete;

    llama_model_params values = llama_model_default_params();

  private:
    std::vector<ggml_backend_dev_t>                 devices_;
    std::vector<llama_model_tensor_buft_override>   buffers_;
    std::vector<llama_model_kv_override>            metadata_;
};

// What llama_init_from_model is given, without the callback.
llama_context_params context_parameters(const SessionOptions & options);

}  // namespace reap
