"""What a new file changes besides its experts: its labels, and prediction layers that are left out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TypedDict

from reap.errors import UsageError
from reap.gguf.expert_tensors import ExpertLayout, read_count, read_layout
from reap.gguf.model_info import ModelInfo
from reap.gguf.reader import GGUFModel
from reap.gguf.writer import encode_pair

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)", re.DOTALL)


class ChangeArguments(TypedDict, total=False):
    """Keyword arguments that a function hands on to `Changes`, where they are explained."""

    name: str | None
    keep_label: bool
    drop_prediction_layers: bool


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is to change besides the experts."""

    name: str | None = None
    """A new general.name; None: the old one, with the number of experts that are left."""
    keep_label: bool = False
    """Leave general.name and general.size_label as they are."""
    drop_prediction_layers: bool = False
    """Leave the multi-token-prediction layers out."""


def without_prediction_layers(model: GGUFModel, info: ModelInfo) -> tuple[GGUFModel, ModelInfo, ExpertLayout]:
    """The model without the tensors of its prediction layers, and what is known of it then. Its identity stays that of
    the whole model, so that plans of it fit. Raises UsageError where the header speaks of no such layers."""
    if not info.n_prediction_layers:
        raise UsageError(f"{model.path}: has no prediction layers to drop")
    first = n_trunk_layers(model, info.architecture)
    trunk = model.with_tensors(tensor for tensor in model.tensors.values() if _block_of(tensor.name) < first)
    layout = read_layout(trunk)
    used = dict(zip(info.moe_layers, info.n_experts_used_per_layer, strict=True))
    return (
        trunk,
        replace(
            info,
            moe_layers=layout.moe_layers,
            n_experts=layout.n_experts if layout.layers else 0,
            n_experts_used_per_layer=tuple(used.get(layer, info.n_experts_used) for layer in layout.moe_layers),
            n_prediction_layers=info.n_layers - first,
            refusals=layout.refusals,
        ),
        layout,
    )


def _block_of(name: str) -> int:
    """Which block a tensor belongs to; -1: none."""
    match = _BLOCK.match(name)
    return -1 if match is None else int(match[1])


def n_trunk_layers(model: GGUFModel, architecture: str) -> int:
    """Blocks before the prediction layers. Where the header promises prediction layers that the file lacks, it may have
    counted them or not: a last block that has tensors and none of a prediction layer's belongs to the trunk."""
    n_blocks = read_count(model, f"{architecture}.block_count")
    n_prediction = min(read_count(model, f"{architecture}.nextn_predict_layers"), n_blocks)
    names: dict[int, list[str]] = {}
    for tensor in model.tensors.values():
        if match := _BLOCK.match(tensor.name):
            names.setdefault(int(match[1]), []).append(match[2])
    promised = range(n_blocks - n_prediction, n_blocks)
    is_trunk = all(block in names and not any(name.startswith("nextn.") for name in names[block]) for block in promised)
    return n_blocks if is_trunk else n_blocks - n_prediction


def dropped_keys(model: GGUFModel, architecture: str) -> tuple[dict[str, bytes], set[str]]:
    """(key -> encoded pair that takes its place, keys to leave out) of a header without prediction layers."""
    n_blocks, n_trunk = read_count(model, f"{architecture}.block_count"), n_trunk_layers(model, architecture)
    count, promise = f"{architecture}.block_count", f"{architecture}.nextn_predict_layers"
    found = {count: encode_pair(count, n_trunk, model.metadata[count].type)}
    for key, pair in model.metadata.items():
        # one entry for each block; the sections of rope are four, whatever the model
        is_by_block = key.startswith(f"{architecture}.") and not key.startswith(f"{architecture}.rope.")
        if is_by_block and pair.array_type is not None and pair.length == n_blocks > n_trunk:
            found[key] = encode_pair(key, pair.value[:n_trunk], pair.type, pair.array_type)
    return found, {promise}
