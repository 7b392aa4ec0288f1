"""Which experts come first: how many to keep, and which ones, given a score. Pure and deterministic."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from reap.errors import UsageError

Keep = int | float
MIN_PER_GROUP = 2  # grouped routers score a group by its best two experts


def resolve_keep(keep: Keep, n_experts: int, n_groups: int = 1, model: Mapping[str, Any] | None = None) -> int:
    """The number of experts that `keep` means in a layer of `n_experts`.

    An int is that number. A float is a fraction of n_experts, rounded to the nearest number, halves up, in decimal as
    it is written (0.29 of 50 is 14.5, so 15); with a grouped router to the nearest multiple of n_groups. So 1.0 is all,
    1 is one. Raises UsageError for anything else, for nothing kept, for more than there are, for a number that the
    groups cannot share equally, and for fewer than two per group. `model`: where it is known, its record, by which a
    fraction of nothing is told the least that works.
    """
    resolve = _from_fraction if isinstance(keep, float | np.floating) else _from_number
    number = resolve(keep, n_experts, n_groups)
    if number == 0 and n_groups == 1:
        raise UsageError(f"keep {keep} of {n_experts} experts rounds to none{_least_text(model)}")
    if n_groups > 1 and number < MIN_PER_GROUP * n_groups:
        raise UsageError(
            f"keep {keep} leaves {number} of {n_experts} experts, but the router has {n_groups} groups and needs at"
            f" least {MIN_PER_GROUP} in each: {MIN_PER_GROUP * n_groups} or more"
        )
    return number


def _from_fraction(keep: Any, n_experts: int, n_groups: int) -> int:
    if not math.isfinite(keep) or not 0 < keep <= 1:
        raise UsageError(f"keep {keep} is not a fraction between 0 and 1 (0.5 is a fraction, 64 a number of experts)")
    share = Decimal(repr(float(keep))) * n_experts / n_groups
    return min(int(share.to_integral_value(ROUND_HALF_UP)) * n_groups, n_experts)


def _from_number(keep: Any, n_experts: int, n_groups: int) -> int:
    if isinstance(keep, bool) or not isinstance(keep, SupportsIndex):
        raise UsageError(f"keep should be a number of experts or a fraction, found {keep!r}")
    number = operator.index(keep)
    if not 1 <= number <= n_experts:
        raise UsageError(f"keep {number} is not between 1 and the model's {n_experts} experts")
    if number % n_groups:
        below = number - number % n_groups
        raise UsageError(
            f"keep {number} cannot be shared equally by the router's {n_groups} groups; {below} and"
            f" {below + n_groups} can"
        )
    return number


def check_keep(keep: int, model: Mapping[str, Any]) -> None:
    """UsageError where `keep` experts cannot serve the router of `model` (n_experts_used, n_groups, n_groups_used)."""
    used = int(model.get("n_experts_used") or 0)
    if keep < used:
        raise UsageError(
            f"keep {keep} is fewer than the {used} experts that the router chooses for each token{_least_text(model)}"
        )
    n_groups = int(model.get("n_groups") or 1)
    n_groups_used = int(model.get("n_groups_used") or n_groups)
    reachable = keep // n_groups * n_groups_used
    if reachable < used:
        raise UsageError(
            f"keep {keep} leaves {keep // n_groups} experts in each of {n_groups} groups; the {n_groups_used} groups"
            f" that a token may use then hold {reachable}, fewer than the {used} experts that the router chooses for"
            f" each token{_least_text(model)}"
        )


def least_keep(model: Mapping[str, Any]) -> int:
    """The fewest experts that can serve the router of `model` (n_experts_used, n_groups, n_groups_used)."""
    used, n_groups = int(model.get("n_experts_used") or 1), int(model.get("n_groups") or 1)
    if n_groups == 1:
        return used
    per_group = -(-used // int(model.get("n_groups_used") or n_groups))
    return n_groups * max(per_group, MIN_PER_GROUP)


def _least_text(model: Mapping[str, Any] | None) -> str:
    return f"; the least that works is {least_keep(model)}" if model and model.get("n_experts_used") else ""


def order_experts(score: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Expert ids of one layer, best first: int64 [n_experts].

    A higher score comes first; an undefined score (NaN) comes last; ties go to the higher count, then to the lower id.
    """
    undefined = np.isnan(score)
    return np.lexsort((np.arange(score.size), -counts, np.where(undefined, 0.0, -score), undefined))


def select_experts(
    score: NDArray[np.float64],
    counts: NDArray[np.int64],
    keep: int,
    n_groups: int = 1,
    protected: Collection[int] = (),
) -> tuple[int, ...]:
    """The ids kept in one layer, ascending: the protected ones, then the best; equally many of each group of
    neighbours.

    A smaller `keep` with the same scores gives a subset.
    """
    order = order_experts(score, counts).tolist()
    return take(sorted(order, key=lambda expert: expert not in protected), keep, n_groups)


def take(order: Collection[int], keep: int, n_groups: int) -> tuple[int, ...]:
    """The first keep / n_groups of each group of neighbours in `order`, ascending."""
    group_size = len(order) // n_groups
    room = [keep // n_groups] * n_groups
    kept = []
    for expert in order:
        group = expert // group_size
        if room[group]:
            room[group] -= 1
            kept.append(int(expert))
    return tuple(sorted(kept))
