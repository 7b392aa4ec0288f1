#include "capture.h"

#include "errors.h"
#include "node_names.h"

#include <algorithm>
#include <charconv>
#include <string_view>

namespace reap {

namespace {

// The number behind `prefix` in `name`, up to `suffix`; -1 where there is none.
int number_between(std::string_view name, std::string_view prefix, std::string_view suffix) {
    const size_t start = name.find(prefix);
    if (start == std::string_view::npos) {
        return -1;
    }
    const std::string_view rest = name.substr(start + prefix.size());
    int number = -1;
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), number);
    return error == std::errc() && rest.substr(static_cast<size_t>(end - rest.data())) == suffix ? number : -1;
}

// The layer whose routed experts' down projection a node is; -1 for another node. An adapter's products have names of their own.
int down_projection_of(const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL_MAT_ID) {
        return -1;
    }
    // a copy on another device is named "CUDA0#blk.1.ffn_down_exps.weight#0"
    std::string_view weights = node->src[0]->name;
    const size_t copy = weights.rfind('#');
    if (copy != std::string_view::npos && copy > weights.find("blk.")) {
        weights = weights.substr(0, copy);
    }
    return number_between(weights, "blk.", ".ffn_down_exps.weight");
}

template <typename T>
void append(std::vector<T> & all, const std::vector<T> & more) {
    all.insert(all.end(), more.begin(), more.end());
}

}  // namespace

Capture::Capture(const std::vector<int> & layers, bool experts) : experts_(experts) {
    if (layers.empty()) {
        throw UsageError("there is no layer to capture");
    }
    last_layer_ = *std::max_element(layers.begin(), layers.end());
    for (const int layer : layers) {
        layers_[layer];
    }
}

Capture::Found Capture::find(const ggml_tensor * node) const {
    Found found;
    const NodeName name = parse_node_name(node->name);
    if (const int stream = number_between(node->name, "l_out-", ""); stream >= 0) {
        found = {Part::Stream, stream};
    } else if (experts_ && name.role == Role::Gated) {
        found = {Part::Gates, name.layer};
    } else if (const int layer = experts_ ? down_projection_of(node) : -1; layer >= 0) {
        found = {Part::Inputs, layer};
    }
    return layers_.count(found.layer) ? found : Found{};
}

bool Capture::on_ask(const ggml_tensor * node) {
    if (first_node_.empty()) {
        first_node_ = node->name;
    } else if (first_node_ == node->name) {
        done_ = false;
    }
    return done_ || find(node).part != Part::None;
}

bool Capture::on_stop(const ggml_tensor * node, TensorReader & reader) {
    if (done_) {
        return false;
    }
    const Found found = find(node);
    if (found.part == Part::None) {
        return true;
    }
    Layer & layer = layers_.at(found.layer);
    std::vector<float> values;
    if (found.part == Part::Stream) {
        reader.read_f32(node, values);
        append(layer.stream, values);
        layer.n_embd = static_cast<size_t>(node->ne[0]);
        done_ = found.layer == last_layer_;
    } else if (found.part == Part::Gates) {
        // the experts' outputs and their gates, in either order
        const bool second = node->src[1]->ne[0] == 1;
        layer.gate_before = layer.inputs.empty();
        reader.read_f32(node->src[second ? 1 : 0], values);
        append(layer.gates, values);
    } else {
        std::vector<int32_t> ids;
        reader.read_i32(node->src[2], ids);
        append(layer.ids, ids);
        reader.read_f32(node->src[1], values);
        append(layer.inputs, values);
        layer.n_ff = static_cast<size_t>(node->src[1]->ne[0]);
        layer.n_used = static_cast<size_t>(node->ne[1]);
    }
    return !done_;
}

void Capture::begin_batch() {
    done_ = false;
    for (auto & [number, layer] : layers_) {
        layer = Layer{};
    }
}

void Capture::check_batch(size_t n_tokens) const {
    for (const auto & [number, layer] : layers_) {
        const std::string where = in_layer(number);
        if (layer.stream.empty()) {
            throw UnsupportedError(where + "the graph does not name the hidden states that it hands on (l_out)");
        }
        const size_t n_rows = n_tokens * layer.n_used;
        if (layer.stream.size() != n_tokens * layer.n_embd) {
            throw EngineError(where + "handed on " + std::to_string(layer.stream.size() / layer.n_embd) + " of " + std::to_string(n_tokens) + " tokens");
        }
        if (experts_ && (n_rows == 0 || layer.ids.size() != n_rows || layer.gates.size() != n_rows || layer.inputs.size() != n_rows * layer.n_ff)) {
            throw UnsupportedError(where + "found " + std::to_string(layer.ids.size()) + " ids, " + std::to_string(layer.gates.size()) + " gates and " +
                                   std::to_string(layer.inputs.size()) + " inputs of down projections for " + std::to_string(n_tokens) + " tokens");
        }
    }
}

}  // namespace reap
