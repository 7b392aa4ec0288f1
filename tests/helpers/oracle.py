"""What REAP's sums and a pruned model's logits are, computed slowly and without any of reap's code (needs PyTorch).

A forward hook records what each MoE block of a transformers model receives and returns. From the recorded input
everything else is computed again here in float64, token by token and expert by expert, from the published formulas of
each family: which experts are selected, the gate g that multiplies the expert's output, and the output f with its bias.
Two checks come with the result: transformers' own router must agree (`router_error`), and the sum of g·f, carried
through what follows the experts, must be the block's output (`block_error`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Selection = tuple[list[int], list[float], float]  # expert ids, their gates, the gap to the first expert not selected


# ---- routers: one token's logits in, the selected experts and their gates out ----------------------------------------


def softmax(values: Floats) -> Floats:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def best(scores: Floats, k: int) -> tuple[list[int], float]:
    """The ids of the k highest scores, and by how much the last of them is ahead of the next."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    gap = scores[order[k - 1]] - scores[order[k]] if k < len(order) and np.isfinite(scores[order[k]]) else np.inf
    return order[:k], float(gap)


def route_softmax(logits: Floats, config: Any, renormalise: bool) -> Selection:
    """Softmax over all experts, then the k largest; divided by their sum where the family does so."""
    probabilities = softmax(logits)
    ids, _ = best(probabilities, config.num_experts_per_tok)
    gates = probabilities[ids]
    if renormalise:
        gates = gates / gates.sum()
    return ids, list(gates), best(logits, len(ids))[1]


def route_softmax_of_selected(logits: Floats, config: Any) -> Selection:
    """The k largest logits, then the softmax over those alone (gpt-oss)."""
    ids, gap = best(logits, config.num_experts_per_tok)
    return ids, list(softmax(logits[ids])), gap


