#include "router_mask.h"

#include "errors.h"
#include "moe_graph.h"
#include "tensor_read.h"

#include <algorithm>
#include <limits>
#include <set>

namespace reap {

namespace {

constexpr const char * IDS = "ffn_moe_topk";

// Whether a node hands on the −inf of a masked source as it is, whatever its other source holds: a bias is added, or some of the tokens
// are picked.
bool hands_on(const ggml_tensor * tensor, const std::vector<const ggml_tensor *> & masked) {
    const bool keeps_columns = tensor->op == GGML_OP_ADD || tensor->op == GGML_OP_GET_ROWS;
    return keeps_columns && std::find(masked.begin(), masked.end(), tensor->src[0]) != masked.end();
}

// An input or a weight that `start` is computed from without passing through one of `masked`; null where there is none.
const ggml_tensor * unmasked_source(const ggml_tensor * start, const std::vector<const ggml_tensor *> & masked) {
    std::set<const ggml_tensor *> visited(masked.begin(), masked.end());
    std::vector<const ggml_tensor *> waiting = {start};
    while (!waiting.empty()) {
        const ggml_tensor * tensor = waiting.back();
        waiting.pop_back();
        if (!visited.insert(tensor).second || hands_on(tensor, masked)) {
            continue;
        }
        const bool is_leaf = std::all_of(std::begin(tensor->src), std::end(tensor->src), [](const ggml_tensor * s) { return s == nullptr; });
        if (is_leaf) {
            return tensor;
        }
        std::copy_if(std::begin(tensor->src), std::end(tensor->src), std::back_inserter(waiting), [](const ggml_tensor * s) { return s != nullptr; });
    }
    return nullptr;
}

std::vector<int32_t> complement(int layer, const std::vector<int32_t> & kept, size_t n_experts) {
    std::vector<bool> stays(n_experts, false);
    for (const int32_t expert : kept) {
        if (expert < 0 || static_cast<size_t>(expert) >= n_experts) {
            throw UsageError(in_layer(layer) + "there is no expert " + std::to_string(expert) + " to keep among " + std::to_string(n_experts));
        }
        stays[static_cast<size_t>(expert)] = true;
    }
    std::vector<int32_t> removed;
    for (size_t expert = 0; expert < n_experts; ++expert) {
        if (!stays[expert]) {
            removed.push_back(static_cast<int32_t>(expert));
        }
    }
    return removed;
}

}  // namespace

void RouterMask::begin_survey() {
    lift();
    layers_.clear();
    seen_.clear();
    last_layer_ = -1;
    surveying_ = true;
}

void RouterMask::abandon_survey() noexcept {
    surveying_ = false;
    layers_.clear();
    seen_.clear();
}

bool RouterMask::on_ask(const ggml_tensor * node) {
    if (surveying_) {
        seen_.push_back(node);
        return false;
    }
    return wants(node);
}

void RouterMask::add_node(Nodes & nodes, const NodeName & name, const ggml_tensor * tensor) {
    switch (name.role) {
        case Role::Scores:
            if (!nodes.targets.empty()) {
                return;  // computed from the first
            }
            [[fallthrough]];
        case Role::Selection:
            nodes.targets.push_back(tensor);
            nodes.kinds.emplace_back(name.kind);
            return;
        case Role::Ids:
            nodes.ids = tensor;
            nodes.n_ids += 1;
            return;
        case Role::Weights:
            nodes.weights = tensor;
            return;
        case Role::Output:
            nodes.has_output = true;
            return;
        default:
            return;
    }
}

void RouterMask::end_survey() {
    std::map<int, Nodes> found;
    for (const ggml_tensor * tensor : seen_) {
        const NodeName name = parse_node_name(tensor->name);
        if (name.role != Role::None) {
            add_node(found[name.layer], name, tensor);
            last_layer_ = name.layer;
        }
    }
    std::map<int, Layer> layers;
    for (const auto & [layer, nodes] : found) {
        if (nodes.has_output) {
            layers[layer] = learn_layer(layer, nodes);
        }
    }
    abandon_survey();
    layers_ = std::move(layers);
}

RouterMask::Layer RouterMask::learn_layer(int layer, const Nodes & nodes) {
    if (nodes.n_ids > 1) {
        throw UnsupportedError(in_layer(layer) + "routes more than once under the same names, which reap cannot tell apart");
    }
    if (nodes.targets.empty() || nodes.ids == nullptr || nodes.weights == nullptr) {
        throw UnsupportedError(in_layer(layer) + "shows no router whose values could be written over");
    }
    Layer learnt;
    learnt.n_experts = static_cast<size_t>(nodes.targets.front()->ne[0]);
    learnt.n_used = static_cast<size_t>(nodes.ids->ne[0]);
    for (size_t i = 0; i < nodes.targets.size(); ++i) {
        const ggml_tensor * target = nodes.targets[i];
        if (target->type != GGML_TYPE_F32 || static_cast<size_t>(target->ne[0]) != learnt.n_experts) {
            throw UnsupportedError(in_layer(layer) + target->name + " does not have a 32-bit float for each of " + std::to_string(learnt.n_experts) + " experts");
        }
        learnt.targets.push_back({nodes.kinds[i], 0});
    }
    learnt.by_token = are_looked_up(nodes.ids);
    const ggml_tensor * selecting = learnt.by_token ? nullptr : unmasked_source(nodes.ids, nodes.targets);
    if (const ggml_tensor * source = selecting) {
        throw UnsupportedError(in_layer(layer) + "its experts are selected by " + source->name + " as well as by the router, so that removing experts can only be tried by writing the file");
    }
    std::vector<const ggml_tensor *> known = nodes.targets;
    known.push_back(nodes.ids);
    if (const ggml_tensor * source = unmasked_source(nodes.weights, known)) {
        throw UnsupportedError(in_layer(layer) + "its gates depend on " + source->name + " as well as on the router, so that removing experts can only be tried by writing the file");
    }
    if (learnt.by_token) {
        learnt.targets.push_back({IDS, 0});
    }
    return learnt;
}

// Each removed expert has as many kept ones to choose from as a token has experts, so that one is always left that it does not have.
void RouterMask::check_substitutes(int layer, const Layer & learnt) {
    const std::set<int32_t> removed(learnt.removed.begin(), learnt.removed.end());
    for (const int32_t expert : learnt.removed) {
        const auto found = learnt.substitutes.find(expert);
        if (found == learnt.substitutes.end()) {
            throw UnsupportedError(in_layer(layer) + "its experts are selected by token id, and nothing says which expert takes the place of expert " +
                                   std::to_string(expert));
        }
        std::set<int32_t> usable;
        for (const int32_t other : found->second) {
            if (other < 0 || static_cast<size_t>(other) >= learnt.n_experts || removed.count(other) != 0) {
                throw UsageError(in_layer(layer) + "expert " + std::to_string(other) + " cannot take the place of expert " + std::to_string(expert) +
                                 ": it is not among those that stay");
            }
            usable.insert(other);
        }
        if (usable.size() < learnt.n_used) {
            throw UsageError(in_layer(layer) + "names " + std::to_string(usable.size()) + " experts that may take the place of expert " +
                             std::to_string(expert) + ", but a token goes to " + std::to_string(learnt.n_used));
        }
    }
}

void RouterMask::rewrite_ids(const Layer & layer, ggml_tensor * ids) {
    rewrite_i32(ids, [&](std::vector<int32_t> & values) {
        for (auto row = values.begin(); row != values.end(); row += static_cast<std::ptrdiff_t>(layer.n_used)) {
            const auto end = row + static_cast<std::ptrdiff_t>(layer.n_used);
            for (auto id = row; id != end; ++id) {
                const auto found = layer.substitutes.find(*id);
                if (found != layer.substitutes.end()) {
                    // a removed id is never a candidate, so those that are still to be replaced do not get in the way
                    const auto & order = found->second;
                    *id = *std::find_if(order.begin(), order.end(), [&](int32_t other) { return std::find(row, end, other) == end; });
                }
            }
        }
    });
}

void RouterMask::set_kept(const Kept & kept, const Substitutes & substitutes) {
    lift();
    for (const auto & [layer, ids] : kept) {
        if (layers_.count(layer) == 0) {
            throw UsageError(in_layer(layer) + "the engine runs no experts there that could be removed");
        }
    }
    for (auto & [layer, learnt] : layers_) {
        const auto found = kept.find(layer);
        if (found == kept.end()) {
            throw UsageError(in_layer(layer) + "nothing is said about its experts");
        }
        learnt.removed = complement(layer, found->second, learnt.n_experts);
        const size_t n_kept = learnt.n_experts - learnt.removed.size();
        if (n_kept < learnt.n_used) {
            throw UsageError(in_layer(layer) + "keeps " + std::to_string(n_kept) + " experts, but each token goes to " + std::to_string(learnt.n_used));
        }
        const auto said = substitutes.find(layer);
        learnt.substitutes = said == substitutes.end() ? std::map<int32_t, std::vector<int32_t>>() : said->second;
        if (learnt.by_token) {
            check_substitutes(layer, learnt);
        }
    }
    in_force_ = true;
}

RouterMask::Target * RouterMask::find(const ggml_tensor * node) {
    const NodeName name = parse_node_name(node->name);
    if (name.role != Role::Scores && name.role != Role::Selection && name.role != Role::Ids) {
        return nullptr;
    }
    const auto layer = layers_.find(name.layer);
    if (layer == layers_.end()) {
        return nullptr;
    }
    auto & targets = layer->second.targets;
    const auto target = std::find_if(targets.begin(), targets.end(), [&](const Target & t) { return t.kind == name.kind; });
    return target == targets.end() ? nullptr : &*target;
}

bool RouterMask::wants(const ggml_tensor * node) {
    return in_force_ && find(node) != nullptr;
}

void RouterMask::apply(ggml_tensor * node) {
    Target * target = find(node);
    const Layer & layer = layers_.at(parse_node_name(node->name).layer);
    if (target->kind == IDS) {
        rewrite_ids(layer, node);
        target->n_rows += static_cast<size_t>(ggml_nrows(node));
        return;
    }
    if (static_cast<size_t>(node->ne[0]) != layer.n_experts) {
        throw EngineError(std::string(node->name) + " has " + std::to_string(node->ne[0]) + " experts where the survey saw " + std::to_string(layer.n_experts));
    }
    fill_columns(node, layer.removed, -std::numeric_limits<float>::infinity());
    target->n_rows += static_cast<size_t>(ggml_nrows(node));
}

void RouterMask::begin_batch() {
    for (auto & [layer, learnt] : layers_) {
        for (Target & target : learnt.targets) {
            target.n_rows = 0;
        }
    }
}

void RouterMask::check_batch(size_t n_tokens, size_t n_wanted) const {
    if (!in_force_) {
        return;
    }
    for (const auto & [layer, learnt] : layers_) {
        for (const Target & target : learnt.targets) {
            if (target.n_rows != n_tokens && !(layer == last_layer_ && target.n_rows == n_wanted)) {
                throw EngineError(in_layer(layer) + "experts were removed for " + std::to_string(target.n_rows) + " of the batch's " +
                                  std::to_string(n_tokens) + " tokens in " + target.kind);
            }
        }
    }
}

}  // namespace reap
