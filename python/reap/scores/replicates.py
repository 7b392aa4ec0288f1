"""What parts of a calibration say for themselves: its units (samples, windows) dealt out to a few parts, and the share
of each sum that is a part's.

With them a profile can say how much of a choice is chance (`reap.scores.stability`). A share is kept as a 65,535th of
its sum, so the parts cost a few megabytes at most, and are the same in memory as in a file.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from reap.files.strict_json import Node
from reap.scores.records import SUMS, Floats

#: Parts that the units of a calibration are dealt out to.
PARTS = 16
#: Fewer would be too few to halve twice.
LEAST_PARTS = 4
#: What is dealt out: everything that adds.
DEALT = ("counts", *SUMS[:-1])
#: Bytes that all parts of a profile may take in its file; where they would take more, parts are joined.
BUDGET = 8 << 20
_WHOLE = 65_535
_FILE_KEYS = {"counts": "activation_counts"}

Shares = NDArray[np.uint16]
_Profile = TypeVar("_Profile", bound=Any)


@dataclass(frozen=True, eq=False)
class Replicates:
    """The parts of one profile (or of one of its domains)."""

    shares: Mapping[str, Shares]
    """Sum, or "counts" -> uint16 [n_parts, n_layers, n_experts]: the part's share of it, in 65,535ths. A sum that is
    not known is left out."""

    @property
    def n_parts(self) -> int:
        return int(self.shares["counts"].shape[0])

    @classmethod
    def of(cls, parts: Iterable[tuple[int, Mapping[str, Any]]], n_parts: int = PARTS) -> Replicates:
        """Of (part, its sums: name -> array [n_layers, n_experts]); those of one part add, and part p goes to p modulo
        n_parts."""
        known = tuple(parts)
        names = [name for name in DEALT if all(_is_known(sums, name) for _, sums in known)]
        return cls({name: _to_shares([(part, sums[name]) for part, sums in known], n_parts) for name in names})

    def sums(self, whole: Any) -> dict[str, Floats]:
        """Sum, or "counts" -> float64 [n_parts, n_layers, n_experts], of the profile whose parts these are."""
        return {name: shares / _WHOLE * getattr(whole, name) for name, shares in self.shares.items()}

    def joined(self, whole: Any, n_parts: int) -> Replicates:
        """The same in fewer parts."""
        if n_parts == self.n_parts:
            return self
        return Replicates.of(_by_part(self.sums(whole)), n_parts)

    def to_record(self) -> dict[str, Any]:
        """For a profile's file."""
        coded = {
            name: base64.b64encode(shares.astype("<u2").tobytes()).decode() for name, shares in self.shares.items()
        }
        return {"parts": self.n_parts, **{_FILE_KEYS.get(name, name): text for name, text in coded.items()}}


