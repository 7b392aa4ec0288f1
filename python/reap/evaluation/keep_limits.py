"""Which numbers of experts a router can live with, and the largest or smallest of them that meets a limit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from reap.errors import UsageError
from reap.gguf.model_info import ModelInfo
from reap.scores.ranking import MIN_PER_GROUP, check_keep

_INCREASE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,9})?)\s*%", re.ASCII)


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
    """The largest of ascending `keeps` that fits, by bisection; None where none does.

    What is smaller than one that fits has to fit, too.
    """
    low, high = 0, len(keeps)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(keeps[middle]) else (low, middle)
    return keeps[low - 1] if low else None


def smallest(keeps: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The smallest of ascending `keeps` that fits, by bisection; None where none does.

    What is larger than one that fits has to fit, too.
    """
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
