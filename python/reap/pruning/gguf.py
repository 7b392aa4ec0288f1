"""prune(): a GGUF model and a plan -> a smaller GGUF model. Weights are copied byte for byte, never decoded."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from reap.errors import FormatError, OutputError, UsageError
from reap.files.atomic import check_output, check_space, write_set
from reap.files.paths import PathLike
from reap.files.ranges import Piece, Span, Writable, merge_spans
from reap.gguf.expert_tensors import ExpertLayout, gates_depend_on_all, read_count, read_layout
from reap.gguf.imatrix import Experts, Imatrix, output_name, read_imatrix
from reap.gguf.model_info import PROVENANCE_PREFIX, ModelInfo, describe
from reap.gguf.reader import GGUFModel, TensorInfo
from reap.gguf.shards import is_shard_name, shard_path
from reap.gguf.tensor_types import ValueType
from reap.gguf.writer import NewFile, NewTensor, edit_metadata, encode_pair, split
from reap.progress import ProgressCallback
from reap.pruning.compatibility import check_plan, plan_warnings, recorded_mismatch
from reap.pruning.verification import Check
from reap.scores.plan import PrunePlan, router_warning

Verify = Literal["fast", "full", "none"]
Kept = Mapping[int, tuple[int, ...]]
VERIFY_MODES = ("fast", "full", "none")
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
# split.no and split.count are 16 bits wide, and names have five digits
_MOST_SHARDS = 65_535
_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([KMGT]?)", re.ASCII)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did, or would do. Sizes are exact; layers are GGUF block indices."""

    source: Path
    """The model that was pruned; of a split one, the first file."""
    output: Path
    """The file to load the new model from."""
    files: dict[Path, int]
    """Every file written -> its bytes: the shards of a split model in order, then the importance matrix."""
    n_bytes_before: int
    """Bytes of the source, all shards."""
    n_bytes_after: int
    """Bytes of the new model, all shards."""
    n_experts_before: int
    """Experts in each MoE layer of the source."""
    n_experts_after: int
    """Experts in each MoE layer of the new model."""
    kept: dict[int, tuple[int, ...]]
    """Layer -> ids of the source's experts that stay, ascending."""
    removed: dict[int, tuple[int, ...]]
    """Layer -> ids of the source's experts that go, ascending."""
    metric: str
    """The score that the plan ranks experts by."""
    dry_run: bool
    """Whether nothing was written."""
    seconds: float
    """How long the call took."""
    warnings: tuple[str, ...]
    """Sentences worth reading."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; layers become strings."""
        layers = {
            name: {str(layer): list(ids) for layer, ids in getattr(self, name).items()} for name in ("kept", "removed")
        }
        paths = {"source": str(self.source), "output": str(self.output)}
        return {
            **asdict(self),
            **paths,
            "files": {str(path): n_bytes for path, n_bytes in self.files.items()},
            **layers,
        }


