"""The oracle of `oracle.py` for the models of `torch_more_models.py`: the same sums, and as little of reap's code
(needs PyTorch).

These families keep router and experts in other places, so it watches those two modules themselves: what enters the
router and the experts is recorded, everything else is computed again in float64 from the published formulas. The checks
are the same: transformers' router must agree (`router_error`), and the sum of g·f must be what the experts return
(`block_error`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from helpers import oracle
from helpers.oracle import Floats, LayerSums, Selection


@dataclass(frozen=True)
class MoE:
    """The two modules of a layer, and the settings of the whole model's text half."""

    router: Any
    experts: Any
    config: Any
    layer: int

    @property
    def n_experts(self) -> int:
        return len(self.experts.down_proj)

    def numbers(self, module: Any, name: str) -> Floats:
        found: Floats = module.get_parameter(name).detach().double().numpy()
        return found


# ---- what each family computes: one token in, the selected experts with their gates, one expert's output -------------


def plain_logits(moe: MoE, x: Floats) -> Floats:
    return moe.numbers(moe.router, "weight") @ x


def gemma4_logits(moe: MoE, x: Floats) -> Floats:
    """The router has a norm without weights, a scale for each number of its input, and divides by the root of their
    count."""
    normal = x / np.sqrt((x**2).mean() + moe.config.rms_norm_eps)
    return moe.numbers(moe.router, "proj.weight") @ (normal * moe.numbers(moe.router, "scale") / np.sqrt(len(x)))


def gemma4_route(moe: MoE, logits: Floats) -> Selection:
    ids, gap = oracle.best(logits, moe.config.top_k_experts)
    return (
        ids,
        list(oracle.softmax(logits[ids])),
        gap,
    )  # a softmax over all, renormalised over the selected, is the softmax of these


def granite_route(moe: MoE, logits: Floats) -> Selection:
    return oracle.route_softmax_of_selected(logits, moe.config)


def jamba_route(moe: MoE, logits: Floats) -> Selection:
    return oracle.route_softmax(logits, moe.config, renormalise=False)


def deepseek_ocr_route(moe: MoE, logits: Floats) -> Selection:
    ids, gates, gap = oracle.route_softmax(logits, moe.config, renormalise=False)
    return ids, [gate * moe.config.routed_scaling_factor for gate in gates], gap


def step35_route(moe: MoE, logits: Floats) -> Selection:
    """A sigmoid; the bias decides the selection only; renormalised, then scaled."""
    scores = 1 / (1 + np.exp(-logits))
    ids, gap = oracle.best(scores + moe.router.e_score_correction_bias.double().numpy(), moe.config.num_experts_per_tok)
    return ids, list(scores[ids] / scores[ids].sum() * moe.config.moe_router_scaling_factor), gap


def halves(moe: MoE, expert: int, x: Floats) -> tuple[Floats, Floats]:
    gate, up = np.split(moe.experts.gate_up_proj[expert].detach().double().numpy() @ x, 2)
    return gate, up


def down(moe: MoE, expert: int, hidden: Floats) -> Floats:
    output: Floats = moe.experts.down_proj[expert].detach().double().numpy() @ hidden
    return output


def plain_expert(moe: MoE, expert: int, x: Floats) -> Floats:
    gate, up = halves(moe, expert, x)
    return down(moe, expert, oracle.silu(gate) * up)


def gemma4_expert(moe: MoE, expert: int, x: Floats) -> Floats:
    """GELU in its tanh form; the expert's own scale belongs to its output, as a bias would."""
    gate, up = halves(moe, expert, x)
    gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return float(moe.router.per_expert_scale[expert]) * down(moe, expert, gelu * up)


def step35_expert(moe: MoE, expert: int, x: Floats) -> Floats:
    """In some layers the activated half is bounded from above and the other half from both sides."""
    limit = moe.config.swiglu_limits[moe.layer] or np.inf
    gate, up = halves(moe, expert, x)
    return down(moe, expert, np.minimum(oracle.silu(gate), limit) * np.clip(up, -limit, limit))


@dataclass(frozen=True)
class Formulas:
    route: Callable[[MoE, Floats], Selection]
    expert: Callable[[MoE, int, Floats], Floats] = plain_expert
    logits: Callable[[MoE, Floats], Floats] = plain_logits


FORMULAS = {
    "gemma4_text": Formulas(gemma4_route, gemma4_expert, gemma4_logits),
    "granitemoe_swa": Formulas(granite_route),
    "granitemoehybrid": Formulas(granite_route),
    "jamba": Formulas(jamba_route),
    "deepseek_ocr2_text": Formulas(deepseek_ocr_route),
    "step3p5": Formulas(step35_route, step35_expert),
}


