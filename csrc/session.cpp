#include "session.h"

#include "assertion_guard.h"
#include "devices.h"
#include "errors.h"
#include "log_sink.h"
#include "memory_guard.h"

#include <algorithm>
#include <functional>
#include <mutex>
#include <numeric>

namespace reap {

namespace {

// Whether a warning is about the model, and not about how it was opened here.
bool is_worth_reading(const std::string & line) {
    constexpr const char * HARMLESS[] = {
        "dummy tokens",                        // a file without a vocabulary, which is used with token ids
        "model has unused tensor",             // a prediction block that is not run
        "possible training context overflow",  // of the context as it was rounded up or is shared by sequences; said below for itself
        "tensor overrides to CPU are used with mmap",
        "using full-size SWA cache",           // as every context here, so that any position can be asked for
        "Phi SWA is currently disabled",
        "padding V cache",                     // memory, where layers have heads of their own and there is no flash attention
        "sharing with layer",                  // caches of layers that share one by design
        "n_ctx is not divisible by n_seq_max",
        "fallback to CPU",                     // an adapter of weights that were rearranged
    };
    const auto names = [&](const char * words) { return line.find(words) != std::string::npos; };
    return line.find_first_not_of("* ") != std::string::npos && std::none_of(std::begin(HARMLESS), std::end(HARMLESS), names);
}

}  // namespace

void start_engine() {
    static std::once_flag once;
    std::call_once(once, [] {
        install_log_sink();
        install_assertion_guard();
        llama_backend_init();
    });
}

Session::Session(const SessionOptions & options) : options_(options) {
    check(options_);
    start_engine();
    clear_log();
    load_model();
    options_ = resolved(options_, model_.get());
    check_cache(options_, model_.get());
    create_context();
    create_prediction_block();
    set_adapters(options_.adapters);
    collect_warnings();
    collector_.set_mask(&mask_);
    collector_.set_threads(options_.threads);
    collector_.set_reduce_on_device(options_.reduce_on_device);
    collector_.set_stop_early(options_.stop_early);
}

void Session::load_model() {
    add_rpc_servers(options_.rpc);
    const DevicesLock lock = lock_devices();
    const ModelParameters parameters(options_, lock);
    const MemoryGuard guard(options_.model_bytes);
    const CatchAssertions catch_assertions;  // the engine logs what is thrown, and returns null
    model_.reset(llama_model_load_from_file(options_.model_path.c_str(), parameters.values));
    if (!model_) {
        throw EngineError(with_log(options_.model_path + ": the engine cannot load this model"));
    }
    if (llama_model_has_encoder(model_.get())) {
        throw EngineError(options_.model_path + ": this model has an encoder; only decoders can be run");
    }
    tokenizer_ = std::make_unique<Tokenizer>(llama_model_get_vocab(model_.get()), options_.model_path);
    if (n_vocab() < 1) {
        throw EngineError(options_.model_path + ": this model has no vocabulary");
    }
}

void Session::create_context() {
    context_ = std::make_unique<Context>(model_.get(), options_, collector_, &mask_);
    if (!context_->has_cache()) {
        // every token sees every other one, so a window has to be one ubatch, and alone
        options_.n_sequences = 1;
        options_.ubatch_size = options_.batch_size = options_.ctx_size;
        context_.reset();
        context_ = std::make_unique<Context>(model_.get(), options_, collector_, &mask_);
    }
}

void Session::create_prediction_block() {
    if (options_.prediction_layer >= 0) {
        prediction_ = std::make_unique<PredictionBlock>(model_.get(), options_, *context_);
        collector_.set_keep_hidden(true);
    }
}

void Session::collect_warnings() {
    for (const std::string & line : log_warnings()) {
        if (line.find("Bad metadata override type") != std::string::npos) {
            throw UsageError(options_.model_path + ": " + line);
        }
        if (is_worth_reading(line)) {
            warnings_.push_back(line);
        }
    }
    if (n_ctx_train() > 0 && ctx_size() > n_ctx_train()) {
        warnings_.push_back("the context of " + std::to_string(ctx_size()) + " tokens is longer than the " + std::to_string(n_ctx_train()) +
                            " that the model was trained with; what it does beyond them is not what it learnt");
    }
}

std::optional<std::string> Session::chat_template() const {
    const char * text = llama_model_chat_template(model_.get(), nullptr);
    return text ? std::optional<std::string>(text) : std::nullopt;
}

void Session::forget(bool with_data) {
    context_->forget(with_data);
    if (prediction_) {
        prediction_->forget(with_data);
    }
}

void Session::check_tokens(const int32_t * tokens, size_t n_tokens) const {
    for (size_t i = 0; i < n_tokens; ++i) {
        if (tokens[i] < 0 || tokens[i] >= n_vocab()) {
            throw UsageError("token id " + std::to_string(tokens[i]) + " is outside the vocabulary of " + std::to_string(n_vocab()));
        }
    }
}

void Session::check_batch(const TokenBatch & batch, const int32_t * groups) const {
    if (batch.n_tokens == 0) {
        throw UsageError("a batch has no tokens");
    }
    check_tokens(batch.tokens, batch.n_tokens);
    for (size_t i = 0; i < batch.n_tokens; ++i) {
        if (batch.sequences[i] < 0 || batch.sequences[i] >= options_.n_sequences || batch.positions[i] < 0 ||
            (groups != nullptr && groups[i] < Saliency::NOT_COUNTED)) {
            throw UsageError("a batch names a sequence, a position or a group that cannot be");
        }
    }
}

void Session::survey(const std::function<void(const TokenBatch & batch, const int8_t * wanted)> & run) {
    // two tokens: a pass over one may take another path through the graph
    const int32_t tokens[] = {0, std::min(1, n_vocab() - 1)};
    const int32_t positions[] = {0, 1};
    const int32_t sequences[] = {0, 0};
    const int8_t wanted[] = {1, 1};
    forget(false);
    run({tokens, positions, sequences, 2}, wanted);
    forget(false);
}

void Session::start_profile(const std::vector<int> & layers, size_t n_experts) {
    constexpr size_t MAX_EXPERTS = 1 << 16;
    const bool ascending = std::adjacent_find(layers.begin(), layers.end(), std::greater_equal<int>()) == layers.end();
    if (layers.empty() || !ascending || n_experts == 0 || n_experts > MAX_EXPERTS) {
        throw UsageError("a profile needs the numbers of its layers, ascending, and 1 to " + std::to_string(MAX_EXPERTS) + " experts; there are " +
                         std::to_string(layers.size()) + " layers and " + std::to_string(n_experts) + " experts");
    }
    survey([&](const TokenBatch & batch, const int8_t * wanted) {
        collector_.begin_survey();
        context_->decode(batch, wanted);
        const std::vector<int> trunk(layers.begin(), layers.end() - (prediction_ ? 1 : 0));
        collector_.end_survey(trunk, n_experts);
        if (prediction_) {
            prediction_->survey(batch, wanted, n_experts);
        }
    });
}

void Session::set_kept(const std::optional<RouterMask::Kept> & kept, const RouterMask::Substitutes & substitutes) {
    if (!kept) {
        mask_.lift();
        return;
    }
    if (prediction_) {
        throw UsageError("experts of a prediction block cannot be removed while it runs; open the model without it");
    }
    if (!mask_.is_learnt()) {
        survey([&](const TokenBatch & batch, const int8_t * wanted) {
            mask_.begin_survey();
            try {
                context_->decode(batch, wanted);
                mask_.end_survey();
            } catch (...) {
                mask_.abandon_survey();
                throw;
            }
        });
    }
    mask_.set_kept(*kept, substitutes);
}

void Session::set_poll(std::function<bool()> poll) {
    if (prediction_) {
        prediction_->set_poll(poll);
    }
    collector_.set_poll(std::move(poll));
}

void Session::commit(int64_t n_units) {
    if (prediction_) {
        prediction_->commit(n_units);
    }
    collector_.commit(n_units);
}

Sums Session::sums(size_t group) const {
    Sums sums = collector_.saliency().sums(group);
    if (prediction_) {
        append_layers(sums, prediction_->sums(group));
    }
    return sums;
}

void Session::restore(size_t group, const Sums & sums, int64_t n_units) {
    Sums trunk = sums;
    if (prediction_) {
        const Sums last = split_last_layer(trunk, n_experts());
        prediction_->restore(group, last, n_units);
    }
    collector_.restore(group, trunk, n_units);
}

void Session::profile_batch(const TokenBatch & batch, const int32_t * groups) {
    try {
        check_batch(batch, groups);
        if (batch.positions[0] == 0) {
            forget(false);
        }
        // every token's logits are asked for, or the last layer would see one token: most graphs drop the others before it
        const std::vector<int8_t> wanted(batch.n_tokens, 1);
        collector_.begin_batch(groups, batch.n_tokens);
        context_->decode(batch, wanted.data());
        collector_.end_batch();
        if (prediction_) {
            prediction_->run(batch, groups, collector_.hidden());
        }
    } catch (...) {
        discard();
        throw;
    }
}

void Session::forward(const TokenBatch & batch, bool all_logits) {
    check_batch(batch, nullptr);
    if (batch.positions[0] == 0) {
        forget(false);
    }
    std::vector<int8_t> wanted(batch.n_tokens, all_logits);
    wanted.back() = 1;
    context_->decode(batch, wanted.data());
}

void Session::set_adapters(const std::vector<std::string> & paths) {
    decltype(adapters_) adapters;
    std::vector<llama_adapter_lora *> handles;
    for (const std::string & path : paths) {
        const CatchAssertions catch_assertions;  // the engine logs what is thrown, and returns null
        adapters.emplace_back(llama_adapter_lora_init(model_.get(), path.c_str()), llama_adapter_lora_free);
        if (!adapters.back()) {
            throw EngineError(with_log(path + ": the engine cannot load this adapter"));
        }
        handles.push_back(adapters.back().get());
    }
    if (!handles.empty() || !adapters_.empty()) {
        context_->set_adapters(handles, std::vector<float>(handles.size(), 1.0F));
    }
    adapters_ = std::move(adapters);
}

std::map<int, Capture::Layer> Session::capture(const TokenBatch & batch, const std::vector<int> & layers, bool experts) {
    check_batch(batch, nullptr);
    Capture capture(layers, experts);
    // all logits are asked for, or the last layer would see one token: most graphs drop the others before it
    const std::vector<int8_t> wanted(batch.n_tokens, 1);
    struct Guard {
        Collector & collector;
        ~Guard() { collector.set_capture(nullptr); }
    } const guard{collector_};
    collector_.set_capture(&capture);
    forget(false);
    capture.begin_batch();
    context_->decode(batch, wanted.data());
    capture.check_batch(batch.n_tokens);
    return capture.layers();
}

void Session::discard() {
    collector_.discard();
    if (prediction_) {
        prediction_->discard();
    }
    // the cache may hold what is not a number, and masked attention multiplies it by zero: clear the data as well
    forget(true);
}

void Session::for_each_logits(const std::vector<int32_t> & tokens, size_t first, const OnLogits & on_logits) {
    check_tokens(tokens.data(), tokens.size());
    if (tokens.empty() || first >= tokens.size() || tokens.size() > static_cast<size_t>(options_.ctx_size)) {
        throw UsageError("a window of " + std::to_string(tokens.size()) + " tokens, wanted from " + std::to_string(first) +
                         ", does not fit a context of " + std::to_string(options_.ctx_size));
    }
    forget(false);
    std::vector<int32_t> positions(tokens.size());
    std::iota(positions.begin(), positions.end(), 0);
    const std::vector<int32_t> sequences(tokens.size(), 0);
    std::vector<int8_t> wanted(tokens.size());
    std::fill(wanted.begin() + static_cast<std::ptrdiff_t>(first), wanted.end(), int8_t{1});
    run({tokens.data(), positions.data(), sequences.data(), tokens.size()}, wanted, on_logits);
}

void Session::run(const TokenBatch & batch, const std::vector<int8_t> & wanted, const OnLogits & on_logits) {
    check_batch(batch, nullptr);
    const size_t step = static_cast<size_t>(options_.ubatch_size);
    for (size_t start = 0; start < batch.n_tokens; start += step) {
        const size_t n = std::min(step, batch.n_tokens - start);
        collector_.poll();
        context_->decode({batch.tokens + start, batch.positions + start, batch.sequences + start, n}, wanted.data() + start);
        for (size_t i = 0; i < n; ++i) {
            if (wanted[start + i]) {
                on_logits(start + i, context_->logits(i));
            }
        }
    }
}

}  // namespace reap
