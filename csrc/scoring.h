// Logits into figures.
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

// A context, and what may follow it: the choices of a question, say.
struct Question {
    std::vector<int32_t>              context;
    std::vector<std::vector<int32_t>> continuations;
};

struct ContinuationScore {
    double log_prob = 0.0;   // ln p(continuation | context)
    bool   greedy = true;    // each of its tokens is the most probable one, the lowest id where several are
};

// The score of each continuation of each question. Contexts are run once, and what the cache holds of one is shared by its continuations; all
// of them share batches. Each continuation is a sequence of its own, and all tokens together have to fit the cache.
std::vector<std::vector<ContinuationScore>> score_continuations(Session & session, const std::vector<Question> & questions);

// Whether what the model says at a position depends on tokens that come after it (diffusion models), so that it has no perplexity: run on
// a few tokens, twice, with other ones at the end.
bool sees_the_future(Session & session);

}  // namespace reap
