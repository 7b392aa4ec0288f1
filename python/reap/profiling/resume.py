"""Checkpoints of a profiling run: what was measured so far, and of what, so that a later run goes on to the same
result."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.errors import FormatError, MismatchError, UsageError
from reap.files.atomic import write_whole
from reap.files.strict_json import Node, json_bytes, read_json
from reap.scores.records import SUMS

FORMAT = "reap.checkpoint"
VERSION = 1
# saving may take at most about this share of the time
_SAVING_SHARE = 0.05

Arrays = Mapping[str, NDArray[Any]]


@dataclass
class State:
    """Where a run is.

    units: samples (or windows of a text file) that are done, those that failed included. domains: group -> name, None
    for lines without one. groups: sums of each, as `Session.sums` gives them. failed: unit -> "where: why".
    """

    units: int = 0
    domains: list[str | None] = field(default_factory=list)
    groups: list[Arrays] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


class Checkpoint:
    """One file, written whole or not at all, at most every `seconds` (less often where writing it takes long).

    identity: JSON object of what the run is: model, calibration, options. Raises UsageError where a file is in the way
    and `resume` is off, MismatchError where it is of another run, FormatError where it is damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: Mapping[str, Any], *, seconds: float, resume: bool
    ) -> None:
        self.path = Path(path)
        self._identity = dict(identity)
        self._seconds = seconds
        self._saved_at = time.monotonic()
        self._cost = 0.0
        if self.path.exists() and not resume:
            raise UsageError(
                f"{self.path}: a checkpoint is there already; --resume (resume=True) goes on from it, removing it"
                " begins anew"
            )

    def load(self) -> State | None:
        """The state to go on from; None where there is no file yet."""
        if not self.path.exists():
            return None
        node = read_json(self.path, what="checkpoint")
        if node["format"].string() != FORMAT or node["version"].integer() != VERSION:
            raise FormatError(f"{self.path}: is no checkpoint of this version of reap")
        _compare(self.path, node["identity"].members(), self._identity)
        return _read_state(node)

    def is_due(self) -> bool:
        """Whether enough time has passed since the last one."""
        return time.monotonic() - self._saved_at >= max(self._seconds, self._cost / _SAVING_SHARE)

    def save(self, state: State) -> None:
        """Write the state. Raises OutputError where that fails; the file before it is kept then."""
        started = time.monotonic()
        groups = [{name: values.tolist() for name, values in group.items()} for group in state.groups]
        failed = {str(unit): reason for unit, reason in state.failed.items()}
        document = {
            "format": FORMAT,
            "version": VERSION,
            "identity": self._identity,
            "units": state.units,
            "domains": state.domains,
        }
        write_whole(self.path, json_bytes({**document, "failed": failed, "groups": groups}), force=True)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started


def identify_calibration(paths: Sequence[str]) -> list[str]:
    """sha256 of each file. UsageError for standard input, which cannot be read twice."""
    if "-" in paths:
        raise UsageError("standard input cannot be read again, so a run over it cannot have a checkpoint; give a file")
    return [_digest(path) for path in paths]


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as handle:
            return (
                hashlib.file_digest(handle, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else _digest_blocks(handle)
            )
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error


def _digest_blocks(handle: Any) -> str:
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _compare(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for part, wanted in expected.items():
        had = found.get(part)
        if had == wanted:
            continue
        if isinstance(wanted, Mapping) and isinstance(had, Mapping):
            name = next(name for name in {**wanted, **had} if wanted.get(name) != had.get(name))
            raise MismatchError(
                f"{path}: is of a run with {part} {name} {had.get(name)!r}, where this one has {wanted.get(name)!r}"
            )
        raise MismatchError(f"{path}: is of another {part} ({had!r}) than this run's ({wanted!r})")


def _read_state(node: Node) -> State:
    domains = [None if value is None else Node(value, "domain").string() for value in node["domains"].entries()]
    failed = {int(unit): reason.string() for unit, reason in node["failed"].items()}
    groups = [_read_group(node["groups"].entry(index)) for index in range(len(node["groups"].entries()))]
    if len(groups) != len(domains):
        node["groups"].fail(f"has {len(groups)} entries for {len(domains)} domains")
    return State(node["units"].integer(), domains, groups, failed)


def _read_group(node: Node) -> Arrays:
    total = node["total_tokens"].integers()
    rows = range(len(total))
    arrays: dict[str, NDArray[Any]] = {"total_tokens": total}
    arrays["counts"] = np.stack([node["counts"].entry(row).integers() for row in rows])
    for name in SUMS:
        arrays[name] = np.stack([node[name].entry(row).numbers() for row in rows])
    return arrays
