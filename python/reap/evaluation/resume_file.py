"""What a sweep or a search has done so far, in a file beside its output, so that a later call goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from reap.errors import FormatError, MismatchError, OutputError
from reap.files.atomic import write_whole
from reap.files.paths import PathLike
from reap.files.strict_json import Node, json_bytes, read_json
from reap.profiling.resume import check_seal, in_the_way, sealed

VERSION = 2
_SECONDS = 10.0  # between two savings
_SAVING_SHARE = 0.05  # of the time, at most, that saving may take


def resume_path(output: PathLike) -> Path:
    """Where a call that writes `output` keeps what it has done."""
    target = Path(output)
    return target.with_name(f"{target.name}.resume")


class ResumeFile:
    """`OUTPUT.resume`, written whole or not at all, at most every few seconds; gone when the output is complete."""

    def __init__(self, output: PathLike, form: str, *, resume: bool) -> None:
        """Look for the file.

        Args:
            output: the file that the call is to write.
            form: of the file's contents: "reap.sweep.resume".
            resume: go on from it where it is there.

        Raises:
            UsageError: a file is there and `resume` is off.
            FormatError: it is damaged, or of another kind.
        """
        self.path = resume_path(output)
        self._form = form
        self._saved_at = time.monotonic()
        self._cost = 0.0
        self.identity: dict[str, Any] = {}
        self.node: Node | None = None
        if not self.path.exists():
            return
        if not resume:
            raise in_the_way(self.path)
        self.node = read_json(self.path, what="resume file")
        if self.node["format"].string() != form or self.node["version"].integer() != VERSION:
            raise FormatError(f"{self.path}: is not a resume file of this kind and this version of reap")
        check_seal(self.node)

    def check(self, identity: Mapping[str, Any]) -> None:
        """Say what the run is, as JSON types. Raises MismatchError where the file is of another one."""
        self.identity = json.loads(json.dumps(identity))
        if self.node is None:
            return
        found = self.node["identity"].members()
        for name, wanted in self.identity.items():
            if found.get(name) != wanted:
                raise MismatchError(
                    f"{self.path}: is of a run with {name} {_short(found.get(name))}, where this one has"
                    f" {_short(wanted)}"
                )

    def save_if_due(self, state: Mapping[str, Any]) -> None:
        """Write the state where enough time has passed. A disk that is full does not end the run."""
        is_new = not self.path.exists()  # where an output is there before it is complete, so is what to go on from
        if is_new or time.monotonic() - self._saved_at >= max(_SECONDS, self._cost / _SAVING_SHARE):
            with suppress(OutputError):
                self.save(state)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state. Raises OutputError."""
        started = time.monotonic()
        document = {"format": self._form, "version": VERSION, "identity": self.identity, "state": state}
        write_whole(self.path, json_bytes(sealed(document)), force=True)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def remove(self) -> None:
        """The output is complete."""
        self.path.unlink(missing_ok=True)


def _short(value: object, width: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= width else text[: width - 3] + "..."
