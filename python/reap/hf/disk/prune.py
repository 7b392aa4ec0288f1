"""prune(): a Hugging Face checkpoint and a plan -> a smaller checkpoint. Weights are copied byte for byte, never
decoded or loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from reap.errors import FormatError, OutputError, UsageError
from reap.files.atomic import check_space, paths_of, write
from reap.files.atomic_directory import check_output_directory, new_directory
from reap.files.paths import PathLike
from reap.files.ranges import RawFile, Span, merge_spans
from reap.files.regular import RegularFile
from reap.hf.disk.checkpoint_files import PROVENANCE, QUANTISATION, Checkpoint, SideFile
from reap.hf.disk.config import patch_config, patch_names
from reap.hf.disk.discovery import CONFIG, INDEX
from reap.hf.disk.info import PROVENANCE_FORMAT, CheckpointInfo, describe_checkpoint, origin
from reap.hf.disk.layout import CheckpointLayout, Follows, is_of_prediction, read_checkpoint_layout
from reap.hf.disk.safetensors_file import SafetensorsFile, StoredTensor, encode_header
from reap.progress import Progress, ProgressCallback
from reap.pruning.compatibility import check_plan, plan_warnings, recorded_mismatch
from reap.pruning.gguf import VERIFY_MODES, Kept, PruneReport, Verify
from reap.scores.plan import Keep, PrunePlan
from reap.scores.plan import plan as make_plan
from reap.scores.profile import Profile

_SAMPLE_BYTES = 4096
_MOST_SAMPLED = 100  # tensors of one file, except routers
_COMPARE_BYTES = 8 << 20
#: Numbers of prediction layers in config.json, which become 0 where those are left out.
_PREDICTION_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")


@dataclass(frozen=True)
class _NewTensor:
    """One tensor of the new checkpoint: its header entry, and the ranges of the source that it is made of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def n_bytes(self) -> int:
        return sum(span.n_bytes for span in self.spans)


def prune(
    source: PathLike,
    output: PathLike,
    plan: PrunePlan | PathLike | None = None,
    *,
    profile: Profile | PathLike | None = None,
    keep: Keep | None = None,
    metric: str = "reap",
    force: bool = False,
    dry_run: bool = False,
    verify: Verify = "fast",
    drop_prediction: bool = False,
    allow_mismatch: bool = False,
    progress: ProgressCallback | None = None,
) -> PruneReport:
    """Write the checkpoint in the directory `source` without the experts that `plan` removes. Needs neither torch nor
    transformers.

    Args:
        output: a directory, which appears whole or not at all; `force` replaces a checkpoint that is there
        plan: a PrunePlan or the path of one, made of this checkpoint (or another quantisation of it) or of the GGUF
            file that it became
        profile, keep, metric: in place of a plan: what `reap.plan` makes of them
        dry_run: check everything, compute the exact sizes, write nothing
        verify: before the output gets its name: "fast" reads it back and compares its structure, and samples of a
            hundred tensors of each file and of all routers, "full" compares every byte, "none" nothing
        drop_prediction: leave the prediction (MTP) layers out, of which a plan made with transformers says nothing
        allow_mismatch: go on with a plan that was made of another model, where layers and experts are as many; the
            warnings and reap.json say what differs
        progress: called with bytes written, of bytes in all

    Each tensor stays in the file that it was in; experts are numbered anew; config.json changes only in the number of
    experts; reap.json says what was kept. Everything else that is not a weight is carried over. In the report,
    files are
    what was written, sizes are of the weights' files.

    Raises UsageError (paths, options, a plan that no such model can follow), MismatchError (a plan of another model),
    FormatError (a damaged checkpoint), UnsupportedModelError (a dense one, or one whose experts cannot be cut),
    OutputError (could not write).
    """
    started = time.perf_counter()
    if verify not in VERIFY_MODES:
        raise UsageError(f"unknown verify {verify!r}; known: {', '.join(VERIFY_MODES)}")
    target = Path(output)
    check_output_directory(target, map(Path, paths_of(source, plan, profile)), marker=CONFIG, force=force)
    the_plan = _choose(plan, profile, keep, metric)
    with Checkpoint.open(source) as checkpoint:
        layout = read_checkpoint_layout(checkpoint)
        info = describe_checkpoint(checkpoint, layout)
        dropped = layout.prediction_layers if drop_prediction else ()
        the_plan = _check(info, the_plan, dropped, allow_mismatch=allow_mismatch)
        job = _Job(checkpoint, layout, info, the_plan, drop_prediction)
        files, side, left = job.files(), *checkpoint.side_files()
        sizes = {target / name: file.n_bytes for name, file in files.items()} | {
            target / file.name: file.n_bytes for file in side
        }
        if not dry_run:
            _write(job, target, files, side, sum(sizes.values()), force=force, verify=verify, progress=progress)
        warnings = tuple(_warnings(job, left, target, sum(sizes.values()), dry_run))
        n_bytes_after = sum(files[name].n_bytes for name in job.shards)
        n_bytes_before = checkpoint.n_bytes
    return PruneReport(
        source=Path(source),
        output=target,
        files=sizes,
        n_bytes_before=n_bytes_before,
        n_bytes_after=n_bytes_after,
        n_experts_before=info.n_experts,
        n_experts_after=the_plan.keep,
        kept=dict(job.kept),
        removed={layer: the_plan.removed(layer) for layer in job.kept},
        metric=the_plan.metric,
        dry_run=dry_run,
        seconds=time.perf_counter() - started,
        warnings=warnings,
    )


