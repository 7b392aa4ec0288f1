"""What `reap.hf.llmcompressor` holds: that project's names and semantics over reap's own sums and surgery.

Where it is imported, its own state decides what it decides there: the flag of its calibration context, and which
classes of experts it works on.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from reap.errors import ReapWarning, UsageError
from reap.hf.memory.modules import MoELayer
from reap.hf.memory.prune import cut_layer
from reap.hf.memory.tracker import LayerSums, gather_norms

# the names that llm-compressor 0.14 looks for, in its order
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "moe_num_experts")
_TOP_KS = ("num_experts_per_tok", "top_k", "moe_top_k")
_GROUP_COUNTS = ("n_group",)
_GROUP_TOP_KS = ("topk_group", "top_k_group")
_ROUTERS = ("router", "gate")
_EXPERTS = "experts"
_COUNTS_OF_MODULES = ("num_experts", "n_experts", "n_routed_experts")


@dataclass
class MoeModelAttrs:
    """Where a model's experts are, and what its configuration says of them."""

    num_experts_config_key: str
    """Name of the configuration's number of experts."""
    router_attr: str
    """Name of the router within a MoE block."""
    experts_attr: str
    """Name of the experts within a MoE block."""
    moe_layer_names: list[str]
    """Of the MoE blocks, as `model.get_submodule` takes them."""
    num_experts: int
    """Experts of a layer."""
    top_k: int
    """Experts of a token."""
    has_text_config: bool
    """Whether the numbers are those of `config.text_config`."""
    n_group: int | None
    """Groups of the router."""
    top_k_group: int | None
    """Groups that a token may use."""
    group_size: int | None
    """Experts of a group."""


def get_moe_attrs(model: nn.Module, ignore: list[str]) -> MoeModelAttrs | None:
    """Find a model's MoE blocks whose experts are a module each.

    A block has `experts` and a `router` or `gate`. Where llm-compressor is imported its experts are those that it
    works on itself (`LinearExperts2D`, which is called with the router's choice, except Llama-4's); others are passed
    over with a ReapWarning.

    Args:
        model: a transformers model, or one with a `config` like theirs.
        ignore: regular expressions; a block is passed over where one is found in its name.

    Raises:
        ValueError: the configuration lacks a number, groups do not fit, or there is no such block.
    """
    has_text_config = hasattr(model.config, "text_config")
    config: Any = model.config.text_config if has_text_config else model.config
    key, num_experts = _first(config, _EXPERT_COUNTS)
    _, top_k = _first(config, _TOP_KS)
    for what, keys, found in (("experts", _EXPERT_COUNTS, num_experts), ("experts of a token", _TOP_KS, top_k)):
        if found is None:
            raise ValueError(f"{type(config).__name__} has no number of {what} under {', '.join(keys)}")
    assert key is not None
    n_group, top_k_group, group_size = _groups(config, num_experts)
    router = _router_name(model)
    names = [name for name, _ in _blocks(model, router) if not any(re.search(one, name) for one in ignore)]
    names = [name for name in names if _is_supported(model.get_submodule(name), name)]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no block with a router ({' or '.join(_ROUTERS)}) and a module for each of its"
            " experts; reap.hf.find_moe_layers and reap.hf.prune_moe_layer also take experts that share tensors"
        )
    return MoeModelAttrs(
        num_experts_config_key=key,
        router_attr=router,
        experts_attr=_EXPERTS,
        moe_layer_names=names,
        num_experts=num_experts,
        top_k=top_k,
        has_text_config=has_text_config,
        n_group=n_group,
        top_k_group=top_k_group,
        group_size=group_size,
    )


def _first(config: Any, names: Sequence[str]) -> tuple[str | None, Any]:
    """(name, value) of the first of `names` that the configuration has."""
    return next(((name, getattr(config, name)) for name in names if hasattr(config, name)), (None, None))


def _groups(config: Any, num_experts: int) -> tuple[int | None, int | None, int | None]:
    """Groups of the router, those that a token may use, experts of a group."""
    (_, n_group), (_, top_k_group) = _first(config, _GROUP_COUNTS), _first(config, _GROUP_TOP_KS)
    if (n_group is None) != (top_k_group is None):
        there, missing = ("n_group", _GROUP_TOP_KS) if top_k_group is None else ("topk_group", _GROUP_COUNTS)
        raise ValueError(f"{type(config).__name__} has {there}, but no {' or '.join(missing)}")
    if n_group is None:
        return None, None, None
    if num_experts % n_group:
        raise ValueError(f"{num_experts} experts cannot be shared equally by {n_group} groups (n_group)")
    return n_group, top_k_group, num_experts // n_group


