#include "collector.h"

#include "errors.h"

#include <algorithm>
#include <chrono>
#include <set>

namespace reap {

namespace {

const ggml_tensor * root_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

// The ids that an expert output was computed with. A per-expert scale puts a MUL after the MUL_MAT_ID; a bias an ADD_ID.
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

// Whether a node multiplies with the down projection of the routed experts (GroveMoE's adjugate ones are "_chexps").
bool multiplies_experts(const ggml_tensor * node) {
    for (const ggml_tensor * t = node; t != nullptr; t = t->src[0]) {
        if (t->op == GGML_OP_MUL_MAT_ID) {
            return std::string_view(t->src[0]->name).find("ffn_down_exps") != std::string_view::npos;
        }
        if (t->op != GGML_OP_MUL && t->op != GGML_OP_ADD_ID) {
            return false;
        }
    }
    return false;
}

std::string in_layer(int layer) {
    return "layer " + std::to_string(layer) + ": ";
}

}  // namespace

bool Collector::callback(ggml_tensor * node, bool ask, void * self) {
    auto & collector = *static_cast<Collector *>(self);
    try {
        if (ask) {
            const bool to_mask = collector.mask_ != nullptr && collector.mask_->on_ask(node);
            return (!collector.is_idle() && collector.on_ask(node)) || to_mask;
        }
        return collector.mask(node) || collector.is_idle() || collector.on_stop(node);
    } catch (...) {
        // nothing may escape into C: kept here, thrown again after the decode
        collector.error_ = std::current_exception();
        collector.abandoned_ = true;
        return ask;
    }
}

void Collector::poll() const {
    if (poll_ && poll_()) {
        throw Interrupted();
    }
}

// True where the mask took the node, which is then of no other use.
bool Collector::mask(ggml_tensor * node) {
    if (mask_ == nullptr || abandoned_ || (stopped_ && mode_ == Mode::Collect) || !mask_->wants(node)) {
        return false;
    }
    poll();
    mask_->apply(node);
    return true;
}

bool Collector::on_ask(ggml_tensor * node) {
    if (mode_ == Mode::Survey) {
        survey(node);
        return false;
    }
    if (!abandoned_ && node->name == first_node_) {
        begin_graph();
    }
    if (stopped_ || abandoned_) {
        return true;  // computes this one node of the split; on_stop ends it there
    }
    if (!hidden_node_.empty() && node->name == hidden_node_) {
        return true;
    }
    const NodeName name = parse_node_name(node->name);
    if (name.role == Role::None) {
        return false;
    }
    const auto found = plans_.find(name.layer);
    if (found == plans_.end()) {
        return false;
    }
    const LayerPlan & plan = found->second;
    LayerState & state = states_[name.layer];
    if (state.done) {
        return false;
    }
    switch (name.role) {
        case Role::Ids:
            return plan.stop_at_ids;
        case Role::Weights:
            if (name.kind != plan.weights) {
                return false;
            }
            state.weights = node;
            return plan.stop_at_weights;
        default:
            return name.kind == plan.output;
    }
}

// A decode of several ubatches runs the graph once for each.
void Collector::begin_graph() {
    stopped_ = false;
    for (auto & [layer, state] : states_) {
        state.done = state.have_ids = state.have_weights = false;
        state.weights = nullptr;
    }
}

bool Collector::on_stop(ggml_tensor * node) {
    if (stopped_ || abandoned_) {
        return false;
    }
    const auto start = std::chrono::steady_clock::now();
    poll();
    if (!hidden_node_.empty() && node->name == hidden_node_) {
        reader_.read_f32(node, floats_);
        hidden_.insert(hidden_.end(), floats_.begin(), floats_.end());
        stopped_ = stop_early_;
        return !stopped_;
    }
    const NodeName name = parse_node_name(node->name);
    const LayerPlan & plan = plans_.at(name.layer);
    LayerState & state = states_[name.layer];
    if (name.role == Role::Ids) {
        reader_.read_i32(node, state.ids);
        state.have_ids = true;
    } else if (name.role == Role::Weights) {
        reader_.read_f32(node, state.gates);
        state.have_weights = true;
    } else {
        try {
            gather(plan, state, node);
        } catch (const EngineError & error) {
            throw EngineError(in_layer(name.layer) + error.what());
        }
        stopped_ = stop_early_ && !keep_hidden_ && name.layer == last_layer_;
    }
    stats_.stops += 1;
    stats_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return !stopped_;
}

void Collector::gather(const LayerPlan & plan, LayerState & state, const ggml_tensor * output) {
    if (!state.have_ids) {
        const ggml_tensor * ids = ids_of(output);
        if (ids == nullptr) {
            throw EngineError(std::string("the operation ") + ggml_op_name(output->op) + " of " + output->name +
                              " does not say which experts it used");
        }
        reader_.read_i32(ids, state.ids);
    }
    if (!state.have_weights) {
        if (state.weights == nullptr) {
            throw EngineError("no gate was computed before " + std::string(output->name));
        }
        reader_.read_f32(state.weights, state.gates);
    }
    reader_.read_row_norms(output, norms_);
    const size_t n_used = static_cast<size_t>(output->ne[1]);
    const size_t n_tokens = static_cast<size_t>(output->ne[2]);
    if (state.ids.size() != norms_.size() || state.gates.size() != norms_.size()) {
        throw EngineError("found " + std::to_string(state.ids.size()) + " ids and " + std::to_string(state.gates.size()) +
                          " gates for " + std::to_string(norms_.size()) + " expert outputs");
    }
    if (state.tokens_seen + n_tokens > n_tokens_) {
        throw EngineError("saw more tokens than the batch of " + std::to_string(n_tokens_) + " has");
    }
    saliency_->add(plan.row, {state.ids.data(), state.gates.data(), norms_.data(), n_used, n_tokens, plan.gate_in_norm}, groups_ + state.tokens_seen);
    state.tokens_seen += n_tokens;
    state.done = true;
}

void Collector::survey(ggml_tensor * node) {
    Seen seen{node->name, node, root_of(node), {}};
    for (const ggml_tensor * source : node->src) {
        if (source != nullptr) {
            seen.read_roots.push_back(root_of(source));
        }
    }
    seen_.push_back(std::move(seen));
}

void Collector::begin_survey() {
    mode_ = Mode::Survey;
    seen_.clear();
    abandoned_ = false;
    error_ = nullptr;
}

void Collector::end_survey(const std::vector<int> & layers, size_t n_experts) {
    mode_ = Mode::Idle;
    if (seen_.empty()) {
        throw EngineError("the engine computed nothing");
    }
    first_node_ = seen_.front().name;
    hidden_node_ = keep_hidden_ ? find_hidden() : "";
    plans_.clear();
    states_.clear();
    std::set<int> expected(layers.begin(), layers.end());
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
            plans_[name.layer];
        }
    }
    for (size_t row = 0; row < layers.size(); ++row) {
        if (plans_.count(layers[row]) == 0) {
            throw UnsupportedError(in_layer(layers[row]) + "the model's file has experts, but the engine's graph never runs them");
        }
        plans_[layers[row]] = plan_layer(layers[row]);
        plans_[layers[row]].row = row;
    }
    saliency_ = std::make_unique<Saliency>(layers.size(), n_experts);
    units_ = 0;
    seen_.clear();
}

