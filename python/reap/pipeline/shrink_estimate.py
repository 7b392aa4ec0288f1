"""What a shrink would do: which steps, how long each, and how large its result."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap.engine.options import EVALUATION_CTX_SIZE, EngineOptions
from reap.errors import UsageError
from reap.evaluation.keep_limits import allowed_keeps, largest
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.files.paths import PathLike
from reap.pipeline.job_folder import JobFolder, Step, opened
from reap.pipeline.shrink import FORM
from reap.pipeline.shrink_options import Goal, ShrinkArguments, ShrinkOptions
from reap.pipeline.shrink_steps import ShrinkSteps
from reap.pipeline.text_parts import divide_text
from reap.profiling.preview import preview
from reap.pruning.gguf import size_after
from reap.scores.plan import PrunePlan
from reap.scores.ranking import Keep, resolve_keep
from reap.text.evaluation_text import Text
from reap.text.sources import Source, parts_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SAMPLE_BYTES = 64 << 20


@dataclass(frozen=True)
class StepEstimate:
    """What will become of a step."""

    name: str
    """Of the step."""
    runs: bool
    """False: what is there is still right."""
    seconds: float | None
    """It should take; None: moments."""
    what: str
    """How much it is."""


@dataclass(frozen=True)
class ShrinkEstimate:
    """What a shrink would do."""

    steps: tuple[StepEstimate, ...]
    """In order."""
    n_bytes_before: int
    """Of the model."""
    n_bytes_after: tuple[int, int]
    """Of the result: the same number twice, or the least and the most that it can be."""
    keep: tuple[int, int]
    """Experts of each layer, likewise."""
    n_experts: int
    """Of each layer now."""

    @property
    def seconds(self) -> float:
        """Of all steps that run."""
        return sum(step.seconds or 0.0 for step in self.steps if step.runs)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**asdict(self), "seconds": self.seconds}


def estimate_shrink(
    model: PathLike,
    output_dir: PathLike,
    *,
    calibration: Source,
    text: Text,
    keep: Keep | None = None,
    target_size: int | str | None = None,
    max_ppl_increase: float | str | None = None,
    force: bool = False,
    **options: Unpack[ShrinkArguments],
) -> ShrinkEstimate:
    """What `shrink` would do with these arguments.

    Writes nothing; loads the model, where it is to be run, to measure its speed on a few windows. Raises what `shrink`
    raises before its first step.
    """
    goal = Goal.of(keep, target_size, max_ppl_increase)
    given = ShrinkOptions.of(model, calibration, text, goal, dict(options))
    sizes = _Sizes(given)
    least, most = sizes.keeps()
    with opened(Path(output_dir), FORM, writes=False) as folder:
        steps = ShrinkSteps(given, folder).all()
        folder.check(steps, force=force)
        ends = sizes.of(least), sizes.of(most)
        running = _running(folder, steps)
    found = tuple(_Measured(given, running, ends[1]).steps(steps))
    return ShrinkEstimate(found, given.info.n_bytes, ends, (least, most), given.info.n_experts)


def _running(folder: JobFolder, steps: tuple[Step, ...]) -> set[str]:
    """Names of the steps that would run; a step after one of its inputs' steps does."""
    running: set[str] = set()
    for step in steps:
        try:
            # what follows from a file that is to be written anew is not known yet
            done = (not running or step.name == "profile") and folder.is_done(step, step.identity())
        except UsageError:
            done = False
        if not done:
            running.add(step.name)
    return running


