#include "saliency.h"

#include "errors.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace reap {

namespace {

// Calls work(first, n) with the part of a field's array that belongs to a layer.
template <typename Field, typename Work>
void with_row(const Field & field, size_t layer, size_t n_experts, const Work & work) {
    const size_t n = field.per_expert ? n_experts : 1;
    work(layer * n, n);
}

// Joins row `layer` of `from` to `to`.
void join_row(Sums & to, const Sums & from, size_t layer, size_t n_experts) {
    for_each_field([&](const auto & field) {
        auto & total = to.*field.values;
        const auto & waiting = from.*field.values;
        with_row(field, layer, n_experts, [&](size_t first, size_t n) {
            for (size_t i = first; i < first + n; ++i) {
                total[i] = field.join == Join::Max ? std::max(total[i], waiting[i]) : total[i] + waiting[i];
            }
        });
    });
}

void clear_row(Sums & sums, size_t layer, size_t n_experts) {
    for_each_field([&](const auto & field) {
        auto & values = sums.*field.values;
        with_row(field, layer, n_experts, [&](size_t first, size_t n) {
            std::fill_n(values.begin() + static_cast<std::ptrdiff_t>(first), n, 0);
        });
    });
}

}  // namespace

Sums::Sums(size_t n_layers, size_t n_experts) {
    for_each_field([&](const auto & field) { (this->*field.values).assign(field.per_expert ? n_layers * n_experts : n_layers, 0); });
}

void append_layers(Sums & to, const Sums & from) {
    for_each_field([&](const auto & field) {
        auto & values = to.*field.values;
        values.insert(values.end(), (from.*field.values).begin(), (from.*field.values).end());
    });
}

Sums split_last_layer(Sums & sums, size_t n_experts) {
    Sums last;
    for_each_field([&](const auto & field) {
        auto & values = sums.*field.values;
        const auto first = values.end() - static_cast<std::ptrdiff_t>(std::min(field.per_expert ? n_experts : 1, values.size()));
        (last.*field.values).assign(first, values.end());
        values.erase(first, values.end());
    });
    return last;
}

Saliency::Saliency(size_t n_layers, size_t n_experts) : n_layers_(n_layers), n_experts_(n_experts) {
    reserve_groups(1);
}

void Saliency::reserve_groups(size_t n_groups) {
    if (n_groups > MAX_GROUPS) {
        throw UsageError("the calibration has more than " + std::to_string(MAX_GROUPS) + " domains");
    }
    if (n_groups > total_.size()) {
        total_.resize(n_groups, Sums(n_layers_, n_experts_));
        pending_.resize(n_groups);
        touched_.resize(n_groups * n_layers_, 0);
    }
}

Sums & Saliency::pending(size_t group) {
    Sums & sums = pending_.at(group);
    if (sums.total_tokens.empty()) {
        if (spare_.empty()) {
            spare_.emplace_back(n_layers_, n_experts_);
        }
        sums = std::move(spare_.back());
        spare_.pop_back();
    }
    return sums;
}

void Saliency::add(size_t layer, const Routing & routing, const int32_t * groups) {
    for (size_t t = 0; t < routing.n_tokens; ++t) {
        if (groups[t] == NOT_COUNTED) {
            continue;
        }
        const size_t group = static_cast<size_t>(groups[t]);
        Sums & sums = pending(group);
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
            sums.gate_sum[i] += gate;
            sums.norm_sum[i] += norm;
            sums.gated_norm_sum[i] += gated;
            sums.gated_norm_sq_sum[i] += gated * gated;
            sums.norm_sq_sum[i] += norm * norm;
            sums.norm_max[i] = std::max(sums.norm_max[i], norm);
        }
    }
}

void Saliency::commit() {
    for (size_t group = 0; group < total_.size(); ++group) {
        for (size_t layer = 0; layer < n_layers_; ++layer) {
            if (touched_[group * n_layers_ + layer]) {
                join_row(total_[group], pending_[group], layer, n_experts_);
            }
        }
    }
    discard();
}

void Saliency::restore(size_t group, const Sums & sums) {
    if (group >= MAX_GROUPS) {
        throw UsageError("there is no group " + std::to_string(group) + "; the last is " + std::to_string(MAX_GROUPS - 1));
    }
    for_each_field([&](const auto & field) {
        const size_t expected = field.per_expert ? n_layers_ * n_experts_ : n_layers_;
        const size_t found = (sums.*field.values).size();
        if (found != expected) {
            throw UsageError(std::string("the sums to go on from are of another model: ") + field.name + " has " + std::to_string(found) +
                             " values, expected " + std::to_string(expected));
        }
    });
    reserve_groups(group + 1);
    total_[group] = sums;
}

void Saliency::discard() {
    for (size_t group = 0; group < total_.size(); ++group) {
        if (pending_[group].total_tokens.empty()) {
            continue;
        }
        for (size_t layer = 0; layer < n_layers_; ++layer) {
            if (touched_[group * n_layers_ + layer]) {
                clear_row(pending_[group], layer, n_experts_);
            }
        }
        spare_.push_back(std::move(pending_[group]));
        pending_[group] = Sums();
    }
    touched_.assign(touched_.size(), 0);
}

}  // namespace reap