def prune(
    source: PathLike,
    output: PathLike,
    plan: PrunePlan | PathLike,
    *,
    name: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    verify: Verify = "fast",
    split_max_size: int | str | None = None,
    imatrix: PathLike | None = None,
    imatrix_output: PathLike | None = None,
    allow_mismatch: bool = False,
    progress: ProgressCallback | None = None,
) -> PruneReport:
    """Write `source` without the experts that `plan` removes.

    Args:
        output: appears whole or not at all; `force` replaces a file that is there
        plan: a PrunePlan or the path of one; it must be of this model (or of another quantisation of it)
        name: a new general.name; nothing else of the source's metadata changes except the expert count
        dry_run: check everything, compute the exact sizes, write nothing
        verify: before the output gets its name: "fast" reads it back and compares its structure and samples of every
            tensor, "full" compares every byte, "none" nothing
        split_max_size: bytes, or a text like "4G" (10^9, as llama.cpp has it): a larger output becomes
            OUTPUT-00001-of-0000N.gguf, each at most so large; only a tensor that is larger has a file larger than that,
            of its own
        imatrix: an importance matrix of the source, cut to the same experts and written to `imatrix_output` (None:
            beside the output, small.gguf -> small.imatrix.gguf, or small.imatrix where it has the older form)
        allow_mismatch: go on with a plan that was made of another model, where layers and experts are as many; the
            warnings and the key reap.mismatch of the output say what differs
        progress: called with bytes written, of bytes in all

    Raises UsageError (paths, options, a plan that no such model can follow), MismatchError (a plan or a matrix of
    another model), FormatError (a damaged file), UnsupportedModelError (a dense model, or one whose experts cannot be
    cut), OutputError (could not write).
    """
    started = time.perf_counter()
    _check_options(name, verify)
    if imatrix_output is not None and imatrix is None:
        raise UsageError("imatrix_output needs an imatrix")
    max_bytes = None if split_max_size is None else parse_size(split_max_size)
    inputs = [Path(path) for path in (plan, imatrix) if path is not None and not isinstance(path, PrunePlan)]
    the_plan = PrunePlan.of(plan)
    with ExitStack() as stack:
        model = stack.enter_context(GGUFModel.open(source))
        matrix = None if imatrix is None else stack.enter_context(read_imatrix(imatrix))
        inputs += [file.path for file in model.files]
        info, layout = describe(model), read_layout(model)
        check_output(Path(output), inputs, force=force or max_bytes is not None)
        check_plan(info, the_plan, allow_mismatch=allow_mismatch)
        _check_loadable(model, layout, the_plan)
        kept = {layer: tuple(int(expert) for expert in the_plan.layers[layer]) for layer in layout.moe_layers}
        whole = _new_file(model, layout, the_plan, kept, info, name)
        shards = _shards(whole, Path(output), max_bytes)
        outputs: list[tuple[Path, Writable]] = [*shards]
        experts = _imatrix_experts(layout, kept)
        if matrix is not None:
            target = (
                Path(imatrix_output)
                if imatrix_output is not None
                else output_name(Path(output), is_legacy=matrix.is_legacy)
            )
            outputs.append((target, matrix.cut(experts)))
        _check_outputs([path for path, _ in outputs], inputs, force=force)
        if not dry_run:
            new_files = [new_file for _, new_file in shards]
            check = Check(model, layout, kept, new_files, outputs[0][0], verify == "full", matrix, experts)
            write_set(outputs, force=force, check=None if verify == "none" else check, progress=progress)
        warnings = tuple(_warnings(model, info, the_plan, outputs, matrix, experts, dry_run))
    return PruneReport(
        source=info.path,
        output=outputs[0][0],
        files={path: new_file.n_bytes for path, new_file in outputs},
        n_bytes_before=info.n_bytes,
        n_bytes_after=sum(new_file.n_bytes for _, new_file in shards),
        n_experts_before=info.n_experts,
        n_experts_after=the_plan.keep,
        kept=kept,
        removed={layer: the_plan.removed(layer) for layer in kept},
        metric=the_plan.metric,
        dry_run=dry_run,
        seconds=time.perf_counter() - started,
        warnings=warnings,
    )


def size_after(source: PathLike, plan: PrunePlan, *, allow_mismatch: bool = False) -> int:
    """Bytes, exactly, of the file that `prune` would write. Raises what it raises for a plan that does not fit."""
    with GGUFModel.open(source) as model:
        info, layout = describe(model), read_layout(model)
        check_plan(info, plan, allow_mismatch=allow_mismatch)
        return _new_file(
            model, layout, plan, {layer: plan.layers[layer] for layer in layout.moe_layers}, info, None
        ).n_bytes


def parse_size(size: int | str) -> int:
    """Bytes: a number, or a text like "500M" or "4.5G", in powers of a thousand as in llama.cpp. Raises UsageError."""
    match = None if isinstance(size, bool) else _SIZE.fullmatch(str(size))
    n_bytes = int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0
    if n_bytes < 1:
        raise UsageError(f"size {size!r} should be a number of bytes, or one followed by K, M, G or T, such as 4G")
    return n_bytes


def _shards(whole: NewFile, output: Path, max_bytes: int | None) -> list[tuple[Path, NewFile]]:
    """The file, or the files that it becomes: path and contents, in order."""
    if max_bytes is None:
        return [(output, whole)]
    if is_shard_name(output.name):
        raise UsageError(
            f"{output}: is named like one shard of a split model; name the whole, and the shards are named after it"
        )
    n_tensors = len(whole.tensors)

    def pairs(index: int, count: int) -> Iterator[bytes]:
        # types and order of llama.cpp's tools/gguf-split
        yield encode_pair("split.no", index, ValueType.UINT16)
        yield encode_pair("split.count", count, ValueType.UINT16)
        yield encode_pair("split.tensors.count", n_tensors, ValueType.INT32)

    try:
        files = split(whole, max_bytes, pairs)
    except FormatError:
        raise UsageError(f"{output}: split_max_size {max_bytes:,} makes more than {_MOST_SHARDS:,} shards") from None
    if len(files) == 1:
        return [(output, whole)]
    stem = output.with_suffix("") if output.suffix == ".gguf" else output
    return [(shard_path(stem, index, len(files)), new_file) for index, new_file in enumerate(files)]


