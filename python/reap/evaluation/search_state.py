"""Where a search for experts is: all that it needs to go on, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from reap.files.strict_json import Node

Kept = dict[int, tuple[int, ...]]
Expert = tuple[int, int]  # (layer, id)


@dataclass
class SearchStats:
    """What a search did, for the record."""

    passes: float = 0.0
    """Over the whole text."""
    tried: int = 0
    """Single experts that were measured."""
    exchanged: int = 0
    """Experts that took another's place."""
    crossed: int = 0
    """Layers that took another criterion's choice."""


@dataclass
class SearchState:
    """Where a search is, between two of its steps."""

    start: str
    """The criterion that `kept` began with."""
    kept: Kept
    """The choice that is being improved."""
    origins: list[str] = field(default_factory=list)
    """Criteria from which to begin again, in this order."""
    best: tuple[str, Kept] | None = None
    """While a search from another criterion runs: the best so far, and what it began with."""
    crosses: list[int] | None = None
    """Layers in which other criteria's choices are still to be tried; None: all."""
    layers: list[int] = field(default_factory=list)
    """Layers still to be visited in this round."""
    has_news: bool = False
    """Whether the round exchanged anything, or tried an expert for the first time."""
    idle: int = 0
    """Rounds in a row without news, this one included."""
    scan_at: int = 0
    """Where the next windows that propose begin."""
    turn: int = 0
    """Visits to a layer so far."""
    visits: dict[Expert, int] = field(default_factory=dict)
    """When each expert was tried last."""
    worth: dict[Expert, float] = field(default_factory=dict)
    """By how much the loss is lower with an expert than without: the mean over the visits."""
    weight: dict[Expert, float] = field(default_factory=dict)
    """Visits that each worth rests on, those before the layer last changed counting less."""
    stats: SearchStats = field(default_factory=SearchStats)
    """What was done so far."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        experts = sorted(self.visits.keys() | self.worth.keys() | self.weight.keys())
        return {
            "start": self.start,
            "kept": _kept_to_dict(self.kept),
            "origins": self.origins,
            "best": None if self.best is None else {"start": self.best[0], "kept": _kept_to_dict(self.best[1])},
            "crosses": self.crosses,
            "layers": self.layers,
            "has_news": self.has_news,
            "idle": self.idle,
            "scan_at": self.scan_at,
            "turn": self.turn,
            "experts": [
                [*expert, self.visits.get(expert), self.worth.get(expert), self.weight.get(expert)]
                for expert in experts
            ],
            "stats": asdict(self.stats),
        }

    @classmethod
    def from_node(cls, node: Node) -> SearchState:
        """Read what `to_dict` wrote. Raises FormatError."""
        state = cls(
            start=node["start"].string(),
            kept=_read_kept(node["kept"]),
            origins=[item.string() for item in _items(node["origins"])],
            crosses=None if node["crosses"].value is None else node["crosses"].integers().tolist(),
            layers=node["layers"].integers().tolist(),
            has_news=node["has_news"].flag(),
            idle=node["idle"].integer(),
            scan_at=node["scan_at"].integer(),
            turn=node["turn"].integer(),
        )
        if node["best"].value is not None:
            state.best = (node["best"]["start"].string(), _read_kept(node["best"]["kept"]))
        for item in _items(node["experts"]):
            expert = (item.entry(0).integer(), item.entry(1).integer())
            if item.entry(2).value is not None:
                state.visits[expert] = item.entry(2).integer()
            for values, index in ((state.worth, 3), (state.weight, 4)):
                if item.entry(index).value is not None:
                    values[expert] = item.entry(index).number()
        stats = node["stats"]
        counts = {name: stats[name].integer() for name in ("tried", "exchanged", "crossed")}
        state.stats = SearchStats(passes=stats["passes"].number(), **counts)
        return state


def _kept_to_dict(kept: Mapping[int, tuple[int, ...]]) -> dict[str, list[int]]:
    return {str(layer): list(experts) for layer, experts in kept.items()}


def _read_kept(node: Node) -> Kept:
    return {int(layer): tuple(experts.integers().tolist()) for layer, experts in node.items()}


def _items(node: Node) -> list[Node]:
    return [node.entry(index) for index in range(len(node.entries()))]
