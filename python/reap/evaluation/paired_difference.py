"""Comparing two models on the same tokens: they make mostly the same mistakes, so their difference is known far better
than either loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A mean of differences, and its standard error."""

    mean: float
    """Mean over all tokens."""
    stderr: float
    """Standard error of the mean; NaN for a single token."""

    def exceeds(self, errors: float) -> bool:
        """Whether the mean is above zero by more than so many standard errors."""
        return self.mean > errors * self.stderr


def paired_difference(a: Floats, b: Floats) -> Difference:
    """Mean of a − b over tokens, float64 [n_windows, n_scored] each, and its standard error."""
    difference = np.subtract(a, b, dtype=np.float64)
    return Difference(float(difference.mean()), standard_error(difference))


def standard_error(values: Floats) -> float:
    """Standard error of the mean of values, float64 [n_windows, n_scored]; NaN for a single one.

    The larger of two estimates: from the scatter of the single values, which takes the tokens for independent, and from
    the scatter of the windows' means, which allows for what the tokens of a window have in common (the usual estimate
    for clustered samples; windows are of equal size).
    """
    if values.size < 2:
        return math.nan
    return max(_error_of_independent(values.ravel()), _error_of_independent(values.mean(axis=1)))


def _error_of_independent(values: Floats) -> float:
    """Of fewer than two values the error is not known: 0 leaves the word to the other estimate."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
