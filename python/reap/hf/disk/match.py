"""Is a GGUF file what a Hugging Face checkpoint became? Layers, counts and shapes are compared, and the routers'
numbers.

A profile or a plan crosses from one form to the other by its layer and expert numbers, which the converter keeps: layer
N of the checkpoint is block N of the file, expert E is row E. `pruner.check_plan` compares what a plan says of its
model; this compares the models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reap.errors import MismatchError
from reap.gguf.experts import ExpertLayout, read_layout
from reap.gguf.model_info import ModelInfo, describe, require_moe
from reap.gguf.reader import GGUFModel, TensorInfo
from reap.hf.disk.checkpoint_files import Checkpoint
from reap.hf.disk.info import CheckpointInfo, describe_checkpoint
from reap.hf.disk.layout import CheckpointLayout, read_checkpoint_layout

#: How far a router's number may be off, relative to the largest of its layer: a conversion to BF16 moves it by less.
TOLERANCE = 0.01
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_COMPARED = ("n_experts", "n_experts_used", "n_groups", "n_groups_used", "n_embd")

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ModelMatch:
    """What was compared of a checkpoint and a GGUF file.

    layers: MoE layers that both have. routers: of these, those whose routers were compared; a quantised router cannot
    be. router_difference: the largest of |a - b| / max|a| over them.
    """

    layers: tuple[int, ...]
    routers: tuple[int, ...]
    router_difference: float


def compare_with_gguf(hf_dir: str | os.PathLike[str], gguf: str | os.PathLike[str]) -> ModelMatch:
    """Check that the GGUF file was made of the checkpoint, with layers and experts in the same places.

    Raises MismatchError that says where they differ, and what opening either of them raises. Prediction layers that one
    of them lacks are passed over.
    """
    with Checkpoint.open(hf_dir) as checkpoint, GGUFModel.open(gguf) as model:
        layout, experts = read_checkpoint_layout(checkpoint), read_layout(model)
        info, model_info = describe_checkpoint(checkpoint, layout), describe(model)
        require_moe(model_info)
        layers = _check_counts(info, model_info)
        for layer in layers:
            _check_size(checkpoint, layout, model, experts, layer)
        differences = {layer: _router_difference(checkpoint, layout, model, layer) for layer in layers}
    compared = {layer: difference for layer, difference in differences.items() if difference is not None}
    for layer, difference in compared.items():
        if not difference <= TOLERANCE:
            raise MismatchError(
                f"{model_info.path} is not {info.path}: the routers of layer {layer} differ by {difference:.2g} of"
                " their largest number, so the experts are others or in another order"
            )
    return ModelMatch(layers, tuple(compared), max(compared.values(), default=0.0))


def _check_counts(info: CheckpointInfo, model: ModelInfo) -> tuple[int, ...]:
    """The MoE layers that both have."""
    for key in _COMPARED:
        ours, theirs = getattr(info, key), getattr(model, key)
        if ours and theirs and ours != theirs:
            raise MismatchError(
                f"{model.path} is not {info.path}: {key} is {theirs} in the file and {ours} in the checkpoint"
            )
    ordinary = [
        tuple(layer for layer in one.moe_layers if layer < one.n_layers - one.n_prediction_layers)
        for one in (info, model)
    ]
    if ordinary[0] != ordinary[1]:
        raise MismatchError(
            f"{model.path} is not {info.path}: the layers with experts are {list(ordinary[1])} in the file and"
            f" {list(ordinary[0])} in the checkpoint"
        )
    return tuple(layer for layer in info.moe_layers if layer in model.moe_layers)


def _check_size(
    checkpoint: Checkpoint, layout: CheckpointLayout, model: GGUFModel, experts: ExpertLayout, layer: int
) -> None:
    """An expert has as many weights in both, where the checkpoint does not pack them."""
    stored = [
        checkpoint.tensor(name) for name, how in layout.follows.items() if how.layer == layer and not how.is_router
    ]
    matrices = [t for t in stored if len(t.shape) + (layout.follows[t.name].expert is not None) >= 3]
    if any(tensor.dtype not in _FLOATS for tensor in matrices):
        return
    ours = sum(tensor.n_elements for tensor in matrices)
    theirs = sum(t.n_elements for t in experts.layers[layer] if "_exps." in t.name and len(t.shape) == 3)
    if ours != theirs:
        raise MismatchError(
            f"{model.path} is not {checkpoint.directory}: the experts of layer {layer} have {theirs:,} weights in the"
            f" file and {ours:,} in the checkpoint"
        )


def _router_difference(checkpoint: Checkpoint, layout: CheckpointLayout, model: GGUFModel, layer: int) -> float | None:
    name = layout.router_weight(layer)
    theirs = model.tensors[f"blk.{layer}.ffn_gate_inp.weight"]
    stored = None if name is None else checkpoint.tensor(name)
    if stored is None or stored.dtype not in _FLOATS or theirs.type_name not in _FLOATS:
        return None
    first = _floats(checkpoint.read(stored.name), stored.dtype)
    second = _floats(_read(model, theirs), theirs.type_name)
    if first.size != second.size:
        raise MismatchError(
            f"{model.path} is not {checkpoint.directory}: {theirs.name} has {second.size:,} numbers, {stored.name}"
            f" {first.size:,}"
        )
    return float(np.abs(first - second).max() / max(float(np.abs(first).max()), 1e-30))


def _read(model: GGUFModel, tensor: TensorInfo) -> bytes:
    return model.files[tensor.shard].read_range(tensor.offset_bytes, tensor.n_bytes)


_NUMPY: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _floats(raw: bytes, dtype: str) -> Floats:
    numbers = np.frombuffer(raw, dtype=_NUMPY[dtype])
    if dtype == "BF16":  # the upper half of an F32
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)
