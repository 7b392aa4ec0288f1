"""What files hold: their SHA-256, and of one that was not touched since the last look the one found then."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.errors import UsageError
from reap.files.paths import PathLike
from reap.files.recognise import unreadable_text
from reap.files.strict_json import Node

_BLOCK = 1 << 20
_STAMP_LENGTH = 5
#: A file that was changed so shortly before it was read may have been changed again within the same tick of its clock.
_TICK_NS = 2_000_000_000


@dataclass(frozen=True)
class _Seen:
    """What a file was when it was read."""

    sha256: str
    stamp: tuple[int, ...]
    """Device, inode, bytes, and the two times that change with it, in nanoseconds."""
    at: int
    """When it was read, in nanoseconds."""

    def holds_for(self, stamp: tuple[int, ...]) -> bool:
        """Whether a file with this stamp is still the same, beyond doubt."""
        return stamp == self.stamp and max(stamp[3:]) + _TICK_NS < self.at


class Contents:
    """Digests of files by path; a file is read once, and again only where its stamp says that it was touched."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def sha256(self, path: PathLike) -> str:
        """Of one file. Raises UsageError where it cannot be read."""
        name = os.path.realpath(path)
        try:
            with open(name, "rb") as file:
                stamp = _stamp(os.fstat(file.fileno()))
                known = self._seen.get(name)
                if known is None or not known.holds_for(stamp):
                    at = time.time_ns()
                    digest = hashlib.sha256()
                    while block := file.read(_BLOCK):
                        digest.update(block)
                    known = self._seen[name] = _Seen(digest.hexdigest(), stamp, at)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {unreadable_text(path, error)}") from error
        return known.sha256

    def of_files(self, paths: Sequence[PathLike]) -> list[str]:
        """Of several files, in order."""
        return [self.sha256(path) for path in paths]

    def forget(self, path: Path) -> None:
        """The file is gone, or about to be another one."""
        self._seen.pop(os.path.realpath(path), None)

    # ---- for a state file

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            name: {"sha256": seen.sha256, "stamp": list(seen.stamp), "at": seen.at} for name, seen in self._seen.items()
        }

    def restore(self, node: Node) -> None:
        """Take what `to_dict` gave. Raises FormatError."""
        for name, item in node.items():
            entries = item["stamp"].entries()
            stamp = tuple(item["stamp"].entry(index).integer() for index in range(len(entries)))
            if len(stamp) != _STAMP_LENGTH:
                item["stamp"].fail(f"has {len(stamp)} numbers, expected {_STAMP_LENGTH}")
            self._seen[name] = _Seen(item["sha256"].string(), stamp, item["at"].integer())


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
