// What the nodes of a MoE layer are called in llama.cpp's graphs: the only home of the "ffn_moe_*" names.
// Read in llama_graph_context::build_moe_ffn (src/llama-graph.cpp) of the pinned tree.
#pragma once

#include <string>
#include <string_view>

namespace reap {

enum class Role {
    None,
    Ids,      // the selected experts, [n_used, n_tokens], often a strided view
    Weights,  // a form of the gate; the last one multiplies the expert's output
    Output,   // a form of the expert's output, [n_embd, n_used, n_tokens]; the last one is what the gate multiplies
    Gated,    // the product with the gate: of the output, or (Llama-4) of the experts' input
    Scores,     // a form of the router's values, [n_experts, n_tokens]; all that routes comes from the first one
    Selection,  // those values with a bias that selects and does not weigh, [n_experts, n_tokens]
};

// The hidden states that a multi-token-prediction block is fed with, [n_embd, n_tokens], in the graph of the layers before it. Where they
// are the output norm's result as well, that later name is the one the node keeps.
inline constexpr std::string_view PREDICTION_INPUTS[] = {"h_nextn", "result_norm"};

struct NodeName {
    Role role = Role::None;
    int  layer = -1;
    // the name before the layer's number, "ffn_moe_weights_norm" say; points into what was parsed
    std::string_view kind;
};

// Parses a whole name, `role-layer` and nothing after it: views inherit names ("ffn_moe_weights-3 (reshaped)").
NodeName parse_node_name(std::string_view name);

// What an error about a layer begins with.
std::string in_layer(int layer);

}  // namespace reap
