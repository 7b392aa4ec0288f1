"""Has a text been seen before? A small sketch of the token windows that a calibration held, to hold another text
against.

Every run of 16 tokens has a hash. The sketch keeps the 2,048 smallest distinct ones, which is an even sample of all of
them whatever the size of the text (bottom-k sampling), takes 16 KB, and can be merged with another's. Of a second text
the windows whose hash is small enough to be in the sketch, if the calibration had them, are looked up; the share found
estimates how much of the text was seen.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reap.files.strict_json import Node

WINDOW = 16  # tokens; a power of two
CAPACITY = 2048
_BYTES = 6  # of a hash
_LIMIT = 1 << (8 * _BYTES)

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """How much of a text was seen before."""

    looked_up: int
    """Windows that were looked up, a sample of all of them."""
    found: int
    """How many of these were seen."""

    @property
    def share(self) -> float:
        return self.found / self.looked_up if self.looked_up else 0.0


class Sketch:
    """The smallest hashes of the windows added so far, uint64, ascending and distinct."""

    def __init__(self, hashes: Hashes | None = None) -> None:
        self.hashes: Hashes = np.empty(0, dtype=np.uint64) if hashes is None else hashes

    def add(self, tokens: ArrayLike) -> None:
        """All windows of one stretch of token ids [n_tokens]; a stretch shorter than a window has none."""
        new = window_hashes(tokens)
        self._take(new[new <= self._largest()])

    def merge(self, other: Sketch) -> None:
        """Also what `other` has seen."""
        self._take(other.hashes)

    def look_up(self, tokens: ArrayLike) -> Overlap:
        """How much of a text, token ids [n_tokens], was seen. A window that comes twice in it is looked up once."""
        asked = np.unique(window_hashes(tokens))
        asked = asked[asked <= self._largest()]
        return Overlap(len(asked), int(np.isin(asked, self.hashes).sum()) if len(self.hashes) else 0)

    def to_dict(self) -> dict[str, Any]:
        """For a profile's "calibration": the hashes as base64 of 6 bytes each, the highest byte first."""
        raw = self.hashes.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - _BYTES :]
        return {"tokens_per_window": WINDOW, "hashes": base64.b64encode(raw.tobytes()).decode("ascii")}

    def _largest(self) -> np.uint64:
        """The largest hash that the sketch would hold, had it been seen."""
        return self.hashes[-1] if len(self.hashes) >= CAPACITY else np.uint64(_LIMIT - 1)

    def _take(self, new: Hashes) -> None:
        if len(new):
            self.hashes = _ascending(np.concatenate((self.hashes, new)))[:CAPACITY]


def window_hashes(tokens: ArrayLike) -> Hashes:
    """uint64 [n_tokens - 15], below 2^48: of every run of 16 token ids; [0] for fewer tokens."""
    values = _mix(np.asarray(tokens, dtype=np.int64).astype(np.uint64))
    step = 1
    while step < WINDOW and len(values) > step:
        values = _mix(values[:-step] * np.uint64(0x9E3779B97F4A7C15) + values[step:])
        step *= 2
    return values >> np.uint64(64 - 8 * _BYTES) if step == WINDOW else values[:0]


def _mix(values: Hashes) -> Hashes:
    """A bijection of 64-bit numbers after which every bit depends on every other: the last steps of SplitMix64 (Steele
    et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _ascending(hashes: Hashes) -> Hashes:
    """Each once, in order. As numpy.unique, which loads the module of masked arrays for it."""
    hashes = np.sort(hashes)
    return hashes[np.concatenate(([True], hashes[1:] != hashes[:-1]))] if len(hashes) else hashes


def read_sketch(record: Node) -> Sketch:
    """The sketch that `to_dict` wrote. FormatError where it cannot be one."""
    record["tokens_per_window"].integer(WINDOW, WINDOW)
    node = record["hashes"]
    try:
        raw = base64.b64decode(node.string().encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        node.fail("is not base64")
    if len(raw) % _BYTES or len(raw) > CAPACITY * _BYTES:
        node.fail(f"should be at most {CAPACITY:,} hashes of {_BYTES} bytes, found {len(raw):,} bytes")
    wide = np.zeros((len(raw) // _BYTES, 8), dtype=np.uint8)
    wide[:, 8 - _BYTES :] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, _BYTES)
    hashes = wide.view(">u8").ravel().astype(np.uint64)
    if (hashes[1:] <= hashes[:-1]).any():
        node.fail("should ascend without repeats")
    return Sketch(hashes)


def merge_sketches(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of all that the records have seen."""
    merged = Sketch()
    for record in records:
        merged.merge(read_sketch(Node(dict(record), "calibration: sketch")))
    return merged.to_dict()


def overlap_warnings(texts: Mapping[str, str], tokens: ArrayLike, calibration: Mapping[str, Any]) -> list[str]:
    """Sentences where a text, held out by intention, was part of the calibration that a profile records.

    texts: name -> SHA-256 of each file; tokens: ids of all of them. The same file is told by its digest, parts of it by
    the sketch of windows, where the profile has one.
    """
    files: Sequence[str] = calibration.get("files") or ()
    digests = dict(zip(calibration.get("sha256") or (), files, strict=False))
    same = {name: digests[digest] for name, digest in texts.items() if digest in digests}
    if same or "sketch" not in calibration:
        return [f"{name}: is the calibration file {other} itself; {_FLATTERED}" for name, other in same.items()]
    overlap = read_sketch(Node(calibration["sketch"], "calibration: sketch")).look_up(tokens)
    if overlap.found < _LEAST_FOUND or overlap.share < _LEAST_SHARE:
        return []
    looked_up = f"{overlap.found:,} of {overlap.looked_up:,} windows of {WINDOW} tokens that were looked up"
    return [f"{', '.join(texts)}: about {overlap.share:.0%} of it was in the calibration ({looked_up}); {_FLATTERED}"]


_FLATTERED = "on text that its experts were chosen by, a pruned model looks better than it is"
# Licence texts and the like stand in much of what people write: a window here and there is no overlap.
_LEAST_FOUND = 5
_LEAST_SHARE = 0.05
