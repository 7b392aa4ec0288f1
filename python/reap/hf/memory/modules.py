"""Where a model's experts are: found by what modules hold, not by what their classes are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import UnsupportedModelError
from reap.gguf.router_sketch import LayerSketch, sketch_rows
from reap.hf.memory.offloading import read_tensor

# a router that is named so is preferred over another module of the same shape
_ROUTER_NAMES = ("gate", "router", "wg", "gating")
_USED_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k",
    "topk",
    "moe_top_k",
    "moe_topk",
    "top_k_experts",
    "moe_k",
)
_EXPERTS_NAME = re.compile(r"expert", re.IGNORECASE)
_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|decoder)\.(\d+)(?=\.|$)")
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
# per-expert vectors that a block keeps beside its router
_BLOCK_VECTORS = re.compile(
    r"(^|_)(e_score_correction_bias|expert_bias|expert_biases|correction_bias|per_expert_scale)$"
)


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One Mixture-of-Experts block of a model."""

    name: str
    """Of the block within the model, as `model.get_submodule` takes it."""
    index: int
    """The layer's number in the checkpoint, which is the GGUF block index."""
    n_experts: int
    """Routed experts."""
    n_experts_used: int
    """Experts of each token; 0 where neither the modules nor the configuration say."""
    n_group: int
    """Groups of the router; 1 where it has none."""
    topk_group: int
    """Groups that a token may use."""
    is_list: bool
    """Whether `experts` is a list with one module each; else its tensors have the experts as their first axis."""
    router_name: str
    """Of the router, relative to the block."""
    experts_name: str
    """Of the experts' module, relative to the block."""
    block: nn.Module = field(repr=False)
    """The block's module."""
    router: nn.Module = field(repr=False)
    """The module that routes."""
    experts: nn.Module = field(repr=False)
    """The module that holds the experts."""


def find_moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE blocks of a transformers model (or of any module built like one), by name, in the model's order.

    A block is a module with a child that holds experts (a list of modules alike, or tensors of three axes that begin
    with the expert) and a child that routes to as many (a matrix with a row for each). Models that contain a text model
    are searched whole. Raises UnsupportedModelError where there is none.
    """
    config = text_config(getattr(model, "config", None))
    found: dict[str, MoELayer] = {}
    for name, module in model.named_modules():
        layer = _read_block(name, module, config)
        if layer is not None:
            found[name] = layer
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no layer has a router and experts; the model is dense or of a kind unknown to"
            " reap"
        )
    indices = [layer.index for layer in found.values()]
    if len(set(indices)) != len(indices):
        raise UnsupportedModelError(
            f"{type(model).__name__}: several blocks with experts in one layer: {', '.join(found)}"
        )
    return dict(sorted(found.items(), key=lambda item: item[1].index))


def require_one_count(layers: Iterable[MoELayer]) -> None:
    """UnsupportedModelError where layers differ in the number of experts: a profile and a configuration have one for
    all."""
    counts = {layer.n_experts: layer.name for layer in layers}
    if len(counts) > 1:
        found = " and ".join(f"{count} ({name})" for count, name in sorted(counts.items()))
        raise UnsupportedModelError(f"the layers have {found} experts, where one number was expected")


def text_config(config: Any) -> Any:
    """The configuration of the text model within a configuration; itself where it has none."""
    if hasattr(config, "get_text_config"):
        return config.get_text_config(decoder=True)
    return getattr(config, "text_config", None) or config


def expert_tensors(layer: MoELayer) -> Iterator[tuple[nn.Module, str, int]]:
    """(module, name in it, axis) of every parameter and buffer of the block that has an axis of experts; none of a
    list's."""
    if not layer.is_list:
        yield from _with_axis(layer.experts, layer.n_experts)
    yield from _with_axis(layer.router, layer.n_experts)
    for name, tensor in _own_tensors(layer.block):
        if _BLOCK_VECTORS.search(name) and tensor.shape[:1] == (layer.n_experts,):
            yield layer.block, name, 0


def sketch_routers(layers: Iterable[MoELayer]) -> dict[int, LayerSketch]:
    """The sketch of each layer's router, of what is in memory or offloaded; without rows where it is quantised."""
    return {layer.index: _sketch_router(layer) for layer in layers}


