"""The windows that a search never sees: they choose what it begins with, and judge what it ends with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reap.evaluation.paired_difference import Difference, Floats, paired_difference
from reap.evaluation.quality_metrics import QualityMetrics, TokenScores, quality_metrics
from reap.evaluation.search import OutOfTime
from reap.evaluation.search_state import Kept
from reap.evaluation.search_windows import batches
from reap.evaluation.sweep_table import CLEAR

_PARTS = 4  # after each, what is clearly worse than the best is not asked any more


@dataclass
class HoldOut:
    """Compares whole choices on windows that had no part in a search.

    The start is the best plain criterion of all on these very windows, which flatters it: what is found has to be
    clearly better than that, and so than every other criterion, to take its place.
    """

    measure: Callable[[Kept, Sequence[int]], TokenScores]
    """(kept by layer, window numbers) -> scores of the model with these experts alone."""
    windows: Sequence[int]
    """Their numbers."""

    def rank(self, plans: Mapping[str, Kept], spent: Callable[[int], None]) -> list[str]:
        """The criteria, the one with the smallest divergence first.

        `spent` is called with a number of windows before each measurement; where it raises OutOfTime before all were
        compared on the same windows, the order is that of `plans`, as far as nothing better is known.
        """
        found: dict[str, list[Floats]] = {name: [] for name in plans}
        asked = list(plans)
        order = list(plans)
        for part in batches(self.windows, -(-len(self.windows) // _PARTS)):
            try:
                for name in asked:
                    spent(len(part))
                    found[name].append(self.measure(plans[name], part).divergence())
            except OutOfTime:
                break
            losses = {name: np.concatenate(found[name]) for name in asked}
            ranked = sorted(asked, key=lambda name: float(losses[name].mean()))
            order = ranked + [name for name in order if name not in ranked]
            best = losses[ranked[0]]
            asked = [name for name in ranked if not paired_difference(losses[name], best).exceeds(CLEAR)]
        return order

    def judge(self, start: Kept, found: Kept) -> Verdict:
        """Whether `found` is clearly better than `start`."""
        before = self.measure(start, self.windows)
        after = before if found == start else self.measure(found, self.windows)
        return Verdict(
            paired_difference(before.divergence(), after.divergence()),
            paired_difference(after.log_probs, before.log_probs),
            quality_metrics(before),
            quality_metrics(after),
        )


@dataclass(frozen=True)
class Verdict:
    """A choice that was found beside the one that the search began with."""

    divergence: Difference
    """By how much the divergence from the whole model is smaller, in nats a token."""
    loss: Difference
    """By how much the loss is smaller, in nats a token."""
    before: QualityMetrics
    """Figures of the start."""
    after: QualityMetrics
    """Figures of what was found."""

    @property
    def is_better(self) -> bool:
        """Nearer to the whole model beyond doubt, and no worse at the tokens that came."""
        return self.divergence.exceeds(CLEAR) and self.loss.mean >= 0
