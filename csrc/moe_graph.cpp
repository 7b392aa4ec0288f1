#include "moe_graph.h"

#include "errors.h"

#include <algorithm>
#include <set>

namespace reap {

namespace {

const ggml_tensor * root_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

// Whether a node multiplies with the down projection of the routed experts (GroveMoE's adjugate ones are "_chexps").
// An adapter adds its product to it.
bool multiplies_experts(const ggml_tensor * node) {
    for (const ggml_tensor * t = node; t != nullptr; t = t->src[0]) {
        if (t->op == GGML_OP_MUL_MAT_ID) {
            return std::string_view(t->src[0]->name).find("ffn_down_exps") != std::string_view::npos;
        }
        if (t->op != GGML_OP_MUL && t->op != GGML_OP_ADD_ID && t->op != GGML_OP_ADD) {
            return false;
        }
    }
    return false;
}

}  // namespace

const ggml_tensor * ids_of(const ggml_tensor * output) {
    switch (output->op) {
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ADD_ID:
            return output->src[2];
        case GGML_OP_MUL:
            return output->src[0]->op == GGML_OP_MUL_MAT_ID ? output->src[0]->src[2] : nullptr;
        default:
            return nullptr;
    }
}

bool are_looked_up(const ggml_tensor * ids) {
    return ids->op == GGML_OP_GET_ROWS && std::string_view(ids->src[0]->name).find("ffn_gate_tid2eid") != std::string_view::npos;
}

void MoeGraph::clear() {
    seen_.clear();
    last_layer_ = -1;
}

void MoeGraph::add(const ggml_tensor * node) {
    Seen seen{node->name, node, root_of(node), {}};
    for (const ggml_tensor * source : node->src) {
        if (source != nullptr) {
            seen.read_roots.push_back(root_of(source));
        }
    }
    seen_.push_back(std::move(seen));
}

std::map<int, LayerPlan> MoeGraph::plan(const std::vector<int> & layers) {
    std::map<int, LayerPlan> plans;
    const std::set<int> expected(layers.begin(), layers.end());
    for (const Seen & seen : seen_) {
        const NodeName name = parse_node_name(seen.name);
        if (name.role == Role::None) {
            continue;
        }
        if (expected.count(name.layer) == 0) {
            throw UnsupportedError(in_layer(name.layer) + "the engine runs experts (" + seen.name + ") that the model's file does not show");
        }
        if (name.role == Role::Output) {
            last_layer_ = name.layer;
            plans[name.layer];
        }
    }
    for (size_t row = 0; row < layers.size(); ++row) {
        if (plans.count(layers[row]) == 0) {
            throw UnsupportedError(in_layer(layers[row]) + "the model's file has experts, but the engine's graph never runs them");
        }
        plans[layers[row]] = plan_layer(layers[row]);
        plans[layers[row]].row = row;
    }
    return plans;
}

std::string MoeGraph::hidden_node() const {
    for (const std::string_view name : PREDICTION_INPUTS) {
        if (std::any_of(seen_.begin(), seen_.end(), [&](const Seen & seen) { return seen.name == name; })) {
            return std::string(name);
        }
    }
    throw UnsupportedError("the graph shows no hidden states that a prediction block could be fed with");
}

// The nodes (indices of seen_) of the layer's block of routed experts: from its ids to the next ids of the same layer.
std::vector<size_t> MoeGraph::routing_block(int layer) const {
    std::vector<std::vector<size_t>> blocks;
    for (size_t i = 0; i < seen_.size(); ++i) {
        const NodeName name = parse_node_name(seen_[i].name);
        if (name.role == Role::None || name.layer != layer) {
            continue;
        }
        if (name.role == Role::Ids) {
            blocks.emplace_back();
        }
        if (!blocks.empty()) {
            blocks.back().push_back(i);
        }
    }
    std::vector<size_t> found;
    for (const auto & block : blocks) {
        const bool routed = std::any_of(block.begin(), block.end(), [&](size_t i) {
            return parse_node_name(seen_[i].name).role == Role::Output && multiplies_experts(seen_[i].tensor);
        });
        if (routed && !found.empty()) {
            throw UnsupportedError(in_layer(layer) + "runs its experts more than once, which reap cannot tell apart");
        }
        if (routed) {
            found = block;
        }
    }
    if (found.empty()) {
        throw UnsupportedError(in_layer(layer) + "found no ids that the experts are selected by");
    }
    if (found.front() != blocks.front().front()) {
        throw UnsupportedError(in_layer(layer) + "runs another block under the experts' names before them");
    }
    return found;
}

// The last form of the gate and of the output before they are multiplied, and where their values are still whole.
LayerPlan MoeGraph::plan_layer(int layer) const {
    LayerPlan plan;
    const ggml_tensor * weights = nullptr;
    size_t output = 0;
    size_t gated = 0;
    for (const size_t i : routing_block(layer)) {
        const NodeName name = parse_node_name(seen_[i].name);
        if (name.role == Role::Weights) {
            weights = seen_[i].tensor;
            plan.weights = name.kind;
        } else if (name.role == Role::Output) {
            output = i;
            plan.output = name.kind;
        } else if (name.role == Role::Gated) {
            gated = i;
        }
    }
    if (weights == nullptr || gated == 0) {
        throw UnsupportedError(in_layer(layer) + "found experts without " + (weights == nullptr ? "a gate" : "a product with their gate"));
    }
    const ggml_tensor * ids = ids_of(seen_[output].tensor);
    plan.by_token = ids != nullptr && are_looked_up(ids);
    plan.stop_at_ids = ids == nullptr || !read_later(ids, output);
    plan.stop_at_weights = !read_later(weights, output);
    plan.gate_in_norm = gated < output;
    return plan;
}

// True where the tensor's memory is read by the node at `stop` or by one after it, so that its values are whole at that stop.
bool MoeGraph::read_later(const ggml_tensor * tensor, size_t stop) const {
    const ggml_tensor * root = root_of(tensor);
    for (size_t i = stop; i < seen_.size(); ++i) {
        const auto & reads = seen_[i].read_roots;
        if (std::find(reads.begin(), reads.end(), root) != reads.end()) {
            return true;
        }
    }
    return false;
}

}  // namespace reap
