// Virtual pruning: −inf over the removed experts' router values as they are computed, so that a model behaves as if they were gone.
//
// What is written over is learnt once, from a survey pass: each layer's first form of the router's values, from which its gates come,
// and what experts are selected by where a bias was added to that. Then it is proved on the graph that every layer's selection
// and gates depend on nothing that was not written over; a layer where they do is refused.
#pragma once

#include "ggml.h"
#include "node_names.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace reap {

class RouterMask {
  public:
    // By layer, the ids of its experts that stay.
    using Kept = std::map<int, std::vector<int32_t>>;
    // By layer whose experts are selected by token id: for each removed expert those that take its place, best first. The first that a
    // token does not have already is taken.
    using Substitutes = std::map<int, std::map<int32_t, std::vector<int32_t>>>;

    // The survey: begin, decode a few tokens, end. Once for a model.
    void begin_survey();
    void end_survey();
    void abandon_survey() noexcept;
    bool is_learnt() const { return !layers_.empty(); }

    // UsageError where `kept` is not of this model's layers, or leaves too few experts; UnsupportedError where a layer selects by token id
    // and `substitutes` says nothing about it.
    void set_kept(const Kept & kept, const Substitutes & substitutes);
    void lift() { in_force_ = false; }
    bool in_force() const { return in_force_; }

    // Of each node as it is asked about: whether it has to be stopped at.
    bool on_ask(const ggml_tensor * node);
    bool wants(const ggml_tensor * node);
    void apply(ggml_tensor * node);

    // A batch: begin, decode, then check that every layer was masked for every token. Graphs may drop the tokens whose logits are not wanted
    // before their last layer.
    void begin_batch();
    void check_batch(size_t n_tokens, size_t n_wanted) const;

  private:
    // A node that is written over, and for how many tokens of the batch that happened.
    struct Target {
        std::string kind;
        size_t      n_rows = 0;
    };

    struct Layer {
        size_t               n_experts = 0;
        size_t               n_used = 0;
        std::vector<Target>  targets;
        std::vector<int32_t> removed;
        bool                 by_token = false;  // its experts are looked up by token id
        std::map<int32_t, std::vector<int32_t>> substitutes;
    };

    // One layer's nodes in the survey.
    struct Nodes {
        std::vector<const ggml_tensor *> targets;
        std::vector<std::string>         kinds;
        const ggml_tensor *              ids = nullptr;
        const ggml_tensor *              weights = nullptr;
        size_t n_ids = 0;
        bool   has_output = false;
    };

    static void add_node(Nodes & nodes, const NodeName & name, const ggml_tensor * tensor);
    static Layer learn_layer(int layer, const Nodes & nodes);
    static void check_substitutes(int layer, const Layer & learnt);
    static void rewrite_ids(const Layer & layer, ggml_tensor * ids);
    Target * find(const ggml_tensor * node);

    bool surveying_ = false;
    bool in_force_ = false;
    int  last_layer_ = -1;  // in the order of the graph
    std::vector<const ggml_tensor *> seen_;
    std::map<int, Layer>             layers_;
};

}  // namespace reap