def _sketch_router(layer: MoELayer) -> LayerSketch:
    for module, name, axis in _with_axis(layer.router, layer.n_experts):
        tensor = dict(_own_tensors(module))[name]
        if axis == 0 and tensor.dim() == 2:
            if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                return LayerSketch(str(tensor.dtype).removeprefix("torch."), None)
            return sketch_rows(read_tensor(module, name).detach().to("cpu", torch.float32).numpy())
    return LayerSketch("unknown", None)


def _with_axis(root: nn.Module, n_experts: int) -> Iterator[tuple[nn.Module, str, int]]:
    for module in root.modules():
        for name, tensor in _own_tensors(module):
            if tensor.dim() and len(tensor) == n_experts and not _is_of_the_hidden_axis(module, name, tensor):
                yield module, name, 0
            elif tensor.shape == (1, n_experts) and _BLOCK_VECTORS.search(name):  # Ernie
                yield module, name, 1


def _is_of_the_hidden_axis(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a vector scales or shifts the hidden state, which may be as long as there are experts: its name
    decides."""
    return tensor.dim() == 1 and ("norm" in type(module).__name__.lower() or name in ("scale", "weight"))


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _read_block(name: str, module: nn.Module, config: Any) -> MoELayer | None:
    if isinstance(module, nn.ModuleList):
        return None
    for child_name, child in module.named_children():
        counted = _count_experts(child_name, child)
        if counted is None:
            continue
        experts, n_experts, is_list = counted
        router_name = _find_router(module, child, n_experts)
        if router_name is None:
            continue
        router = module.get_submodule(router_name)
        holders = (router, module, child)
        n_group, topk_group = _groups((*holders, config), n_experts)
        return MoELayer(
            name=name,
            index=_layer_number(name, config),
            n_experts=n_experts,
            n_experts_used=_first_number((*holders, config), _USED_NAMES) or 0,
            n_group=n_group,
            topk_group=topk_group,
            is_list=is_list,
            router_name=router_name,
            experts_name=child_name,
            block=module,
            router=router,
            experts=experts,
        )
    return None


def _count_experts(name: str, module: nn.Module) -> tuple[nn.Module, int, bool] | None:
    """(the module, number of experts, whether they are a list) of a module that holds experts."""
    if not _EXPERTS_NAME.search(name) or "shared" in name:
        return None
    numbered = [child for key, child in module.named_children() if key.isdigit()]
    if len(numbered) > 1 and len({type(child) for child in numbered if not isinstance(child, nn.Identity)}) == 1:
        return module, len(numbered), True
    cubes = [tensor for part in module.modules() for _, tensor in _own_tensors(part) if tensor.dim() == 3]
    if cubes and len({len(cube) for cube in cubes}) == 1 and len(cubes[0]) > 1:
        return module, len(cubes[0]), False
    return None


def _find_router(block: nn.Module, experts: nn.Module, n_experts: int) -> str | None:
    """Name of the child that holds a matrix with one row for each expert."""
    found: list[str] = []
    for name, child in block.named_children():
        if child is experts or "shared" in name:
            continue
        matrices = [
            tensor
            for part in child.modules()
            for _, tensor in _own_tensors(part)
            if tensor.dim() == 2 and len(tensor) == n_experts
        ]
        if matrices:
            found.append(name)
    named = [name for name in found if any(part in name for part in _ROUTER_NAMES)]
    if named:
        return sorted(named, key=lambda name: name not in _ROUTER_NAMES)[0]
    return found[0] if len(found) == 1 else None


def _layer_number(name: str, config: Any) -> int:
    numbers = [int(number) for number in _LAYER_NUMBER.findall(name) or _NUMBER.findall(name)[-1:]]
    if not numbers:
        raise UnsupportedModelError(f"{name}: a block with experts that is in no numbered layer")
    # prediction blocks are numbered from 0 in some checkpoints; in a GGUF file they follow the layers
    after = int(getattr(config, "num_hidden_layers", 0) or 0) if re.search(r"(^|\.)mtp\.", name) else 0
    return numbers[0] + after


def _groups(holders: tuple[Any, ...], n_experts: int) -> tuple[int, int]:
    n_group = _first_number(holders, ("n_group",)) or 1
    if n_group == 1 or n_experts % n_group:
        return 1, 1
    return n_group, _first_number(holders, ("topk_group", "top_k_group")) or n_group


def _first_number(holders: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    for holder in holders:
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