def part_of(unit: int) -> int:
    """The part that a unit of a calibration, counted from 0, is dealt to.

    Of any 16 units in a row, from a multiple of 16 on, each goes to another part, in an order of its own, so that a
    regular calibration (every fourth line is code) does not fill some parts with one thing.
    """
    return _deal(unit // PARTS)[unit % PARTS]


def with_replicates(profile: _Profile, parts: Mapping[str | None, Mapping[int, Mapping[str, Any]]]) -> _Profile:
    """A profile with its parts: domain (None: of lines without one) -> part -> sums by name."""
    of_domains = {
        name: replace(domain, replicates=Replicates.of(parts[name].items())) for name, domain in profile.parts.items()
    }
    every = [item for name in sorted(parts, key=lambda name: (name is not None, name)) for item in parts[name].items()]
    return fit(replace(profile, parts=of_domains, replicates=Replicates.of(every)))


def fit(profile: _Profile) -> _Profile:
    """The same profile with so few parts that its file stays small: joined, or those of its domains left out."""
    if profile.replicates is None:
        return profile
    domains = [part for part in profile.parts.values() if part.replicates is not None]
    for of_domains in (True, False):
        n_sets = 1 + len(domains) * of_domains
        n_parts = _fitting(profile.replicates.n_parts, n_sets * profile.counts.size)
        if n_parts:
            break
    kept = {
        name: replace(part, replicates=part.replicates.joined(part, min(n_parts, part.replicates.n_parts)))
        if of_domains and n_parts and part.replicates is not None
        else replace(part, replicates=None)
        for name, part in profile.parts.items()
    }
    return replace(profile, parts=kept, replicates=profile.replicates.joined(profile, n_parts) if n_parts else None)


def added(profiles: Sequence[tuple[Any, Replicates]]) -> Replicates:
    """The parts of several profiles as those of their sum: (profile, its parts) of each."""
    n_parts = min(replicates.n_parts for _, replicates in profiles)
    every = [replicates.joined(profile, n_parts).sums(profile) for profile, replicates in profiles]
    known = [name for name in DEALT if all(name in sums for sums in every)]
    # sorted, so that the order of the profiles does not show in the last bit
    together = {name: np.sort([sums[name] for sums in every], axis=0).sum(axis=0) for name in known}
    return Replicates.of(_by_part(together), n_parts)


def read_replicates(node: Node, n_layers: int, n_experts: int) -> Replicates:
    """Of a profile's file. FormatError for what reap does not write."""
    n_parts = node["parts"].integer(LEAST_PARTS, PARTS)
    shape = (n_parts, n_layers, n_experts)
    keys = {name: _FILE_KEYS.get(name, name) for name in DEALT}
    node[keys["counts"]].string()
    return Replicates({name: _read_shares(node[key], shape) for name, key in keys.items() if key in node})


def _by_part(sums: Mapping[str, Floats]) -> list[tuple[int, dict[str, Floats]]]:
    return [(part, {name: values[part] for name, values in sums.items()}) for part in range(len(sums["counts"]))]


def _fitting(n_parts: int, n_rows: int) -> int:
    """The number of parts, at most `n_parts`, with which so many rows (layers · experts, in all) keep to the budget; 0
    for none."""
    while n_parts >= LEAST_PARTS:
        if n_parts * n_rows * len(DEALT) * 2 * 4 // 3 <= BUDGET:
            return n_parts
        n_parts //= 2
    return 0


@lru_cache(maxsize=64)
def _deal(block: int) -> tuple[int, ...]:
    return tuple(sorted(range(PARTS), key=lambda part: blake2b(f"{block} {part}".encode()).digest()))


def _is_known(sums: Mapping[str, Any], name: str) -> bool:
    return name in sums and not np.isnan(sums[name]).all()


def _to_shares(values: Iterable[tuple[int, Any]], n_parts: int) -> Shares:
    parts: dict[int, Any] = {}
    for part, array in values:
        place = part % n_parts
        parts[place] = parts[place] + array if place in parts else np.asarray(array, dtype=np.float64)
    nothing = np.zeros_like(next(iter(parts.values())))
    stacked = np.stack([parts.get(part, nothing) for part in range(n_parts)])
    total = stacked.sum(axis=0)
    shares = np.divide(stacked * _WHOLE, total, out=np.zeros_like(stacked), where=total > 0)
    return np.asarray(np.rint(shares), dtype=np.uint16)


def _read_shares(node: Node, shape: tuple[int, int, int]) -> Shares:
    try:
        raw = base64.b64decode(node.string(), validate=True)
    except (ValueError, binascii.Error):
        node.fail("should be base64")
    n_values = int(np.prod(shape))
    if len(raw) != 2 * n_values:
        node.fail(f"holds {len(raw)} bytes, expected {2 * n_values}: 2 for each of {shape[0]} parts, layer and expert")
    shares = np.frombuffer(raw, dtype="<u2").reshape(shape).astype(np.uint16)
    together = shares.sum(axis=0, dtype=np.int64)
    wrong = (np.abs(together - _WHOLE) > shape[0]) & (together != 0)
    if wrong.any():
        row, expert = (int(index) for index in np.argwhere(wrong)[0])
        node.fail(f"has shares of expert {expert}, in the profile's layer number {row}, that do not add up to a whole")
    return shares