# ---- the sums --------------------------------------------------------------------------------------------------------


def moe_layers(model: Any) -> dict[int, MoE]:
    """Router and experts of each layer that has them, by the layer's index, which is also the GGUF block's."""
    modules = dict(model.named_modules())
    found = {}
    for name, experts in modules.items():
        if match := re.search(r"\.layers\.(\d+)\..*?experts$", name):
            if not hasattr(experts, "gate_up_proj"):
                continue  # the shared expert
            parent = modules[name.rpartition(".")[0]]
            router = parent.router if hasattr(parent, "router") else parent.gate
            found[int(match[1])] = MoE(router, experts, model.config.get_text_config(), int(match[1]))
    return found


def measure(model: Any, samples: Sequence[Sequence[int]]) -> dict[int, LayerSums]:
    """Run every sample on its own through the model; the sums of each MoE layer, by block index."""
    layers = moe_layers(model)
    sums = {layer: LayerSums.empty(moe.n_experts) for layer, moe in layers.items()}
    for tokens in samples:
        for layer, seen in _record(model, layers, tokens).items():
            _add_sample(sums[layer], layers[layer], seen)
    return sums


@dataclass
class Seen:
    """What one sample showed of one layer, each [n_tokens, ...]."""

    router_input: Floats
    router_output: tuple[Any, ...]
    states: Floats
    combined: Floats


def _record(model: Any, layers: Mapping[int, MoE], tokens: Sequence[int]) -> dict[int, Seen]:
    at_router: dict[int, tuple[Any, Any]] = {}
    at_experts: dict[int, tuple[Any, Any]] = {}

    def watch(module: Any, into: dict[int, tuple[Any, Any]], layer: int) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            into[layer] = (inputs[0].clone(), output)

        return module.register_forward_hook(hook)

    handles = [watch(moe.router, at_router, layer) for layer, moe in layers.items()]
    handles += [watch(moe.experts, at_experts, layer) for layer, moe in layers.items()]
    try:
        with torch.no_grad():
            model(torch.tensor([list(tokens)]))
    finally:
        for handle in handles:
            handle.remove()

    def rows(tensor: Any) -> Floats:
        array: Floats = tensor.reshape(len(tokens), -1).double().numpy()
        return array

    return {
        layer: Seen(
            rows(at_router[layer][0]), at_router[layer][1], rows(at_experts[layer][0]), rows(at_experts[layer][1])
        )
        for layer in layers
    }


def _add_sample(sums: LayerSums, moe: MoE, seen: Seen) -> None:
    formulas = FORMULAS[moe.config.model_type]
    # what transformers multiplies in elsewhere: the scale of the whole block later, the expert's own scale together
    # with the gate
    later = getattr(moe.config, "moe_router_scaling_factor", 1.0)
    own = getattr(moe.router, "per_expert_scale", torch.ones(moe.n_experts)).detach().double().numpy()
    combined = np.zeros_like(seen.states)
    for token, state in enumerate(seen.states):
        ids, gates, gap = formulas.route(moe, formulas.logits(moe, seen.router_input[token]))
        sums.min_gap = min(sums.min_gap, gap)
        theirs = [gate * own[expert] / later for expert, gate in zip(ids, gates, strict=True)]
        sums.router_error = max(sums.router_error, oracle._router_difference(ids, theirs, seen.router_output, token))
        for expert, gate in zip(ids, gates, strict=True):
            output = formulas.expert(moe, expert, state)
            sums.add(expert, gate, output)
            combined[token] += gate * output / later
    sums.total_tokens += len(seen.states)
    error = np.abs(combined - seen.combined).max() / np.abs(seen.combined).max()
    sums.block_error = max(sums.block_error, float(error))


# ---- removing experts ------------------------------------------------------------------------------------------------


def keep_experts(model: Any, kept: Mapping[int, Sequence[int]]) -> Any:
    """A copy of the model in which each MoE layer has only the experts `kept[layer]`, in that order."""
    smaller = copy.deepcopy(model)
    for layer, moe in moe_layers(smaller).items():
        ids = torch.tensor(list(kept[layer]))
        for module in (moe.experts, moe.router):
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if name != "scale":  # of the router's input
                    tensor.data = tensor.data[ids]
            module.num_experts = len(ids)
    return smaller


def by_expert(model: Any, name: str) -> dict[int, NDArray[np.float32]]:
    """Per MoE layer, one tensor of the experts or the router, [n_experts, ...]."""
    return {
        layer: dict([*moe.experts.named_parameters(), *moe.router.named_parameters()])[name].detach().numpy()
        for layer, moe in moe_layers(model).items()
    }
