// Per-expert sums of the REAP family of criteria. Spans in, double sums out: no ggml, no llama, no Python.
//
// For the tokens routed to an expert, with g the gate that multiplies its output f:
//   count, Σ g, Σ ‖f‖, Σ g·‖f‖, Σ (g·‖f‖)², max ‖f‖        (REAP is Σ g·‖f‖ / count; arXiv:2510.13999)
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace reap {

// One layer's routings of a batch: three arrays [n_tokens][n_used], as they lie in memory.
struct Routing {
    const int32_t * experts;
    const float *   gates;
    const double *  norms;
    size_t          n_used;
    size_t          n_tokens;
    // the gate multiplied the expert's input, so that the norm already has it in it (Llama-4)
    bool            gate_in_norm = false;
};

// The sums of one group (a domain, say): arrays [n_layers][n_experts], and the tokens that each layer saw.
struct Sums {
    std::vector<int64_t> counts;
    std::vector<double>  gate, norm, gated_norm, gated_norm_sq, norm_max;
    std::vector<int64_t> total_tokens;  // [n_layers]
};

class Saliency {
  public:
    static constexpr int32_t NOT_COUNTED = -1;

    static constexpr size_t  MAX_GROUPS = 4096;

    Saliency(size_t n_layers, size_t n_experts);

    // Makes room for at least `n_groups` groups.
    void reserve_groups(size_t n_groups);

    // Adds one layer's routings to what waits for commit(). groups[t] is the group of token t, or NOT_COUNTED.
    // Throws EngineError for a routing outside the experts or a value that is not finite.
    void add(size_t layer, const Routing & routing, const int32_t * groups);

    void commit();   // what was added succeeded: it joins the totals
    void discard();  // it failed: forget it
    // Takes the totals of a group from an earlier run. Throws UsageError where the arrays have another size.
    void restore(size_t group, const Sums & sums);

    const Sums & sums(size_t group) const { return total_.at(group); }
    size_t n_layers() const { return n_layers_; }
    size_t n_experts() const { return n_experts_; }
    size_t n_groups() const { return total_.size(); }

  private:
    size_t n_layers_, n_experts_;
    std::vector<Sums> total_, pending_;
    std::vector<char> touched_;  // [n_groups][n_layers] of pending_
};

}  // namespace reap
