"""sweep(): many choices of experts, judged virtually on one held-out text, with the weights loaded once."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reap.engine import native
from reap.engine.options import EVALUATION_CTX_SIZE, EngineArguments, EngineOptions, shows_engine_options
from reap.errors import Interrupted, ReapWarning, UsageError
from reap.evaluation.paired_difference import Difference, Floats, paired_difference
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.evaluation.quality_metrics import measure, perplexity_of
from reap.evaluation.sweep_table import BASELINE, CLEAR, Sweep, SweepRow, Target, Verdict
from reap.gguf.model_info import ModelInfo, inspect
from reap.progress import Progress, ProgressCallback
from reap.pruning.compatibility import plan_warnings
from reap.pruning.gguf import parse_size, size_after
from reap.scores.plan import Protect, PrunePlan, plan
from reap.scores.profile import METRICS, Profile
from reap.scores.ranking import MIN_PER_GROUP, Keep, check_keep, resolve_keep
from reap.text.evaluation_text import Text
from reap.text.overlap import overlap_warnings
from reap.version import version

if TYPE_CHECKING:
    from typing_extensions import Unpack

KEEPS = (0.75, 0.5, 0.25)
DEFAULT_METRICS = ("reap", "frequency", "weighted_ean_sum", "random")
_INCREASE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,9})?)\s*%", re.ASCII)


# ---- which numbers of experts can be kept


def allowed_keeps(model: ModelInfo) -> list[int]:
    """Every number of experts that the router of `model` can live with, ascending; all of them is the last."""
    least = model.n_groups * MIN_PER_GROUP if model.n_groups > 1 else 1
    return [keep for keep in range(least, model.n_experts + 1) if not keep % model.n_groups and _serves(keep, model)]


def _serves(keep: int, model: ModelInfo) -> bool:
    try:
        check_keep(keep, {name: getattr(model, name) for name in ("n_experts_used", "n_groups", "n_groups_used")})
    except UsageError:
        return False
    return True


def largest(keeps: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending `keeps` that fits, by bisection, where whatever is smaller than one that fits does too;
    None for none."""
    low, high = 0, len(keeps)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(keeps[middle]) else (low, middle)
    return keeps[low - 1] if low else None


