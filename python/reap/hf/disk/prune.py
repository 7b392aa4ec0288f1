"""prune(): a Hugging Face checkpoint and a plan -> a smaller checkpoint. Weights are copied byte for byte, never
decoded or loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap.errors import FormatError, OutputError, UsageError
from reap.files.arguments import divide, shows
from reap.files.atomic import check_space, paths_of, write
from reap.files.atomic_directory import check_output_directory, new_directory
from reap.files.paths import PathLike
from reap.files.ranges import RawFile, Span
from reap.files.regular import RegularFile
from reap.hf.disk.checkpoint_files import Checkpoint
from reap.hf.disk.discovery import CONFIG, INDEX
from reap.hf.disk.info import CheckpointInfo, describe_checkpoint
from reap.hf.disk.job import Job
from reap.hf.disk.layout import CheckpointLayout, read_checkpoint_layout
from reap.hf.disk.mentions import counts_in_texts, mentions_in_files
from reap.hf.disk.safetensors_file import StoredTensor
from reap.hf.disk.side_files import FileArguments, FileOptions, SideFile, left_out, sort_side_files
from reap.progress import Progress, ProgressCallback
from reap.pruning.compatibility import check_plan, check_profile, plan_warnings
from reap.pruning.gguf import VERIFY_MODES, PruneReport, Verify
from reap.scores.plan import Keep, PrunePlan
from reap.scores.plan import plan as make_plan
from reap.scores.profile import Profile

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SAMPLE_BYTES = 4096
_MOST_SAMPLED = 100  # tensors of one file, except routers
_COMPARE_BYTES = 8 << 20


@shows((FileArguments, FileOptions))
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
    **options: Unpack[FileArguments],
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
        options: which files are the checkpoint (`FileOptions`)

    Each tensor stays in the file that it was in; experts are numbered anew; config.json changes only in the number of
    experts; reap.json says what was kept. Everything else that is not a weight is carried over. In the report,
    files are
    what was written, sizes are of the weights' files.

    Raises UsageError (paths, options, a plan that no such model can follow), MismatchError (a plan of another model),
    FormatError (a damaged checkpoint), UnsupportedModelError (a dense one, or one whose experts cannot be cut),
    OutputError (could not write).
    """
    started = time.perf_counter()
    (given,) = divide("prune", options, FileArguments)
    which = FileOptions(**given)
    which.check()
    if verify not in VERIFY_MODES:
        raise UsageError(f"unknown verify {verify!r}; known: {', '.join(VERIFY_MODES)}")
    target = Path(output)
    check_output_directory(target, map(Path, paths_of(source, plan, profile)), marker=CONFIG, force=force)
    the_plan = _choose(plan, profile, keep, metric)
    with Checkpoint.open(source, which.trust) as checkpoint:
        layout = read_checkpoint_layout(checkpoint, drop_prediction=drop_prediction)
        info = describe_checkpoint(checkpoint, layout)
        if profile is not None:
            check_profile(info, Profile.of(profile), allow_mismatch=allow_mismatch)
        the_plan = _check(info, the_plan, layout, allow_mismatch=allow_mismatch)
        job = Job(checkpoint, layout, info, the_plan, drop_prediction)
        files, side, left = job.files(), *sort_side_files(checkpoint, layout, which)
        sizes = {target / name: file.n_bytes for name, file in files.items()} | {
            target / file.name: file.n_bytes for file in side
        }
        if not dry_run:
            _write(job, target, files, side, sum(sizes.values()), force=force, verify=verify, progress=progress)
        warnings = tuple(_warnings(job, which, side, left, target, sum(sizes.values()), dry_run))
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


def _check(info: CheckpointInfo, plan: PrunePlan, layout: CheckpointLayout, *, allow_mismatch: bool) -> PrunePlan:
    """The plan, without the layers that are left out. Raises what `check_plan` raises."""
    plan = replace(plan, layers={layer: kept for layer, kept in plan.layers.items() if layer not in layout.dropped})
    missing = [layer for layer in info.moe_layers if layer not in plan.layers]
    if missing and missing[0] in layout.prediction_layers:
        raise UsageError(
            f"the plan says nothing about the prediction (MTP) layers {missing} of {info.path}, which transformers does"
            " not run; leave them out with --drop-mtp (drop_prediction=True), or make the plan of the GGUF file, where"
            " they are measured"
        )
    check_plan(info, plan, allow_mismatch=allow_mismatch)
    return plan


# ---- writing


def _write(
    job: Job,
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


def _verify(job: Job, directory: Path, target: Path, *, full: bool) -> None:
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
            for shard in job.checkpoint.shards:
                tensors = list(job.checkpoint.tensors_of(shard))
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


def _compare(job: Job, tensor: StoredTensor, written: Checkpoint, *, full: bool) -> None:
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


def _warnings(
    job: Job, which: FileOptions, side: list[SideFile], left: list[str], target: Path, total: int, dry_run: bool
) -> Iterator[str]:
    info, plan = job.info, job.plan
    yield from plan_warnings(info, plan)
    if plan.keep < info.n_experts and job.checkpoint.config.get("norm_topk_prob") is False:
        yield (
            "the gates of the chosen experts are not normalised again: removing experts makes the gates of those that"
            " stay larger"
        )
    if job.layout.dropped:
        yield f"the prediction (MTP) layers {list(job.layout.dropped)} were left out"
    if job.checkpoint.difference:
        yield f"{job.checkpoint.directory / INDEX}: {job.checkpoint.difference.text}; it was gone by the {which.trust}"
    if left:
        yield left_out(left)
    if plan.keep < info.n_experts:
        yield from counts_in_texts(job.texts, info.n_experts)
        yield from mentions_in_files([file.path for file in side], job.checkpoint.directory, info.n_experts)
    if dry_run:
        try:
            check_space(target, total)
        except OutputError as error:
            yield str(error)
