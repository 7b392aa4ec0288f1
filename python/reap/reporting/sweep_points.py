"""What the figures show of a sweep: one point for a metric at a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reap.evaluation.sweep_table import Sweep, SweepRow

_MEANS = ("perplexity", "stderr", "kl_mean", "top1", "loss_increase", "loss_increase_stderr")


@dataclass(frozen=True)
class SweepPoint:
    """One metric at one size in one domain: means over the seeds, NaN where unknown."""

    metric: str
    """What chose the experts."""
    keep: int
    """Experts in each layer."""
    n_bytes: int
    """Size of the pruned file."""
    perplexity: float
    """By llama-perplexity's rule."""
    stderr: float
    """Its standard error."""
    kl_mean: float
    """Mean KL divergence from the model as it is, in nats per token."""
    top1: float
    """Share of tokens for which it and the model as it is have the same first choice."""
    rise: float
    """Of the perplexity over that of the model as it is, a share."""
    rise_error: float
    """Standard error of that share, from the differences token by token."""
    spread: tuple[float, float] | None
    """(lowest, highest) perplexity of several seeds; None of one."""


def points_of(sweep: Sweep, domain: str | None) -> dict[str, list[SweepPoint]]:
    """Metric -> its points on the whole text (None) or one domain, smallest first; rows without a perplexity are left
    out."""
    groups: dict[tuple[str, int], list[SweepRow]] = {}
    for row in sweep.select(domain=domain):
        if not math.isnan(row.perplexity):
            groups.setdefault((row.metric, row.keep), []).append(row)
    points: dict[str, list[SweepPoint]] = {}
    for (metric, keep), rows in sorted(groups.items(), key=lambda item: item[0][1]):
        perplexities = [row.perplexity for row in rows]
        spread = (min(perplexities), max(perplexities)) if len(rows) > 1 else None
        perplexity, stderr, kl_mean, top1, loss, error = (
            _mean([getattr(row, name) for row in rows]) for name in _MEANS
        )
        rise, rise_error = math.expm1(loss), math.exp(loss) * error
        point = SweepPoint(metric, keep, rows[0].bytes, perplexity, stderr, kl_mean, top1, rise, rise_error, spread)
        points.setdefault(metric, []).append(point)
    return points


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
