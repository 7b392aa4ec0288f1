// One context of a model, with a collector in its graph: the only caller of llama_decode.
#pragma once

#include "collector.h"
#include "router_mask.h"
#include "session_options.h"

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <memory>

namespace reap {

// One batch: arrays [n_tokens].
struct TokenBatch {
    const int32_t * tokens;
    const int32_t * positions;
    const int32_t * sequences;
    size_t          n_tokens;
};

class Context {
  public:
    // `collector` and `mask` (which may be null) are not owned; `trunk` is the context of the layers before a prediction block.
    // EngineError with the end of the engine's log where it cannot be made.
    Context(llama_model * model, const SessionOptions & options, Collector & collector, RouterMask * mask, const Context * trunk = nullptr);

    // False where every token sees every other one (diffusion models), so that a window has to be one ubatch.
    bool has_cache() const;

    // Forgets all sequences; `with_data`: what the cache holds as well.
    void forget(bool with_data);

    // `to` begins with all that the cache holds of `from`, which the two share.
    void copy_sequence(int32_t from, int32_t to);

    // Adds the products of adapters, each with its scale, to those of the model's weights from now on.
    void set_adapters(std::vector<llama_adapter_lora *> adapters, std::vector<float> scales);

    // The most tokens of a batch.
    size_t batch_size() const;

    // Runs a batch. wanted[i]: whether the logits of token i are. `hidden`: [n_tokens][n_embd] for a prediction block, which takes them
    // beside the tokens. Throws what went wrong inside the graph, EngineError, UsageError for a batch that is too large.
    void decode(const TokenBatch & batch, const int8_t * wanted, float * hidden = nullptr);

    // Of token i of the batch before, [n_vocab]; valid until the next batch.
    const float * logits(size_t i) const;

  private:
    int32_t run(const llama_batch & batch);

    Collector &  collector_;
    RouterMask * mask_;
    bool         is_broken_ = false;  // an assertion failed in it
    std::unique_ptr<llama_context, void (*)(llama_context *)> context_{nullptr, llama_free};
};

}  // namespace reap
