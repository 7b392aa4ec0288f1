"""What a profile says in few numbers: inequality, load, the gap at the cut, what is kept against chance, agreement.
Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.errors import MismatchError, UsageError
from reap.scores.identity import compare_records, require_same
from reap.scores.plan import PrunePlan, plan
from reap.scores.profile import Profile
from reap.scores.ranking import check_keep, resolve_keep, select_experts
from reap.scores.records import Floats, span

Mask = NDArray[np.bool_]
# of fewer tokens the mean of a heavy-tailed quantity says little
FEW_TOKENS = 30


def gini(values: NDArray[Any]) -> Floats:
    """float64 [n_layers]: Gini coefficient of each row of [n_layers, n_experts]; 0 all equal, (n − 1)/n one has all.

    What is undefined counts as 0. NaN for a row of zeros. G = Σ (2i − n − 1)·x₍ᵢ₎ / (n·Σ x), x ascending, i from 1.
    """
    ascending = np.sort(np.nan_to_num(np.asarray(values, dtype=np.float64)), axis=1)
    n = ascending.shape[1]
    total = ascending.sum(axis=1)
    weighted = ascending @ (2.0 * np.arange(1, n + 1) - n - 1)
    return _divide(weighted, n * total)


def effective_experts(counts: NDArray[np.int64]) -> Floats:
    """float64 [n_layers]: exp of the entropy of the load; n_experts where all are chosen equally often, 1 where one is
    always."""
    share = _divide(counts.astype(np.float64), counts.sum(axis=1, keepdims=True))
    known = np.where(share > 0, share, 1.0)
    effective: Floats = np.exp(-(known * np.log(known)).sum(axis=1))
    return np.where(counts.sum(axis=1) > 0, effective, np.nan)


def busiest_share(counts: NDArray[np.int64], part: float = 0.1) -> Floats:
    """float64 [n_layers]: share of the routings that go to the busiest `part` of the experts (at least one)."""
    n_busiest = max(1, round(part * counts.shape[1]))
    busiest = np.sort(counts, axis=1)[:, -n_busiest:].sum(axis=1)
    return _divide(busiest.astype(np.float64), counts.sum(axis=1).astype(np.float64))


def kept_mask(profile: Profile, kept: Mapping[int, Sequence[int]]) -> Mask:
    """bool [n_layers, n_experts]: which experts stay. MismatchError where the layers are not those of the profile."""
    if sorted(kept) != profile.layers.tolist():
        raise MismatchError(
            f"the plan has the layers {span(np.array(sorted(kept)))}, but the profile {span(profile.layers)}"
        )
    mask = np.zeros(profile.counts.shape, dtype=bool)
    for row, layer in enumerate(profile.layers.tolist()):
        mask[row, list(kept[layer])] = True
    return mask


def require_plan_of(profile: Profile, made: PrunePlan) -> None:
    """MismatchError where a plan and a profile are not of one model."""
    if made.n_experts != profile.n_experts:
        raise MismatchError(
            f"the plan is of a model with {made.n_experts} experts, but the profile of one with {profile.n_experts}"
        )
    kept_mask(profile, made.layers)
    verdict = compare_records(made.model, profile.model, ("the plan", "the profile"))
    require_same(
        verdict, "the plan is not of the profile's model", allow_mismatch=bool(made.model.get("mismatch")), advice=""
    )


def plan_of_half(profile: Profile, metric: str = "reap") -> PrunePlan:
    """What half of the experts would be, or as few above it as the router allows: an example where there is no plan."""
    for number in range(max(1, profile.n_experts // 2), profile.n_experts):
        try:
            resolve_keep(number, profile.n_experts, profile.n_groups)
            check_keep(number, profile.model)
        except UsageError:
            continue
        return plan(profile, keep=number, metric=metric)
    return plan(profile, keep=profile.n_experts, metric=metric)


# ---- the cut


def kept_share(mass: Floats, mask: Mask) -> Floats:
    """float64 [n_layers]: part of each row's `mass` that lies in `mask`; NaN where the row has none."""
    known = np.nan_to_num(mass)
    return _divide(np.where(mask, known, 0.0).sum(axis=1), known.sum(axis=1))


