"""What the figures show of a sweep: one point for a metric at a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reap.evaluation.sweep_table import Sweep, SweepRow

_MEANS = ("perplexity", "stderr", "kl_mean", "top1", "loss_increase", "loss_increase_stderr")


@dataclass(frozen=True)
class SweepPoint:
    """One metric at one size in one domain: means over the seeds, NaN where unknown; spread is (lowest, highest) of
    several seeds.

    rise: of the perplexity over that of the model as it is, a share; rise_error: its standard error, token by token.
    """

    metric: str
    keep: int
    n_bytes: int
    perplexity: float
    stderr: float
    kl_mean: float
    top1: float
    rise: float
    rise_error: float
    spread: tuple[float, float] | None


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