def _choose(plan: Any, profile: Any, keep: Keep | None, metric: str) -> PrunePlan:
    if plan is not None and profile is None and keep is None:
        return PrunePlan.of(plan)
    if plan is None and profile is not None and keep is not None:
        return make_plan(profile, keep=keep, metric=metric)
    raise UsageError("give either a plan, or a profile and keep")


def _check(info: CheckpointInfo, plan: PrunePlan, dropped: tuple[int, ...], *, allow_mismatch: bool) -> PrunePlan:
    """The plan, without the layers that are left out. Raises what `check_plan` raises."""
    if dropped:
        info = replace(info, moe_layers=tuple(layer for layer in info.moe_layers if layer not in dropped))
        plan = replace(plan, layers={layer: kept for layer, kept in plan.layers.items() if layer not in dropped})
    missing = [layer for layer in info.moe_layers if layer not in plan.layers]
    if missing and missing[0] >= info.n_layers - info.n_prediction_layers and not dropped:
        raise UsageError(
            f"the plan says nothing about the prediction (MTP) layers {missing} of {info.path}, which transformers does"
            " not run; leave them out with --drop-mtp (drop_prediction=True), or make the plan of the GGUF file, where"
            " they are measured"
        )
    check_plan(info, plan, allow_mismatch=allow_mismatch)
    return plan


