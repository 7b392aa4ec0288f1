#include "node_names.h"

#include <array>
#include <charconv>
#include <utility>

namespace reap {

namespace {

constexpr std::array<std::pair<std::string_view, Role>, 13> ROLES = {{
    {"ffn_moe_topk", Role::Ids},
    {"ffn_moe_weights", Role::Weights},
    {"ffn_moe_weights_softmax", Role::Weights},
    {"ffn_moe_weights_norm", Role::Weights},
    {"ffn_moe_weights_scaled", Role::Weights},
    {"ffn_moe_down", Role::Output},
    {"ffn_moe_down_scaled", Role::Output},
    {"ffn_moe_down_biased", Role::Output},
    {"ffn_moe_weighted", Role::Gated},
    {"ffn_moe_logits", Role::Scores},
    {"ffn_moe_logits_biased", Role::Scores},
    {"ffn_moe_probs", Role::Scores},
    {"ffn_moe_probs_biased", Role::Selection},
}};

}  // namespace

NodeName parse_node_name(std::string_view name) {
    constexpr std::string_view PREFIX = "ffn_moe_";
    if (name.compare(0, PREFIX.size(), PREFIX) != 0) {
        return {};
    }
    const size_t dash = name.rfind('-');
    if (dash == std::string_view::npos || dash + 1 == name.size()) {
        return {};
    }
    int layer = -1;
    const char * end = name.data() + name.size();
    const auto [stopped, error] = std::from_chars(name.data() + dash + 1, end, layer);
    if (error != std::errc() || stopped != end || layer < 0) {
        return {};
    }
    const std::string_view kind = name.substr(0, dash);
    for (const auto & [known, role] : ROLES) {
        if (known == kind) {
            return {role, layer, kind};
        }
    }
    return {};
}

std::string in_layer(int layer) {
    return "layer " + std::to_string(layer) + ": ";
}

}  // namespace reap
