#include "scoring.h"

#include "errors.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

namespace reap {

namespace {

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
void add_prediction(Predictions & result, const float * row, int n_vocab, int32_t next, const int32_t * ids, size_t n_ids) {
    const Normaliser normaliser(row, n_vocab);
    result.next.push_back(row[next] - normaliser.log_sum);
    result.best.push_back(normaliser.best);
    const bool all = n_ids == static_cast<size_t>(n_vocab);
    double covered = 0.0;
    for (size_t i = 0; i < n_ids; ++i) {
        const double log_prob = row[ids[i]] - normaliser.log_sum;
        result.log_probs.push_back(static_cast<float>(log_prob));
        covered += all ? 0.0 : std::exp(log_prob);
    }
    result.rest.push_back(all ? 0.0 : std::max(0.0, 1.0 - covered));
}

// Tokens that are run together, and what is asked about the one that follows each.
struct Pass {
    struct Ask {
        ContinuationScore * score;
        int32_t             next;
    };

    std::vector<int32_t>          tokens, positions, sequences;
    std::vector<std::vector<Ask>> asks;

    void add(int32_t token, int32_t position, int32_t sequence) {
        tokens.push_back(token);
        positions.push_back(position);
        sequences.push_back(sequence);
        asks.emplace_back();
    }

    void run(Session & session) const {
        if (tokens.empty()) {
            return;
        }
        std::vector<int8_t> wanted;
        for (const auto & about : asks) {
            wanted.push_back(!about.empty());
        }
        session.run({tokens.data(), positions.data(), sequences.data(), tokens.size()}, wanted, [&](size_t i, const float * row) {
            const Normaliser normaliser(row, session.n_vocab());
            for (const Ask & ask : asks[i]) {
                ask.score->log_prob += row[ask.next] - normaliser.log_sum;
                ask.score->greedy = ask.score->greedy && ask.next == normaliser.best;
            }
        });
    }
};

void check_questions(const Session & session, const std::vector<Question> & questions) {
    size_t n_tokens = 0, n_sequences = 0;
    for (const Question & question : questions) {
        if (question.context.empty() || question.continuations.empty()) {
            throw UsageError("a question has no context or no continuation");
        }
        n_tokens += question.context.size();
        for (const std::vector<int32_t> & continuation : question.continuations) {
            if (continuation.empty() || question.context.size() + continuation.size() - 1 > static_cast<size_t>(session.ctx_size())) {
                throw UsageError("a context of " + std::to_string(question.context.size()) + " tokens and a continuation of " +
                                 std::to_string(continuation.size()) + " do not fit a window of " + std::to_string(session.ctx_size()));
            }
            session.check_tokens(continuation.data(), continuation.size());
            n_tokens += continuation.size() - 1;
            ++n_sequences;
        }
    }
    if (n_tokens > static_cast<size_t>(session.cache_size()) || n_sequences > static_cast<size_t>(session.n_sequences())) {
        throw UsageError("questions of " + std::to_string(n_tokens) + " tokens and " + std::to_string(n_sequences) + " continuations, expected at most " +
                         std::to_string(session.cache_size()) + " and " + std::to_string(session.n_sequences()));
    }
}

}  // namespace

std::vector<float> logits(Session & session, const std::vector<int32_t> & tokens, size_t first) {
    const size_t n_row = static_cast<size_t>(session.n_vocab());
    std::vector<float> result;
    session.for_each_logits(tokens, first, [&](size_t, const float * row) { result.insert(result.end(), row, row + n_row); });
    return result;
}

std::vector<double> log_probs(Session & session, const std::vector<int32_t> & tokens, size_t first) {
    std::vector<double> result;
    session.for_each_logits(tokens, first, [&](size_t position, const float * row) {
        if (position + 1 < tokens.size()) {
            result.push_back(row[tokens[position + 1]] - Normaliser(row, session.n_vocab()).log_sum);
        }
    });
    return result;
}

Predictions predict_top(Session & session, const std::vector<int32_t> & tokens, size_t first, size_t n_top) {
    const int n_vocab = session.n_vocab();
    std::vector<int32_t> order(static_cast<size_t>(n_vocab));
    const size_t k = std::min(n_top, order.size());
    Predictions result;
    session.for_each_logits(tokens, first, [&](size_t position, const float * row) {
        if (position + 1 == tokens.size()) {
            return;
        }
        std::iota(order.begin(), order.end(), 0);
        if (k < order.size()) {
            const auto more_probable = [row](int32_t a, int32_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); };
            std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k), order.end(), more_probable);
        }
        result.ids.insert(result.ids.end(), order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k));
        add_prediction(result, row, n_vocab, tokens[position + 1], order.data(), k);
    });
    return result;
}

