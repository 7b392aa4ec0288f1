// How alike a router's values of two experts are, token for token, in a layer whose experts are selected by token id: what shows which
// expert can take the place of a removed one there. Spans in, double sums out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace reap {

class RouterLikeness {
  public:
    struct Sums {
        int64_t             n_tokens = 0;
        std::vector<double> values;    // [n_experts]: Σ v
        std::vector<double> products;  // [n_experts][n_experts], the lower triangle: Σ v·w
    };

    explicit RouterLikeness(size_t n_experts);

    // values: [n_experts] of one token; waits for commit().
    void add(const float * values);
    void commit();
    void discard();

    size_t n_experts() const { return n_experts_; }
    const Sums & sums() const { return total_; }

  private:
    size_t n_experts_;
    Sums   total_, pending_;
};

}  // namespace reap
