#include "prediction_block.h"

#include "errors.h"

#include <algorithm>
#include <string>

namespace reap {

namespace {

UnsupportedError cannot_run(int layer, const std::exception & error) {
    return UnsupportedError(in_layer(layer) + "the engine cannot run its prediction block; without its prediction layers the model can be profiled (" +
                            error.what() + ")");
}

Context make_context(llama_model * model, const SessionOptions & options, Collector & collector, const Context & trunk) {
    const int n_embd = llama_model_n_embd(model);
    if (llama_model_n_embd_out(model) != n_embd || llama_model_n_embd_inp(model) != n_embd) {
        throw UnsupportedError(in_layer(options.prediction_layer) + "its prediction block takes hidden states of another width than the model's, "
                               "which reap cannot feed it; without its prediction layers the model can be profiled");
    }
    try {
        return Context(model, options, collector, nullptr, &trunk);
    } catch (const EngineError & error) {
        throw cannot_run(options.prediction_layer, error);
    }
}

}  // namespace

PredictionBlock::PredictionBlock(llama_model * model, const SessionOptions & options, const Context & trunk)
    : layer_(options.prediction_layer), n_embd_(static_cast<size_t>(llama_model_n_embd(model))), context_(make_context(model, options, collector_, trunk)) {
    collector_.set_threads(options.threads);
}

void PredictionBlock::survey(const TokenBatch & batch, const int8_t * wanted, size_t n_experts) {
    std::vector<float> hidden(batch.n_tokens * n_embd_, 0.0f);
    collector_.begin_survey();
    try {
        context_.decode(batch, wanted, hidden.data());
    } catch (const Interrupted &) {
        throw;
    } catch (const std::exception & error) {
        throw cannot_run(layer_, error);
    }
    collector_.end_survey({layer_}, n_experts);
}

// Feeds the block with each token and the hidden state of the one before it, as llama.cpp's own speculative decoding does
// (common/speculative.cpp).
void PredictionBlock::run(const TokenBatch & batch, const int32_t * groups, const std::vector<float> & hidden) {
    if (hidden.size() != batch.n_tokens * n_embd_) {
        throw EngineError("the layers before the prediction block gave " + std::to_string(hidden.size() / n_embd_) + " hidden states for " +
                          std::to_string(batch.n_tokens) + " tokens");
    }
    if (last_hidden_.size() != n_embd_ || batch.positions[0] == 0) {
        last_hidden_.assign(n_embd_, 0.0f);
    }
    std::vector<int32_t> counted(groups, groups + batch.n_tokens);
    std::vector<float> before(hidden.size(), 0.0f);
    for (size_t i = 0; i < batch.n_tokens; ++i) {
        if (batch.positions[i] == 0) {
            counted[i] = Saliency::NOT_COUNTED;  // nothing precedes it that a prediction could have come from
        } else {
            const float * row = i == 0 ? last_hidden_.data() : hidden.data() + (i - 1) * n_embd_;
            std::copy_n(row, n_embd_, before.begin() + static_cast<std::ptrdiff_t>(i * n_embd_));
        }
    }
    const std::vector<int8_t> wanted(batch.n_tokens, 1);
    collector_.begin_batch(counted.data(), batch.n_tokens);
    context_.decode(batch, wanted.data(), before.data());
    collector_.end_batch();
    last_hidden_.assign(hidden.end() - static_cast<std::ptrdiff_t>(n_embd_), hidden.end());
}

Sums PredictionBlock::sums(size_t group) const {
    const Saliency & saliency = collector_.saliency();
    return group < saliency.n_groups() ? saliency.sums(group) : Sums(1, saliency.n_experts());
}

}  // namespace reap
