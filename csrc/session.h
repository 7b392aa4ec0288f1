// A model and a context: the only caller of llama_*. RAII, no Python.
#pragma once

#include "collector.h"

#include "llama.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace reap {

struct SessionOptions {
    std::string model_path;
    uint64_t    model_bytes = 0;  // of its files, which are mapped
    int  ctx_size = 2048;  // tokens of one sequence
    int  batch_size = 0;   // tokens of one decode; 0: ubatch_size
    int  ubatch_size = 512;
    int  n_sequences = 1;  // that may share a batch; 1 where the model does not allow it
    int  threads = 0;  // 0: the cores that this process may use
    int  gpu_layers = -1;
    std::vector<std::string> devices;
    std::vector<std::pair<std::string, std::string>> override_tensors;
    std::vector<std::string> rpc;
    std::string type_k = "f16";
    std::string type_v = "f16";
    std::string flash_attn = "auto";
    int  prediction_layer = -1;  // the block of experts that predicts the token after the next, where it is to be profiled; -1: none
    bool use_mmap = true;
    bool repack = true;
    // the output head stays in host memory: a profile stops before it, and its logits would be read back from the device all the same
    bool head_on_host = false;
    // for comparison: read whole outputs from devices; run the graph to its end
    bool reduce_on_device = true;
    bool stop_early = true;
};

// What a model predicts at n positions, natural logarithms.
struct Predictions {
    std::vector<double>  next;       // [n]: of the token that comes
    std::vector<int32_t> best;       // [n]: the most probable token, the lowest id where several are
    std::vector<int32_t> ids;        // [n][k]: the tokens that log_probs is about
    std::vector<float>   log_probs;  // [n][k]
    std::vector<double>  rest;       // [n]: probability (not its logarithm) of all other tokens
};

// One batch: arrays [n_tokens].
struct TokenBatch {
    const int32_t * tokens;
    const int32_t * positions;
    const int32_t * sequences;
    size_t          n_tokens;
};

// Starts llama.cpp and takes over its log, once per process.
void start_engine();

class Session {
  public:
    explicit Session(const SessionOptions & options);
    Session(const Session &) = delete;
    Session & operator=(const Session &) = delete;

    int  n_vocab() const;
    int  n_ctx_train() const;
    int  ctx_size() const { return options_.ctx_size; }
    int  batch_size() const { return options_.batch_size; }
    int  ubatch_size() const { return options_.ubatch_size; }
    int  n_sequences() const { return options_.n_sequences; }
    int  threads() const { return options_.threads; }
    bool has_tokenizer() const;
    bool add_bos() const;
    bool add_eos() const;
    int  bos() const;
    int  eos() const;
    std::optional<std::string> chat_template() const;
    std::vector<int32_t> tokenize(const std::string & text, bool add_special, bool parse_special) const;
    std::string token_text(int token) const;

    // Asked once per layer while a batch runs; true ends the batch with Interrupted.
    void set_poll(std::function<bool()> poll);

    void start_profile(const std::vector<int> & layers, size_t n_experts);
    // groups[t]: where token t is counted, Saliency::NOT_COUNTED for nowhere. What is counted waits for commit(); where a batch
    // fails, all that waits is discarded.
    void profile_batch(const TokenBatch & batch, const int32_t * groups);
    void commit(int64_t n_units);
    // The sums of a group, the prediction layer's row last.
    Sums sums(size_t group) const;
    void restore(size_t group, const Sums & sums, int64_t n_units);
    int64_t units() const { return collector_.units(); }
    void discard();
    size_t n_groups() const { return collector_.saliency().n_groups(); }
    size_t n_experts() const { return collector_.saliency().n_experts(); }
    const Collector & collector() const { return collector_; }

    // Virtual pruning: from now on as if each layer had only the experts that `kept` says; nothing: all of them again.
    void set_kept(const std::optional<RouterMask::Kept> & kept);

    // Runs a batch without collecting anything: all logits, or the last token's alone. What a profile is measured against.
    void forward(const TokenBatch & batch, bool all_logits);

    // Logits [n - first][n_vocab] of the positions from `first` on, in a fresh context.
    std::vector<float> logits(const std::vector<int32_t> & tokens, size_t first);
    // ln p(tokens[i + 1] | tokens[..i]) for i = first .. n - 2, in a fresh context.
    std::vector<double> log_probs(const std::vector<int32_t> & tokens, size_t first);
    // The same with the `n_top` most probable tokens of each position, all of them in the order of the vocabulary where n_top is as large.
    Predictions predict_top(const std::vector<int32_t> & tokens, size_t first, size_t n_top);
    // The same with the tokens that `ids` [n - 1 - first][n_ids] says.
    Predictions predict_ids(const std::vector<int32_t> & tokens, size_t first, const std::vector<int32_t> & ids, size_t n_ids);
    // The most probable tokens one after another behind `tokens`, at most n_new, until one that ends a generation (which is included).
    std::vector<int32_t> generate(const std::vector<int32_t> & tokens, size_t n_new);
    bool ends_generation(int token) const;

  private:
    using OnLogits = std::function<void(size_t position, const float * logits)>;

    void resolve_options();
    void load_model();
    llama_context * create_context(Collector & collector, llama_context_type type);
    bool has_prediction() const { return prediction_context_ != nullptr; }
    void survey_prediction(const TokenBatch & batch, const int8_t * wanted, size_t n_experts);
    void run_prediction(const TokenBatch & batch, const int32_t * groups);
    void forget();
    void check_tokens(const int32_t * tokens, size_t n_tokens) const;
    void survey(const std::function<void(const TokenBatch & batch, const int8_t * wanted)> & run);
    void check_batch(const TokenBatch & batch, const int32_t * groups) const;
    // `hidden`: [n_tokens][n_embd] for the prediction block, which takes them beside the tokens
    void decode(llama_context * context, Collector & collector, const TokenBatch & batch, const int8_t * wanted, float * hidden = nullptr);
    void for_each_logits(const std::vector<int32_t> & tokens, size_t first, const OnLogits & on_logits);

    SessionOptions options_;
    RouterMask     mask_;
    Collector      collector_;
    std::unique_ptr<llama_model, void (*)(llama_model *)>     model_{nullptr, llama_model_free};
    std::unique_ptr<llama_context, void (*)(llama_context *)> context_{nullptr, llama_free};
    const llama_vocab * vocab_ = nullptr;

    // multi-token prediction: a context of its own over the same weights, fed with the hidden states of the layers before it
    Collector          prediction_;
    std::unique_ptr<llama_context, void (*)(llama_context *)> prediction_context_{nullptr, llama_free};
    std::vector<float> last_hidden_;  // of the batch before, for a window that goes on
};

}  // namespace reap
