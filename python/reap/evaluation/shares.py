"""How sure a share is that was counted: its interval, a test of two of them, and how many would tell them apart."""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()
#: Of the intervals, and of a difference that is called one.
CONFIDENCE = 0.95
POWER = 0.8


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score: right for few, and for shares near 0 and 1. (0, 1) of none."""
    if n == 0:
        return 0.0, 1.0
    z = _NORMAL.inv_cdf((1 + CONFIDENCE) / 2)
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == n else centre + half)


def two_shares(hits: int, n: int, other_hits: int, other_n: int) -> float:
    """Two-sided p-value of the two-proportion test with a pooled share; 1 where there is nothing to compare."""
    if n == 0 or other_n == 0:
        return 1.0
    pooled = (hits + other_hits) / (n + other_n)
    variance = pooled * (1 - pooled) * (1 / n + 1 / other_n)
    if variance == 0:
        return 1.0
    z = abs(hits / n - other_hits / other_n) / math.sqrt(variance)
    return 2 * (1 - _NORMAL.cdf(z))


def needed(share: float, difference: float) -> int:
    """How many of each would show, at 80 % power and the 5 % level, that a share has risen by `difference`."""
    share = min(max(share, 0.0), 1 - difference)
    other = share + difference
    mean = (share + other) / 2
    z_level, z_power = _NORMAL.inv_cdf((1 + CONFIDENCE) / 2), _NORMAL.inv_cdf(POWER)
    spread = z_level * math.sqrt(2 * mean * (1 - mean))
    spread += z_power * math.sqrt(share * (1 - share) + other * (1 - other))
    return math.ceil((spread / difference) ** 2)
