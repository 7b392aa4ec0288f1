// Logits into figures, and texts that a model goes on with.
#pragma once

#include "session.h"

#include <cstdint>
#include <vector>

namespace reap {

// What a model predicts at n positions, natural logarithms.
struct Predictions {
    std::vector<double>  next;       // [n]: of the token that comes
    std::vector<int32_t> best;       // [n]: the most probable token, the lowest id where several are
    std::vector<int32_t> ids;        // [n][k]: the tokens that log_probs is about
    std::vector<float>   log_probs;  // [n][k]
    std::vector<double>  rest;       // [n]: probability (not its logarithm) of all other tokens
};

// Logits [n - first][n_vocab] of the positions from `first` on, in a fresh context.
std::vector<float> logits(Session & session, const std::vector<int32_t> & tokens, size_t first);

// ln p(tokens[i + 1] | tokens[..i]) for i = first .. n - 2, in a fresh context.
std::vector<double> log_probs(Session & session, const std::vector<int32_t> & tokens, size_t first);

// The same with the `n_top` most probable tokens of each position, all of them in the order of the vocabulary where n_top is as large.
Predictions predict_top(Session & session, const std::vector<int32_t> & tokens, size_t first, size_t n_top);

// The same with the tokens that `ids` [n - 1 - first][n_ids] says.
Predictions predict_ids(Session & session, const std::vector<int32_t> & tokens, size_t first, const std::vector<int32_t> & ids, size_t n_ids);

// The most probable tokens one after another, following `tokens`, at most n_new, until one that ends a generation (which is included).
// UnsupportedError for a model without a cache.
std::vector<int32_t> generate(Session & session, const std::vector<int32_t> & tokens, size_t n_new);

// Whether what the model says at a position depends on tokens that come after it (diffusion models), so that it has no perplexity: run on
// a few tokens, twice, with other ones at the end.
bool sees_the_future(Session & session);

}  // namespace reap
