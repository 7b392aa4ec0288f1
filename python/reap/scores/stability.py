"""How much of a choice of experts is chance: the overlap that two profiles of as much text would have.

The parts of a profile are halved at random, many times, and each half chooses. How often two halves agree is measured
with halves of all the parts and of a few; the difference falls as a power of the amount of text, whose exponent these
two show. The same power gives the overlap of two profiles as large as this one. The exponent is 1/2 where the scores
near the cut lie evenly, and less where some are tied, which no amount of text will part: docs/formulas.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.errors import UsageError
from reap.scores.records import Floats

SPLITS = 32
_SEED = 0

Parts = Mapping[str, Floats]
Score = Callable[[dict[str, Floats]], Floats]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Stability:
    """How far a choice of experts can be relied on, as far as the amount of text goes."""

    metric: str
    """What ranks the experts."""
    keep: int
    """Experts kept of each layer."""
    overlap: float
    """Of the kept experts, the share that another profile of as much text of the same kind would keep as well."""
    layers: Mapping[int, float]
    """Block index -> the same of this layer."""
    domains: Mapping[str, Stability] = field(default_factory=dict)
    """Domain -> the same of the choice by its tokens alone; a domain with too few samples to tell is left out."""

    @property
    def lowest(self) -> tuple[float, int]:
        """(smallest overlap, its layer)."""
        return min((overlap, layer) for layer, overlap in self.layers.items())

    @property
    def highest(self) -> tuple[float, int]:
        """(largest overlap, its layer)."""
        return max((overlap, layer) for layer, overlap in self.layers.items())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "metric": self.metric,
            "keep": self.keep,
            "overlap": self.overlap,
            "layers": {str(layer): overlap for layer, overlap in self.layers.items()},
            "domains": {name: part.overlap for name, part in self.domains.items()},
        }


class TooFewPartsError(UsageError):
    """A profile has too few samples to say anything."""


def expected_overlaps(parts: Parts, score: Score, keep: int, n_groups: int, splits: int = SPLITS) -> Floats:
    """float64 [n_layers]: the share of the kept experts that two profiles of as much text would have in common.

    Args:
        parts: sum, or "counts" -> float64 [n_parts, n_layers, n_experts].
        score: sums -> float64 [n_layers, n_experts], NaN where it is undefined; a name that `parts` lacks is absent.
        keep, n_groups: experts kept of each layer, and groups of its router.
        splits: random halvings; they are the same ones each time.

    Raises TooFewPartsError where fewer than 4 parts have a token.
    """
    filled = np.flatnonzero(parts["counts"].any(axis=(1, 2)))
    if len(filled) < 4:
        raise TooFewPartsError(f"a choice can be judged from 4 samples on; here are {len(filled)}")
    known = {name: values[filled] for name, values in parts.items()}

    def kept(chosen: NDArray[np.int64]) -> Mask:
        sums = {name: values[chosen].sum(axis=0) for name, values in known.items()}
        return kept_by(score(sums), sums["counts"], keep, n_groups)

    rng = np.random.default_rng(_SEED)
    large, small = len(filled) // 2, max(1, len(filled) // 8)
    differing = {size: _mean_difference(kept, len(filled), size, splits, rng) / keep for size in (large, small)}
    rate = _rate(differing[small].mean(), differing[large].mean(), large / small)
    return np.asarray(1 - differing[large] * (large / len(filled)) ** rate)


def kept_by(score: Floats, counts: Floats, keep: int, n_groups: int = 1) -> Mask:
    """bool [n_layers, n_experts]: what `reap.scores.ranking.select_experts` keeps, of all layers at once."""
    grouped = (*score.shape[:-1], n_groups, score.shape[-1] // n_groups)
    value = np.where(np.isnan(score), -np.inf, score).reshape(grouped)
    order = np.lexsort((np.broadcast_to(np.arange(grouped[-1]), grouped), -counts.reshape(grouped), -value))
    mask = np.zeros(grouped, dtype=bool)
    np.put_along_axis(mask, order[..., : keep // n_groups], True, axis=-1)
    return mask.reshape(score.shape)


def _mean_difference(
    kept: Callable[[NDArray[np.int64]], Mask], n_parts: int, size: int, splits: int, rng: np.random.Generator
) -> Floats:
    """float64 [n_layers]: experts that one set of `size` parts keeps and another, of other parts, does not."""
    found = []
    for _ in range(splits):
        order = rng.permutation(n_parts)
        one, other = kept(order[:size]), kept(order[size : 2 * size])
        found.append((one & ~other).sum(axis=1))
    return np.asarray(np.mean(found, axis=0), dtype=np.float64)


def _rate(at_few: float, at_many: float, factor: float) -> float:
    """The exponent by which a difference falls with the amount of text, from 0 (not at all) to 1."""
    if not at_few or not at_many:
        return 0.5
    return min(1.0, max(0.0, math.log(at_few / at_many) / math.log(factor)))
