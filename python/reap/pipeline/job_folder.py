"""A folder in which a job leaves its files, and a file in it that says of which inputs and options each was made.

A step is done where its outputs are what it wrote, from the inputs and options that it has now; all by content, so that
a file that was only touched changes nothing. What a killed job was about to write is known as well, and so is not taken
for somebody else's.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reap.errors import OutputError, UsageError
from reap.files.atomic import write_whole
from reap.files.strict_json import json_bytes, read_json
from reap.pipeline.contents import Contents

VERSION = 1


@dataclass(frozen=True)
class Step:
    """One step of a job."""

    name: str
    """What it does, in a word."""
    outputs: tuple[str, ...]
    """Names of the files that it leaves in the folder."""
    identity: Callable[[], dict[str, Any]]
    """All that its outputs follow from, as JSON types: digests, options. Asked when the steps before are done."""
    run: Callable[[], None]
    """Do it. The outputs are whole or not there when it ends, however it ends."""
    scratch: tuple[str, ...] = ()
    """Names of files that hold what an interrupted run left; gone when the step is done."""
    is_whole: Callable[[], bool] = lambda: True
    """Whether outputs that are there are complete; asked where a run ended before it could say so."""


@dataclass(frozen=True)
class _Made:
    """What a step wrote, and of what."""

    identity: dict[str, Any]
    outputs: dict[str, str]
    """File name -> SHA-256."""


@dataclass
class JobFolder:
    """The folder, and what it remembers. Made by `opened`."""

    path: Path
    """The folder."""
    state_path: Path
    """The file in it that says what was made of what."""
    form: str
    """The format of that file."""
    contents: Contents = field(default_factory=Contents)
    """Digests of the job's files and of its inputs."""
    made: dict[str, _Made] = field(default_factory=dict)
    """Step -> what it wrote."""
    begun: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Step that had begun and not ended -> its identity then."""

    # ---- before anything runs

    def check(self, steps: Sequence[Step], *, force: bool) -> None:
        """UsageError where a step would replace a file that this job did not write, or that was changed since.

        `force` takes back what was changed; what the job did not write it never replaces.
        """
        for step in steps:
            for name in self._changed(step):
                if not force:
                    raise UsageError(
                        f"{self.path / name}: was changed since {self.form} wrote it; --force (force=True) writes it"
                        " anew, a copy of it elsewhere keeps the change"
                    )
            for name in self._foreign(step):
                raise UsageError(
                    f"{self.path / name}: is there and was not written by this job, which would write a file of that"
                    " name; move it, or choose another folder"
                )

    def _foreign(self, step: Step) -> list[str]:
        known = self.made[step.name].outputs if step.name in self.made else {}
        if step.name in self.begun:
            return []
        return [name for name in step.outputs if name not in known and os.path.lexists(self.path / name)]

    def _changed(self, step: Step) -> list[str]:
        """Outputs that are there and not as they were written."""
        if step.name not in self.made:
            return []
        there = {name: sha for name, sha in self.made[step.name].outputs.items() if os.path.lexists(self.path / name)}
        return [name for name, sha in there.items() if self.contents.sha256(self.path / name) != sha]

    # ---- step by step

    def is_done(self, step: Step, identity: Mapping[str, Any]) -> bool:
        """Whether the step's files are there, as it wrote them, and nothing that they follow from has changed."""
        self._adopt(step, identity)
        made = self.made.get(step.name)
        return (
            made is not None
            and made.identity == _as_json(identity)
            and set(made.outputs) == set(step.outputs)
            and all((self.path / name).is_file() for name in step.outputs)
            and not self._changed(step)
        )

    def _adopt(self, step: Step, identity: Mapping[str, Any]) -> None:
        """A step that ended, and was killed before it could say so, is done."""
        if self.begun.get(step.name) != _as_json(identity):
            return
        if all((self.path / name).is_file() for name in step.outputs) and step.is_whole():
            self._finish(step, identity)

    def run(self, step: Step, identity: Mapping[str, Any]) -> None:
        """Run a step, and remember what it wrote."""
        before = self.made.get(step.name)
        for name, sha in before.outputs.items() if before is not None else ():
            path = self.path / name
            # gone before the step begins: what is there when it is killed is then what it wrote itself
            if path.is_file() and (name in step.outputs or self.contents.sha256(path) == sha):
                path.unlink()
                self.contents.forget(path)
        self.made.pop(step.name, None)
        if step.name not in self.begun:
            self._remove_scratch(step)
        elif self.begun[step.name] != _as_json(identity):
            for name in step.outputs:
                (self.path / name).unlink(missing_ok=True)
        self.begun[step.name] = _as_json(identity)
        self.save()
        step.run()
        self._finish(step, identity)

    def _finish(self, step: Step, identity: Mapping[str, Any]) -> None:
        outputs = {name: self.contents.sha256(self.path / name) for name in step.outputs}
        self.made[step.name] = _Made(_as_json(identity), outputs)
        self.begun.pop(step.name, None)
        self.save()
        self._remove_scratch(step)

    def clean(self, step: Step) -> None:
        """Remove what a step that is done left over where it was killed at its very end."""
        self._remove_scratch(step)

    def _remove_scratch(self, step: Step) -> None:
        for name in step.scratch:
            (self.path / name).unlink(missing_ok=True)

    # ---- the state file

    def save(self) -> None:
        """Write down what was made of what. Raises OutputError."""
        document = {
            "format": self.form,
            "version": VERSION,
            "steps": {name: {"identity": made.identity, "outputs": made.outputs} for name, made in self.made.items()},
            "begun": self.begun,
            "contents": self.contents.to_dict(),
        }
        write_whole(self.state_path, json_bytes(document), force=True)

    def load(self) -> None:
        """Read it, where it is there. Raises FormatError where it is not of this job's kind."""
        if not os.path.lexists(self.state_path):
            return
        root = read_json(self.state_path, what="state of a job")
        if root["format"].string() != self.form or root["version"].integer() != VERSION:
            root["format"].fail(f"should be {self.form!r} in version {VERSION}: it is not the state of such a job")
        for name, node in root["steps"].items():
            outputs = {file: sha.string() for file, sha in node["outputs"].items()}
            if any(os.path.basename(file) != file or file in ("", ".", "..") for file in outputs):
                node["outputs"].fail("should name files of this folder")
            self.made[name] = _Made(node["identity"].members(), outputs)
        self.begun = {name: node.members() for name, node in root["begun"].items()}
        self.contents.restore(root["contents"])


@contextmanager
def opened(path: Path, form: str, *, writes: bool = True) -> Iterator[JobFolder]:
    """The folder of a job, made where it is not there, for this process alone.

    writes: off for a look that leaves nothing. Raises UsageError where another process works in it, or it cannot be a
    folder, OutputError where it cannot be made.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise UsageError(f"{path}: exists and is not a folder")
    if writes:
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no directory {path.absolute().parent}")
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path}: cannot be made: {error.strerror or error}") from error
    with _locked(path) if writes else nullcontext():
        folder = JobFolder(path, path / f"{form.removeprefix('reap.')}.json", form)
        folder.load()
        yield folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{path}: another process works in this folder") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(fd)


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: tuples are lists there."""
    found: dict[str, Any] = json.loads(json.dumps(identity))
    return found
