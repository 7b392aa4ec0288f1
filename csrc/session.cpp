#include "session.h"

#include "devices.h"
#include "errors.h"
#include "log_sink.h"
#include "memory_guard.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>

namespace reap {

namespace {

std::string with_log(const std::string & message) {
    const std::string tail = log_tail();
    return tail.empty() ? message : message + ": " + tail;
}

ggml_type cache_type(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        const char * type_name = ggml_type_name(type);
        if (type_name == nullptr || ggml_type_size(type) == 0) {
            continue;
        }
        if (name == type_name) {
            return type;
        }
    }
    throw UsageError("the engine has no cache type '" + name + "'; f32, f16, bf16, q8_0 and q4_0 are the usual ones");
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

std::vector<ggml_backend_dev_t> find_devices(const std::vector<std::string> & names) {
    std::vector<ggml_backend_dev_t> devices;
    for (const auto & name : names) {
        if (name == "none") {
            continue;  // llama.cpp's word for "the CPU alone"
        }
        const ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str());
        if (device == nullptr) {
            std::string known;
            for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
                known += (i ? ", " : "") + std::string(ggml_backend_dev_name(ggml_backend_dev_get(i)));
            }
            throw UsageError("there is no device '" + name + "'; there is " + known);
        }
        devices.push_back(device);
    }
    return devices;
}

ggml_backend_buffer_type_t find_buffer_type(const std::string & name) {
    std::string known;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(ggml_backend_dev_get(i));
        if (type != nullptr && name == ggml_backend_buft_name(type)) {
            return type;
        }
        known += (known.empty() ? "" : ", ") + std::string(type ? ggml_backend_buft_name(type) : "");
    }
    throw UsageError("there is no buffer type '" + name + "' to put tensors in; there is " + known);
}

// ln Σ exp of a row of logits, so that ln p(t) = logits[t] - ln Σ exp; summed in double precision.
struct Normaliser {
    Normaliser(const float * logits, int n_vocab) {
        const float * max = std::max_element(logits, logits + n_vocab);
        double sum = 0.0;
        for (int i = 0; i < n_vocab; ++i) {
            sum += std::exp(logits[i] - *max);
        }
        best = static_cast<int32_t>(max - logits);
        log_sum = static_cast<double>(*max) + std::log(sum);
    }

    int32_t best;
    double  log_sum;
};

// Adds to `result` what is said about one position: of the tokens `ids` among all of `n_vocab`.
void add_prediction(Predictions & result, const float * logits, int n_vocab, int32_t next, const int32_t * ids, size_t n_ids) {
    const Normaliser row(logits, n_vocab);
    result.next.push_back(logits[next] - row.log_sum);
    result.best.push_back(row.best);
    const bool all = n_ids == static_cast<size_t>(n_vocab);
    double covered = 0.0;
    for (size_t i = 0; i < n_ids; ++i) {
        const double log_prob = logits[ids[i]] - row.log_sum;
        result.log_probs.push_back(static_cast<float>(log_prob));
        covered += all ? 0.0 : std::exp(log_prob);
    }
    result.rest.push_back(all ? 0.0 : std::max(0.0, 1.0 - covered));
}

}  // namespace

void start_engine() {
    static std::once_flag once;
    std::call_once(once, [] {
        install_log_sink();
        llama_backend_init();
    });
}

Session::Session(const SessionOptions & options) : options_(options) {
    start_engine();
    clear_log();
    load_model();
    resolve_options();
    context_.reset(create_context(collector_, LLAMA_CONTEXT_TYPE_DEFAULT));
    if (llama_get_memory(context_.get()) == nullptr) {
        // no cache: every token sees every other one (diffusion models), so a window has to be one ubatch, and alone
        options_.n_sequences = 1;
        options_.ubatch_size = options_.batch_size = options_.ctx_size;
        context_.reset();
        context_.reset(create_context(collector_, LLAMA_CONTEXT_TYPE_DEFAULT));
    }
    if (options_.prediction_layer >= 0) {
        const int n_embd = llama_model_n_embd(model_.get());
        if (llama_model_n_embd_out(model_.get()) != n_embd || llama_model_n_embd_inp(model_.get()) != n_embd) {
            throw UnsupportedError("layer " + std::to_string(options_.prediction_layer) +
                                   ": its prediction block takes hidden states of another width than the model's, which reap cannot feed it");
        }
        prediction_context_.reset(create_context(prediction_, LLAMA_CONTEXT_TYPE_MTP));
        prediction_.set_threads(options_.threads);
        collector_.set_keep_hidden(true);
    }
    collector_.set_mask(&mask_);
    collector_.set_threads(options_.threads);
    collector_.set_reduce_on_device(options_.reduce_on_device);
    collector_.set_stop_early(options_.stop_early);
}

