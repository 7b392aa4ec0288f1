// What a pass through a model's graph shows of its MoE layers: which nodes carry a layer's ids, gates and outputs in their last form,
// and whether ids and gates still hold their values when the output has been computed (the allocator reuses memory after a tensor's
// last reader).
#pragma once

#include "ggml.h"
#include "node_names.h"

#include <map>
#include <string>
#include <vector>

namespace reap {

// How one layer's routing is read.
struct LayerPlan {
    size_t      row = 0;  // in the sums
    std::string output;   // the kind of the expert output's last form
    std::string weights;  // the kind of the gate's last form
    bool        stop_at_ids = false;
    bool        stop_at_weights = false;
    bool        gate_in_norm = false;  // the gate multiplies the experts' input
    bool        by_token = false;      // its experts are selected by token id; the router's values are read as well
};

// The ids that an expert output was computed with. A per-expert scale puts a MUL after the MUL_MAT_ID; a bias an ADD_ID.
const ggml_tensor * ids_of(const ggml_tensor * output);

// Whether the ids are looked up in a table by token (DeepSeek-V4's first layers), not selected by the router.
bool are_looked_up(const ggml_tensor * ids);

class MoeGraph {
  public:
    void clear();
    // A node as it passes by.
    void add(const ggml_tensor * node);

    bool is_empty() const { return seen_.empty(); }
    // With it, a graph begins.
    const std::string & first_node() const { return seen_.front().name; }
    // How each of `layers` is read, which are the MoE layers of the model's file, ascending. UnsupportedError where the graph has others, or
    // runs them in a way that reap cannot read.
    std::map<int, LayerPlan> plan(const std::vector<int> & layers);
    // The last to run, once they are planned.
    int last_layer() const { return last_layer_; }
    // The hidden states that a prediction block is fed with. UnsupportedError where there are none.
    std::string hidden_node() const;

  private:
    // What is remembered of a node: names and identities, never values.
    struct Seen {
        std::string         name;
        const ggml_tensor * tensor;
        const ggml_tensor * root;  // whose memory it is
        std::vector<const ggml_tensor *> read_roots;
    };

    std::vector<size_t> routing_block(int layer) const;
    LayerPlan plan_layer(int layer) const;
    bool read_later(const ggml_tensor * tensor, size_t stop) const;

    std::vector<Seen> seen_;
    int               last_layer_ = -1;
};

}  // namespace reap
