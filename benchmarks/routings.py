"""Each token's experts and their g·‖f‖, and how two runs of one model differ in them. Used by wheel_variants.py and
cuda_check.py."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 256


@dataclass(frozen=True)
class Run:
    """What one run measured. label: of what ran it. routed: bool [windows, tokens, layers, n_experts]. gated_norm:
    float64, same shape."""

    label: str
    routed: np.ndarray[Any, np.dtype[np.bool_]]
    gated_norm: np.ndarray[Any, np.dtype[np.float64]]


def measure(label: str, session: Any, layers: list[int], n_experts: int, tokens: np.ndarray[Any, Any]) -> Run:
    """Profile whole windows of `tokens`, every token in a group of its own."""
    positions, zeros = np.arange(WINDOW, dtype=np.int32), np.zeros(WINDOW, np.int32)
    counts, sums = [], []
    n_windows = len(tokens) // WINDOW
    for window in np.split(tokens[: n_windows * WINDOW].astype(np.int32), n_windows):
        session.start_profile(layers, n_experts)
        session.profile_batch(window, positions, zeros, positions)  # the last: groups
        session.commit(1)
        groups = [session.sums(token) for token in range(WINDOW)]
        counts.append([group["counts"] for group in groups])
        sums.append([group["gated_norm_sum"] for group in groups])
    return Run(label, np.asarray(counts) > 0, np.asarray(sums))


@dataclass(frozen=True)
class Difference:
    """flipped: routings with another set of experts. largest, median: relative difference of an expert's REAP, over the
    routings that no flip can have reached."""

    flipped: int
    total: int
    largest: float
    median: float


def compare(name: str, expected: Run, found: Run, n_listed: int) -> Difference:
    """Print where two runs differ.

    What a flip in layer l of token t can reach is the same token and those after it in its window, in the layers
    above; that is set aside.
    """
    flipped = (expected.routed != found.routed).any(axis=-1)
    below = np.cumsum(flipped, axis=2) - flipped
    reached = np.maximum.accumulate(below > 0, axis=1) | flipped
    rest = ~reached[..., None]
    a, b = (reap(one, rest) for one in (expected, found))
    both = ~np.isnan(a)
    relative = np.abs(a - b)[both] / a[both]
    result = Difference(int(flipped.sum()), flipped.size, float(relative.max()), float(np.median(relative)))
    same = f"REAP differs by {result.largest:.1e} at most, {result.median:.1e} in the median expert"
    if np.array_equal(expected.gated_norm, found.gated_norm):
        same = "every value is bit for bit the same"
    print(
        f"{name}: {result.flipped:,} of {result.total:,} routings flipped, {reached.sum():,} set aside; on the rest"
        f" {same}"
    )
    for window, token, layer in np.argwhere(flipped)[:n_listed]:
        names = [set(np.flatnonzero(one.routed[window, token, layer]).tolist()) for one in (expected, found)]
        went, came = (", ".join(map(str, sorted(names[i] - names[1 - i]))) for i in (0, 1))
        print(f"    window {window}, token {token}, layer {layer}: {went} -> {came}")
    if result.flipped > n_listed:
        print(f"    and {result.flipped - n_listed:,} more")
    sys.stdout.flush()
    return result


def reap(one: Run, rest: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Σ g·‖f‖ / n over the routings of `rest`: [layers, n_experts], NaN where there is none."""
    counts = (one.routed & rest).sum(axis=(0, 1)).astype(float)
    sums = np.where(rest, one.gated_norm, 0.0).sum(axis=(0, 1))
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