def route_sigmoid(logits: Floats, config: Any, bias: Floats) -> Selection:
    """DeepSeek-V3: a sigmoid; the bias and the groups (scored by their two best) decide the selection, never the
    gate."""
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + bias
    size = len(scores) // config.n_group
    groups = [choice[g * size : (g + 1) * size] for g in range(config.n_group)]
    group_scores = np.array([np.sort(group)[-2:].sum() for group in groups])
    open_groups, group_gap = best(group_scores, config.topk_group)
    closed = [i for i in range(len(scores)) if i // size not in open_groups]
    choice[closed] = -np.inf
    ids, gap = best(choice, config.num_experts_per_tok)
    gates = scores[ids]
    if config.norm_topk_prob:
        gates = gates / (gates.sum() + 1e-20)
    return ids, list(gates * config.routed_scaling_factor), min(gap, group_gap)


def route(logits: Floats, config: Any, bias: Floats | None) -> Selection:
    family = config.model_type
    if family in ("deepseek_v3", "glm4_moe", "nemotron_h"):
        assert bias is not None
        return route_sigmoid(logits, config, bias)
    if family == "gpt_oss":
        return route_softmax_of_selected(logits, config)
    return route_softmax(logits, config, renormalise=family == "mixtral" or config.norm_topk_prob)


# ---- experts: one token's state in, one expert's output out ----------------------------------------------------------


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


def expert_gated(weights: Mapping[str, Floats], expert: int, x: Floats) -> Floats:
    gate, up = np.split(weights["gate_up_proj"][expert] @ x, 2)
    return weights["down_proj"][expert] @ (silu(gate) * up)


def expert_squared_relu(weights: Mapping[str, Floats], expert: int, x: Floats) -> Floats:
    return weights["down_proj"][expert] @ np.maximum(weights["up_proj"][expert] @ x, 0) ** 2


def expert_gpt_oss(weights: Mapping[str, Floats], expert: int, x: Floats) -> Floats:
    """Matrices as [expert, input, output], gate and up interleaved and clamped, both with a bias."""
    mixed = x @ weights["gate_up_proj"][expert] + weights["gate_up_proj_bias"][expert]
    gate, up = np.minimum(mixed[::2], 7.0), np.clip(mixed[1::2], -7.0, 7.0)
    hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    return hidden @ weights["down_proj"][expert] + weights["down_proj_bias"][expert]


EXPERTS: dict[str, Callable[[Mapping[str, Floats], int, Floats], Floats]] = {
    "nemotron_h": expert_squared_relu,
    "gpt_oss": expert_gpt_oss,
}


# ---- the sums --------------------------------------------------------------------------------------------------------


@dataclass
class LayerSums:
    """One layer's sums, each [n_experts], and how far the checks were off."""

    counts: NDArray[np.int64]
    gate_sum: Floats
    norm_sum: Floats
    gated_norm_sum: Floats
    gated_norm_sq_sum: Floats
    norm_sq_sum: Floats
    norm_max: Floats
    total_tokens: int = 0
    router_error: float = 0.0  # largest difference of a gate from transformers' own
    block_error: float = 0.0  # largest difference from the block's output, relative to the largest output
    min_gap: float = np.inf  # smallest lead of a selected expert (or group) over one that was not

    @classmethod
    def empty(cls, n_experts: int) -> LayerSums:
        return cls(np.zeros(n_experts, dtype=np.int64), *(np.zeros(n_experts) for _ in range(6)))

    @property
    def reap(self) -> Floats:
        """S / n: the mean of g·‖f‖; NaN where the expert was never selected."""
        with np.errstate(invalid="ignore"):
            return self.gated_norm_sum / self.counts

    def add(self, expert: int, gate: float, output: Floats) -> None:
        norm = float(np.sqrt((output**2).sum()))
        self.counts[expert] += 1
        self.gate_sum[expert] += gate
        self.norm_sum[expert] += norm
        self.gated_norm_sum[expert] += gate * norm
        self.gated_norm_sq_sum[expert] += (gate * norm) ** 2
        self.norm_sq_sum[expert] += norm**2
        self.norm_max[expert] = max(self.norm_max[expert], norm)


def moe_blocks(model: Any) -> dict[int, Any]:
    """The MoE block of each layer that has one, by the layer's index, which is also the GGUF block's."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        block = layer.mixer if hasattr(layer, "mixer") else layer.mlp
        if hasattr(block, "experts"):
            found[index] = block
    return found


def router_of(block: Any) -> Any:
    return block.gate if hasattr(block, "gate") else block.router


def measure(model: Any, samples: Sequence[Sequence[int]]) -> dict[int, LayerSums]:
    """Run every sample on its own through the model; the sums of each MoE layer, by block index."""
    blocks = moe_blocks(model)
    sums = {layer: LayerSums.empty(len(router_of(block).weight)) for layer, block in blocks.items()}
    for tokens in samples:
        for layer, (entered, left, routed) in _record(model, blocks, tokens).items():
            _add_sample(sums[layer], blocks[layer], model.config, entered, left, routed)
    return sums


def _record(model: Any, blocks: Mapping[int, Any], tokens: Sequence[int]) -> dict[int, tuple[Any, Any, Any]]:
    """(input [n, n_embd], output [n, n_embd], the router's output) of each block for one sample."""
    entered: dict[int, Any] = {}
    left: dict[int, Any] = {}
    routed: dict[int, Any] = {}

    def watch(layer: int, block: Any) -> list[Any]:
        def on_block(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            entered[layer] = inputs[0][0]
            left[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        def on_router(_module: Any, _inputs: tuple[Any, ...], output: Any) -> None:
            routed[layer] = output

        return [block.register_forward_hook(on_block), router_of(block).register_forward_hook(on_router)]

    handles = [handle for layer, block in blocks.items() for handle in watch(layer, block)]
    try:
        with torch.no_grad():
            model(torch.tensor([list(tokens)]))
    finally:
        for handle in handles:
            handle.remove()
    return {layer: (entered[layer], left[layer], routed[layer]) for layer in blocks}


def _add_sample(sums: LayerSums, block: Any, config: Any, entered: Any, left: Any, routed: Any) -> None:
    router = router_of(block)
    weights = {name: tensor.detach().double().numpy() for name, tensor in block.experts.named_parameters()}
    matrix = router.weight.detach().double().numpy()
    router_bias = router.bias.detach().double().numpy() if hasattr(router, "bias") else 0.0
    correction = getattr(router, "e_score_correction_bias", None)
    bias = None if correction is None else correction.double().numpy()
    compute = EXPERTS.get(config.model_type, expert_gated)
    latent = getattr(block, "fc1_latent_proj", None)
    with torch.no_grad():
        states = (entered if latent is None else latent(entered)).double().numpy()
    logits = entered.double().numpy() @ matrix.T + router_bias

    combined = np.zeros_like(states)
    for token, state in enumerate(states):
        ids, gates, gap = route(logits[token], config, bias)
        sums.min_gap = min(sums.min_gap, gap)
        sums.router_error = max(sums.router_error, _router_difference(ids, gates, routed, token))
        for expert, gate in zip(ids, gates, strict=True):
            output = compute(weights, expert, state)
            sums.add(expert, gate, output)
            combined[token] += gate * output
    sums.total_tokens += len(states)
    sums.block_error = max(sums.block_error, _block_difference(block, combined, entered, left))


def _router_difference(ids: Sequence[int], gates: Sequence[float], routed: Any, token: int) -> float:
    """Largest difference of a gate from transformers' (logits, gates, ids); infinite when the experts differ."""
    _, their_gates, their_ids = routed
    theirs = dict(zip(their_ids[token].tolist(), their_gates[token].tolist(), strict=True))
    if set(theirs) != set(ids):
        return float("inf")
    return max(abs(theirs[expert] - gate) for expert, gate in zip(ids, gates, strict=True))


def _block_difference(block: Any, combined: Floats, entered: Any, left: Any) -> float:
    """How far the sum of g·f, carried through what follows the experts, is from the block's output, relative to its
    largest."""
    with torch.no_grad():
        expected = torch.from_numpy(combined).float()
        if hasattr(block, "fc2_latent_proj"):
            expected = block.fc2_latent_proj(expected)
        if hasattr(block, "shared_experts"):
            expected = expected + block.shared_experts(entered)
        return float((expected - left).abs().max() / left.abs().max())


# ---- removing experts ------------------------------------------------------------------------------------------------


def keep_experts(model: Any, kept: Mapping[int, Sequence[int]]) -> Any:
    """A copy of the model in which each MoE layer has only the experts `kept[layer]`, in that order."""
    smaller = copy.deepcopy(model)
    for layer, block in moe_blocks(smaller).items():
        ids = torch.tensor(list(kept[layer]))
        for module in (block.experts, router_of(block)):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                tensor.data = tensor.data[ids]
                assert len(getattr(module, name)) == len(ids)
            module.num_experts = len(ids)
    return smaller


def logits(model: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
    """float32 [n_tokens, n_vocab]."""
    with torch.no_grad():
        result: NDArray[np.float32] = model(torch.tensor([list(tokens)])).logits[0].numpy()
    return result


def best_half(sums: Mapping[int, LayerSums], n_groups: int = 1) -> dict[int, list[int]]:
    """Per layer, the half of each group's experts with the highest REAP, ascending; an expert never selected goes
    first."""
    kept = {}
    for layer, layer_sums in sums.items():
        score = np.nan_to_num(layer_sums.reap, nan=-1.0)
        size = len(score) // n_groups
        groups = [range(g * size, (g + 1) * size) for g in range(n_groups)]
        kept[layer] = sorted(i for group in groups for i in sorted(group, key=lambda i: -score[i])[: size // 2])
    return kept
