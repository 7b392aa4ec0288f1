#include "context.h"

#include "assertion_guard.h"
#include "errors.h"
#include "log_sink.h"
#include "memory_guard.h"

#include <algorithm>
#include <string>
#include <vector>

namespace reap {

namespace {

// Whether the engine's last words are about memory (ggml-alloc, ggml-backend, llama-kv-cache, and what the C++ library throws).
bool is_about_memory(const std::string & log) {
    for (const char * words : {"alloc", "out of memory", "length_error", "vector::_M"}) {
        if (log.find(words) != std::string::npos) {
            return true;
        }
    }
    return false;
}

std::string cannot_be_made(const SessionOptions & options, uint32_t n_ctx) {
    const char * advice = is_about_memory(log_tail()) ? " (a smaller ctx-size, ubatch-size or cache type needs less memory)" : "";
    return with_log(options.model_path + ": the engine cannot make a context of " + std::to_string(n_ctx) + " tokens" + advice);
}

}  // namespace

Context::Context(llama_model * model, const SessionOptions & options, Collector & collector, RouterMask * mask, const Context * trunk)
    : collector_(collector), mask_(mask) {
    llama_context_params params = context_parameters(options);
    params.cb_eval = Collector::callback;
    params.cb_eval_user_data = &collector;
    if (trunk != nullptr) {
        params.ctx_type = LLAMA_CONTEXT_TYPE_MTP;
        params.ctx_other = trunk->context_.get();
    }
    const MemoryGuard guard;
    const CatchAssertions catch_assertions;  // the engine logs what is thrown, and returns null
    context_.reset(llama_init_from_model(model, params));
    if (!context_) {
        throw EngineError(cannot_be_made(options, params.n_ctx));
    }
}

bool Context::has_cache() const { return llama_get_memory(context_.get()) != nullptr; }

void Context::forget(bool with_data) { llama_memory_clear(llama_get_memory(context_.get()), with_data); }

void Context::copy_sequence(int32_t from, int32_t to) { llama_memory_seq_cp(llama_get_memory(context_.get()), from, to, -1, -1); }

void Context::set_adapters(std::vector<llama_adapter_lora *> adapters, std::vector<float> scales) {
    if (llama_set_adapters_lora(context_.get(), adapters.data(), adapters.size(), scales.data()) != 0) {
        throw EngineError(with_log("the engine does not take these adapters"));
    }
}

size_t Context::batch_size() const { return llama_n_batch(context_.get()); }

void Context::decode(const TokenBatch & batch, const int8_t * wanted, float * hidden) {
    if (batch.n_tokens == 0 || batch.n_tokens > batch_size()) {
        throw UsageError("a batch of " + std::to_string(batch.n_tokens) + " tokens, expected 1 to batch-size, which is " + std::to_string(batch_size()));
    }
    if (is_broken_) {
        throw EngineError("an assertion of the engine failed in this context; open the model again");
    }
    std::vector<int32_t> tokens(batch.tokens, batch.tokens + batch.n_tokens);
    std::vector<int32_t> positions(batch.positions, batch.positions + batch.n_tokens);
    std::vector<int32_t> sequences(batch.sequences, batch.sequences + batch.n_tokens);
    std::vector<int32_t> n_sequences(batch.n_tokens, 1);
    std::vector<int32_t *> sequence_of(batch.n_tokens);
    std::vector<int8_t> outputs(wanted, wanted + batch.n_tokens);
    for (size_t i = 0; i < batch.n_tokens; ++i) {
        sequence_of[i] = &sequences[i];
    }
    const llama_batch native{static_cast<int32_t>(batch.n_tokens), tokens.data(),      hidden, positions.data(),
                             n_sequences.data(),                   sequence_of.data(), outputs.data()};
    clear_log();
    if (mask_ != nullptr) {
        mask_->begin_batch();
    }
    const int32_t status = run(native);
    collector_.rethrow();
    if (status != 0) {
        const char * reason = status == 1 ? "the context is full" : status == 2 ? "it was aborted" : "it failed";
        throw EngineError(with_log("the engine could not run a batch of " + std::to_string(batch.n_tokens) + " tokens: " + reason +
                                   " (status " + std::to_string(status) + ")"));
    }
    if (mask_ != nullptr) {
        mask_->check_batch(batch.n_tokens, static_cast<size_t>(std::count(wanted, wanted + batch.n_tokens, int8_t{1})));
    }
}

int32_t Context::run(const llama_batch & batch) {
    const CatchAssertions catch_assertions;
    try {
        const int32_t status = llama_decode(context_.get(), batch);
        llama_synchronize(context_.get());
        return status;
    } catch (const AssertionFailed & failed) {
        is_broken_ = true;
        throw EngineError(std::string("the engine could not run a batch: ") + failed.what());
    }
}

const float * Context::logits(size_t i) const { return llama_get_logits_ith(context_.get(), static_cast<int32_t>(i)); }

}  // namespace reap