std::string Collector::find_hidden() const {
    for (const std::string_view name : PREDICTION_INPUTS) {
        if (std::any_of(seen_.begin(), seen_.end(), [&](const Seen & seen) { return seen.name == name; })) {
            return std::string(name);
        }
    }
    throw UnsupportedError("the graph shows no hidden states that a prediction block could be fed with");
}

// The nodes (indices of seen_) of the layer's block of routed experts: from its ids to the next ids of the same layer.
std::vector<size_t> Collector::routing_block(int layer) const {
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

Collector::LayerPlan Collector::plan_layer(int layer) const {
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
    plan.stop_at_ids = ids == nullptr || !read_later(ids, output);
    plan.stop_at_weights = !read_later(weights, output);
    plan.gate_in_norm = gated < output;
    return plan;
}

// True where the tensor's memory is read by the node at `stop` or by one after it, so that its values are whole at that stop.
bool Collector::read_later(const ggml_tensor * tensor, size_t stop) const {
    const ggml_tensor * root = root_of(tensor);
    for (size_t i = stop; i < seen_.size(); ++i) {
        const auto & reads = seen_[i].read_roots;
        if (std::find(reads.begin(), reads.end(), root) != reads.end()) {
            return true;
        }
    }
    return false;
}

void Collector::begin_batch(const int32_t * groups, size_t n_tokens) {
    if (!saliency_) {
        throw EngineError("the collector was not started");
    }
    mode_ = Mode::Collect;
    groups_ = groups;
    n_tokens_ = n_tokens;
    hidden_.clear();
    const int32_t last_group = *std::max_element(groups, groups + n_tokens);
    saliency_->reserve_groups(static_cast<size_t>(std::max(0, last_group)) + 1);
    abandoned_ = false;
    error_ = nullptr;
    for (auto & [layer, state] : states_) {
        state.tokens_seen = 0;
    }
    begin_graph();
}

void Collector::end_batch() {
    mode_ = Mode::Idle;
    for (const auto & [layer, plan] : plans_) {
        const size_t seen = states_[layer].tokens_seen;
        if (seen != n_tokens_) {
            throw EngineError(in_layer(layer) + "saw " + std::to_string(seen) + " of the batch's " + std::to_string(n_tokens_) + " tokens");
        }
    }
    stats_.batches += 1;
}

void Collector::commit(int64_t n_units) {
    if (saliency_) {
        saliency_->commit();
        units_ += n_units;
    }
}

void Collector::restore(size_t group, const Sums & sums, int64_t n_units) {
    if (!saliency_) {
        throw EngineError("the collector was not started");
    }
    saliency_->restore(group, sums);
    units_ = n_units;
}

void Collector::discard() noexcept {
    mode_ = Mode::Idle;
    abandoned_ = false;
    if (saliency_) {
        saliency_->discard();
    }
}

void Collector::rethrow() {
    if (error_) {
        std::exception_ptr error = nullptr;
        std::swap(error, error_);
        abandoned_ = false;
        std::rethrow_exception(error);
    }
}

const Saliency & Collector::saliency() const {
    if (!saliency_) {
        throw EngineError("the collector was not started");
    }
    return *saliency_;
}

}  // namespace reap
