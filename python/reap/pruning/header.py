"""What the header of a pruned file says: its number of experts, its name and size, where it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from reap.errors import FormatError
from reap.files.ranges import Piece
from reap.gguf.expert_tensors import ExpertLayout, read_text
from reap.gguf.model_info import PROVENANCE_PREFIX, ModelInfo
from reap.gguf.reader import GGUFModel
from reap.gguf.tensor_types import ValueType
from reap.gguf.writer import NewTensor, edit_metadata, encode_pair
from reap.pruning.changes import Changes, dropped_keys
from reap.pruning.compatibility import recorded_mismatch
from reap.scores.plan import PrunePlan

_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_NAME, _SIZE = "general.name", "general.size_label"
_OUR_LABEL = re.compile(r" \(REAP, \d+ of \d+ experts\)$")
#: 128x1.8B as llama.cpp's converter makes it; 30B-A3B as publishers do.
_EXPERTS_TIMES_SIZE = re.compile(r"(\d+)(x.+)")
_SIZE_AND_ACTIVE = re.compile(r"[\d.]+[KMBTQ](-A[\d.]+[KMBTQ])?")


def new_metadata(
    model: GGUFModel,
    layout: ExpertLayout,
    plan: PrunePlan,
    info: ModelInfo,
    tensors: Iterable[NewTensor],
    changes: Changes,
) -> tuple[int, tuple[Piece, ...]]:
    """(number of pairs, their bytes) of the new file: the source's, except what the experts change."""
    count_key = f"{layout.architecture}.expert_count"
    replace = {count_key: encode_pair(count_key, plan.keep, model.metadata[count_key].type)}
    drop = {key for key in model.metadata if key.startswith(PROVENANCE_PREFIX)}
    drop.update(_SPLIT_KEYS)
    if changes.drop_prediction_layers:
        replaced, dropped = dropped_keys(model, layout.architecture)
        replace |= replaced
        drop |= dropped
    append = list(_provenance(model, plan, info))
    for key, text in _labels(model, plan, info, tensors, changes).items():
        pair = encode_pair(key, text, ValueType.STRING)
        if key in model.metadata:
            replace[key] = pair
        else:
            append.insert(0, pair)
    return edit_metadata(model.files[0], replace=replace, drop=drop, append=append)


# ---- name and size


def _labels(
    model: GGUFModel, plan: PrunePlan, info: ModelInfo, tensors: Iterable[NewTensor], changes: Changes
) -> dict[str, str]:
    """Key -> text. Hubs and apps show both, so a file must not go on calling itself what it was."""
    found: dict[str, str] = {}
    name, size = read_text(model, _NAME), read_text(model, _SIZE)
    if not changes.keep_label and plan.keep < info.n_experts:
        if name:
            original = (info.provenance or {}).get("reap.source.expert_count", info.n_experts)
            found[_NAME] = f"{_OUR_LABEL.sub('', name)} (REAP, {plan.keep} of {original} experts)"
        if size:
            found[_SIZE] = new_size_label(size, info.n_experts, plan.keep, sum(map(_n_elements, tensors)))
    if changes.name is not None:
        found[_NAME] = changes.name
    return found


def new_size_label(label: str, n_experts: int, keep: int, n_parameters: int) -> str:
    """What a label such as "128x1.8B" or "30B-A3B" becomes with `keep` of `n_experts` experts; one of another form, the
    number of parameters."""
    by_experts, by_size = _EXPERTS_TIMES_SIZE.fullmatch(label), _SIZE_AND_ACTIVE.fullmatch(label)
    if by_experts is not None and int(by_experts[1]) == n_experts:
        return f"{keep}{by_experts[2]}"
    return rounded(n_parameters) + ((by_size[1] or "") if by_size is not None else "")


def rounded(n_parameters: int) -> str:
    """Two digits or more and a unit, as llama.cpp's gguf-py writes it: 1.8B, 17B, 235B."""
    unit, factor = next((pair for pair in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if n_parameters > pair[1]), ("K", 1e3))
    scaled = n_parameters / factor
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{unit}"


def _n_elements(tensor: NewTensor) -> int:
    n = 1
    for length in tensor.shape:
        n *= length
    return n


# ---- where it came from


def _provenance(model: GGUFModel, plan: PrunePlan, info: ModelInfo) -> Iterator[bytes]:
    """Encoded pairs that say what was kept, in ids of the original model, before any pruning."""
    from reap import __version__

    fingerprint, n_experts, original = _origin(model, info)
    text, u32, i32 = ValueType.STRING, ValueType.UINT32, ValueType.INT32
    yield encode_pair("reap.version", __version__, text)
    yield encode_pair("reap.metric", plan.metric, text)
    yield encode_pair("reap.source.fingerprint", fingerprint, text)
    yield encode_pair("reap.source.expert_count", n_experts, u32)
    if plan.calibration_sha256:
        yield encode_pair("reap.calibration.sha256", ",".join(plan.calibration_sha256), text)
    if mismatch := recorded_mismatch(info, plan):
        yield encode_pair("reap.mismatch", mismatch, text)
    for layer in info.moe_layers:
        ids = [original[layer][expert] for expert in plan.layers[layer]]
        yield encode_pair(f"reap.kept.{layer}", ids, ValueType.ARRAY, i32)


def _origin(model: GGUFModel, info: ModelInfo) -> tuple[str, int, dict[int, tuple[int, ...]]]:
    """(fingerprint, expert count, layer -> ids there of this model's experts) of the model at the start of the
    chain."""
    if info.provenance is None:
        return info.fingerprint, info.n_experts, dict.fromkeys(info.moe_layers, tuple(range(info.n_experts)))
    fingerprint = info.provenance.get("reap.source.fingerprint")
    n_experts = info.provenance.get("reap.source.expert_count")
    if not isinstance(fingerprint, str) or type(n_experts) is not int:
        raise FormatError(f"{model.path}: was pruned before, but its reap.source.* keys are damaged")
    original = {}
    for layer in info.moe_layers:
        ids: Any = info.provenance.get(f"reap.kept.{layer}")
        sound = (
            isinstance(ids, list)
            and len(ids) == info.n_experts
            and all(type(i) is int and 0 <= i < n_experts for i in ids)
        )
        if not sound or any(before >= after for before, after in pairwise(ids)):
            raise FormatError(
                f"{model.path}: reap.kept.{layer} does not name {info.n_experts} of {n_experts} experts in order"
            )
        original[layer] = tuple(ids)
    return fingerprint, n_experts, original
