#include "generation.h"

#include "errors.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace reap {

namespace {

void check(const Sampling & sampling) {
    const auto is_share = [](float value) { return value >= 0.0F && value <= 1.0F; };
    if (!std::isfinite(sampling.temperature) || sampling.temperature < 0.0F || sampling.top_k < 0 || !is_share(sampling.top_p) || !is_share(sampling.min_p)) {
        throw UsageError("sampling needs a finite temperature and a top-k of at least 0, and a top-p and a min-p of 0 to 1");
    }
}

void check(const Session & session, const std::vector<Prompt> & prompts) {
    if (!session.has_cache()) {
        throw UnsupportedError(session.model_path() + ": this model sees whole texts and does not continue them token by token");
    }
    const size_t n_ctx = static_cast<size_t>(session.ctx_size()), n_cells = static_cast<size_t>(session.cache_size());
    size_t n_tokens = 0;
    for (const Prompt & prompt : prompts) {
        session.check_tokens(prompt.tokens.data(), prompt.tokens.size());
        if (prompt.tokens.empty() || prompt.tokens.size() > n_ctx || prompt.n_new > n_ctx - prompt.tokens.size()) {
            throw UsageError("a prompt of " + std::to_string(prompt.tokens.size()) + " tokens and " + std::to_string(prompt.n_new) +
                             " new ones do not fit a context of " + std::to_string(n_ctx));
        }
        n_tokens += prompt.tokens.size() + prompt.n_new;
    }
    if (prompts.size() > static_cast<size_t>(session.n_sequences()) || n_tokens > n_cells) {
        throw UsageError(std::to_string(prompts.size()) + " prompts with " + std::to_string(n_tokens) + " tokens in all, expected at most " +
                         std::to_string(session.n_sequences()) + " and " + std::to_string(n_cells));
    }
}

// One prompt's samplers, and what came of it so far.
class Writer {
  public:
    Writer(const Prompt & prompt, const Sampling & sampling, const Tokenizer & tokenizer)
        : prompt_(prompt), tokenizer_(tokenizer), sampler_(llama_sampler_chain_init(llama_sampler_chain_default_params()), llama_sampler_free) {
        if (sampling.temperature == 0.0F) {
            add(llama_sampler_init_greedy());
            return;
        }
        if (sampling.top_k > 0) {
            add(llama_sampler_init_top_k(sampling.top_k));
        }
        if (sampling.top_p < 1.0F) {
            add(llama_sampler_init_top_p(sampling.top_p, 1));
        }
        if (sampling.min_p > 0.0F) {
            add(llama_sampler_init_min_p(sampling.min_p, 1));
        }
        add(llama_sampler_init_temp(sampling.temperature));
        add(llama_sampler_init_dist(prompt.seed));
    }

    // Takes the next token from a row of logits [n_vocab].
    void take(const float * row) {
        candidates_.resize(static_cast<size_t>(tokenizer_.n_vocab()));
        for (size_t i = 0; i < candidates_.size(); ++i) {
            candidates_[i] = {static_cast<llama_token>(i), row[i], 0.0F};
        }
        llama_token_data_array array{candidates_.data(), candidates_.size(), -1, false};
        llama_sampler_apply(sampler_.get(), &array);
        const llama_token token = array.data[array.selected].id;
        llama_sampler_accept(sampler_.get(), token);
        result.tokens.push_back(token);
        is_done = has_ended(token) || result.tokens.size() == prompt_.n_new;
    }

    Continuation result;
    bool         is_done = false;

  private:
    void add(llama_sampler * sampler) { llama_sampler_chain_add(sampler_.get(), sampler); }

    bool has_ended(llama_token token) {
        if (tokenizer_.ends_generation(token)) {
            result.ended = Ended::TEXT;
            return true;
        }
        if (prompt_.stops.empty()) {
            return false;
        }
        const size_t n_before = text_.size();
        text_ += tokenizer_.token_text(token);
        for (const std::string & stop : prompt_.stops) {  // one that begins in an earlier token is found as well
            const size_t start = n_before - std::min(n_before, stop.size());
            if (!stop.empty() && text_.find(stop, start) != std::string::npos) {
                result.ended = Ended::STOP;
                return true;
            }
        }
        return false;
    }

    const Prompt &                prompt_;
    const Tokenizer &             tokenizer_;
    std::unique_ptr<llama_sampler, void (*)(llama_sampler *)> sampler_;
    std::vector<llama_token_data> candidates_;
    std::string                   text_;
};

}  // namespace

std::vector<Continuation> generate(Session & session, const std::vector<Prompt> & prompts, const Sampling & sampling) {
    check(sampling);
    check(session, prompts);
    session.begin_anew();
    std::vector<Writer> writers;
    std::vector<int32_t> tokens, positions, sequences;
    std::vector<int8_t> wanted;
    const auto add = [&](int32_t token, size_t position, size_t sequence, bool is_wanted) {
        tokens.push_back(token);
        positions.push_back(static_cast<int32_t>(position));
        sequences.push_back(static_cast<int32_t>(sequence));
        wanted.push_back(is_wanted);
    };
    for (size_t p = 0; p < prompts.size(); ++p) {
        writers.emplace_back(prompts[p], sampling, session.tokenizer());
        const std::vector<int32_t> & prompt = prompts[p].tokens;
        for (size_t i = 0; i < prompt.size() && prompts[p].n_new > 0; ++i) {
            add(prompt[i], i, p, i + 1 == prompt.size());
        }
    }
    while (!tokens.empty()) {
        session.run({tokens.data(), positions.data(), sequences.data(), tokens.size()}, wanted,
                    [&](size_t i, const float * row) { writers[static_cast<size_t>(sequences[i])].take(row); });
        tokens.clear();
        positions.clear();
        sequences.clear();
        wanted.clear();
        for (size_t p = 0; p < prompts.size(); ++p) {
            const std::vector<int32_t> & found = writers[p].result.tokens;
            if (!writers[p].is_done && !found.empty()) {
                add(found.back(), prompts[p].tokens.size() + found.size() - 1, p, true);
            }
        }
    }
    std::vector<Continuation> results;
    for (Writer & writer : writers) {
        results.push_back(std::move(writer.result));
    }
    return results;
}

}  // namespace reap