def best_share(mass: Floats, keep: int, n_groups: int = 1) -> Floats:
    """float64 [n_layers]: the largest share that `keep` experts can hold, equally many of each group."""
    grouped = np.sort(_grouped(np.nan_to_num(mass), n_groups), axis=2)
    best = grouped[:, :, grouped.shape[2] - keep // n_groups :].sum(axis=(1, 2))
    return _divide(best, np.nan_to_num(mass).sum(axis=1))


def random_share(mass: Floats, keep: int, n_groups: int = 1) -> tuple[Floats, Floats]:
    """(mean, standard deviation), each float64 [n_layers], of the share that `keep` experts chosen blindly hold. Exact.

    Drawing k of n without replacement from values of population variance σ² gives a sum of mean k·μ and variance
    k·(n − k)/(n − 1)·σ²; with a grouped router that is drawn in each group, and variances add.
    """
    grouped = _grouped(np.nan_to_num(mass), n_groups)
    n, k = grouped.shape[2], keep // n_groups
    total = grouped.sum(axis=(1, 2))
    mean = k * grouped.mean(axis=2).sum(axis=1)
    variance = (k * (n - k) / max(n - 1, 1)) * grouped.var(axis=2).sum(axis=1)
    return _divide(mean, total), _divide(np.sqrt(variance), total)


@dataclass(frozen=True)
class Cut:
    """Where each layer's score is cut; each float64 [n_layers], NaN where it is undefined.

    Near a gap of 0 the cut falls into a slope without a step, and its neighbours are interchangeable; below 0 something
    else than this score chose as well (protected experts, groups, another metric).
    """

    lowest_kept: Floats
    """The lowest score of a kept expert."""
    highest_removed: Floats
    """The highest score of a removed expert."""
    gap: Floats
    """(lowest_kept − highest_removed) / lowest_kept."""


def find_cut(score: Floats, mask: Mask) -> Cut:
    """The cut that `mask` makes in `score`, both [n_layers, n_experts]."""
    known = ~np.isnan(score)
    lowest = np.where(mask & known, score, np.inf).min(axis=1)
    highest = np.where(~mask & known, score, -np.inf).max(axis=1)
    lowest[np.isinf(lowest)] = np.nan
    highest[np.isinf(highest)] = np.nan
    return Cut(lowest, highest, _divide(lowest - highest, lowest))


# ---- agreement


def overlaps(masks: Sequence[Mask]) -> NDArray[np.float64]:
    """float64 [n, n]: of the experts that i keeps, the share that j keeps too, over all layers."""
    flat = np.stack([mask.ravel() for mask in masks]).astype(np.float64)
    return _divide(flat @ flat.T, flat.sum(axis=1, keepdims=True))


def mask_by(profile: Profile, metric: str, keep: int, seed: int = 0) -> Mask:
    """bool [n_layers, n_experts]: what `metric` alone would keep."""
    score = profile.score(metric, seed=seed)
    kept = {
        layer: select_experts(score[row], profile.counts[row], keep, profile.n_groups)
        for row, layer in enumerate(profile.layers.tolist())
    }
    return kept_mask(profile, kept)


def known_metrics(profile: Profile) -> tuple[str, ...]:
    """The metrics that the profile holds the sums for."""
    return profile.metrics


def low_by_every_metric(profile: Profile, part: float = 0.25) -> Mask:
    """bool [n_layers, n_experts]: among the lowest `part` of its layer whichever measured metric ranks, or never routed
    to."""
    n_high = profile.n_experts - max(1, int(part * profile.n_experts))
    low = np.ones(profile.counts.shape, dtype=bool)
    for metric in known_metrics(profile):
        if metric != "random":
            score = profile.score(metric)
            for row in range(profile.n_layers):
                low[row, list(select_experts(score[row], profile.counts[row], n_high))] = False
    return low | profile.never_routed


# ---- helpers


def lowest_of(values: Floats, layers: NDArray[np.int64]) -> tuple[float, int] | None:
    """(smallest defined value, its layer)."""
    return None if np.isnan(values).all() else (float(np.nanmin(values)), int(layers[int(np.nanargmin(values))]))


def highest_of(values: Floats, layers: NDArray[np.int64]) -> tuple[float, int] | None:
    """(largest defined value, its layer)."""
    return None if np.isnan(values).all() else (float(np.nanmax(values)), int(layers[int(np.nanargmax(values))]))


def mean_of(values: Floats) -> float:
    """Mean of what is defined; NaN of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _grouped(mass: Floats, n_groups: int) -> Floats:
    return mass.reshape(mass.shape[0], n_groups, -1)


def _divide(above: Floats, below: Floats) -> Floats:
    quotient: Floats = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    np.divide(above, below, out=quotient, where=np.broadcast_to(below != 0, quotient.shape))
    return quotient
