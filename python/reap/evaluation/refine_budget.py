"""What the time of a search is spent on: enough windows first, more exchanges after."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from reap.evaluation.search import OutOfTime
from reap.evaluation.search_state import SearchStats
from reap.evaluation.search_windows import ENOUGH_WINDOWS
from reap.progress import Progress, ProgressCallback

USEFUL_PASSES = 24  # over the text: where the time is longer than they take on few windows, more windows are used
_START_PASSES = 3.0  # the reference, the plain criteria and the end
_LAYER_PASSES = 1.0  # one visit to a layer
_UNBOUNDED_PASSES = 1.25  # what is done however late it is: the reference, and the windows held out once


@dataclass(frozen=True)
class Needs:
    """How much of a text a search can use, and how long it needs for it."""

    seconds_per_window: float
    """Of one run over a window."""
    n_layers: int
    """Layers whose experts are searched."""
    n_windows: int
    """Windows that the text has."""

    @property
    def passes(self) -> float:
        """Over the text, for the beginning, the end and one visit to every layer."""
        return _START_PASSES + _LAYER_PASSES * self.n_layers

    @property
    def preparation(self) -> float:
        """Seconds that the least search takes before and after it searches: the whole model is run on enough windows,
        and the choice judged."""
        return _UNBOUNDED_PASSES * min(self.n_windows, ENOUGH_WINDOWS) * self.seconds_per_window

    def affordable(self, seconds: float) -> int:
        """Windows for a search that has `seconds` left: never fewer than are enough, where the text has them."""
        useful = int(seconds / (max(USEFUL_PASSES, self.passes) * self.seconds_per_window))
        return min(self.n_windows, max(ENOUGH_WINDOWS, useful))

    def shortcomings(self, seconds: float, max_passes: float, elapsed: float = 0.0) -> Iterator[str]:
        """What is known to be too little, before anything is searched, in sentences. elapsed: seconds that are over."""
        if self.n_windows < ENOUGH_WINDOWS:
            yield (
                f"the text has {self.n_windows} windows, and a search needs at least {ENOUGH_WINDOWS} to tell what"
                " helps from what fits them by chance: give more text, or shorter windows (--ctx-size)"
            )
        needed = self.passes * min(self.n_windows, ENOUGH_WINDOWS) * self.seconds_per_window
        if max_passes < self.passes:
            yield (
                f"{max_passes:g} passes over the text do not reach every layer once; about {math.ceil(self.passes)} do"
            )
        elif seconds < needed and max_passes == math.inf:
            yield (
                f"{_seconds_text(seconds)} do not reach every layer once on {min(self.n_windows, ENOUGH_WINDOWS)}"
                f" windows of this text; about {_seconds_text(needed)} do"
            )
        in_all, asked = _seconds_text(elapsed + self.preparation), _seconds_text(seconds)
        if seconds < elapsed + self.preparation and in_all != asked and max_passes == math.inf:
            yield (
                f"it will take about {in_all} instead of {asked}:"
                f" to open the model, to run all of it on {min(self.n_windows, ENOUGH_WINDOWS)} windows, and to judge"
                " the choice; nothing is searched"
            )


@dataclass
class Budget:
    """Time and passes of a search, with enough left over to judge its end."""

    seconds: float
    """In all."""
    max_passes: float
    """Over the text; infinite where only time counts."""
    progress: ProgressCallback | None = None
    """Called with seconds."""
    started: float = field(default_factory=time.monotonic)
    """When this call began, by the monotonic clock."""
    spent_before: float = 0.0
    """Seconds that an earlier part of this search took."""
    seconds_per_window: float = 0.0
    """Of one run over a window."""
    stats: SearchStats = field(default_factory=SearchStats)
    """What was spent so far."""
    _n_windows: int = 1
    _n_judging: int = 0

    def begin(self, stats: SearchStats, n_windows: int, n_judging: int) -> None:
        """What was spent so far, how many windows the text has, and how many of them are run twice at the end."""
        self.stats, self._n_windows, self._n_judging = stats, n_windows, n_judging

    @property
    def elapsed(self) -> float:
        """Seconds so far, of all parts."""
        return self.spent_before + time.monotonic() - self.started

    def report(self, _: Progress | None = None) -> None:
        """Tell the listener how much of the time is over."""
        if self.progress is not None:
            self.progress(Progress(min(int(self.elapsed), int(self.seconds)), max(1, int(self.seconds)), "seconds"))

    def check(self) -> None:
        """Raises OutOfTime where nothing more can be measured."""
        elapsed = self.elapsed
        self.report()
        is_late = elapsed + 2.2 * self._n_judging * self.seconds_per_window >= self.seconds
        if is_late or self.stats.passes + 2 * self._n_judging / self._n_windows >= self.max_passes:
            raise OutOfTime

    def spend(self, n_windows: int) -> None:
        """`check`, and count a measurement that the search does not count itself."""
        self.check()
        self.stats.passes += n_windows / self._n_windows


def _seconds_text(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