class _Sizes:
    """Bytes of the pruned file by the number of experts."""

    def __init__(self, options: ShrinkOptions) -> None:
        self._options = options

    def keeps(self) -> tuple[int, int]:
        """The fewest and the most experts that the goal can lead to."""
        goal, info = self._options.goal, self._options.info
        allowed = allowed_keeps(info)
        if goal.keep is not None:
            keep = resolve_keep(goal.keep, info.n_experts, info.n_groups, info.record())
            return keep, keep
        if goal.target_size is None:
            return allowed[0], allowed[-1]
        limit = goal.target_size
        found = largest(allowed, lambda keep: self.of(keep) <= limit)
        if found is None:
            raise UsageError(
                f"target_size: {limit:,} bytes cannot be reached: with {allowed[0]} experts, the fewest that the router"
                f" can live with, the file still has {self.of(allowed[0]):,} bytes"
            )
        return found, found

    def of(self, keep: int) -> int:
        """To the byte, apart from the length of the criterion's name."""
        info = self._options.info
        size = info.n_experts // info.n_groups
        kept = tuple(group * size + expert for group in range(info.n_groups) for expert in range(keep // info.n_groups))
        files = [part for part in parts_of(self._options.calibration) if part.path is not None]
        plan = PrunePlan(
            info.record(),
            self._options.metrics[0],
            keep,
            dict.fromkeys(info.moe_layers, kept),
            {"sha256": ["0" * 64] * len(files)},
        )
        return size_after(self._options.model, plan)


class _Measured:
    """How long steps take, from a few batches and windows."""

    def __init__(self, options: ShrinkOptions, running: set[str], n_bytes_after: int) -> None:
        self._options = options
        self._running = running
        self._n_bytes = n_bytes_after
        parts = divide_text(options.model, options.text, options.text_ctx_size, options.max_text_tokens)
        self._windows = tuple(len(part.windows) for part in parts)

    def steps(self, steps: tuple[Step, ...]) -> list[StepEstimate]:
        """Of all of them."""
        window = self._seconds_per_window() if self._running & {"sweep", "evaluate"} else 0.0
        n_models = self._n_models()
        choose, judge = self._windows
        known = {
            "text": (None, f"{choose} windows to choose on, {judge} to judge on"),
            "profile": self._profile(),
            "sweep": (n_models * choose * window, f"{n_models} models on {choose} windows"),
            "prune": (self._copying(), f"{self._n_bytes:,} bytes"),
            "evaluate": (2 * judge * window, f"2 models on {judge} windows"),
        }
        found = []
        for step in steps:
            seconds, what = known.get(step.name, (None, ""))
            runs = step.name in self._running
            found.append(StepEstimate(step.name, runs, seconds if runs else None, what))
        return found

    def _profile(self) -> tuple[float | None, str]:
        options = self._options
        seen = preview(
            options.model,
            options.calibration,
            show=1,
            measure_time="profile" in self._running,
            **{**options.texts, "skip_bad_lines": True},
            **options.engine,
        )
        return seen.seconds, f"{seen.tokens:,} tokens"

    def _seconds_per_window(self) -> float:
        options = self._options
        engine: Any = {**options.engine, "ctx_size": options.text_ctx_size}
        chosen = EngineOptions.of(engine, ctx_size=EVALUATION_CTX_SIZE)
        return PlanEvaluator(options.model, options.text, chosen, max_windows=2).seconds_per_window()

    def _n_models(self) -> int:
        """That a sweep runs: the whole one, each criterion at each size, and those of a bisection."""
        goal, n_metrics = self._options.goal, len(self._options.metrics)
        sizes = set(self._options.also_keep)
        if goal.max_ppl_increase is None:
            sizes.add(_Sizes(self._options).keeps()[0])
            return 1 + n_metrics * len(sizes)
        return 1 + n_metrics * (len(sizes) + len(allowed_keeps(self._options.info)).bit_length())

    def _copying(self) -> float:
        """Reading and writing as many bytes, at the speed at which the model is read."""
        n_bytes = min(_SAMPLE_BYTES, self._n_bytes)
        started = time.perf_counter()
        fd = os.open(self._options.model, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read = len(os.pread(fd, n_bytes, 0))
        finally:
            os.close(fd)
        return 2 * (time.perf_counter() - started) * self._n_bytes / max(read, 1)