def smallest(keeps: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The smallest of ascending `keeps` that fits, by bisection, where whatever is larger than one that fits does too;
    None for none."""
    found = largest([-keep for keep in reversed(keeps)], lambda keep: fits(-keep))
    return None if found is None else -found


def parse_increase(value: float | str) -> float:
    """0.05, or a text like "5%", as a share. UsageError for anything else, and for less than nothing."""
    match = _INCREASE.fullmatch(value.strip()) if isinstance(value, str) else None
    share = float(match[1]) / 100 if match else math.nan if isinstance(value, str | bool) else float(value)
    if not 0 <= share < math.inf:
        raise UsageError(
            f"max_ppl_increase {value!r} should be a percentage such as 5%, or a share such as 0.05 in Python"
        )
    return share


# ---- judging candidates


@dataclass(frozen=True)
class Measured:
    """What one candidate does on the text, each float64 [n_windows, n_scored]: ln p of the scored tokens, KL divergence
    in nats from the model as it is, and 1 where both models' first choice is the same."""

    log_probs: Floats
    kl: Floats
    top1: Floats


class Measurer(Protocol):
    """Runs candidates over a text."""

    @property
    def domains(self) -> Sequence[str | None]:
        """Of each window; None: none."""

    def measure(self, candidate: PrunePlan | None) -> Measured:
        """The model as if it were pruned; None: as it is."""


@dataclass(frozen=True)
class Candidate:
    """A choice of experts, where it came from, and the exact size of the file that it leaves."""

    name: str
    seed: int | None
    plan: PrunePlan
    n_bytes: int


@dataclass
class Table:
    """Rows and verdicts as they come: measures candidates, each once."""

    judge: Measurer
    rows: list[SweepRow] = field(default_factory=list)
    losses: dict[tuple[str, int | None, int], Floats] = field(default_factory=dict)

    def add_baseline(self, n_experts: int, n_bytes: int) -> None:
        """The model as it is."""
        self._add(BASELINE, None, n_experts, n_bytes, self.judge.measure(None))

    def add(self, candidate: Candidate) -> None:
        """Measure a candidate, unless it was measured already."""
        key = (candidate.name, candidate.seed, candidate.plan.keep)
        if key not in self.losses:
            self._add(*key, candidate.n_bytes, self.judge.measure(candidate.plan))

    def whole(self, metric: str, keep: int, seed: int | None = None) -> SweepRow:
        """The row of a candidate on the whole text."""
        return next(
            row for row in self.rows if (row.metric, row.seed, row.keep, row.domain) == (metric, seed, keep, None)
        )

    def verdicts(self) -> list[Verdict]:
        """The best of what was measured at each size, on the whole text and on each domain."""
        sizes = sorted({keep for name, _, keep in self.losses if name != BASELINE}, reverse=True)
        found = [self._verdict(keep, domain) for keep in sizes for domain in (None, *self._domains())]
        return [verdict for verdict in found if verdict is not None]

    def _add(self, metric: str, seed: int | None, keep: int, n_bytes: int, measured: Measured) -> None:
        self.losses[metric, seed, keep] = -measured.log_probs
        baseline = next(iter(self.losses.values()))
        for domain in (None, *self._domains()):
            windows = self._windows(domain)
            loss = -measured.log_probs[windows]
            increase = paired_difference(loss, baseline[windows])
            perplexity, stderr = perplexity_of(measured.log_probs[windows].ravel())
            self.rows.append(
                SweepRow(
                    metric=metric,
                    seed=seed,
                    keep=keep,
                    bytes=n_bytes,
                    domain=domain,
                    tokens=int(loss.size),
                    perplexity=perplexity,
                    stderr=stderr,
                    kl_mean=max(0.0, float(measured.kl[windows].mean())),
                    top1=float(measured.top1[windows].mean()),
                    loss_increase=increase.mean,
                    loss_increase_stderr=increase.stderr,
                )
            )

    def _domains(self) -> list[str]:
        named = [domain for domain in dict.fromkeys(self.judge.domains) if domain is not None]
        return named if len(named) > 1 else []

    def _windows(self, domain: str | None) -> list[int]:
        return [index for index, name in enumerate(self.judge.domains) if domain is None or name == domain]

    def _verdict(self, keep: int, domain: str | None) -> Verdict | None:
        windows = self._windows(domain)
        by_metric: dict[str, list[Floats]] = {}
        for (name, _, number), loss in self.losses.items():
            if number == keep and name != BASELINE:
                by_metric.setdefault(name, []).append(loss[windows])
        if len(by_metric) < 2:
            return None
        order = sorted(by_metric, key=lambda name: float(np.mean(by_metric[name])))
        margin = margin_between(by_metric[order[1]], by_metric[order[0]])
        return Verdict(
            keep=keep,
            domain=domain,
            metric=order[0],
            runner_up=order[1],
            margin=margin.mean,
            spread=margin.stderr,
            clear=margin.exceeds(CLEAR),
        )


def margin_between(worse: Sequence[Floats], better: Sequence[Floats]) -> Difference:
    """Mean loss of one criterion less that of another, each with the losses [n_windows, n_scored] of its seeds.

    The error adds to that of the paired difference of the means over seeds how far the seeds of each scatter.
    """
    paired = paired_difference(np.mean(worse, axis=0), np.mean(better, axis=0))
    scatter = [
        float(np.var([loss.mean() for loss in losses], ddof=1)) / len(losses)
        for losses in (worse, better)
        if len(losses) > 1
    ]
    return Difference(paired.mean, math.sqrt(paired.stderr**2 + sum(scatter)))


class EnginePlanEvaluator:
    """A model in the engine, and the text: what `Table` asks."""

    def __init__(self, judge: PlanEvaluator, progress: ProgressCallback | None) -> None:
        self.judge = judge
        self.domains = judge.text.domain_of
        self._progress = progress
        self._n_done = 0
        self._n_expected = 0

    def expect(self, n_candidates: int) -> None:
        """How many there will be, for the progress; the model as it is counts."""
        self._n_expected = n_candidates

    def measure(self, candidate: PrunePlan | None) -> Measured:
        """The model as if it were pruned; None: as it is."""
        if candidate is None:
            reference = self.judge.reference(self._report)
            found = measure(reference.windows, reference.windows)
        else:
            found = self.judge.measure(candidate, reference=self.judge.reference(), progress=self._report)
        self._n_done += 1
        if found.kl is None or found.same_top is None:
            raise AssertionError("a measurement beside a reference has a divergence")
        shape = (len(self.domains), -1)
        return Measured(
            found.log_probs.reshape(shape), found.kl.reshape(shape), found.same_top.reshape(shape).astype(np.float64)
        )

    def tokens(self) -> NDArray[np.int32]:
        """All windows of the text, one behind the other."""
        return np.concatenate(self.judge.text.windows)

    def record(self) -> dict[str, Any]:
        """What a sweep keeps of the text."""
        text = self.judge.text
        return {
            "files": list(text.files),
            "sha256": list(text.file_digests().values()),
            "domains": list(text.domains),
            "tokens": len(text.windows) * text.n_scored,
            "windows": len(text.windows),
            "ctx_size": text.ctx_size,
            "dropped_tokens": text.dropped_tokens,
        }

    def _report(self, step: Progress) -> None:
        if self._progress is not None:
            total = step.total or step.done
            self._progress(
                Progress(self._n_done * total + step.done, max(self._n_expected, self._n_done + 1) * total, step.unit)
            )


# ---- which candidates there are


@dataclass(frozen=True)
class Choices:
    """Makes candidates of a profile; whatever cannot work is an error here, before a model is loaded."""

    profile: Profile
    metrics: Sequence[str]
    seeds: int
    keeps: Sequence[int]  # that the router can live with, ascending
    choose: Callable[..., PrunePlan]  # plan() with the options that hold for every candidate
    size_of: Callable[[PrunePlan], int]  # checks the plan against the model, too

    def candidate(self, metric: str, keep: int, seed: int = 0) -> Candidate:
        """The choice of one metric at one size."""
        made = self.choose(self.profile, keep=keep, metric=metric, seed=seed)
        return Candidate(metric, seed if metric == "random" else None, made, self.size_of(made))

    def at(self, metric: str, keep: int) -> list[Candidate]:
        """The choice of one metric at one size, of random one for each seed."""
        return [self.candidate(metric, keep, seed) for seed in range(self.seeds if metric == "random" else 1)]

    def grid(self, keeps: Iterable[int]) -> list[Candidate]:
        """Every metric at every size."""
        return [candidate for keep in keeps for metric in self.metrics for candidate in self.at(metric, keep)]

    def given(self, plans: Iterable[PrunePlan]) -> list[Candidate]:
        """Plans made elsewhere, under their own names, with a number where two would have the same."""
        found: list[Candidate] = []
        for made in plans:
            taken = [item.name for item in found if item.plan.keep == made.keep] + list(self.metrics)
            names = [made.metric, *(f"{made.metric}-{number}" for number in range(2, len(taken) + 3))]
            found.append(Candidate(next(name for name in names if name not in taken), None, made, self.size_of(made)))
        return found

    def largest_within(self, max_bytes: int) -> dict[str, list[Candidate]]:
        """metric -> its choice at the largest size whose file has at most `max_bytes`. UsageError where even the
        smallest has more."""
        found = {metric: largest(self.keeps, partial(self._is_within, metric, max_bytes)) for metric in self.metrics}
        for metric, keep in found.items():
            if keep is None:
                raise UsageError(
                    f"target_size: {max_bytes:,} bytes cannot be reached: with {self.keeps[0]} experts, the fewest that"
                    f" the router can live with, the file still has {self.candidate(metric, self.keeps[0]).n_bytes:,}"
                    " bytes"
                )
        return {metric: self.at(metric, keep) for metric, keep in found.items() if keep is not None}

    def _is_within(self, metric: str, max_bytes: int, keep: int) -> bool:
        return self.candidate(metric, keep).n_bytes <= max_bytes


# ---- the sweep


@dataclass
class Sweeping:
    """Measures the candidates in turn, and what a limit on the perplexity asks for."""

    choices: Choices
    table: Table
    after_each: Callable[[], None] = lambda: None
    targets: list[Target] = field(default_factory=list)

    def measure(self, candidates: Iterable[Candidate]) -> None:
        """Add them to the table, one by one."""
        for candidate in candidates:
            self.table.add(candidate)
            self.after_each()

    def fit_size(self, max_bytes: int, found: dict[str, list[Candidate]]) -> None:
        """The quality of what is the largest within `max_bytes`."""
        for metric, candidates in found.items():
            self.measure(candidates)
            self._add_target("size", max_bytes, metric, candidates[0].plan.keep)

    def fit_perplexity(self, increase: float) -> None:
        """The smallest keep of each metric whose measured perplexity is at most 1 + `increase` times the model's own;
        of random the first seed decides."""
        most = self.table.rows[0].perplexity * (1 + increase)
        keeps = self.choices.keeps
        for metric in self.choices.metrics:
            # all experts fit by definition
            found = smallest(keeps[:-1], partial(self._is_good, metric, most)) or keeps[-1]
            self.measure([self.choices.candidate(metric, found)])
            self._add_target("perplexity", increase, metric, found)

    def _is_good(self, metric: str, most: float, keep: int) -> bool:
        self.measure([self.choices.candidate(metric, keep)])
        return self._row(metric, keep).perplexity <= most

    def _add_target(self, kind: str, limit: float, metric: str, keep: int) -> None:
        row = self._row(metric, keep)
        self.targets.append(
            Target(kind=kind, limit=float(limit), metric=metric, keep=keep, bytes=row.bytes, perplexity=row.perplexity)
        )
        self.after_each()

    def _row(self, metric: str, keep: int) -> SweepRow:
        return self.table.whole(metric, keep, 0 if metric == "random" else None)


class ResultWriter:
    """Makes the table of what a sweep has so far, and keeps it in a file where one was asked for."""

    def __init__(
        self, run: Sweeping, judge: EnginePlanEvaluator, options: EngineOptions, output: str | os.PathLike[str] | None
    ) -> None:
        self._run = run
        self._text = judge.record()
        self._profile = run.choices.profile
        self._engine = {"reap": version(), "llama_cpp": native.load().__llama_cpp_commit__, "options": options.record()}
        self._output = output
        texts = dict(zip(self._text["files"], self._text["sha256"], strict=True))
        self.warnings = overlap_warnings(texts, judge.tokens(), self._profile.calibration)

    def save(self) -> None:
        """The rows so far; nothing where no file was asked for."""
        if self._output is not None:
            self._table(complete=False).save(self._output)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """On Ctrl-C the rows so far are kept where a file was asked for, and Interrupted says so."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if self._output is None or not self._run.table.rows:
                raise
            self.save()
            n_measured = len(self._run.table.losses)
            raise Interrupted(
                f"stopped after {n_measured} of the sweep's models; {self._output} keeps the rows so far"
            ) from stop

    def finish(self) -> Sweep:
        """The whole table, which is in the file now, too."""
        table = self._table(complete=True)
        if self._output is not None:
            table.save(self._output)
        return table

    def _table(self, *, complete: bool) -> Sweep:
        table = self._run.table
        return Sweep(
            rows=tuple(table.rows),
            verdicts=tuple(table.verdicts()),
            targets=tuple(self._run.targets),
            model={**self._profile.model, "bytes": table.rows[0].bytes},
            text=self._text,
            calibration={
                key: self._profile.calibration[key] for key in ("files", "sha256") if key in self._profile.calibration
            },
            engine=self._engine,
            complete=complete,
            warnings=tuple(self.warnings),
        )


@shows_engine_options(ctx_size=EVALUATION_CTX_SIZE)
def sweep(
    model: str | os.PathLike[str],
    profile: Profile | str | os.PathLike[str],
    text: Text,
    *,
    keep: Keep | Sequence[Keep] | None = None,
    metric: str | Sequence[str] | None = None,
    seeds: int = 1,
    plans: Sequence[PrunePlan | str | os.PathLike[str]] = (),
    target_size: int | str | None = None,
    max_ppl_increase: float | str | None = None,
    protect: str | Iterable[Protect] = (),
    blend: str = "sum",
    protect_super_experts: bool = False,
    output: str | os.PathLike[str] | None = None,
    allow_mismatch: bool = False,
    progress: ProgressCallback | None = None,
    **engine: Unpack[EngineArguments],
) -> Sweep:
    """PlanEvaluator many choices of experts of `model` (a GGUF file) on the held-out `text`, without writing one.

    keep              numbers or fractions: `resolve_keep`; 0.75, 0.5 and 0.25 where neither this nor a limit is given
    metric            names of METRICS; reap, frequency, weighted_ean_sum and random where none is given
    seeds             how many selections of metric random, with the seeds 0, 1, ...
    plans             plans (or files of them) to judge as well, under their own names
    target_size       bytes, or a text like "12G" (10^9): also the largest keep of each metric whose file is no larger
    max_ppl_increase  0.05 or "5%": also the smallest keep of each metric whose perplexity on the text rises by no more,
                      found by bisection, which takes it for rising with each expert that goes; what is returned was
                      measured
    protect, blend, protect_super_experts  as in `plan`, for every candidate
    allow_mismatch    go on with a profile or plans of another model, where layers and experts are as many; the warnings
                      say what differs
    output            a file that holds the rows so far after each candidate, whole or not at all
    progress          called with scored tokens, of those of all candidates
    engine            options of the engine: `reap.engine.options.EngineOptions`

    A ReapWarning where part of the text was in the calibration. Raises what `plan`, `prune` and `evaluate` raise for a
    call that cannot work, before the model is loaded; Interrupted on Ctrl-C where `output` keeps the rows, else
    KeyboardInterrupt.
    """
    options = EngineOptions.of(engine, ctx_size=EVALUATION_CTX_SIZE)
    source = Profile.of(profile)
    max_bytes = None if target_size is None else parse_size(target_size)
    increase = None if max_ppl_increase is None else parse_increase(max_ppl_increase)
    if keep is None and target_size is None and max_ppl_increase is None:
        keep = KEEPS
    protected = [protect] if isinstance(protect, str) else list(protect)
    choose = partial(plan, protect=protected, blend=blend, protect_super_experts=protect_super_experts)
    info, measure_size = inspect(model), partial(size_after, model, allow_mismatch=allow_mismatch)
    choices = Choices(source, _metrics(metric), _seeds(seeds), allowed_keeps(info), choose, measure_size)
    candidates = choices.grid(_keeps(keep, source))
    candidates += choices.given(PrunePlan.of(item) for item in plans)
    within = {} if max_bytes is None else choices.largest_within(max_bytes)
    judge = EnginePlanEvaluator(PlanEvaluator(model, text, options, allow_mismatch=allow_mismatch), progress)
    n_bisected = 0 if increase is None else len(choices.metrics) * len(choices.keeps).bit_length()
    judge.expect(1 + len(candidates) + sum(map(len, within.values())) + n_bisected)
    run = Sweeping(choices, Table(judge))
    keeper = ResultWriter(run, judge, options, output)
    tried = [*candidates, *(item for found in within.values() for item in found)]
    tried = tried or [choices.candidate(choices.metrics[0], choices.keeps[-1])]
    keeper.warnings += dict.fromkeys(warning for item in tried for warning in plan_warnings(info, item.plan))
    for warning in keeper.warnings:
        warnings.warn(warning, ReapWarning, stacklevel=2)
    with keeper.keeping():
        run.table.add_baseline(judge.judge.info.n_experts, judge.judge.info.n_bytes)
        run.after_each = keeper.save
        run.measure(candidates)
        if max_bytes is not None:
            run.fit_size(max_bytes, within)
        if increase is not None:
            run.fit_perplexity(increase)
    return keeper.finish()


def _metrics(metric: str | Sequence[str] | None) -> tuple[str, ...]:
    names = (
        DEFAULT_METRICS if metric is None else (metric,) if isinstance(metric, str) else tuple(dict.fromkeys(metric))
    )
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise UsageError(
            f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}"
            if unknown
            else "sweep needs at least one metric"
        )
    return names


def _seeds(seeds: int) -> int:
    if type(seeds) is not int or not 1 <= seeds <= 1000:
        raise UsageError(
            f"seeds is {seeds!r}, expected how many selections of metric random there are to be, from 1 on"
        )
    return seeds


def _keeps(keep: Keep | Sequence[Keep] | None, profile: Profile) -> list[int]:
    """The numbers that are meant, each once, the largest first."""
    listed = [] if keep is None else list(keep) if isinstance(keep, Sequence | np.ndarray) else [keep]
    return sorted(
        {resolve_keep(item, profile.n_experts, profile.n_groups, profile.model) for item in listed}, reverse=True
    )
