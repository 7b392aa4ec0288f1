"""Removing experts from a transformers model in memory: one layer, or the whole model with its configuration."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from reap.errors import MismatchError, ReapWarning, UnsupportedModelError, UsageError
from reap.files.paths import PathLike
from reap.gguf.router_sketch import to_record
from reap.hf.memory.modules import (
    MoELayer,
    expert_tensors,
    find_moe_layers,
    require_one_count,
    sketch_routers,
    text_config,
)
from reap.hf.memory.offloading import read_tensor, replace_tensor
from reap.scores.identity import compare_records, require_same
from reap.scores.plan import PrunePlan
from reap.scores.ranking import check_keep

# what modules and configurations call the number of routed experts
COUNT_NAMES = (
    "num_experts",
    "n_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "num_expert",
)
# tables that choose experts by token: their contents are expert ids
_ID_TABLES = ("tid2eid",)

Plan = PrunePlan | PathLike | Mapping[int, Sequence[int]]


def prune_moe_layer(model: nn.Module, layer_name: str, retained: Iterable[int], moe_attrs: object = None) -> list[int]:
    """Keep only the experts `retained` of the block `layer_name` (a name that `find_moe_layers` gives), in that order;
    returns them.

    Experts, router, correction biases and per-expert scales are cut by the same list, and the modules' own counts
    follow; the configuration does not (`prune_model`). Weights that accelerate keeps elsewhere (on the host, on disk)
    are cut where they are. `moe_attrs` is accepted for those who come from llm-compressor, and not needed. UsageError,
    before anything is changed, for a name or ids that cannot be, and where too few would be left for the router.
    """
    layers = find_moe_layers(model)
    if layer_name not in layers:
        raise UsageError(
            f"{layer_name!r} is not a block with experts of this {type(model).__name__}; it has {', '.join(layers)}"
        )
    layer = layers[layer_name]
    kept = [_number(expert) for expert in retained]
    _check_layer(layer, kept)
    cut_layer(layer, kept)
    return kept


def prune_model(model: nn.Module, plan: Plan, *, allow_mismatch: bool = False) -> nn.Module:
    """Keep in each layer of a transformers model what `plan` keeps, and say so in its configuration; returns the same
    model, changed.

    `plan`: a PrunePlan, the path of one, or layer number -> ids to keep. Everything is checked before anything is
    changed: MismatchError where layers or expert counts are not those of the model, or where a PrunePlan holds a sketch
    of other routers (a ReapWarning with `allow_mismatch`), UsageError where the router could not be served any more
    (its top-k, its groups), UnsupportedModelError for a model that cannot be cut.
    """
    if isinstance(plan, str | os.PathLike):
        plan = PrunePlan.load(plan)
    kept = _kept_by_layer(plan)
    layers = find_moe_layers(model)
    _check_model(model, layers, plan, kept)
    if isinstance(plan, PrunePlan):
        _check_routers(model, layers, plan, allow_mismatch=allow_mismatch)
    for layer in layers.values():
        cut_layer(layer, kept[layer.index])
    n_before = next(iter(layers.values())).n_experts
    n_after = len(next(iter(kept.values())))
    config = getattr(model, "config", None)
    for holder in (config, text_config(config), *_outer_modules(model)):
        _set_counts(holder, n_before, n_after)
    return model


def _kept_by_layer(plan: PrunePlan | Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    layers = plan.layers if isinstance(plan, PrunePlan) else plan
    if not isinstance(layers, Mapping):
        raise UsageError(f"plan should be a PrunePlan, the path of one, or layer -> ids, found {type(plan).__name__}")
    return {_number(layer): [_number(expert) for expert in kept] for layer, kept in layers.items()}


def _check_model(model: nn.Module, layers: Mapping[str, MoELayer], plan: object, kept: Mapping[int, list[int]]) -> None:
    name = type(model).__name__
    require_one_count(layers.values())
    indices = [layer.index for layer in layers.values()]
    if sorted(kept) != indices:
        raise MismatchError(f"the plan has the layers {sorted(kept)}, but the MoE layers of this {name} are {indices}")
    n_experts = next(iter(layers.values())).n_experts
    if isinstance(plan, PrunePlan) and plan.n_experts != n_experts:
        raise MismatchError(
            f"the plan is of a model with {plan.n_experts} experts a layer, but this {name} has {n_experts}"
        )
    if len({len(ids) for ids in kept.values()}) > 1:
        raise UsageError("the plan keeps more experts in some layers than in others; a model has one number for all")
    for layer in layers.values():
        _check_layer(layer, kept[layer.index])


def _check_routers(model: nn.Module, layers: Mapping[str, MoELayer], plan: PrunePlan, *, allow_mismatch: bool) -> None:
    if not plan.model.get("routers"):
        return
    name = type(model).__name__
    record = {"routers": to_record(sketch_routers(layers.values()))}
    verdict = compare_records({"routers": plan.model["routers"]}, record, ("the plan", f"this {name}"))
    found = require_same(verdict, f"the plan is of a model other than this {name}", allow_mismatch=allow_mismatch)
    if found is not None:
        warnings.warn(found, ReapWarning, stacklevel=3)


def _check_layer(layer: MoELayer, kept: Sequence[int]) -> None:
    if len(set(kept)) != len(kept) or not kept:
        raise UsageError(
            f"{layer.name}: the experts to keep should be different ones, at least one, found {list(kept)}"
        )
    outside = [expert for expert in kept if not 0 <= expert < layer.n_experts]
    if outside:
        raise UsageError(f"{layer.name}: there is no expert {outside[0]}, the layer has 0 to {layer.n_experts - 1}")
    check_keep(
        len(kept),
        {"n_experts_used": layer.n_experts_used, "n_groups": layer.n_group, "n_groups_used": layer.topk_group},
    )
    if layer.n_group > 1:
        size = layer.n_experts // layer.n_group
        groups = [expert // size for expert in kept]
        counts = {groups.count(group) for group in range(layer.n_group)}
        if len(counts) > 1 or groups != sorted(groups):
            raise UsageError(
                f"{layer.name}: its router has {layer.n_group} groups, which have to keep equally many experts, in"
                " their order"
            )
    tables = [name for module in (layer.block, layer.router) for name, _ in _tables(module)]
    if tables:
        raise UnsupportedModelError(
            f"{layer.name}: chooses experts by a table of token ids ({tables[0]}), which cannot be cut here"
        )


def _tables(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, tensor) for name, tensor in own if any(part in name for part in _ID_TABLES)]


def cut_layer(layer: MoELayer, kept: Sequence[int]) -> None:
    """Keep only the experts `kept` of a layer, in that order: their tensors, the router's, and the modules' counts.
    Nothing is checked."""
    ids = torch.tensor(list(kept), dtype=torch.int64)
    # all reading before the first change: what cannot be read leaves the layer whole
    cut = [(module, name, _take(read_tensor(module, name), ids, axis)) for module, name, axis in expert_tensors(layer)]
    for module, name, tensor in cut:
        replace_tensor(module, name, tensor)
    if layer.is_list:
        _cut_list(layer.experts, kept)
    for root in (layer.router, layer.experts):
        for module in root.modules():
            _set_counts(module, layer.n_experts, len(kept))
            if root is layer.router and getattr(module, "out_features", None) == layer.n_experts:
                setattr(module, "out_features", len(kept))  # noqa: B010  (declared by nn.Linear alone)
    _set_counts(layer.block, layer.n_experts, len(kept))


def _take(tensor: Tensor, ids: Tensor, axis: int) -> Tensor:
    return tensor.detach().index_select(axis, ids.to(tensor.device)).contiguous()


def _cut_list(experts: nn.Module, kept: Sequence[int]) -> None:
    """The modules themselves stay the same objects, with everything that refers to them."""
    modules = dict(experts._modules)
    numbered = {key: module for key, module in modules.items() if key.isdigit()}
    experts._modules.clear()
    experts._modules.update({str(index): numbered[str(expert)] for index, expert in enumerate(kept)})
    experts._modules.update({key: module for key, module in modules.items() if key not in numbered})


def _outer_modules(model: nn.Module) -> list[nn.Module]:
    """The model and what wraps its layers, which may keep a count for a loss."""
    inner = [module for _, module in model.named_children() if not isinstance(module, nn.ModuleList)]
    return [model, *inner]


def _set_counts(holder: Any, before: int, after: int) -> None:
    for name in COUNT_NAMES:
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value == before:
            setattr(holder, name, after)


def _number(value: object) -> int:
    try:
        return int(cast(Any, value).__index__())
    except (AttributeError, TypeError, RuntimeError):
        raise UsageError(f"{value!r} is not the number of an expert or a layer") from None