void Session::resolve_options() {
    SessionOptions & o = options_;
    if (o.ctx_size <= 0) {
        o.ctx_size = n_ctx_train();
    }
    // a recurrent state is kept per sequence, and its batches are cut into equal parts
    const bool recurrent = llama_model_is_recurrent(model_.get()) || llama_model_is_hybrid(model_.get());
    o.n_sequences = recurrent ? 1 : std::clamp(o.n_sequences, 1, static_cast<int>(llama_max_parallel_sequences()));
    if (o.n_sequences == 1) {
        o.ubatch_size = std::min(o.ubatch_size, o.ctx_size);
    }
    o.ubatch_size = std::max(2, o.ubatch_size);  // the survey runs two tokens in one graph
    o.batch_size = std::max(o.batch_size, o.ubatch_size);
    // llama_context asserts that its outputs hold a token of every sequence
    o.n_sequences = std::min(o.n_sequences, o.ubatch_size);
    if (o.threads <= 0) {
        o.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    }
}

void Session::load_model() {
    add_rpc_servers(options_.rpc);
    llama_model_params params = llama_model_default_params();
    std::vector<ggml_backend_dev_t> devices = options_.devices.empty() ? default_devices(options_.rpc) : find_devices(options_.devices);
    devices.push_back(nullptr);
    if (!options_.devices.empty() || rpc_servers_known()) {
        params.devices = devices.data();
    }
    std::vector<llama_model_tensor_buft_override> overrides;
    for (const auto & [pattern, type] : options_.override_tensors) {
        overrides.push_back({pattern.c_str(), find_buffer_type(type)});
    }
    if (options_.head_on_host) {
        const ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        overrides.push_back({"^(output|token_embd)", ggml_backend_dev_buffer_type(cpu)});
    }
    overrides.push_back({nullptr, nullptr});
    params.tensor_buft_overrides = overrides.data();
    params.n_gpu_layers = options_.gpu_layers;
    params.load_mode = options_.use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    params.use_extra_bufts = options_.repack;
    params.load_mtp = options_.prediction_layer >= 0;
    const MemoryGuard guard(options_.model_bytes);
    model_.reset(llama_model_load_from_file(options_.model_path.c_str(), params));
    if (!model_) {
        throw EngineError(with_log(options_.model_path + ": the engine cannot load this model"));
    }
    if (llama_model_has_encoder(model_.get())) {
        throw EngineError(options_.model_path + ": this model has an encoder; only decoders can be run");
    }
    vocab_ = llama_model_get_vocab(model_.get());
}

llama_context * Session::create_context(Collector & collector, llama_context_type type) {
    llama_context_params params = llama_context_default_params();
    // sequences that share a batch share the cache as well: one long window, or one batch of short ones
    params.n_ctx = static_cast<uint32_t>(options_.n_sequences > 1 ? std::max(options_.ctx_size, options_.batch_size) : options_.ctx_size);
    params.n_batch = static_cast<uint32_t>(options_.batch_size);
    params.n_ubatch = static_cast<uint32_t>(options_.ubatch_size);
    params.n_seq_max = static_cast<uint32_t>(options_.n_sequences);
    params.kv_unified = options_.n_sequences > 1;
    params.n_threads = params.n_threads_batch = options_.threads;
    params.flash_attn_type = flash_attention(options_.flash_attn);
    params.type_k = cache_type(options_.type_k);
    params.type_v = cache_type(options_.type_v);
    params.cb_eval = Collector::callback;
    params.cb_eval_user_data = &collector;
    params.ctx_type = type;
    params.ctx_other = context_.get();
    params.no_perf = true;
    const MemoryGuard guard;
    llama_context * context = llama_init_from_model(model_.get(), params);
    if (context == nullptr) {
        throw EngineError(with_log(options_.model_path + ": the engine cannot make a context of " + std::to_string(params.n_ctx) +
                                   " tokens (a smaller ctx-size, ubatch-size or cache type needs less memory)"));
    }
    return context;
}

