"""Every expert on every token, in float64, from the weights: what the sums of a transformers model are (needs PyTorch).

Slower than anything else here and without any of reap's code: a hook notes what each MoE block receives and returns;
routing, gates and outputs are computed again from the published formulas, and the block's own output has to be the
gated sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK_NAMES = ("mlp", "mixer", "feed_forward", "block_sparse_moe")


def decoder_layers(model: Any) -> Any:
    inner = model.model
    return (inner.language_model if hasattr(inner, "language_model") else inner).layers


def blocks(model: Any) -> dict[int, Any]:
    found = {}
    for index, layer in enumerate(decoder_layers(model)):
        for name in BLOCK_NAMES:
            block = getattr(layer, name, None)
            if hasattr(block, "experts"):
                found[index] = block
    return found


def gates_of(config: Any, block: Any, x: Tensor) -> Tensor:
    """float64 [n_tokens, n_experts]: the gate of each expert, 0 where it is not selected."""
    router = block.gate if hasattr(block, "gate") else block.router
    logits = x @ router.weight.double().T + (router.bias.double() if hasattr(router, "bias") else 0)
    k = config.num_experts_per_tok
    kind = config.model_type
    if kind in ("gpt_oss", "granitemoe"):
        chosen = logits.topk(k).indices
        picked = torch.softmax(logits.gather(1, chosen), dim=-1)
    elif kind in ("deepseek_v3", "glm4_moe", "nemotron_h", "minimax_m2", "lfm2_moe"):
        scores = torch.sigmoid(logits)
        bias = next(
            v for n, v in block.named_buffers() if n.endswith(("e_score_correction_bias", "expert_bias"))
        ).double()
        choice = scores + bias
        groups = getattr(config, "n_group", 1) or 1
        if groups > 1:
            by_group = choice.reshape(len(choice), groups, -1)
            best = by_group.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            closed = torch.ones(len(choice), groups, dtype=torch.bool).scatter(1, best, False)
            choice = by_group.masked_fill(closed[..., None], -torch.inf).reshape(choice.shape)
        chosen = choice.topk(k).indices
        picked = scores.gather(1, chosen)
        if kind == "minimax_m2" or config.norm_topk_prob:
            picked = picked / (picked.sum(-1, keepdim=True) + (1e-6 if kind == "lfm2_moe" else 1e-20))
        picked = picked * float(getattr(config, "routed_scaling_factor", 1.0))
    else:
        probabilities = torch.softmax(logits, dim=-1)
        picked, chosen = probabilities.topk(k)
        # Mixtral and the later Qwens have no field for it: they always do
        if getattr(config, "norm_topk_prob", True):
            picked = picked / picked.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(1, chosen, picked)


def outputs_of(config: Any, experts: Any, x: Tensor) -> Iterator[Tensor]:
    """float64 [n_tokens, n_out] of each expert, for every token."""
    w = {name: tensor.detach().double() for name, tensor in experts.named_parameters()}
    for e in range(len(w["down_proj"])):
        if config.model_type == "gpt_oss":
            mixed = x @ w["gate_up_proj"][e] + w["gate_up_proj_bias"][e]
            gate, up = mixed[:, ::2].clamp(max=7.0), mixed[:, 1::2].clamp(-7.0, 7.0)
            yield ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ w["down_proj"][e] + w["down_proj_bias"][e]
        elif config.model_type == "nemotron_h":
            yield torch.relu(x @ w["up_proj"][e].T) ** 2 @ w["down_proj"][e].T
        else:
            gate, up = (x @ w["gate_up_proj"][e].T).chunk(2, dim=-1)
            yield (torch.nn.functional.silu(gate) * up) @ w["down_proj"][e].T


def measure(
    model: Any, samples: Sequence[Sequence[int]], counted: Callable[[int, int], bool] = lambda _s, _t: True
) -> dict[int, Any]:
    """layer -> {"counts", "total_tokens", the sums}: tensors; `counted(sample, token)` says what enters."""
    config = model.config.get_text_config()
    found = blocks(model)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in found}

    def watch(layer: int) -> Callable[..., None]:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[layer].append((inputs[0].reshape(-1, inputs[0].shape[-1]), first.reshape(-1, first.shape[-1])))

        return hook

    handles = [block.register_forward_hook(watch(layer)) for layer, block in found.items()]
    try:
        with torch.no_grad():
            for tokens in samples:
                model(input_ids=torch.tensor([list(tokens)]))
    finally:
        for handle in handles:
            handle.remove()
    keep = [
        torch.tensor([counted(number, token) for token in range(len(tokens))]) for number, tokens in enumerate(samples)
    ]
    return {layer: _layer(config, block, seen[layer], keep) for layer, block in found.items()}


def _layer(config: Any, block: Any, seen: Sequence[tuple[Tensor, Tensor]], keep: Sequence[Tensor]) -> dict[str, Any]:
    entered, left, counts = torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen]), torch.cat(list(keep))
    latent = getattr(block, "fc1_latent_proj", None)
    with torch.no_grad():
        gates = gates_of(config, block, entered.double())
        states = (entered if latent is None else latent(entered)).double()
        outputs = torch.stack(list(outputs_of(config, block.experts, states)), dim=1)  # [n_tokens, n_experts, n_out]
        _check_block(block, entered, left, (gates[..., None] * outputs).sum(1))
    gates, norms = gates[counts], outputs.norm(dim=-1)[counts]
    used = gates != 0
    return {
        "counts": used.sum(0),
        "total_tokens": int(counts.sum()),
        "gate_sum": gates.sum(0),
        "norm_sum": (norms * used).sum(0),
        "gated_norm_sum": (gates * norms).sum(0),
        "gated_norm_sq_sum": ((gates * norms) ** 2).sum(0),
        "norm_sq_sum": (norms**2 * used).sum(0),
        "norm_max": (norms * used).amax(0),
    }


def _check_block(block: Any, entered: Tensor, left: Tensor, combined: Tensor) -> None:
    expected = combined.float()
    if getattr(block, "fc2_latent_proj", None) is not None:
        expected = block.fc2_latent_proj(expected)
    if hasattr(block, "shared_experts"):
        expected = expected + block.shared_experts(entered)
    if hasattr(block, "shared_expert"):
        expected = expected + torch.sigmoid(block.shared_expert_gate(entered)) * block.shared_expert(entered)
    error = float((expected - left).abs().max() / left.abs().max())
    assert error < 1e-5, f"the oracle is not the block: {error:.1e}"
