"""compare(): how far two profiles of one model agree."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from reap.errors import ReapWarning
from reap.files.paths import PathLike
from reap.scores.merging import require_same_model
from reap.scores.profile import Profile
from reap.scores.ranking import Keep, resolve_keep, select_experts
from reap.scores.records import Floats

# ---- comparing


@dataclass(frozen=True)
class LayerComparison:
    """How far two profiles agree on one layer."""

    layer: int
    """GGUF block index."""
    spearman: float
    """Rank correlation of the scores, -1 to 1; NaN where one side gives all experts the same score."""
    overlap: float
    """Share of the kept experts that both keep, 0 to 1."""
    jaccard: float
    """Experts that both keep, over experts that either keeps, 0 to 1."""


@dataclass(frozen=True)
class Comparison:
    """How far two profiles agree on all layers and on each."""

    metric: str
    """The score that was compared."""
    keep: int
    """Experts of each layer that count as kept."""
    spearman: float
    """Mean over the layers where it is defined; NaN where it is defined in none."""
    overlap: float
    """Mean over the layers."""
    jaccard: float
    """Mean over the layers."""
    layers: tuple[LayerComparison, ...]
    """Each layer, ascending."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an undefined correlation is null."""
        return {
            "metric": self.metric,
            "keep": self.keep,
            **{name: _or_none(getattr(self, name)) for name in ("spearman", "overlap", "jaccard")},
            "layers": [
                {item.name: _or_none(getattr(layer, item.name)) for item in fields(LayerComparison)}
                for layer in self.layers
            ],
        }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def compare(
    a: Profile | PathLike,
    b: Profile | PathLike,
    *,
    keep: Keep = 0.5,
    metric: str = "reap",
    seed: int = 0,
    allow_mismatch: bool = False,
) -> Comparison:
    """How far two profiles of one model agree: rank correlation of the scores and overlap of the kept sets, per layer.

    One may be of a GGUF file and the other of the checkpoint that it was made of. An expert that was never routed to
    ranks below every other. MismatchError where layers, expert counts or models differ; with
    `allow_mismatch` a ReapWarning where only the models do.
    """
    first, second = Profile.of(a), Profile.of(b)
    mismatch = require_same_model(first, second, any_form=True, allow_mismatch=allow_mismatch)
    if mismatch is not None:
        warnings.warn(mismatch, ReapWarning, stacklevel=2)
    number = resolve_keep(keep, first.n_experts, first.n_groups)
    scores = first.score(metric, seed=seed), second.score(metric, seed=seed)
    layers = []
    for row, layer in enumerate(first.layers.tolist()):
        ranks = [_ranks(score[row]) for score in scores]
        kept = [
            set(select_experts(score[row], profile.counts[row], number, first.n_groups))
            for score, profile in zip(scores, (first, second), strict=True)
        ]
        both = len(kept[0] & kept[1])
        layers.append(LayerComparison(layer, _correlation(*ranks), both / number, both / len(kept[0] | kept[1])))
    return Comparison(
        metric,
        number,
        _mean_of([layer.spearman for layer in layers]),
        _mean_of([layer.overlap for layer in layers]),
        _mean_of([layer.jaccard for layer in layers]),
        tuple(layers),
    )


def _ranks(score: Floats) -> Floats:
    """Ranks from 0, ties averaged; undefined scores share the lowest ranks."""
    values = np.where(np.isnan(score), -np.inf, score)
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return np.asarray((last - (sizes + 1) / 2)[inverse], dtype=np.float64)


def _correlation(x: Floats, y: Floats) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return min(1.0, max(-1.0, float(x @ y) / scale)) if scale else math.nan


def _mean_of(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