def _router_name(model: nn.Module) -> str:
    """What the first block calls its router."""
    for module in model.modules():
        for name in _ROUTERS:
            if hasattr(module, _EXPERTS) and hasattr(module, name):
                return name
    raise ValueError(f"{type(model).__name__} has no block with {_EXPERTS} and a {' or a '.join(_ROUTERS)}")


def _blocks(model: nn.Module, router: str) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, _EXPERTS) and hasattr(module, router)
    ]


def _is_supported(block: nn.Module, name: str) -> bool:
    """Whether the experts of a block are those that llm-compressor prunes; without it, whether they are a module
    each."""
    experts = getattr(block, _EXPERTS)
    theirs = getattr(sys.modules.get("llmcompressor.modeling.moe.linear_experts"), "LinearExperts2D", None)
    llama4 = getattr(sys.modules.get("llmcompressor.modeling.moe.llama4"), "Llama4LinearExperts", None)
    if theirs is None:
        fits = isinstance(experts, nn.Module) and any(key.isdigit() for key in experts._modules)
    else:
        fits = isinstance(experts, theirs) and not (llama4 is not None and isinstance(experts, llama4))
    if not fits:
        warnings.warn(
            f"{name}: passed over, its experts ({type(experts).__name__}) are not a module each that is called with"
            " the router's choice",
            ReapWarning,
            stacklevel=4,
        )
    return fits


class REAPSaliencyTracker:
    """REAP's saliency of one layer's experts, the mean of g·‖f‖ over the tokens routed to an expert, as
    llm-compressor's tracker gives it: 0 for an expert that no token was routed to.

    Attributes:
        num_experts: of the layer
        sum_saliency: float64 [num_experts]: sum of g·‖f‖, on the device of the norms; None before the first update
        count: float64 [num_experts]: tokens routed to each; None before the first update

    Both can be set. `reap.hf.SaliencyTracker` sums in the same way and tells apart what was never measured.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.sum_saliency: Tensor | None = None
        self.count: Tensor | None = None

    def update(
        self,
        topk_indices: Tensor,
        topk_weights: Tensor,
        expert_norms_dict: Mapping[int, Tensor],
        *,
        every_token: bool | None = None,
    ) -> None:
        """Add the routings of a batch.

        Args:
            topk_indices: int [num_tokens, top_k]: the experts of each token
            topk_weights: float [num_tokens, top_k]: the gate that multiplies the expert's output
            expert_norms_dict: expert -> float: ‖f‖ of the tokens routed to it [num_routed_tokens] (all that chose it
                first, then all that chose it second, and so on), or of every token in order [num_tokens]. A routed
                expert that is left out counts with a norm of 0; an empty one adds nothing at all.
            every_token: which of the two. None: as llm-compressor tells them apart, by the flag of its
                `moe_calibration_context` where that is imported; elsewhere by the lengths, and where both fit they are
                those of the routed tokens.

        UsageError where lengths or numbers do not belong together; nothing is added then.
        """
        if not expert_norms_dict:
            return
        if topk_indices.dim() != 2 or topk_indices.shape != topk_weights.shape:
            found = f"{list(topk_indices.shape)} and {list(topk_weights.shape)}"
            raise UsageError(f"topk_indices and topk_weights should both be [num_tokens, top_k], found {found}")
        device = next(iter(expert_norms_dict.values())).device
        with torch.no_grad():
            ids = topk_indices.to(device, torch.int64)
            every = self._is_of_every_token(ids, expert_norms_dict) if every_token is None else every_token
            norms = gather_norms(ids, expert_norms_dict, self.num_experts, every_token=every, may_lack=not every)
            batch = LayerSums(self.num_experts, device=device)
            batch.add(ids, topk_weights, norms)
            sums, counts = self._begun(batch.device)
            sums += batch.tensors["gated_norm_sum"][0].to(sums)
            counts += batch.tensors["counts"][0].to(counts)

    def _is_of_every_token(self, ids: Tensor, given: Mapping[int, Tensor]) -> bool:
        context = sys.modules.get("llmcompressor.modeling.moe.context")
        if context is not None:
            return bool(context.get_calibrate_all_experts_flag())
        counts = torch.bincount(ids.reshape(-1), minlength=self.num_experts).tolist()
        if all(len(norms) == counts[expert] for expert, norms in given.items() if expert < len(counts)):
            return False
        return all(expert in given and len(given[expert]) == len(ids) for expert in range(self.num_experts))

    def _begun(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both sums, made where there are none yet."""
        if self.sum_saliency is None:
            self.sum_saliency = torch.zeros(self.num_experts, dtype=torch.float64, device=device)
        if self.count is None:
            self.count = torch.zeros(self.num_experts, dtype=torch.float64, device=device)
        return self.sum_saliency, self.count

    def reduce_saliency_stats(self, device: torch.device, group: Any = None) -> None:
        """Sum both over all ranks of `group` (torch.distributed) into those of rank 0, on the host; the other ranks'
        are of no use afterwards. `device` is where a rank without any update keeps its zeros."""
        sums, counts = self._begun(torch.device(device))
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        self.sum_saliency, self.count = sums.cpu(), counts.cpu()
        for tensor in (self.sum_saliency, self.count):
            distributed.reduce(tensor, dst=0, op=distributed.ReduceOp.SUM, group=group)

    def compute_retained_experts(
        self, n_experts_to_drop: int, n_experts_to_drop_per_group: int | None, moe_attrs: MoeModelAttrs
    ) -> Tensor:
        """The experts that stay when the least salient go: int32, ascending.

        With `n_experts_to_drop_per_group` as many go from each of `moe_attrs.n_group` groups of
        `moe_attrs.group_size`; else `n_experts_to_drop` go from all. Which of equals go is `torch.topk`'s choice.
        """
        n_groups, size, n_dropped = 1, self.num_experts, n_experts_to_drop
        if n_experts_to_drop_per_group is not None:
            if moe_attrs.n_group is None or moe_attrs.group_size is None:
                raise UsageError("n_experts_to_drop_per_group is for a router with groups, and moe_attrs names none")
            n_groups, size, n_dropped = moe_attrs.n_group, moe_attrs.group_size, n_experts_to_drop_per_group
        saliency = self.mean_saliency
        kept = torch.ones(self.num_experts, dtype=torch.bool)
        kept[n_groups * size :] = False
        for start in range(0, n_groups * size, size):
            kept[start + torch.topk(saliency[start : start + size], n_dropped, largest=False).indices] = False
        return torch.nonzero(kept).reshape(-1).to(torch.int32)

    @property
    def total_count(self) -> float:
        """Routings counted so far."""
        return 0.0 if self.count is None else float(self.count.sum())

    @property
    def mean_saliency(self) -> Tensor:
        """float64 [num_experts], on the host: sum_saliency / count; 0 for an expert that no token was routed to."""
        if self.sum_saliency is None:
            return torch.zeros(self.num_experts, dtype=torch.float64)
        sums, counts = (tensor.to("cpu", torch.float64) for tensor in self._begun(self.sum_saliency.device))
        return sums / counts.clamp(min=1.0)


