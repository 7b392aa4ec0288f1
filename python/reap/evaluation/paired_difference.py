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
    stderr: float

    def exceeds(self, errors: float) -> bool:
        """Whether the mean is above zero by more than so many standard errors."""
        return self.mean > errors * self.stderr


def paired_difference(a: Floats, b: Floats) -> Difference:
    """Mean of a − b over tokens, float64 [n_windows, n_scored] each, and its standard error.

    The error is the larger of two estimates: from the scatter of the single differences, which takes the tokens for
    independent, and from the scatter of the windows' means, which allows for what the tokens of a window have in common
    (the usual estimate for clustered samples; windows are of equal size). NaN for a single token.
    """
    if np.size(a) < 2:
        return Difference(float(np.mean(np.subtract(a, b))), math.nan)
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return Difference(float(difference.mean()), max(_error(difference.ravel()), _error(difference.mean(axis=1))))


def _error(values: Floats) -> float:
    """Standard error of the mean of independent values; of fewer than two it is not known: 0 leaves the word to the
    other estimate."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