Predictions predict_ids(Session & session, const std::vector<int32_t> & tokens, size_t first, const std::vector<int32_t> & ids, size_t n_ids) {
    if (first >= tokens.size() || ids.size() != (tokens.size() - 1 - first) * n_ids) {
        throw UsageError("there are " + std::to_string(ids.size()) + " ids for " + std::to_string(tokens.size()) + " tokens from " + std::to_string(first));
    }
    session.check_tokens(ids.data(), ids.size());
    Predictions result;
    session.for_each_logits(tokens, first, [&](size_t position, const float * row) {
        if (position + 1 < tokens.size()) {
            add_prediction(result, row, session.n_vocab(), tokens[position + 1], ids.data() + (position - first) * n_ids, n_ids);
        }
    });
    return result;
}

std::vector<std::vector<ContinuationScore>> score_continuations(Session & session, const std::vector<Question> & questions) {
    std::vector<std::vector<ContinuationScore>> scores;
    check_questions(session, questions);
    session.begin_anew();
    Pass contexts, rest;
    std::vector<std::pair<int32_t, int32_t>> copies;
    int32_t sequence = 0;
    for (const Question & question : questions) {
        scores.emplace_back(question.continuations.size());
    }
    for (size_t q = 0; q < questions.size(); ++q) {
        const int32_t first = sequence;
        for (size_t i = 0; i < questions[q].context.size(); ++i) {
            contexts.add(questions[q].context[i], static_cast<int32_t>(i), first);
        }
        const size_t last = contexts.tokens.size() - 1;
        for (size_t c = 0; c < scores[q].size(); ++c) {
            const std::vector<int32_t> & tokens = questions[q].continuations[c];
            contexts.asks[last].push_back({&scores[q][c], tokens[0]});
            if (tokens.size() > 1 && sequence != first) {
                copies.emplace_back(first, sequence);
            }
            for (size_t i = 0; i + 1 < tokens.size(); ++i) {
                rest.add(tokens[i], static_cast<int32_t>(questions[q].context.size() + i), sequence);
                rest.asks.back().push_back({&scores[q][c], tokens[i + 1]});
            }
            ++sequence;
        }
    }
    contexts.run(session);
    for (const auto & [from, to] : copies) {
        session.copy_sequence(from, to);
    }
    rest.run(session);
    return scores;
}

bool sees_the_future(Session & session) {
    // rounding may depend on which tokens share a matrix product; what a token contributes is larger by orders of magnitude
    constexpr double ROUNDING = 1e-3;  // of the spread of the logits
    constexpr size_t N_TOKENS = 8;
    const int n_vocab = session.n_vocab();
    const size_t n = std::min<size_t>(N_TOKENS, static_cast<size_t>(session.ctx_size()));
    if (n < 2 || n_vocab < 2) {
        return false;
    }
    std::vector<int32_t> tokens(n), others(n);
    for (size_t i = 0; i < n; ++i) {
        tokens[i] = static_cast<int32_t>(i) % n_vocab;
        others[i] = i == 0 ? tokens[0] : (tokens[i] + 1 + n_vocab / 2) % n_vocab;
    }
    std::vector<float> rows[2];
    for (int i = 0; i < 2; ++i) {
        session.for_each_logits(i == 0 ? tokens : others, 0, [&](size_t position, const float * row) {
            if (position == 0) {
                rows[i].assign(row, row + n_vocab);
            }
        });
    }
    const auto [least, most] = std::minmax_element(rows[0].begin(), rows[0].end());
    double difference = 0.0;
    for (size_t i = 0; i < rows[0].size(); ++i) {
        difference = std::max(difference, static_cast<double>(std::abs(rows[0][i] - rows[1][i])));
    }
    return difference > ROUNDING * (static_cast<double>(*most) - *least);
}

}  // namespace reap