def prune_moe_layer(model: nn.Module, layer_name: str, retained: list[int], moe_attrs: MoeModelAttrs) -> list[int]:
    """Keep only the experts `retained` of the block `layer_name`, in that order; returns them.

    The kept experts stay the same modules. The router, its bias, correction biases (its own and the block's) and what
    else has a number for each expert are cut alike, and the modules' counts follow; the configuration does not
    (`update_model_config`). Weights that accelerate or compressed-tensors keep elsewhere are cut there.
    """
    block = model.get_submodule(layer_name)
    router, experts = getattr(block, moe_attrs.router_attr), getattr(block, moe_attrs.experts_attr)
    n_experts = sum(key.isdigit() for key in experts._modules)
    cut_layer(
        MoELayer(
            name=layer_name,
            index=0,
            n_experts=n_experts,
            n_experts_used=moe_attrs.top_k,
            n_group=moe_attrs.n_group or 1,
            topk_group=moe_attrs.top_k_group or 1,
            is_list=True,
            router_name=moe_attrs.router_attr,
            experts_name=moe_attrs.experts_attr,
            block=block,
            router=router,
            experts=experts,
        ),
        retained,
    )
    experts.num_experts = len(retained)
    for holder in (block, router):
        for name in _COUNTS_OF_MODULES:
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, len(retained))
    if isinstance(getattr(router, "out_features", None), int):
        router.out_features = len(retained)
    return retained


def update_model_config(model: nn.Module, moe_attrs: MoeModelAttrs, new_num_experts: int) -> None:
    """Write the new number of experts into the model's configuration, that of the text where there is one."""
    config: Any = model.config.text_config if moe_attrs.has_text_config else model.config
    setattr(config, moe_attrs.num_experts_config_key, new_num_experts)
