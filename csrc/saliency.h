// Per-expert sums of the REAP family of criteria. Spans in, double sums out: no ggml, no llama, no Python.
//
// For the tokens routed to an expert, with g the gate that multiplies its output f:
//   count, Σ g, Σ ‖f‖, Σ g·‖f‖, Σ (g·‖f‖)², Σ ‖f‖², max ‖f‖        (REAP is Σ g·‖f‖ / count; arXiv:2510.13999)
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <tuple>
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

// The sums of one group (a domain, say).
struct Sums {
    std::vector<int64_t> counts;             // [n_layers][n_experts], as all that follow except the last
    std::vector<double>  gate_sum;           // Σ g
    std::vector<double>  norm_sum;           // Σ ‖f‖
    std::vector<double>  gated_norm_sum;     // Σ g·‖f‖
    std::vector<double>  gated_norm_sq_sum;  // Σ (g·‖f‖)²
    std::vector<double>  norm_sq_sum;        // Σ ‖f‖²
    std::vector<double>  norm_max;           // max ‖f‖
    std::vector<int64_t> total_tokens;       // [n_layers]: the tokens that each layer saw

    Sums() = default;
    Sums(size_t n_layers, size_t n_experts);  // all zero
};

// What is done with a value that waits when it joins the totals.
enum class Join { Add, Max };

template <typename T>
struct SumsField {
    const char *           name;  // in Python and in files
    std::vector<T> Sums::* values;
    bool                   per_expert;  // [n_layers][n_experts], else [n_layers]
    Join                   join;
};

// The only list of the fields: code that has to touch all of them goes through for_each_field.
inline constexpr auto SUMS_FIELDS = std::make_tuple(
    SumsField<int64_t>{"counts", &Sums::counts, true, Join::Add}, SumsField<double>{"gate_sum", &Sums::gate_sum, true, Join::Add},
    SumsField<double>{"norm_sum", &Sums::norm_sum, true, Join::Add},
    SumsField<double>{"gated_norm_sum", &Sums::gated_norm_sum, true, Join::Add},
    SumsField<double>{"gated_norm_sq_sum", &Sums::gated_norm_sq_sum, true, Join::Add},
    SumsField<double>{"norm_sq_sum", &Sums::norm_sq_sum, true, Join::Add},
    SumsField<double>{"norm_max", &Sums::norm_max, true, Join::Max},
    SumsField<int64_t>{"total_tokens", &Sums::total_tokens, false, Join::Add});
static_assert(sizeof(Sums) == std::tuple_size_v<decltype(SUMS_FIELDS)> * sizeof(std::vector<double>), "a field of Sums is not in the list");

template <typename Visit>
void for_each_field(const Visit & visit) {
    std::apply([&visit](const auto &... field) { (visit(field), ...); }, SUMS_FIELDS);
}

// Adds the layers of `from` after those of `to`.
void append_layers(Sums & to, const Sums & from);

// Takes the last layer's row off.
Sums split_last_layer(Sums & sums, size_t n_experts);

class Saliency {
  public:
    static constexpr int32_t NOT_COUNTED = -1;
    static constexpr size_t  MAX_GROUPS = 1 << 16;

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
    Sums & pending(size_t group);

    std::vector<Sums> total_;
    std::vector<Sums> pending_;  // empty, except of the groups that something waits for
    std::vector<Sums> spare_;    // all zero, for the next groups that need one: a batch touches few of many groups
    std::vector<char> touched_;  // [n_groups][n_layers] of pending_
};

}  // namespace reap
