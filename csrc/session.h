// A model and a context: what is loaded, run, collected and pruned virtually. RAII, no Python.
#pragma once

#include "capture.h"
#include "collector.h"
#include "context.h"
#include "prediction_block.h"
#include "session_options.h"
#include "tokenizer.h"

#include "llama.h"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace reap {

// Starts llama.cpp and takes over its log, once per process.
void start_engine();

// Sessions of several threads may be opened, used and closed at the same time; one session belongs to one thread at a time.
class Session {
  public:
    explicit Session(const SessionOptions & options);
    Session(const Session &) = delete;
    Session & operator=(const Session &) = delete;

    const std::string & model_path() const { return options_.model_path; }
    const Tokenizer & tokenizer() const { return *tokenizer_; }
    int  n_vocab() const { return tokenizer_->n_vocab(); }
    int  n_ctx_train() const { return llama_model_n_ctx_train(model_.get()); }
    int  ctx_size() const { return options_.ctx_size; }
    int  batch_size() const { return options_.batch_size; }
    int  ubatch_size() const { return options_.ubatch_size; }
    int  n_sequences() const { return options_.n_sequences; }
    int  threads() const { return options_.threads; }
    bool has_cache() const { return context_->has_cache(); }
    // As the file has it: bytes, of any encoding.
    std::optional<std::string> chat_template() const;
    // What the engine warned of while this session was opened, and what follows from its options: sentences, each once.
    const std::vector<std::string> & warnings() const { return warnings_; }

    // Asked once per layer while a batch runs; true ends the batch with Interrupted.
    void set_poll(std::function<bool()> poll);

    // Learns the model's graph and prepares empty sums. `layers`: the MoE layers that the model's file has, ascending, the prediction
    // block's last where there is one.
    void start_profile(const std::vector<int> & layers, size_t n_experts);
    // groups[t]: where token t is counted, Saliency::NOT_COUNTED for nowhere. What is counted waits for commit(); where a batch
    // fails, all that waits is discarded. A batch that begins at position 0 begins anew: the context forgets all sequences.
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
    // `substitutes`: who takes a removed expert's place in the layers that select by token id.
    void set_kept(const std::optional<RouterMask::Kept> & kept, const RouterMask::Substitutes & substitutes);

    // Runs a batch without collecting anything: all logits, or the last token's alone. What a profile is measured against.
    void forward(const TokenBatch & batch, bool all_logits);

    // Takes the place of the adapters that were in force. Paths are bytes.
    void set_adapters(const std::vector<std::string> & paths);

    // Runs a batch as far as the last of `layers`, and gives what a repair is fitted on (capture.h); without `experts` the hidden states alone.
    std::map<int, Capture::Layer> capture(const TokenBatch & batch, const std::vector<int> & layers, bool experts);

    // Calls on_logits(position, logits [n_vocab]) for the positions from `first` on, in a fresh context.
    using OnLogits = std::function<void(size_t position, const float * logits)>;
    void for_each_logits(const std::vector<int32_t> & tokens, size_t first, const OnLogits & on_logits);

    // Runs tokens of any number of sequences after what the context holds of them, and calls on_logits(i, logits [n_vocab]) for the tokens i
    // of the batch that are wanted.
    void run(const TokenBatch & batch, const std::vector<int8_t> & wanted, const OnLogits & on_logits);

    // Forgets all sequences.
    void begin_anew() { forget(false); }

    // `to` begins with all that the context holds of `from`.
    void copy_sequence(int32_t from, int32_t to) { context_->copy_sequence(from, to); }

    // Tokens that all sequences together have room for.
    int cache_size() const { return reap::cache_size(options_); }

    // UsageError where an id is outside the vocabulary.
    void check_tokens(const int32_t * tokens, size_t n_tokens) const;

  private:
    void load_model();
    void create_context();
    void create_prediction_block();
    void collect_warnings();
    void forget(bool with_data);
    void survey(const std::function<void(const TokenBatch & batch, const int8_t * wanted)> & run);
    void check_batch(const TokenBatch & batch, const int32_t * groups) const;

    SessionOptions options_;
    RouterMask     mask_;
    Collector      collector_;
    std::unique_ptr<llama_model, void (*)(llama_model *)> model_{nullptr, llama_model_free};
    std::unique_ptr<Tokenizer>       tokenizer_;
    std::vector<std::unique_ptr<llama_adapter_lora, void (*)(llama_adapter_lora *)>> adapters_;  // in force in the context
    std::unique_ptr<Context>         context_;
    std::unique_ptr<PredictionBlock> prediction_;  // null: the model has none, or it is not to be profiled
    std::vector<std::string>         warnings_;
};

}  // namespace reap
