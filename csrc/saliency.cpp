#include "saliency.h"

#include "errors.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace reap {

namespace {

Sums zero_sums(size_t n_layers, size_t n_experts) {
    const size_t n = n_layers * n_experts;
    const std::vector<double> zeros(n, 0.0);
    return {std::vector<int64_t>(n, 0), zeros, zeros, zeros, zeros, zeros, std::vector<int64_t>(n_layers, 0)};
}

// Adds row `layer` of `from` to `to` and sets it to zero.
void move_row(Sums & from, Sums & to, size_t layer, size_t n_experts) {
    for (size_t i = layer * n_experts; i < (layer + 1) * n_experts; ++i) {
        to.counts[i] += from.counts[i];
        to.gate[i] += from.gate[i];
        to.norm[i] += from.norm[i];
        to.gated_norm[i] += from.gated_norm[i];
        to.gated_norm_sq[i] += from.gated_norm_sq[i];
        to.norm_max[i] = std::max(to.norm_max[i], from.norm_max[i]);
    }
    to.total_tokens[layer] += from.total_tokens[layer];
}

void clear_row(Sums & sums, size_t layer, size_t n_experts) {
    const size_t first = layer * n_experts;
    std::fill_n(sums.counts.begin() + first, n_experts, 0);
    for (auto * values : {&sums.gate, &sums.norm, &sums.gated_norm, &sums.gated_norm_sq, &sums.norm_max}) {
        std::fill_n(values->begin() + first, n_experts, 0.0);
    }
    sums.total_tokens[layer] = 0;
}

}  // namespace

Saliency::Saliency(size_t n_layers, size_t n_experts) : n_layers_(n_layers), n_experts_(n_experts) {
    reserve_groups(1);
}

void Saliency::reserve_groups(size_t n_groups) {
    if (n_groups > MAX_GROUPS) {
        throw UsageError("the calibration has more than " + std::to_string(MAX_GROUPS) + " domains");
    }
    if (n_groups > total_.size()) {
        total_.resize(n_groups, zero_sums(n_layers_, n_experts_));
        pending_.resize(n_groups, zero_sums(n_layers_, n_experts_));
        touched_.resize(n_groups * n_layers_, 0);
    }
}

void Saliency::add(size_t layer, const Routing & routing, const int32_t * groups) {
    for (size_t t = 0; t < routing.n_tokens; ++t) {
        if (groups[t] == NOT_COUNTED) {
            continue;
        }
        const size_t group = static_cast<size_t>(groups[t]);
        Sums & sums = pending_.at(group);
        touched_[group * n_layers_ + layer] = 1;
        sums.total_tokens[layer] += 1;
        for (size_t k = 0; k < routing.n_used; ++k) {
            const size_t at = t * routing.n_used + k;
            const int32_t expert = routing.experts[at];
            if (expert < 0 || static_cast<size_t>(expert) >= n_experts_) {
                throw EngineError("a token was routed to expert " + std::to_string(expert) + " of " + std::to_string(n_experts_));
            }
            const double gate = routing.gates[at];
            const double norm = routing.norms[at];
            const double gated = routing.gate_in_norm ? norm : gate * norm;
            if (!std::isfinite(gated) || !std::isfinite(gate)) {
                throw EngineError("expert " + std::to_string(expert) + " has an output or a gate that is not a finite number (gate " +
                                  std::to_string(gate) + ", norm " + std::to_string(norm) + ")");
            }
            const size_t i = layer * n_experts_ + static_cast<size_t>(expert);
            sums.counts[i] += 1;
            sums.gate[i] += gate;
            sums.norm[i] += norm;
            sums.gated_norm[i] += gated;
            sums.gated_norm_sq[i] += gated * gated;
            sums.norm_max[i] = std::max(sums.norm_max[i], norm);
        }
    }
}

void Saliency::commit() {
    for (size_t group = 0; group < total_.size(); ++group) {
        for (size_t layer = 0; layer < n_layers_; ++layer) {
            if (touched_[group * n_layers_ + layer]) {
                move_row(pending_[group], total_[group], layer, n_experts_);
            }
        }
    }
    discard();
}

void Saliency::restore(size_t group, const Sums & sums) {
    const size_t n = n_layers_ * n_experts_;
    for (const auto * values : {&sums.gate, &sums.norm, &sums.gated_norm, &sums.gated_norm_sq, &sums.norm_max}) {
        if (values->size() != n) {
            throw UsageError("the sums to go on from are of another model");
        }
    }
    if (sums.counts.size() != n || sums.total_tokens.size() != n_layers_) {
        throw UsageError("the counts to go on from are of another model");
    }
    reserve_groups(group + 1);
    total_[group] = sums;
}

void Saliency::discard() {
    for (size_t group = 0; group < total_.size(); ++group) {
        for (size_t layer = 0; layer < n_layers_; ++layer) {
            if (touched_[group * n_layers_ + layer]) {
                clear_row(pending_[group], layer, n_experts_);
            }
        }
    }
    touched_.assign(touched_.size(), 0);
}

}  // namespace reap