int Session::n_vocab() const { return llama_vocab_n_tokens(vocab_); }
int Session::n_ctx_train() const { return llama_model_n_ctx_train(model_.get()); }
bool Session::has_tokenizer() const { return llama_vocab_type(vocab_) != LLAMA_VOCAB_TYPE_NONE; }
bool Session::add_bos() const { return has_tokenizer() && llama_vocab_get_add_bos(vocab_); }
bool Session::add_eos() const { return has_tokenizer() && llama_vocab_get_add_eos(vocab_); }
int Session::bos() const { return llama_vocab_bos(vocab_); }
int Session::eos() const { return llama_vocab_eos(vocab_); }

std::optional<std::string> Session::chat_template() const {
    const char * text = llama_model_chat_template(model_.get(), nullptr);
    return text ? std::optional<std::string>(text) : std::nullopt;
}

std::vector<int32_t> Session::tokenize(const std::string & text, bool add_special, bool parse_special) const {
    if (!has_tokenizer()) {
        throw UsageError(options_.model_path + ": this model has no tokenizer; give token ids");
    }
    std::vector<int32_t> tokens(text.size() + 8);
    const auto call = [&] {
        return llama_tokenize(vocab_, text.data(), static_cast<int32_t>(text.size()), tokens.data(), static_cast<int32_t>(tokens.size()),
                              add_special, parse_special);
    };
    int32_t n = call();
    if (n < 0) {
        tokens.resize(static_cast<size_t>(-static_cast<int64_t>(n)));
        n = call();
    }
    if (n < 0) {
        throw EngineError("the text of " + std::to_string(text.size()) + " bytes cannot be tokenised");
    }
    tokens.resize(static_cast<size_t>(n));
    return tokens;
}

std::string Session::token_text(int token) const {
    if (!has_tokenizer() || token < 0 || token >= n_vocab()) {
        throw UsageError("there is no text for token " + std::to_string(token));
    }
    std::string piece(32, '\0');
    int32_t n = llama_token_to_piece(vocab_, token, piece.data(), static_cast<int32_t>(piece.size()), 0, true);
    if (n < 0) {
        piece.resize(static_cast<size_t>(-n));
        n = llama_token_to_piece(vocab_, token, piece.data(), static_cast<int32_t>(piece.size()), 0, true);
    }
    piece.resize(static_cast<size_t>(std::max(0, n)));
    return piece;
}

void Session::forget() {
    llama_memory_clear(llama_get_memory(context_.get()), false);
    if (has_prediction()) {
        llama_memory_clear(llama_get_memory(prediction_context_.get()), false);
    }
}

void Session::check_tokens(const int32_t * tokens, size_t n_tokens) const {
    for (size_t i = 0; i < n_tokens; ++i) {
        if (tokens[i] < 0 || tokens[i] >= n_vocab()) {
            throw UsageError("token id " + std::to_string(tokens[i]) + " is outside the vocabulary of " + std::to_string(n_vocab()));
        }
    }
}

