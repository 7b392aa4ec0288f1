"""What a shrink ends with: the new model, what it costs, how sure the choice was, what to try next."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reap.evaluation.keep_limits import allowed_keeps
from reap.evaluation.sweep_table import CLEAR, Sweep, SweepRow, Verdict
from reap.files.formatting import bytes_text, number_text, percent_text
from reap.gguf.model_info import inspect
from reap.gguf.shards import model_paths
from reap.pipeline.shrink_options import ShrinkOptions

#: A rise of the perplexity from which on more experts are worth a try, and one up to which fewer are.
_MUCH, _LITTLE = 0.2, 0.1
#: More text than so many times as much is not asked for to tell two criteria apart.
_MOST_TEXT = 20


@dataclass(frozen=True)
class StepReport:
    """What became of a step."""

    name: str
    """Of the step."""
    was_run: bool
    """False: what an earlier call left was still right."""
    seconds: float
    """It took."""


@dataclass(frozen=True)
class Cost:
    """How much worse the pruned model predicts a text than the whole one."""

    tokens: int
    """Scored."""
    ratio: float
    """Of the perplexities."""
    ratio_stderr: float
    """Its standard error, token by token; NaN where it is not known."""

    @property
    def text(self) -> str:
        """+3.5% ± 0.7%."""
        return f"{self.ratio - 1:+.1%} ± {percent_text(self.ratio_stderr, 1)}"


@dataclass(frozen=True, kw_only=True)
class ShrinkResult:
    """A pruned model, and what is known of it. `lines` says it in words."""

    folder: Path
    """Where everything is."""
    model: Path
    """The pruned model."""
    source: Path
    """The model that it was made of."""
    n_bytes_before: int
    """Of the source."""
    n_bytes_after: int
    """Of the pruned model."""
    n_experts: int
    """Of each layer, before."""
    keep: int
    """Of each layer, after."""
    n_layers: int
    """With experts."""
    metric: str
    """The criterion that chose them."""
    verdict: Verdict | None
    """How it compares with the next on the text that chose it; None where there was no other."""
    perplexity: float
    """Of the pruned model, on text that chose nothing."""
    reference_perplexity: float
    """Of the source, there."""
    cost: Cost
    """The difference, with its error."""
    top1: float
    """Share of positions at which both hold the same token most probable."""
    domains: Mapping[str, Cost]
    """The same by domain, where the text names some."""
    max_ppl_increase: float | None
    """The limit that was set, as a share; None where none was."""
    steps: tuple[StepReport, ...]
    """What was done now, and what was done already."""
    advice: str
    """What to try next."""

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """The four sentences, each with its name: size, cost, criterion, try next."""
        return (
            ("size", self._size()),
            ("cost", self._cost()),
            ("criterion", self._criterion()),
            ("try next", self.advice),
        )

    def _size(self) -> str:
        share = self.n_bytes_after / max(self.n_bytes_before, 1)
        return (
            f"{bytes_text(self.n_bytes_before)} before, {bytes_text(self.n_bytes_after)} after ({share:.1%}):"
            f" {self.keep} of {self.n_experts} experts in each of {self.n_layers} layers"
        )

    def _cost(self) -> str:
        worst = max(self.domains, key=lambda name: self.domains[name].ratio, default=None)
        most = "" if worst is None else f"; most on {worst}, {self.domains[worst].text}"
        return (
            f"perplexity {self.cost.text} ({number_text(self.reference_perplexity)} to {number_text(self.perplexity)})"
            f" on {self.cost.tokens:,} tokens that had no part in the choice{most}"
        )

    def _criterion(self) -> str:
        verdict = self.verdict
        if verdict is None:
            return f"{self.metric}, which was compared with none"
        if verdict.metric != self.metric:
            return f"{self.metric}, though {verdict.metric} did no worse: the profile knows nothing of these experts"
        ratio = math.exp(min(verdict.margin, 700))
        margin = f"{ratio - 1:.1%} ± {ratio * verdict.spread:.1%}"
        if verdict.clear:
            return f"{self.metric}, clearly: with {verdict.runner_up}, the next, perplexity is {margin} higher"
        return f"{self.metric}, but not clearly: with {verdict.runner_up}, the next, perplexity is {margin} higher"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        paths = {name: os.fspath(getattr(self, name)) for name in ("folder", "model", "source")}
        return {**asdict(self), **paths, "lines": [list(line) for line in self.lines]}


def result_of(
    options: ShrinkOptions,
    folder: Path,
    row: SweepRow,
    table: Sweep,
    evaluation: Mapping[str, Any],
    steps: list[StepReport],
) -> ShrinkResult:
    """Put together what the steps have left.

    Args:
        options: of the call.
        folder: of the job.
        row: of the sweep, that was made.
        table: the sweep.
        evaluation: the document of the evaluation, which chose nothing.
        steps: what became of them.
    """
    pruned = folder / options.pruned_name
    cost = _cost_of(evaluation)
    domains = {name: _cost_of(found) for name, found in evaluation["domains"].items()}
    verdict = table.best().get(row.keep)
    return ShrinkResult(
        folder=folder,
        model=pruned,
        source=options.model,
        n_bytes_before=sum(path.stat().st_size for path in model_paths(options.model)),
        n_bytes_after=pruned.stat().st_size,
        n_experts=options.info.n_experts,
        keep=inspect(pruned).n_experts,
        n_layers=len(options.info.moe_layers),
        metric=row.metric,
        verdict=verdict,
        perplexity=evaluation["perplexity"],
        reference_perplexity=evaluation["reference_perplexity"],
        cost=cost,
        top1=evaluation["top1"],
        domains=domains if len(domains) > 1 else {},
        max_ppl_increase=options.goal.max_ppl_increase,
        steps=tuple(steps),
        advice=next(_advice(options, row, verdict, cost, domains)),
    )


def _cost_of(found: Mapping[str, Any]) -> Cost:
    error = found["ratio_stderr"]
    return Cost(found["tokens"], found["perplexity_ratio"], math.nan if error is None else error)


def _advice(
    options: ShrinkOptions, row: SweepRow, verdict: Verdict | None, cost: Cost, domains: Mapping[str, Cost]
) -> Iterator[str]:
    """What is worth a try, the most needed first."""
    rise, limit = cost.ratio - 1, options.goal.max_ppl_increase
    if limit is not None and rise > limit:
        yield f"more text: on what had no part in the choice the rise is above the limit of {100 * limit:g} %"
    if (
        verdict is not None
        and "random" in (verdict.metric, verdict.runner_up)
        and not (verdict.clear and verdict.metric != "random")
    ):
        yield "a longer calibration: the choice is not clearly better than chance"
    keeps = allowed_keeps(options.info)
    step = max(1, options.info.n_experts // 8)
    more = next((keep for keep in keeps if keep >= row.keep + step), None)
    if rise > _MUCH and more is not None and more < options.info.n_experts:
        yield f"more experts: --keep {more}"
    worst = max(domains, key=lambda name: domains[name].ratio, default=None)
    if worst is not None and len(domains) > 1 and _stands_out(domains[worst], cost):
        yield f"more calibration of {worst}, which loses most, or --blend maxmin"
    fewer = next((keep for keep in reversed(keeps) if keep <= row.keep - step), None)
    if rise < _LITTLE and fewer is not None:
        yield f"fewer experts, for it costs little: --keep {fewer}"
    if verdict is not None and not verdict.clear and verdict.margin > 0:
        factor = math.ceil((CLEAR * verdict.spread / verdict.margin) ** 2)
        if factor <= _MOST_TEXT:
            yield f"about {factor} times as much text, which would tell {verdict.metric} from {verdict.runner_up}"
    yield "another way to the same size, a smaller quantisation say, judged on the same text"


def _stands_out(worst: Cost, cost: Cost) -> bool:
    """Whether a domain loses clearly more than the whole text."""
    return worst.ratio - 1 > 1.5 * (cost.ratio - 1) and worst.ratio - cost.ratio > CLEAR * _error_of_both(worst, cost)


def _error_of_both(a: Cost, b: Cost) -> float:
    """Standard error of the difference of two costs, taken for independent."""
    return math.hypot(a.ratio_stderr, b.ratio_stderr)
