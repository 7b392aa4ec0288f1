"""The windows of a search's text, divided before anything starts: some propose, some confirm, some judge the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

#: A search that sees fewer windows than this fits their peculiarities (measured: docs/sweeping.md).
ENOUGH_WINDOWS = 64
#: The parts of the windows, dealt out in turn.
_DEAL = ("propose", "confirm", "hold_out", "propose", "confirm", "propose", "confirm", "hold_out")


@dataclass(frozen=True)
class SearchWindows:
    """Numbers of windows in three parts that share none; each has its share of every domain, well mixed."""

    propose: tuple[int, ...]
    """Single experts are tried on these."""
    confirm: tuple[int, ...]
    """An exchange stays only where it helps on these."""
    hold_out: tuple[int, ...]
    """The start is chosen on these, and the end is compared with it; the search itself never sees them."""

    @property
    def n_windows(self) -> int:
        """All of them."""
        return len(self.propose) + len(self.confirm) + len(self.hold_out)


def divide_windows(domain_of: Sequence[str | None], seed: int) -> SearchWindows:
    """Deal the windows of each domain out to the three parts, shuffled by `seed`: three eighths each to propose and to
    confirm, a quarter to judge the end."""
    rng = np.random.Generator(np.random.PCG64(seed))
    parts: dict[str, list[tuple[float, int]]] = {name: [] for name in _DEAL}
    turn = count()
    for domain in dict.fromkeys(domain_of):
        members = [index for index, name in enumerate(domain_of) if name == domain]
        shuffled = rng.permutation(members).tolist()
        for place, window in enumerate(shuffled):
            # by its place in the domain, so that any stretch of a part has all domains in it
            parts[_DEAL[next(turn) % len(_DEAL)]].append(((place + float(rng.random())) / len(shuffled), window))
    mixed = {name: tuple(window for _, window in sorted(part)) for name, part in parts.items()}
    return SearchWindows(mixed["propose"], mixed["confirm"], mixed["hold_out"])


def batches(windows: Sequence[int], n: int) -> Iterator[Sequence[int]]:
    """The windows, about `n` at a time, in parts of nearly equal size."""
    n_parts = max(1, round(len(windows) / max(1, n)))
    for part in range(n_parts):
        found = windows[part * len(windows) // n_parts : (part + 1) * len(windows) // n_parts]
        if found:
            yield found
