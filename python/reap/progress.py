"""How long work reports how far it is. Imports nothing of reap's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a long call is: `done` of `total` units; `total` is None where nobody knows it yet."""

    done: int
    total: int | None
    unit: str = "tokens"


ProgressCallback = Callable[[Progress], None]
