// Multi-token prediction: the block of experts that predicts the token after the next, run in a context of its own over the same weights
// and fed with the hidden states of the layers before it.
#pragma once

#include "collector.h"
#include "context.h"
#include "session_options.h"

#include "llama.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace reap {

class PredictionBlock {
  public:
    // UnsupportedError where the engine cannot run the block, or reap cannot feed it.
    PredictionBlock(llama_model * model, const SessionOptions & options, const Context & trunk);

    void set_poll(std::function<bool()> poll) { collector_.set_poll(std::move(poll)); }
    void forget(bool with_data) { context_.forget(with_data); }

    // Learns the block's graph from a batch, as the collector of the other layers does.
    void survey(const TokenBatch & batch, const int8_t * wanted, size_t n_experts);

    // `hidden`: [n_tokens][n_embd] of the same batch, as the layers before gave them.
    void run(const TokenBatch & batch, const int32_t * groups, const std::vector<float> & hidden);

    void commit(int64_t n_units) { collector_.commit(n_units); }
    void discard() { collector_.discard(); }
    void restore(size_t group, const Sums & sums, int64_t n_units) { collector_.restore(group, sums, n_units); }
    // One layer's; zeros for a group of which the block has seen nothing.
    Sums sums(size_t group) const;

  private:
    int                layer_;
    size_t             n_embd_;
    Collector          collector_;
    Context            context_;
    std::vector<float> last_hidden_;  // of the batch before, for a window that goes on
};

}  // namespace reap
