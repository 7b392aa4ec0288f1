#include "collector.h"

#include "errors.h"

#include <algorithm>
#include <chrono>

namespace reap {

namespace {

// What the gates are made of: the router's values for each expert, before any of them is selected.
constexpr std::string_view ROUTER_VALUES = "ffn_moe_probs";

}  // namespace

bool Collector::callback(ggml_tensor * node, bool ask, void * self) {
    auto & collector = *static_cast<Collector *>(self);
    try {
        if (ask) {
            const bool to_mask = collector.mask_ != nullptr && collector.mask_->on_ask(node);
            const bool to_capture = collector.capture_ != nullptr && collector.capture_->on_ask(node);
            return (!collector.is_idle() && collector.on_ask(node)) || to_mask || to_capture;
        }
        if (collector.capture_ != nullptr && !collector.abandoned_) {
            return collector.capture(node);
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

bool Collector::capture(const ggml_tensor * node) {
    poll();
    return capture_->on_stop(node, reader_);
}

bool Collector::on_ask(ggml_tensor * node) {
    if (mode_ == Mode::Survey) {
        graph_.add(node);
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
        case Role::Scores:
            return plan.by_token && name.kind == ROUTER_VALUES;
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
    } else if (name.role == Role::Scores) {
        compare_values(name.layer, state, node);
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

// Comes before the layer's output, so that the layer has not yet seen these tokens.
void Collector::compare_values(int layer, const LayerState & state, const ggml_tensor * values) {
    RouterLikeness & likeness = likeness_.at(layer);
    reader_.read_f32(values, floats_);
    const size_t n_tokens = floats_.size() / likeness.n_experts();
    if (static_cast<size_t>(values->ne[0]) != likeness.n_experts() || state.tokens_seen + n_tokens > n_tokens_) {
        throw EngineError(in_layer(layer) + values->name + " does not have a value for each expert and token");
    }
    for (size_t t = 0; t < n_tokens; ++t) {
        if (groups_[state.tokens_seen + t] != Saliency::NOT_COUNTED) {
            likeness.add(floats_.data() + t * likeness.n_experts());
        }
    }
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

void Collector::begin_survey() {
    mode_ = Mode::Survey;
    graph_.clear();
    abandoned_ = false;
    error_ = nullptr;
}

void Collector::end_survey(const std::vector<int> & layers, size_t n_experts) {
    mode_ = Mode::Idle;
    if (graph_.is_empty()) {
        throw EngineError("the engine computed nothing");
    }
    first_node_ = graph_.first_node();
    hidden_node_ = keep_hidden_ ? graph_.hidden_node() : "";
    states_.clear();
    plans_ = graph_.plan(layers);
    last_layer_ = graph_.last_layer();
    saliency_ = std::make_unique<Saliency>(layers.size(), n_experts);
    likeness_.clear();
    for (const auto & [layer, plan] : plans_) {
        if (plan.by_token) {
            likeness_.emplace(layer, n_experts);
        }
    }
    units_ = 0;
    graph_.clear();
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
        for (auto & [layer, likeness] : likeness_) {
            likeness.commit();
        }
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
        for (auto & [layer, likeness] : likeness_) {
            likeness.discard();
        }
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