void Session::decode(llama_context * context, Collector & collector, const TokenBatch & batch, const int8_t * wanted, float * hidden) {
    if (batch.n_tokens > static_cast<size_t>(options_.batch_size)) {
        throw UsageError("a batch of " + std::to_string(batch.n_tokens) + " tokens is larger than batch-size, which is " + std::to_string(options_.batch_size));
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
    mask_.begin_batch();
    const int32_t status = llama_decode(context, native);
    llama_synchronize(context);
    collector.rethrow();
    if (status != 0) {
        const char * reason = status == 1 ? "the context is full" : status == 2 ? "it was aborted" : "it failed";
        throw EngineError(with_log("the engine could not run a batch of " + std::to_string(batch.n_tokens) + " tokens: " + reason +
                                   " (status " + std::to_string(status) + ")"));
    }
    if (context == context_.get()) {
        mask_.check_batch(batch.n_tokens, static_cast<size_t>(std::count(wanted, wanted + batch.n_tokens, int8_t{1})));
    }
}

void Session::start_profile(const std::vector<int> & layers, size_t n_experts) {
    survey([&](const TokenBatch & batch, const int8_t * wanted) {
        collector_.begin_survey();
        decode(context_.get(), collector_, batch, wanted);
        const std::vector<int> trunk(layers.begin(), layers.end() - (has_prediction() ? 1 : 0));
        collector_.end_survey(trunk, n_experts);
        if (has_prediction()) {
            survey_prediction(batch, wanted, n_experts);
        }
    });
}

void Session::survey(const std::function<void(const TokenBatch & batch, const int8_t * wanted)> & run) {
    // two tokens: a pass over one may take another path through the graph
    const int32_t tokens[] = {0, std::min(1, n_vocab() - 1)};
    const int32_t positions[] = {0, 1};
    const int32_t sequences[] = {0, 0};
    const int8_t wanted[] = {1, 1};
    forget();
    run({tokens, positions, sequences, 2}, wanted);
    forget();
}

void Session::set_kept(const std::optional<RouterMask::Kept> & kept) {
    if (!kept) {
        mask_.lift();
        return;
    }
    if (has_prediction()) {
        throw UsageError("experts of a prediction block cannot be removed while it runs; open the model without it");
    }
    if (!mask_.is_learnt()) {
        survey([&](const TokenBatch & batch, const int8_t * wanted) {
            mask_.begin_survey();
            try {
                decode(context_.get(), collector_, batch, wanted);
                mask_.end_survey();
            } catch (...) {
                mask_.abandon_survey();
                throw;
            }
        });
    }
    mask_.set_kept(*kept);
}

void Session::survey_prediction(const TokenBatch & batch, const int8_t * wanted, size_t n_experts) {
    std::vector<float> hidden(batch.n_tokens * static_cast<size_t>(llama_model_n_embd(model_.get())), 0.0f);
    prediction_.begin_survey();
    decode(prediction_context_.get(), prediction_, batch, wanted, hidden.data());
    prediction_.end_survey({options_.prediction_layer}, n_experts);
}

// Feeds the prediction block with each token and the hidden state of the one before it, as llama.cpp's own speculative decoding does
// (common/speculative.cpp).
void Session::run_prediction(const TokenBatch & batch, const int32_t * groups) {
    const size_t n_embd = static_cast<size_t>(llama_model_n_embd(model_.get()));
    const std::vector<float> & hidden = collector_.hidden();
    if (hidden.size() != batch.n_tokens * n_embd) {
        throw EngineError("the layers before the prediction block gave " + std::to_string(hidden.size() / n_embd) + " hidden states for " +
                          std::to_string(batch.n_tokens) + " tokens");
    }
    if (last_hidden_.size() != n_embd || batch.positions[0] == 0) {
        last_hidden_.assign(n_embd, 0.0f);
    }
    std::vector<int32_t> counted(groups, groups + batch.n_tokens);
    std::vector<float> before(hidden.size(), 0.0f);
    for (size_t i = 0; i < batch.n_tokens; ++i) {
        if (batch.positions[i] == 0) {
            counted[i] = Saliency::NOT_COUNTED;  // nothing precedes it that a prediction could have come from
        } else {
            const float * row = i == 0 ? last_hidden_.data() : hidden.data() + (i - 1) * n_embd;
            std::copy_n(row, n_embd, before.begin() + static_cast<std::ptrdiff_t>(i * n_embd));
        }
    }
    const std::vector<int8_t> wanted(batch.n_tokens, 1);
    prediction_.begin_batch(counted.data(), batch.n_tokens);
    decode(prediction_context_.get(), prediction_, batch, wanted.data(), before.data());
    prediction_.end_batch();
    last_hidden_.assign(hidden.end() - static_cast<std::ptrdiff_t>(n_embd), hidden.end());
}

void Session::set_poll(std::function<bool()> poll) {
    prediction_.set_poll(poll);
    collector_.set_poll(std::move(poll));
}

void Session::commit(int64_t n_units) {
    if (has_prediction()) {
        prediction_.commit(n_units);
    }
    collector_.commit(n_units);
}

namespace {

template <typename T>
void append(std::vector<T> & to, const std::vector<T> & from) {
    to.insert(to.end(), from.begin(), from.end());
}

template <typename T>
std::vector<T> split_off(std::vector<T> & values, size_t n_last) {
    const auto first = values.end() - static_cast<std::ptrdiff_t>(std::min(n_last, values.size()));
    std::vector<T> last(first, values.end());
    values.erase(first, values.end());
    return last;
}

}  // namespace

Sums Session::sums(size_t group) const {
    Sums sums = collector_.saliency().sums(group);
    if (has_prediction()) {
        const Saliency & prediction = prediction_.saliency();
        const Sums last = group < prediction.n_groups() ? prediction.sums(group) : Saliency(1, prediction.n_experts()).sums(0);
        append(sums.counts, last.counts);
        append(sums.gate, last.gate);
        append(sums.norm, last.norm);
        append(sums.gated_norm, last.gated_norm);
        append(sums.gated_norm_sq, last.gated_norm_sq);
        append(sums.norm_max, last.norm_max);
        append(sums.total_tokens, last.total_tokens);
    }
    return sums;
}

void Session::restore(size_t group, const Sums & sums, int64_t n_units) {
    Sums trunk = sums;
    if (has_prediction()) {
        const size_t n = n_experts();
        const Sums last{split_off(trunk.counts, n),     split_off(trunk.gate, n),          split_off(trunk.norm, n),
                        split_off(trunk.gated_norm, n), split_off(trunk.gated_norm_sq, n), split_off(trunk.norm_max, n),
                        split_off(trunk.total_tokens, 1)};
        prediction_.restore(group, last, n_units);
    }
    collector_.restore(group, trunk, n_units);
}

void Session::check_batch(const TokenBatch & batch, const int32_t * groups) const {
    check_tokens(batch.tokens, batch.n_tokens);
    for (size_t i = 0; i < batch.n_tokens; ++i) {
        if (batch.sequences[i] < 0 || batch.sequences[i] >= options_.n_sequences || groups[i] < Saliency::NOT_COUNTED) {
            throw UsageError("a batch names a sequence or a group that cannot be");
        }
    }
}

void Session::profile_batch(const TokenBatch & batch, const int32_t * groups) {
    try {
        check_batch(batch, groups);
        if (batch.positions[0] == 0) {
            forget();
        }
        // every token's logits are asked for, or the last layer would see one token: most graphs drop the others before it
        const std::vector<int8_t> wanted(batch.n_tokens, 1);
        collector_.begin_batch(groups, batch.n_tokens);
        decode(context_.get(), collector_, batch, wanted.data());
        collector_.end_batch();
        if (has_prediction()) {
            run_prediction(batch, groups);
        }
    } catch (...) {
        discard();
        throw;
    }
}

void Session::forward(const TokenBatch & batch, bool all_logits) {
    check_tokens(batch.tokens, batch.n_tokens);
    if (batch.positions[0] == 0) {
        forget();
    }
    std::vector<int8_t> wanted(batch.n_tokens, all_logits);
    wanted.back() = 1;
    decode(context_.get(), collector_, batch, wanted.data());
}

void Session::discard() {
    collector_.discard();
    prediction_.discard();
    // the cache may hold what is not a number, and masked attention multiplies it by zero: clear the data as well
    llama_memory_clear(llama_get_memory(context_.get()), true);
    if (has_prediction()) {
        llama_memory_clear(llama_get_memory(prediction_context_.get()), true);
    }
}

void Session::for_each_logits(const std::vector<int32_t> & tokens, size_t first, const OnLogits & on_logits) {
    check_tokens(tokens.data(), tokens.size());
    if (tokens.empty() || first >= tokens.size() || tokens.size() > static_cast<size_t>(options_.ctx_size)) {
        throw UsageError("a window of " + std::to_string(tokens.size()) + " tokens, wanted from " + std::to_string(first) +
                         ", does not fit a context of " + std::to_string(options_.ctx_size));
    }
    forget();
    std::vector<int32_t> positions(tokens.size());
    std::iota(positions.begin(), positions.end(), 0);
    const std::vector<int32_t> sequences(tokens.size(), 0);
    const size_t step = static_cast<size_t>(options_.ubatch_size);
    for (size_t start = 0; start < tokens.size(); start += step) {
        const size_t n = std::min(step, tokens.size() - start);
        std::vector<int8_t> wanted(n);
        for (size_t i = 0; i < n; ++i) {
            wanted[i] = start + i >= first;
        }
        collector_.poll();
        decode(context_.get(), collector_, {tokens.data() + start, positions.data() + start, sequences.data(), n}, wanted.data());
        for (size_t i = 0; i < n; ++i) {
            if (wanted[i]) {
                on_logits(start + i, llama_get_logits_ith(context_.get(), static_cast<int32_t>(i)));
            }
        }
    }
}

std::vector<float> Session::logits(const std::vector<int32_t> & tokens, size_t first) {
    const size_t n_row = static_cast<size_t>(n_vocab());
    std::vector<float> result;
    for_each_logits(tokens, first, [&](size_t, const float * row) { result.insert(result.end(), row, row + n_row); });
    return result;
}

std::vector<double> Session::log_probs(const std::vector<int32_t> & tokens, size_t first) {
    std::vector<double> result;
    for_each_logits(tokens, first, [&](size_t position, const float * row) {
        if (position + 1 < tokens.size()) {
            result.push_back(row[tokens[position + 1]] - Normaliser(row, n_vocab()).log_sum);
        }
    });
    return result;
}

Predictions Session::predict_top(const std::vector<int32_t> & tokens, size_t first, size_t n_top) {
    std::vector<int32_t> order(static_cast<size_t>(n_vocab()));
    const size_t k = std::min(n_top, order.size());
    Predictions result;
    for_each_logits(tokens, first, [&](size_t position, const float * row) {
        if (position + 1 == tokens.size()) {
            return;
        }
        std::iota(order.begin(), order.end(), 0);
        if (k < order.size()) {
            const auto more_probable = [row](int32_t a, int32_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); };
            std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k), order.end(), more_probable);
        }
        result.ids.insert(result.ids.end(), order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k));
        add_prediction(result, row, n_vocab(), tokens[position + 1], order.data(), k);
    });
    return result;
}