def _check_outputs(outputs: list[Path], inputs: list[Path], *, force: bool) -> None:
    for path in outputs:
        check_output(path, inputs, force=force)
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise UsageError(f"{outputs[-1]}: is the output for the model as well")


def _imatrix_experts(layout: ExpertLayout, kept: Kept) -> dict[str, Experts]:
    """Tensors that an importance matrix may speak of one expert at a time."""
    weights = (tensor for tensor in layout.experts if tensor.name.endswith(".weight"))
    return {
        tensor.name: Experts(tensor.shape[0], layout.n_experts, kept[layout.cut[tensor.name]]) for tensor in weights
    }


def _check_options(name: str | None, verify: str) -> None:
    if verify not in VERIFY_MODES:
        raise UsageError(f"unknown verify {verify!r}; known: {', '.join(VERIFY_MODES)}")
    try:
        (name or "").encode()
    except UnicodeEncodeError:
        raise UsageError(f"name {name!r} is not valid Unicode") from None


def _check_loadable(model: GGUFModel, layout: ExpertLayout, plan: PrunePlan) -> None:
    # asserted when llama.cpp reads the header (src/llama-model.cpp, load_hparams), where a failure aborts the process
    n_groups = read_count(model, f"{layout.architecture}.expert_group_count")
    if plan.keep <= n_groups:
        raise UsageError(
            f"keep {plan.keep} is too few: llama.cpp needs more experts than the router's groups ({n_groups})"
        )


# ---- what the new file is


def _new_file(
    model: GGUFModel, layout: ExpertLayout, plan: PrunePlan, kept: Kept, info: ModelInfo, name: str | None
) -> NewFile:
    cut = layout.cut
    tensors = tuple(
        _new_tensor(model, tensor, kept[cut[tensor.name]] if tensor.name in cut else None)
        for tensor in model.tensors.values()
    )
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
    drop.update(_SPLIT_KEYS)
    n_keys, metadata = edit_metadata(model.files[0], replace=replace, drop=drop, append=append)
    return NewFile(model.version, model.alignment, n_keys, metadata, tensors)


def _new_tensor(model: GGUFModel, tensor: TensorInfo, kept: tuple[int, ...] | None) -> NewTensor:
    file = model.files[tensor.shard]
    if kept is None:
        return NewTensor(tensor.name, tensor.shape, tensor.type, (Span(file, tensor.offset_bytes, tensor.n_bytes),))
    # the expert axis is outermost, so a block never straddles two experts
    stride = (tensor.n_bytes - tensor.tail_bytes) // tensor.shape[-1]
    pieces: list[Piece] = [Span(file, tensor.offset_bytes + expert * stride, stride) for expert in kept]
    if tensor.tail_bytes:
        pieces.append(Span(file, tensor.offset_bytes + tensor.n_bytes - tensor.tail_bytes, tensor.tail_bytes))
    return NewTensor(tensor.name, (*tensor.shape[:-1], len(kept)), tensor.type, merge_spans(pieces))


def _provenance(model: GGUFModel, plan: PrunePlan, kept: Kept, info: ModelInfo) -> Iterator[bytes]:
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
    for layer, experts in kept.items():
        ids = [original[layer][expert] for expert in experts]
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


# ---- what a reader of the report should know


def _warnings(
    model: GGUFModel,
    info: ModelInfo,
    plan: PrunePlan,
    outputs: list[tuple[Path, Writable]],
    matrix: Imatrix | None,
    experts: Mapping[str, Experts],
    dry_run: bool,
) -> Iterator[str]:
    yield from plan_warnings(info, plan)
    if plan.keep < info.n_experts and gates_depend_on_all(model, info.architecture):
        yield (
            f"{info.architecture} does not normalise the gates of the chosen experts again: removing experts makes the"
            " gates of those that stay larger"
        )
    slower = router_warning(plan.keep, info.n_experts)
    if slower is not None:
        yield slower
    missing = matrix.missing(experts) if matrix is not None else []
    if missing:
        yield f"the importance matrix says nothing about {len(missing)} tensors of experts, such as {missing[0]}"
    if dry_run:
        try:
            check_space(outputs[0][0], sum(new_file.n_bytes for _, new_file in outputs))
        except OutputError as error:
            yield str(error)
