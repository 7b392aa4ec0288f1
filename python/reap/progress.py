"""How long work reports how far it is. Imports nothing of reap's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a long call is."""

    done: int
    """Units that are done."""
    total: int | None
    """None where it is not known yet; an estimate in a profile, until the end."""
    unit: str = "tokens"
    """What is counted, in the plural."""
    rate: float | None = None
    """Units a second in this process; None where the work does not say."""

    @property
    def seconds_left(self) -> float | None:
        """At this rate; None where the rate or the total is not known."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self.done) / self.rate


ProgressCallback = Callable[[Progress], None]
