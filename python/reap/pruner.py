"""prune(): a GGUF model and a plan -> a smaller GGUF model. Weights are copied byte for byte, never decoded."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from reap.errors import FormatError, MismatchError, OutputError, UnsupportedModelError, UsageError
from reap.gguf.experts import ExpertLayout, gates_depend_on_all, read_count, read_layout
from reap.gguf.reader import GGUFModel, TensorInfo, ValueType
from reap.gguf.writer import NewFile, NewTensor, Piece, Span, check_output, check_space, edit_metadata, encode_pair, merge_spans, write
from reap.inspector import PROVENANCE_PREFIX, ModelInfo, describe, require_moe
from reap.planner import PrunePlan, router_warning
from reap.progress import ProgressCallback
from reap.ranking import check_keep, resolve_keep

Verify = Literal["fast", "full", "none"]
Kept = Mapping[int, tuple[int, ...]]
VERIFY_MODES = ("fast", "full", "none")
_SAMPLE_BYTES = 4096
_COMPARE_BYTES = 8 << 20
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did, or would do. Sizes in bytes, exact; layers are GGUF block indices.

    kept, removed: layer -> expert ids of the source, ascending. seconds: the call took. warnings: sentences worth reading.
    """

    source: Path
    output: Path
    n_bytes_before: int
    n_bytes_after: int
    n_experts_before: int
    n_experts_after: int
    kept: dict[int, tuple[int, ...]]
    removed: dict[int, tuple[int, ...]]
    metric: str
    dry_run: bool
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; layers become strings."""
        layers = {name: {str(layer): list(ids) for layer, ids in getattr(self, name).items()} for name in ("kept", "removed")}
        return {**asdict(self), "source": str(self.source), "output": str(self.output), **layers}


def prune(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    plan: PrunePlan | str | os.PathLike[str],
    *,
    name: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    verify: Verify = "fast",
    progress: ProgressCallback | None = None,
) -> PruneReport:
    """Write `source` without the experts that `plan` removes.

    output   appears whole or not at all; `force` replaces a file that is there
    plan     a PrunePlan or the path of one; it must be of this model (or of another quantisation of it)
    name     a new general.name; nothing else of the source's metadata changes except the expert count
    dry_run  check everything, compute the exact size, write nothing
    verify   before the output gets its name: "fast" reads it back and compares its structure and samples of every tensor,
             "full" compares every byte, "none" nothing
    progress called with bytes written, of bytes in all

    Raises UsageError (paths, options, a plan that no such model can follow), MismatchError (a plan of another model), FormatError (a
    damaged file), UnsupportedModelError (a dense model, or one whose experts cannot be cut), OutputError (could not write).
    """
    started = time.perf_counter()
    _check_options(name, verify)
    inputs = [] if isinstance(plan, PrunePlan) else [Path(plan)]
    the_plan = plan if isinstance(plan, PrunePlan) else PrunePlan.load(plan)
    target = Path(output)
    with GGUFModel.open(source) as model:
        check_output(target, [*inputs, *(file.path for file in model.files)], force=force)
        info, layout = describe(model), read_layout(model)
        check_plan(info, the_plan)
        _check_loadable(model, layout, the_plan)
        kept = {layer: tuple(int(expert) for expert in the_plan.layers[layer]) for layer in layout.moe_layers}
        new_file = _new_file(model, layout, the_plan, kept, info, name)
        if not dry_run:
            check = None if verify == "none" else _Check(model, layout, kept, new_file, target, verify)
            write(target, new_file, force=force, check=check, progress=progress)
        warnings = tuple(_warnings(model, info, the_plan, target, new_file, dry_run))
    n_bytes = new_file.n_bytes
    removed = {layer: the_plan.removed(layer) for layer in kept}
    counts = (info.n_bytes, n_bytes, info.n_experts, the_plan.keep)
    return PruneReport(info.path, target, *counts, kept, removed, the_plan.metric, dry_run, time.perf_counter() - started, warnings)


def _check_options(name: str | None, verify: str) -> None:
    if verify not in VERIFY_MODES:
        raise UsageError(f"unknown verify {verify!r}; known: {', '.join(VERIFY_MODES)}")
    try:
        (name or "").encode()
    except UnicodeEncodeError:
        raise UsageError(f"name {name!r} is not valid Unicode") from None


# ---- does the plan fit the model


def check_plan(info: ModelInfo, plan: PrunePlan) -> None:
    """Raise unless `plan` can be carried out on the model that `info` describes.

    MismatchError where it was made for another model, UnsupportedModelError for a model that cannot be pruned, UsageError for
    a choice of experts that llama.cpp or the router could not live with.
    """
    require_moe(info)
    if info.refusals:
        raise UnsupportedModelError(info.refusals[0])
    if plan.fingerprint is not None and plan.fingerprint != info.fingerprint:
        raise MismatchError(
            f"the plan is of a model with fingerprint {plan.fingerprint}"
            f" ({plan.model.get('name') or 'unnamed'}), but {info.path} has {info.fingerprint}"
        )
    if plan.n_experts != info.n_experts:
        raise MismatchError(f"the plan is of a model with {plan.n_experts} experts, but {info.path} has {info.n_experts}")
    _check_layers(info, plan)
    resolve_keep(plan.keep, info.n_experts, info.n_groups)
    check_keep(plan.keep, {"n_experts_used": info.n_experts_used, "n_groups": info.n_groups, "n_groups_used": info.n_groups_used})
    for layer, kept in plan.layers.items():
        _check_kept(layer, kept, plan.keep, info)


def _check_layers(info: ModelInfo, plan: PrunePlan) -> None:
    missing = [layer for layer in info.moe_layers if layer not in plan.layers]
    if missing:
        raise MismatchError(f"the plan says nothing about MoE layers {missing} of {info.path}; every one must lose as many experts")
    unknown = sorted(set(plan.layers) - set(info.moe_layers))
    if unknown:
        raise MismatchError(f"the plan names layers {unknown}, which are no MoE layers of {info.path}")


def _check_kept(layer: int, kept: tuple[int, ...], keep: int, info: ModelInfo) -> None:
    if len(kept) != keep:
        raise UsageError(f"the plan keeps {len(kept)} experts in layer {layer}, but {keep} elsewhere; llama.cpp knows one number for all")
    if any(before >= after for before, after in pairwise(kept)) or kept[0] < 0 or kept[-1] >= info.n_experts:
        raise UsageError(f"the plan's experts of layer {layer} are not ascending ids from 0 to {info.n_experts - 1}: {list(kept)}")
    group_size = info.n_experts // info.n_groups
    per_group = [sum(expert // group_size == group for expert in kept) for group in range(info.n_groups)]
    if len(set(per_group)) > 1:
        raise UsageError(f"the plan keeps {per_group} experts in the router's groups of layer {layer}; every group must keep as many")


def _check_loadable(model: GGUFModel, layout: ExpertLayout, plan: PrunePlan) -> None:
    # asserted when llama.cpp reads the header (src/llama-model.cpp, load_hparams), where a failure aborts the process
    n_groups = read_count(model, f"{layout.architecture}.expert_group_count")
    if plan.keep <= n_groups:
        raise UsageError(f"keep {plan.keep} is too few: llama.cpp needs more experts than the router's groups ({n_groups})")


# ---- what the new file is


def _new_file(model: GGUFModel, layout: ExpertLayout, plan: PrunePlan, kept: Kept, info: ModelInfo, name: str | None) -> NewFile:
    cut = layout.cut
    tensors = tuple(_new_tensor(model, tensor, kept[cut[tensor.name]] if tensor.name in cut else None) for tensor in model.tensors.values())
    count_key = f"{layout.architecture}.expert_count"
    replace = {count_key: encode_pair(count_key, plan.keep, model.metadata[count_key].type)}
    append = list(_provenance(model, plan, kept, info))
    if name is not None:
        pair = encode_pair("general.name", name, ValueType.STRING)
        if "general.name" in model.metadata:
            replace["general.name"] = pair
        else:
            append.insert(0, pair)
    drop = {key for key in model.metadata if key.startswith(PROVENANCE_PREFIX)}
    if len(model.files) > 1:
        drop.update(_SPLIT_KEYS)
    n_keys, metadata = edit_metadata(model.files[0], replace=replace, drop=drop, append=append)
    return NewFile(model.version, model.alignment, n_keys, metadata, tensors)


def _new_tensor(model: GGUFModel, tensor: TensorInfo, kept: tuple[int, ...] | None) -> NewTensor:
    file = model.files[tensor.shard]
    if kept is None:
        return NewTensor(tensor.name, tensor.shape, tensor.type, (Span(file, tensor.offset_bytes, tensor.n_bytes),))
    # the expert axis is outermost, so a block never straddles two experts
    stride = tensor.n_bytes // tensor.shape[-1]
    pieces: Iterator[Piece] = (Span(file, tensor.offset_bytes + expert * stride, stride) for expert in kept)
    return NewTensor(tensor.name, (*tensor.shape[:-1], len(kept)), tensor.type, merge_spans(pieces))


def _provenance(model: GGUFModel, plan: PrunePlan, kept: Kept, info: ModelInfo) -> Iterator[bytes]:
    """Encoded pairs that say what was kept, in ids of the model that nobody had pruned yet."""
    from reap import __version__

    fingerprint, n_experts, original = _origin(model, info)
    text, u32, i32 = ValueType.STRING, ValueType.UINT32, ValueType.INT32
    yield encode_pair("reap.version", __version__, text)
    yield encode_pair("reap.metric", plan.metric, text)
    yield encode_pair("reap.source.fingerprint", fingerprint, text)
    yield encode_pair("reap.source.expert_count", n_experts, u32)
    if plan.calibration_sha256:
        yield encode_pair("reap.calibration.sha256", ",".join(plan.calibration_sha256), text)
    for layer, experts in kept.items():
        ids = [original[layer][expert] for expert in experts]
        yield encode_pair(f"reap.kept.{layer}", ids, ValueType.ARRAY, i32)


def _origin(model: GGUFModel, info: ModelInfo) -> tuple[str, int, dict[int, tuple[int, ...]]]:
    """(fingerprint, expert count, layer -> ids there of this model's experts) of the model at the start of the chain."""
    if info.provenance is None:
        return info.fingerprint, info.n_experts, dict.fromkeys(info.moe_layers, tuple(range(info.n_experts)))
    fingerprint = info.provenance.get("reap.source.fingerprint")
    n_experts = info.provenance.get("reap.source.expert_count")
    if not isinstance(fingerprint, str) or type(n_experts) is not int:
        raise FormatError(f"{model.path}: was pruned before, but its reap.source.* keys are damaged")
    original = {}
    for layer in info.moe_layers:
        ids: Any = info.provenance.get(f"reap.kept.{layer}")
        sound = isinstance(ids, list) and len(ids) == info.n_experts and all(type(i) is int and 0 <= i < n_experts for i in ids)
        if not sound or any(before >= after for before, after in pairwise(ids)):
            raise FormatError(f"{model.path}: reap.kept.{layer} does not name {info.n_experts} of {n_experts} experts in order")
        original[layer] = tuple(ids)
    return fingerprint, n_experts, original


# ---- is what was written what was meant


@dataclass(frozen=True)
class _Check:
    """Reads the new file back and compares it with the source. It shares no arithmetic with the ranges that were copied."""

    model: GGUFModel
    layout: ExpertLayout
    kept: Kept
    new_file: NewFile
    output: Path
    verify: Verify

    def __call__(self, temporary: Path) -> None:
        try:
            with GGUFModel.open(temporary) as written:
                self.structure(written)
                for tensor in self.model.tensors.values():
                    self.contents(tensor, written)
        except FormatError as error:
            raise OutputError(f"{self.output}: was not written as it should be: {error}") from None

    def structure(self, written: GGUFModel) -> None:
        expected = [(tensor.name, tensor.shape, tensor.type) for tensor in self.new_file.tensors]
        found = [(tensor.name, tensor.shape, tensor.type) for tensor in written.tensors.values()]
        if found != expected or written.size != self.new_file.n_bytes or len(written.metadata) != self.new_file.n_keys:
            raise FormatError("its header differs from what was to be written")
        layout = read_layout(written)
        if layout.moe_layers != self.layout.moe_layers or any(len(kept) != layout.n_experts for kept in self.kept.values()):
            raise FormatError("its experts differ from the plan")

    def contents(self, tensor: TensorInfo, written: GGUFModel) -> None:
        source, target = self.model.files[tensor.shard], written.files[0]
        for offset, new_offset, n_bytes in self.pairs(tensor, written.tensors[tensor.name]):
            for start, length in _chunks(n_bytes, full=self.verify == "full"):
                if source.read_range(offset + start, length) != target.read_range(new_offset + start, length):
                    raise FormatError(f"{tensor.name} differs from the source's at byte {new_offset + start:,}")

    def pairs(self, tensor: TensorInfo, new: TensorInfo) -> list[tuple[int, int, int]]:
        """(offset in the source, offset in the new file, bytes) of each kept expert, or of the whole tensor."""
        layer = self.layout.cut.get(tensor.name)
        if layer is None:
            return [(tensor.offset_bytes, new.offset_bytes, tensor.n_bytes)]
        size = tensor.n_bytes // self.layout.n_experts
        pairs = [(tensor.offset_bytes + size * expert, new.offset_bytes + size * row, size) for row, expert in enumerate(self.kept[layer])]
        return pairs if self.verify == "full" else [pairs[0], pairs[-1]]


def _chunks(n_bytes: int, *, full: bool) -> Iterator[tuple[int, int]]:
    """(start, length) of what to compare: everything in pieces, or the first and the last few KiB."""
    if full:
        for start in range(0, n_bytes, _COMPARE_BYTES):
            yield start, min(_COMPARE_BYTES, n_bytes - start)
    else:
        length = min(_SAMPLE_BYTES, n_bytes)
        yield 0, length
        yield n_bytes - length, length


# ---- what a reader of the report should know


def _warnings(model: GGUFModel, info: ModelInfo, plan: PrunePlan, output: Path, new_file: NewFile, dry_run: bool) -> Iterator[str]:
    if plan.fingerprint is None:
        yield "the plan does not say which model it was made for; only layers and expert counts were compared"
    router = plan.model.get("router_fingerprint")
    if plan.fingerprint is not None and router is not None and router != info.router_fingerprint:
        yield "the routers' bytes differ from those of the model that was profiled (expected where the quantisation differs)"
    if plan.options.get("trusted") is False:
        yield "the plan was made of a file of llama-expert-profile, whose scores are not to be trusted"
    if plan.keep < info.n_experts and gates_depend_on_all(model, info.architecture):
        yield (
            f"{info.architecture} does not normalise the gates of the chosen experts again: removing experts makes the gates of"
            " those that stay larger"
        )
    slower = router_warning(plan.keep, info.n_experts)
    if slower is not None:
        yield slower
    if dry_run:
        try:
            check_space(output, new_file.n_bytes)
        except OutputError as error:
            yield str(error)