class _Job:
    """One pruning: what every file of the new checkpoint is made of. shards: file name -> its tensors, in order."""

    def __init__(
        self, checkpoint: Checkpoint, layout: CheckpointLayout, info: CheckpointInfo, plan: PrunePlan, drop: bool
    ) -> None:
        self.checkpoint, self.layout, self.info, self.plan, self.drop = checkpoint, layout, info, plan, drop
        layers = [layer for layer in layout.moe_layers if not (drop and layer in layout.prediction_layers)]
        self.kept: Kept = {layer: plan.layers[layer] for layer in layers}
        self.place = {layer: {expert: row for row, expert in enumerate(kept)} for layer, kept in self.kept.items()}
        made = {shard: tuple(self._tensors(file)) for shard, file in checkpoint.shards.items()}
        self.shards: Mapping[str, tuple[_NewTensor, ...]] = {
            shard: tensors for shard, tensors in made.items() if tensors
        }

    def files(self) -> dict[str, RawFile]:
        """Every file to write anew -> its contents: shards, config.json, the index, reap.json."""
        files = {
            shard: RawFile(
                (self._header(shard, tensors), *merge_spans(span for tensor in tensors for span in tensor.spans))
            )
            for shard, tensors in self.shards.items()
        }
        texts = {CONFIG: self._config()}
        if self.checkpoint.index is not None:
            texts[INDEX] = json.dumps(self._index(self.checkpoint.index), indent=2, ensure_ascii=False) + "\n"
        quantisation = self.checkpoint.quantisation_text
        if quantisation is not None:
            texts[QUANTISATION] = patch_names(quantisation, self._kept_by_block())
        texts[PROVENANCE] = json.dumps(self._provenance(), ensure_ascii=False) + "\n"
        return files | {name: RawFile((text.encode(),)) for name, text in texts.items()}

    def pairs(self, tensor: StoredTensor) -> Iterator[tuple[str, int, int, int]]:
        """(name of the new tensor, offset in it, offset in the old file, bytes) of every run of bytes that stays of an
        old tensor."""
        how = self.layout.follows.get(tensor.name)
        if self._is_dropped(tensor.name):
            return
        if how is None:
            yield tensor.name, 0, tensor.offset_bytes, tensor.n_bytes
        elif how.expert is None:
            size = tensor.n_bytes // self.layout.n_experts
            for row, expert in enumerate(self.kept[how.layer]):
                yield tensor.name, row * size, tensor.offset_bytes + expert * size, size
        elif how.expert in self.place[how.layer]:
            yield self._renamed(how, how.expert), 0, tensor.offset_bytes, tensor.n_bytes

    def _is_dropped(self, name: str) -> bool:
        return self.drop and is_of_prediction(name, self.layout.n_layers)

    def _renamed(self, how: Follows, expert: int) -> str:
        return f"{how.prefix}{self.place[how.layer][expert]}{how.suffix}"

    def _tensors(self, file: SafetensorsFile) -> Iterator[_NewTensor]:
        for tensor in file.tensors.values():
            runs = list(self.pairs(tensor))
            if runs:
                spans = tuple(Span(file, offset, n_bytes) for _, _, offset, n_bytes in runs)
                yield _NewTensor(runs[0][0], tensor.dtype, self._shape(tensor), spans)

    def _shape(self, tensor: StoredTensor) -> tuple[int, ...]:
        how = self.layout.follows.get(tensor.name)
        if how is None or how.expert is not None:
            return tensor.shape
        shape = list(tensor.shape)
        shape[how.axis] = shape[how.axis] // self.layout.n_experts * len(self.kept[how.layer])
        return tuple(shape)

    def _header(self, shard: str, tensors: tuple[_NewTensor, ...]) -> bytes:
        entries = ((tensor.name, tensor.dtype, tensor.shape, tensor.n_bytes) for tensor in tensors)
        return encode_header(self.checkpoint.shards[shard].metadata, entries)

    def _config(self) -> str:
        zeros = _PREDICTION_KEYS if self.drop else ()
        return patch_config(
            self.checkpoint.config_text, self.checkpoint.config, self.layout.counts, self._kept_by_block(), zeros
        )

    def _kept_by_block(self) -> dict[str, tuple[int, ...]]:
        return {self.layout.blocks[layer]: kept for layer, kept in self.kept.items()}

    def _index(self, index: dict[str, Any]) -> dict[str, Any]:
        """The old index with the new names, in its order, and the new sizes."""
        shards = {tensor.name: shard for shard, tensors in self.shards.items() for tensor in tensors}
        weight_map = {}
        for name in index["weight_map"]:
            for new_name, *_ in self.pairs(self.checkpoint.tensor(name)):
                weight_map[new_name] = shards[new_name]
        metadata = dict(index.get("metadata") or {})
        metadata["total_size"] = sum(tensor.n_bytes for tensors in self.shards.values() for tensor in tensors)
        if isinstance(metadata.get("total_parameters"), int):
            before = sum(prod(tensor.shape) for tensor in self.checkpoint.tensors if _is_parameter(tensor.name))
            after = sum(
                prod(tensor.shape)
                for tensors in self.shards.values()
                for tensor in tensors
                if _is_parameter(tensor.name)
            )
            metadata["total_parameters"] -= before - after
        return {**index, "metadata": metadata, "weight_map": weight_map}

    def _provenance(self) -> dict[str, Any]:
        """Which experts are left, in ids of the original checkpoint."""
        from reap import __version__

        start, mismatch = origin(self.info), recorded_mismatch(self.info, self.plan)
        kept = {str(layer): [start.kept[layer][expert] for expert in experts] for layer, experts in self.kept.items()}
        return {
            "format": PROVENANCE_FORMAT,
            "version": 1,
            "reap": __version__,
            "metric": self.plan.metric,
            "source": {"fingerprint": start.fingerprint, "n_experts": start.n_experts},
            "calibration": {"sha256": list(self.plan.calibration_sha256)},
            **({"mismatch": mismatch} if mismatch else {}),
            "kept": kept,
        }


def _is_parameter(name: str) -> bool:
    """Whether transformers counts a tensor as a parameter: correction biases are buffers there."""
    return not name.endswith(("correction_bias", "expert_bias"))


