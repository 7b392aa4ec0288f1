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

std::vector<int32_t> generate(Session & session, const std::vector<int32_t> & tokens, size_t n_new) {
    if (!session.has_cache()) {
        throw UnsupportedError(session.model_path() + ": this model sees whole texts and does not continue them token by token");
    }
    const size_t n_ctx = static_cast<size_t>(session.ctx_size());
    if (tokens.empty() || tokens.size() > n_ctx || n_new > n_ctx - tokens.size()) {
        throw UsageError("a prompt of " + std::to_string(tokens.size()) + " tokens and " + std::to_string(n_new) + " new ones do not fit a context of " +
                         std::to_string(n_ctx));
    }
    std::vector<int32_t> result;
    int32_t best = 0;
    session.for_each_logits(tokens, tokens.size() - 1, [&](size_t, const float * row) { best = Normaliser(row, session.n_vocab()).best; });
    while (result.size() < n_new) {
        result.push_back(best);
        if (session.tokenizer().ends_generation(best) || result.size() == n_new) {
            break;
        }
        best = Normaliser(session.next_logits(best, static_cast<int32_t>(tokens.size() + result.size() - 1)), session.n_vocab()).best;
    }
    return result;
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
