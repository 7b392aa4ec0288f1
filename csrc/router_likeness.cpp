#include "router_likeness.h"

#include <algorithm>

namespace reap {

RouterLikeness::RouterLikeness(size_t n_experts) : n_experts_(n_experts) {
    for (Sums * sums : {&total_, &pending_}) {
        sums->values.assign(n_experts, 0.0);
        sums->products.assign(n_experts * n_experts, 0.0);
    }
}

void RouterLikeness::add(const float * values) {
    pending_.n_tokens += 1;
    for (size_t i = 0; i < n_experts_; ++i) {
        const double value = values[i];
        pending_.values[i] += value;
        double * row = pending_.products.data() + i * n_experts_;
        for (size_t j = 0; j <= i; ++j) {
            row[j] += value * static_cast<double>(values[j]);
        }
    }
}

void RouterLikeness::commit() {
    if (pending_.n_tokens == 0) {
        return;
    }
    total_.n_tokens += pending_.n_tokens;
    const auto add_up = [](std::vector<double> & to, const std::vector<double> & from) {
        std::transform(to.begin(), to.end(), from.begin(), to.begin(), [](double a, double b) { return a + b; });
    };
    add_up(total_.values, pending_.values);
    add_up(total_.products, pending_.products);
    discard();
}

void RouterLikeness::discard() {
    if (pending_.n_tokens == 0) {
        return;
    }
    pending_.n_tokens = 0;
    std::fill(pending_.values.begin(), pending_.values.end(), 0.0);
    std::fill(pending_.products.begin(), pending_.products.end(), 0.0);
}

}  // namespace reap