# ---- writing


def _write(
    job: _Job,
    target: Path,
    files: Mapping[str, RawFile],
    side: list[SideFile],
    total: int,
    *,
    force: bool,
    verify: Verify,
    progress: ProgressCallback | None,
) -> None:
    check_space(target, total)
    done = 0

    def step(inner: Progress) -> None:
        if progress is not None:
            progress(Progress(done + inner.done, total, "bytes"))

    with new_directory(target, force=force) as directory:
        for file in side:
            (directory / file.name).parent.mkdir(parents=True, exist_ok=True)
            with RegularFile.open(file.path) as opened:
                write(
                    directory / file.name,
                    RawFile((Span(opened, 0, file.n_bytes),) if file.n_bytes else ()),
                    progress=step,
                )
            done += file.n_bytes
        for name, contents in files.items():
            write(directory / name, contents, progress=step)
            done += contents.n_bytes
        if verify != "none":
            _verify(job, directory, target, full=verify == "full")


def _verify(job: _Job, directory: Path, target: Path, *, full: bool) -> None:
    """Read the new checkpoint back as if it were anybody's, and compare it with the old one."""
    try:
        with Checkpoint.open(directory) as written:
            layout = read_checkpoint_layout(written)
            describe_checkpoint(written, layout)
            if layout.moe_layers != tuple(job.kept) or layout.n_experts != job.plan.keep:
                raise FormatError("its experts differ from the plan")
            expected = {
                tensor.name: (tensor.dtype, tensor.shape) for tensors in job.shards.values() for tensor in tensors
            }
            if {tensor.name: (tensor.dtype, tensor.shape) for tensor in written.tensors} != expected:
                raise FormatError("its tensors differ from what was to be written")
            for shard in job.checkpoint.shards.values():
                tensors = list(shard.tensors.values())
                for tensor in tensors if full else _some(tensors, job.layout):
                    _compare(job, tensor, written, full=full)
    except FormatError as error:
        raise OutputError(f"{target}: was not written as it should be: {error}") from None


def _some(tensors: list[StoredTensor], layout: CheckpointLayout) -> Iterator[StoredTensor]:
    """The first, the last and others evenly between them, and every router: tens of thousands of reads would cost more
    than the copy."""
    step = max(1, len(tensors) // _MOST_SAMPLED)
    for index, tensor in enumerate(tensors):
        how = layout.follows.get(tensor.name)
        if index % step == 0 or index == len(tensors) - 1 or (how is not None and how.is_router):
            yield tensor


def _compare(job: _Job, tensor: StoredTensor, written: Checkpoint, *, full: bool) -> None:
    source = job.checkpoint.shards[job.checkpoint.shard_of[tensor.name]]
    runs = list(job.pairs(tensor))
    for name, inside, offset, n_bytes in runs if full else runs[:1] + runs[-1:]:
        file, new = written.shards[written.shard_of[name]], written.tensor(name)
        for start, length in _chunks(n_bytes, full=full):
            if source.read_range(offset + start, length) != file.read_range(new.offset_bytes + inside + start, length):
                raise FormatError(f"{name} differs from the source's {tensor.name}")


def _chunks(n_bytes: int, *, full: bool) -> Iterator[tuple[int, int]]:
    if full:
        for start in range(0, n_bytes, _COMPARE_BYTES):
            yield start, min(_COMPARE_BYTES, n_bytes - start)
    else:
        length = min(_SAMPLE_BYTES, n_bytes)
        yield 0, length
        yield n_bytes - length, length


# ---- what a reader of the report should know


def _warnings(job: _Job, left: list[str], target: Path, total: int, dry_run: bool) -> Iterator[str]:
    info, plan = job.info, job.plan
    yield from plan_warnings(info, plan)
    if plan.keep < info.n_experts and job.checkpoint.config.get("norm_topk_prob") is False:
        yield (
            "the gates of the chosen experts are not normalised again: removing experts makes the gates of those that"
            " stay larger"
        )
    if job.drop and job.layout.prediction_layers:
        yield f"the prediction (MTP) layers {list(job.layout.prediction_layers)} were left out"
    if left:
        yield (
            f"{len(left)} files with weights in another form were not carried over:"
            f" {', '.join(left[:5])}{' …' * (len(left) > 5)}"
        )
    if dry_run:
        try:
            check_space(target, total)
        except OutputError as error:
            yield str(error)
