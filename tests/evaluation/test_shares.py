"""Shares: intervals and tests against figures of textbooks, and against simulated ones."""

from __future__ import annotations

import numpy as np
import pytest

from reap.evaluation.shares import needed, two_shares, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (1, 29, 0.0061, 0.1718), (0, 0, 0.0, 1.0)],
)
def test_wilson(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_two_shares() -> None:
    assert two_shares(15, 100, 25, 100) == pytest.approx(0.0771, abs=1e-4)  # z = 0.1 / sqrt(0.2 · 0.8 · 0.02) = 1.768
    assert two_shares(25, 100, 15, 100) == two_shares(15, 100, 25, 100)
    assert two_shares(7, 50, 7, 50) == pytest.approx(1)
    assert two_shares(0, 50, 0, 50) == two_shares(50, 50, 9, 9) == two_shares(0, 0, 3, 9) == 1


def test_so_many_show_the_difference_four_times_of_five() -> None:
    for share in (0.0, 0.036, 0.3):
        n = needed(share, 0.02)
        rng = np.random.default_rng(1)
        before, after = rng.binomial(n, share, 4000), rng.binomial(n, share + 0.02, 4000)
        found = np.mean([two_shares(int(a), n, int(b), n) < 0.05 for a, b in zip(before, after, strict=True)])
        assert 0.77 < found < (1.0 if share == 0 else 0.83)
    assert needed(0.036, 0.02) > 1500  # fifty prompts are blind
    assert needed(1.0, 0.02) > 0
