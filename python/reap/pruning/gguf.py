"""prune(): a GGUF model and a plan -> a smaller GGUF model. Weights are copied byte for byte, never decoded."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reap.errors import FormatError, OutputError, UsageError
from reap.files.atomic import check_output, check_space, write_set
from reap.files.paths import PathLike
from reap.files.ranges import Piece, Span, Writable, merge_spans
from reap.gguf.expert_tensors import ExpertLayout, gates_depend_on_all, read_count, read_id_table, read_layout
from reap.gguf.imatrix import Experts, Imatrix, other_forms, output_name, read_imatrix
from reap.gguf.model_info import ModelInfo, describe, require_moe
from reap.gguf.reader import GGUFModel, TensorInfo
from reap.gguf.shards import is_shard_name, shard_path
from reap.gguf.tensor_types import ValueType
from reap.gguf.writer import NewFile, NewTensor, encode_pair, split
from reap.progress import ProgressCallback
from reap.pruning.changes import ChangeArguments, Changes, without_prediction_layers
from reap.pruning.compatibility import check_plan, plan_warnings
from reap.pruning.header import new_metadata
from reap.pruning.verification import Check
from reap.scores.hash_routing import require_substitutes, rewrite_table
from reap.scores.plan import PrunePlan, router_warning

if TYPE_CHECKING:
    from typing_extensions import Unpack

Verify = Literal["fast", "full", "none"]
Kept = Mapping[int, tuple[int, ...]]
VERIFY_MODES = ("fast", "full", "none")
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
    plan: PrunePlan | PathLike | None,
    *,
    force: bool = False,
    dry_run: bool = False,
    verify: Verify = "fast",
    split_max_size: int | str | None = None,
    imatrix: PathLike | None = None,
    imatrix_output: PathLike | None = None,
    allow_mismatch: bool = False,
    progress: ProgressCallback | None = None,
    **changes: Unpack[ChangeArguments],
) -> PruneReport:
    """Write `source` without the experts that `plan` removes.

    Args:
        output: appears whole or not at all; `force` replaces a file that is there
        plan: a PrunePlan or the path of one; it must be of this model (or of another quantisation of it). None keeps
            all experts, where only prediction layers are to go
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
        changes: of the header, `Changes`: name, keep_label, drop_prediction_layers

    Raises UsageError (paths, options, a plan that no such model can follow), MismatchError (a plan or a matrix of
    another model), FormatError (a damaged file), UnsupportedModelError (a dense model, or one whose experts cannot be
    cut), OutputError (could not write).
    """
    started = time.perf_counter()
    wanted = Changes(**changes)
    _check_options(wanted.name, verify)
    if imatrix_output is not None and imatrix is None:
        raise UsageError("imatrix_output needs an imatrix")
    max_bytes = None if split_max_size is None else parse_size(split_max_size)
    inputs = [Path(path) for path in (plan, imatrix) if path is not None and not isinstance(path, PrunePlan)]
    with ExitStack() as stack:
        model = stack.enter_context(GGUFModel.open(source))
        matrix = None if imatrix is None else stack.enter_context(read_imatrix(imatrix))
        inputs += [file.path for file in model.files]
        model, info, layout, the_plan = _prepare(model, plan, wanted)
        check_output(Path(output), inputs, force=force or max_bytes is not None)
        check_plan(info, the_plan, allow_mismatch=allow_mismatch)
        _check_loadable(model, layout, the_plan)
        kept = {layer: tuple(int(expert) for expert in the_plan.layers[layer]) for layer in layout.moe_layers}
        whole = _new_file(model, layout, the_plan, kept, info, wanted)
        shards = _shards(whole, Path(output), max_bytes)
        outputs: list[tuple[Path, Writable]] = [*shards]
        experts = _imatrix_experts(layout, kept)
        if matrix is not None:
            target = (
                Path(imatrix_output)
                if imatrix_output is not None
                else output_name(Path(output), is_legacy=matrix.is_legacy)
            )
            matrix = matrix.serving(name for name in experts if name in model.tensors)
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


def size_after(
    source: PathLike, plan: PrunePlan, *, allow_mismatch: bool = False, **changes: Unpack[ChangeArguments]
) -> int:
    """Bytes, exactly, of the file that `prune` would write. Raises what it raises for a plan that does not fit."""
    wanted = Changes(**changes)
    with GGUFModel.open(source) as opened:
        model, info, layout, the_plan = _prepare(opened, plan, wanted)
        check_plan(info, the_plan, allow_mismatch=allow_mismatch)
        kept = {layer: the_plan.layers[layer] for layer in layout.moe_layers}
        return _new_file(model, layout, the_plan, kept, info, wanted).n_bytes


def _prepare(
    model: GGUFModel, plan: PrunePlan | PathLike | None, changes: Changes
) -> tuple[GGUFModel, ModelInfo, ExpertLayout, PrunePlan]:
    """The model without what `changes` drops of it, what is known of it, and the plan of what is left (None: of all
    experts)."""
    info, layout = describe(model), read_layout(model)
    if changes.drop_prediction_layers:
        model, info, layout = without_prediction_layers(model, info)
    if plan is None:
        if not changes.drop_prediction_layers:
            raise UsageError("a plan is missing: without one there is nothing to remove")
        require_moe(info)
        everyone = dict.fromkeys(info.moe_layers, tuple(range(info.n_experts)))
        return model, info, layout, PrunePlan(info.record(), "none", info.n_experts, everyone)
    the_plan = PrunePlan.of(plan)
    if changes.drop_prediction_layers:
        first = info.n_layers - info.n_prediction_layers
        trunk = {layer: ids for layer, ids in the_plan.layers.items() if layer < first}
        the_plan = replace(the_plan, layers=trunk)
    return model, info, layout, the_plan


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
    found = {}
    for tensor in layout.experts:
        if tensor.name.endswith(".weight"):
            experts = Experts(tensor.shape[0], layout.n_experts, kept[layout.cut[tensor.name]])
            found.update(dict.fromkeys((tensor.name, *other_forms(tensor.name)), experts))
    return found


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
    model: GGUFModel, layout: ExpertLayout, plan: PrunePlan, kept: Kept, info: ModelInfo, changes: Changes
) -> NewFile:
    cut = layout.cut
    substitutes = plan.substitutes if info.hash_layers else {}
    require_substitutes(substitutes, info.hash_layers)
    tensors = tuple(
        _new_table(model, tensor, kept[layout.id_tables[tensor.name]], substitutes[layout.id_tables[tensor.name]])
        if tensor.name in layout.id_tables
        else _new_tensor(model, tensor, kept[cut[tensor.name]] if tensor.name in cut else None)
        for tensor in model.tensors.values()
    )
    n_keys, metadata = new_metadata(model, layout, plan, info, tensors, changes)
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


def _new_table(
    model: GGUFModel, tensor: TensorInfo, kept: tuple[int, ...], substitutes: Mapping[int, Sequence[int]]
) -> NewTensor:
    """A table that gives each token its experts by id, with those that are left."""
    table = read_id_table(model, tensor)
    try:
        written = rewrite_table(table, kept, substitutes)
    except FormatError as error:
        raise FormatError(f"{model.path}: {tensor.name}: {error}") from None
    return NewTensor(tensor.name, tensor.shape, tensor.type, (written.astype("<i4").tobytes(),))


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
    missing = matrix.missing({name for name in experts if name in model.tensors}) if matrix is not None else []
    if missing:
        yield f"the importance matrix says nothing about {len(missing)} tensors of experts, such as {missing[0]}"
    if dry_run:
        try:
            check_space(outputs[0][0], sum(new_file.n_bytes for _, new_file in outputs))
        except OutputError as error:
            yield str(error)