Predictions Session::predict_ids(const std::vector<int32_t> & tokens, size_t first, const std::vector<int32_t> & ids, size_t n_ids) {
    if (first >= tokens.size() || ids.size() != (tokens.size() - 1 - first) * n_ids) {
        throw UsageError("there are " + std::to_string(ids.size()) + " ids for " + std::to_string(tokens.size()) + " tokens from " + std::to_string(first));
    }
    check_tokens(ids.data(), ids.size());
    Predictions result;
    for_each_logits(tokens, first, [&](size_t position, const float * row) {
        if (position + 1 < tokens.size()) {
            add_prediction(result, row, n_vocab(), tokens[position + 1], ids.data() + (position - first) * n_ids, n_ids);
        }
    });
    return result;
}

bool Session::ends_generation(int token) const { return llama_vocab_is_eog(vocab_, token); }

std::vector<int32_t> Session::generate(const std::vector<int32_t> & tokens, size_t n_new) {
    if (llama_get_memory(context_.get()) == nullptr) {
        throw UnsupportedError(options_.model_path + ": this model sees whole texts and does not continue them token by token");
    }
    if (tokens.empty() || tokens.size() + n_new > static_cast<size_t>(options_.ctx_size)) {
        throw UsageError("a prompt of " + std::to_string(tokens.size()) + " tokens and " + std::to_string(n_new) + " new ones do not fit a context of " +
                         std::to_string(options_.ctx_size));
    }
    std::vector<int32_t> result;
    int32_t best = 0;
    for_each_logits(tokens, tokens.size() - 1, [&](size_t, const float * row) { best = Normaliser(row, n_vocab()).best; });
    while (result.size() < n_new) {
        result.push_back(best);
        if (ends_generation(best) || result.size() == n_new) {
            break;
        }
        const int32_t position = static_cast<int32_t>(tokens.size() + result.size() - 1);
        const int32_t sequence = 0;
        const int8_t wanted = 1;
        collector_.poll();
        decode(context_.get(), collector_, {&best, &position, &sequence, 1}, &wanted);
        best = Normaliser(llama_get_logits_ith(context_.get(), 0), n_vocab()).best;
    }
    return result;
}

}  // namespace reap
