"""The search for a better choice of experts, with nothing of an engine in it.

It takes the layers in turn: it measures what single experts near the cut are worth (the loss with one more of those
that are out, with one fewer of those that are in), on a few of the windows that propose, and puts those that are worth
more in the place of those that are worth less. The exchange stays where the loss surely falls on the windows that
confirm, which had no part in proposing it.

The loss is the divergence from what the model with all experts predicts, not the surprise at the token that came: both
are smallest at the same place where that model is right, but the token that came is one draw from what it predicts, and
its luck hides what an expert is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reap.evaluation.paired_difference import Floats, paired_difference
from reap.evaluation.search_state import Kept, SearchState, SearchStats
from reap.evaluation.search_windows import SearchWindows, batches

Swap = tuple[int, int]  # (expert that goes, expert that comes)

SCANS = 4  # parts of the windows that propose; one is looked at, at a time
NEAR_THE_CUT = 4  # experts on either side that are tried on one visit to a layer
AGAIN = 2  # of these, so many that were tried before and looked most like being on the wrong side
IDLE_ROUNDS = 2  # rounds over all layers that find nothing, after which nothing more is expected
OTHER_CRITERIA = 2  # whose choice is tried, layer by layer
CERTAIN = 3.0  # standard errors by which the loss has to fall before all windows that confirm were asked
SURE = 1.5  # standard errors that do once they were
DOUBTFUL = 0.5  # standard errors by which it may have risen before the rest is not asked
REMEMBERED = 0.5  # of what was measured before another exchange in the layer
BATCH_TRIES = 3  # an exchange of several that fails is tried again with the better half of them, so often


class OutOfTime(Exception):
    """The budget is spent; what is being tried is dropped."""


@dataclass
class Search:
    """Exchanges experts of a choice for others, a step at a time."""

    measure: Callable[[Kept, Sequence[int]], Floats]
    """(kept by layer, window numbers) -> loss float64 [n_windows, n_scored] of the model with these experts alone."""
    windows: SearchWindows
    """Which windows propose, and which confirm."""
    plans: Mapping[str, Kept]
    """The choice of each criterion, the one to begin with first, then the next best."""
    ranks: Mapping[int, Sequence[int]]
    """layer -> expert ids, best first: which are near the cut, before anything was measured."""
    fixed: Mapping[int, set[int]] = field(default_factory=dict)
    """layer -> experts that always stay."""
    n_groups: int = 1
    """Groups of the router: an expert is exchanged for one of its own group only."""
    may_lose_one: bool = True
    """Whether the router can live with one expert fewer than are kept; where not, an expert is tried without only while
    another takes its place."""
    spent: Callable[[], None] = lambda: None
    """Raises OutOfTime where there is no time for another measurement."""
    state: SearchState | None = None
    """Where an earlier search was, to go on from."""

    def __post_init__(self) -> None:
        if self.state is None:
            start, kept = next(iter(self.plans.items()))
            self.state = SearchState(start=start, kept=dict(kept), origins=[name for name in self.plans][1:])
        self._at: SearchState = self.state
        self._known: dict[int, Floats] = {}  # window -> loss of `kept`, where it was measured

    @property
    def kept(self) -> Kept:
        """The best choice so far."""
        return self._at.best[1] if self._at.best else self._at.kept

    @property
    def start(self) -> str:
        """The criterion that it began with."""
        return self._at.best[0] if self._at.best else self._at.start

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as JSON types."""
        return self._at.to_dict()

    @property
    def stats(self) -> SearchStats:
        """What was done so far."""
        return self._at.stats

    def run(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Search until `spent` ends it, or until a search from every criterion found nothing more."""
        if not self.windows.propose or not self.windows.confirm:
            return
        try:
            while self._step():
                after_step()
        except OutOfTime:
            pass

    def _step(self) -> bool:
        """The next thing to do; False where nothing is left."""
        at = self._at
        if at.crosses is None:
            at.crosses, at.idle = list(at.kept), 0
        if at.crosses:
            self._cross(at.crosses[0])
            at.crosses.pop(0)
        elif at.layers:
            before = at.stats.exchanged
            fresh = self._visit(at.layers[0])
            at.has_news |= fresh or at.stats.exchanged > before
            at.layers.pop(0)
        elif at.idle < IDLE_ROUNDS:
            at.layers, at.has_news = list(at.kept), False
            at.idle += 1  # taken back by what is found
        else:
            return self._next_origin()
        if at.has_news:
            at.idle = 0
        return True

    # ---- whole criteria, and single layers of them

    def _next_origin(self) -> bool:
        """A search from another criterion, which may end at a better choice than the best so far; that is kept
        otherwise."""
        at = self._at
        if at.best is not None:
            (start, kept), found = at.best, (at.start, at.kept)
            at.start, at.kept, self._known = start, kept, {}
            if self._is_confirmed(found[1]):
                at.start, at.kept, self._known = *found, {}
            at.best = None
        if not at.origins:
            return False
        at.best = (at.start, at.kept)
        at.start = at.origins.pop(0)
        at.kept, at.crosses, self._known = dict(self.plans[at.start]), None, {}
        at.visits.clear()
        at.weight = {expert: weight * REMEMBERED for expert, weight in at.weight.items()}
        return True

    def _cross(self, layer: int) -> None:
        """The choice of the next best criteria in one layer instead, where that is better."""
        for name in [name for name in self.plans if name != self._at.start][:OTHER_CRITERIA]:
            other = self.plans[name][layer]
            if other != self._at.kept[layer]:
                self._at.stats.crossed += self._try({**self._at.kept, layer: other}, self._next_scan())

    # ---- single experts

    def _visit(self, layer: int) -> bool:
        """Try experts near the cut of one layer and exchange what is worth it; whether any of them had not been tried
        before."""
        inside, outside = self._near_the_cut(layer)
        if not inside or not outside:
            return False
        at = self._at
        fresh = any((layer, expert) not in at.visits for expert in (*inside, *outside))
        scan = self._next_scan()
        worth = self._worth(layer, inside, outside, scan)
        at.turn += 1
        for expert in (*inside, *outside):
            at.visits[layer, expert] = at.turn
        for expert, value in worth.items():
            self._learn((layer, expert), value)
        at.stats.tried += len(worth)
        self._exchange(layer, self._pairs(layer), scan)
        return fresh

    def _worth(self, layer: int, inside: list[int], outside: list[int], scan: Sequence[int]) -> dict[int, float]:
        """expert -> by how much the loss is lower with it than without, on the windows `scan`."""
        kept = set(self._at.kept[layer])
        current = float(self._current(scan).mean())
        worth = {expert: current - self._mean_loss(layer, {*kept, expert}, scan) for expert in outside}
        for expert in inside:
            if self.may_lose_one:
                worth[expert] = self._mean_loss(layer, kept - {expert}, scan) - current
                continue
            substitutes = [other for other in outside if self._group(layer, other) == self._group(layer, expert)]
            if substitutes:
                best = max(substitutes, key=lambda other: worth[other])
                with_both = current - worth[best]
                worth[expert] = self._mean_loss(layer, kept - {expert} | {best}, scan) - with_both
        return worth

    def _learn(self, expert: tuple[int, int], value: float) -> None:
        at = self._at
        weight = at.weight.get(expert, 0.0)
        at.worth[expert] = (at.worth.get(expert, 0.0) * weight + value) / (weight + 1)
        at.weight[expert] = weight + 1

    def _near_the_cut(self, layer: int) -> tuple[list[int], list[int]]:
        """Experts to try, in and out: some that looked most like being on the wrong side, then those that were tried
        longest ago or never, of these the worst that is in and the best that is out."""
        place = {expert: index for index, expert in enumerate(self.ranks[layer])}
        kept = set(self._at.kept[layer])
        inside, outside = kept - self.fixed.get(layer, set()), set(place) - kept
        return (
            self._choose(layer, inside, lambda expert: -place[expert], 1),
            self._choose(layer, outside, lambda expert: place[expert], -1),
        )

    def _choose(self, layer: int, experts: set[int], prior: Callable[[int], int], sign: int) -> list[int]:
        at = self._at
        known = sorted(
            (expert for expert in experts if (layer, expert) in at.worth),
            key=lambda expert: (sign * at.worth[layer, expert], expert),
        )
        again = known[:AGAIN]
        others = sorted(experts - set(again), key=lambda expert: (at.visits.get((layer, expert), -1), prior(expert)))
        return [*again, *others[: NEAR_THE_CUT - len(again)]]

    def _pairs(self, layer: int) -> list[Swap]:
        """The least that is in for the most that is out, group by group, as long as that gains; the greatest gain
        first."""
        at = self._at
        worth = {expert: value for (where, expert), value in at.worth.items() if where == layer}
        movable = worth.keys() - self.fixed.get(layer, set())
        swaps: list[Swap] = []
        for group in range(self.n_groups):
            members = sorted(
                (expert for expert in movable if self._group(layer, expert) == group),
                key=lambda expert: (worth[expert], expert),
            )
            goes = [expert for expert in members if expert in at.kept[layer]]
            comes = [expert for expert in reversed(members) if expert not in at.kept[layer]]
            swaps += [(out, new) for out, new in zip(goes, comes, strict=False) if worth[new] > worth[out]]
        return sorted(swaps, key=lambda swap: worth[swap[0]] - worth[swap[1]])[:NEAR_THE_CUT]

    def _exchange(self, layer: int, swaps: list[Swap], scan: Sequence[int]) -> None:
        """All exchanges at once, or the better half of them, where the loss falls on windows that did not choose
        them."""
        at = self._at
        for _ in range(BATCH_TRIES):
            if not swaps:
                return
            kept = (set(at.kept[layer]) - {out for out, _ in swaps}) | {new for _, new in swaps}
            if self._try({**at.kept, layer: tuple(sorted(kept))}, scan):
                at.stats.exchanged += len(swaps)
                for expert in self.ranks[layer]:  # what they are worth depends on the others that are there
                    at.weight[layer, expert] = at.weight.get((layer, expert), 0.0) * REMEMBERED
                return
            swaps = swaps[: len(swaps) // 2]

    def _group(self, layer: int, expert: int) -> int:
        return expert // (len(self.ranks[layer]) // self.n_groups)

    # ---- what is measured

    def _try(self, kept: Kept, scan: Sequence[int]) -> bool:
        """Take `kept` where the windows `scan` propose it and those that confirm do."""
        if self._measured(kept, scan).mean() >= self._current(scan).mean() or not self._is_confirmed(kept):
            return False
        self._at.kept = kept
        self._known = self._tried
        return True

    def _is_confirmed(self, kept: Kept) -> bool:
        """Whether the loss of `kept` is surely lower than that of what is, on the windows that confirm.

        Asks a few at a time, until all were asked, the loss does not look lower, or it is beyond doubt.
        """
        self._tried: dict[int, Floats] = {}
        asked: list[int] = []
        for part in batches(self.windows.confirm, len(self.windows.confirm) // SCANS):
            asked += part
            current = self._current(asked)
            self._tried.update(zip(part, self._measured(kept, part), strict=True))
            gain = paired_difference(current, np.stack([self._tried[window] for window in asked]))
            if not gain.exceeds(-DOUBTFUL):
                return False
            if 2 * len(asked) > len(self.windows.confirm) and gain.exceeds(CERTAIN):
                return True
        return gain.exceeds(SURE)

    def _current(self, windows: Sequence[int]) -> Floats:
        """The loss of what is, measured where it is not known yet."""
        unknown = [window for window in windows if window not in self._known]
        if unknown:
            self._known.update(zip(unknown, self._measured(self._at.kept, unknown), strict=True))
        return np.stack([self._known[window] for window in windows])

    def _next_scan(self) -> list[int]:
        """The next few of the windows that propose."""
        windows, at = self.windows.propose, self._at
        n = max(1, len(windows) // SCANS)
        at.scan_at %= len(windows)
        found = [*windows[at.scan_at :], *windows][:n]
        at.scan_at += n
        return found

    def _mean_loss(self, layer: int, experts: set[int], windows: Sequence[int]) -> float:
        return float(self._measured({**self._at.kept, layer: tuple(sorted(experts))}, windows).mean())

    def _measured(self, kept: Kept, windows: Sequence[int]) -> Floats:
        self.spent()
        self._at.stats.passes += len(windows) / self.windows.n_windows
        return self.measure(kept, windows)
