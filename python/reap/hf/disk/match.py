"""Is a GGUF file what a Hugging Face checkpoint became? Layers, counts and shapes are compared, and the routers'
numbers.

A profile or a plan crosses from one form to the other by its layer and expert numbers, which the converter keeps: layer
N of the checkpoint is block N of the file, expert E is row E. `pruner.check_plan` compares what a plan says of its
model; this compares the models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reap.errors import MismatchError
from reap.files.paths import PathLike
from reap.gguf.dequantize import PLAIN_TYPES, dequantize
from reap.gguf.expert_tensors import ExpertLayout, read_layout
from reap.gguf.model_info import ModelInfo, describe, require_moe
from reap.gguf.reader import GGUFModel, TensorInfo
from reap.gguf.router_sketch import ROUNDING, rounding_bound
from reap.hf.disk.checkpoint_files import Checkpoint
from reap.hf.disk.info import CheckpointInfo, describe_checkpoint
from reap.hf.disk.layout import CheckpointLayout, read_checkpoint_layout

#: How far a router's number may be off, relative to the largest of its layer: a conversion to BF16 moves it by less.
TOLERANCE = 0.01
_COMPARED = ("n_experts", "n_experts_used", "n_groups", "n_groups_used", "n_embd")


@dataclass(frozen=True)
class ModelMatch:
    """What was compared of a checkpoint and a GGUF file."""

    layers: tuple[int, ...]
    """MoE layers that both have, ascending."""
    routers: tuple[int, ...]
    """Those of them whose routers were compared; not all types can be read."""
    router_difference: float
    """The largest of |a − b| / max|a| over these routers; of a quantised router, of ‖a − b‖ / ‖a‖."""


def compare_with_gguf(hf_dir: PathLike, gguf: PathLike, *, drop_prediction: bool = False) -> ModelMatch:
    """Check that the GGUF file was made of the checkpoint, with layers and experts in the same places.

    Raises MismatchError that says where they differ, and what opening either of them raises. Prediction layers that one
    of them lacks are passed over, with `drop_prediction` all that the checkpoint has.
    """
    with Checkpoint.open(hf_dir, trust="named") as checkpoint, GGUFModel.open(gguf) as model:
        layout = read_checkpoint_layout(checkpoint, drop_prediction=drop_prediction)
        experts = read_layout(model)
        info, model_info = describe_checkpoint(checkpoint, layout), describe(model)
        require_moe(model_info)
        layers = _check_counts(info, model_info)
        for layer in layers:
            _check_size(checkpoint, layout, model, experts, layer)
        differences = {layer: _router_difference(checkpoint, layout, model, layer) for layer in layers}
    compared = {layer: difference for layer, difference in differences.items() if difference is not None}
    for layer, (difference, most) in compared.items():
        if not difference <= most:
            raise MismatchError(
                f"{model_info.path} is not {info.path}: the routers of layer {layer} differ by {difference:.2g} of"
                f" their size, where {most:.2g} could be rounding, so the experts are others or in another order"
            )
    return ModelMatch(layers, tuple(compared), max((difference for difference, _ in compared.values()), default=0.0))


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
    if any(tensor.dtype not in PLAIN_TYPES for tensor in matrices):
        return
    ours = sum(tensor.n_elements for tensor in matrices)
    theirs = sum(t.n_elements for t in experts.layers[layer] if "_exps." in t.name and len(t.shape) == 3)
    if ours != theirs:
        raise MismatchError(
            f"{model.path} is not {checkpoint.directory}: the experts of layer {layer} have {theirs:,} weights in the"
            f" file and {ours:,} in the checkpoint"
        )


def _router_difference(
    checkpoint: Checkpoint, layout: CheckpointLayout, model: GGUFModel, layer: int
) -> tuple[float, float] | None:
    """(difference, the most that may be); None where one of them cannot be read."""
    name = layout.router_weight(layer)
    theirs = model.tensors[f"blk.{layer}.ffn_gate_inp.weight"]
    stored = None if name is None else checkpoint.tensor(name)
    if stored is None or stored.dtype not in PLAIN_TYPES:
        return None
    first = dequantize(checkpoint.read(stored.name), stored.dtype)
    second = dequantize(_read(model, theirs), theirs.type_name)
    if first is None or second is None:
        return None
    if first.size != second.size:
        raise MismatchError(
            f"{model.path} is not {checkpoint.directory}: {theirs.name} has {second.size:,} numbers, {stored.name}"
            f" {first.size:,}"
        )
    if theirs.type_name in PLAIN_TYPES:
        return float(np.abs(first - second).max() / max(float(np.abs(first).max()), 1e-30)), TOLERANCE
    # of a quantised one single numbers may be far off, not all of them together
    apart = float(np.linalg.norm(first - second) / max(float(np.linalg.norm(first)), 1e-30))
    return apart, rounding_bound(stored.dtype if stored.dtype in ROUNDING else "F32", theirs.type_name)


def _read(model: GGUFModel, tensor: TensorInfo) -> bytes:
    return model.files[tensor.shard].read_range(tensor.offset_bytes, tensor.n_bytes)
