"""A directory that appears whole or not at all: written beside its place under another name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from reap.errors import UsageError
from reap.files.atomic import explained
from reap.files.temporaries import set_aside, sync_directory, temporary_directory


def check_output_directory(output: Path, inputs: Iterable[Path], *, marker: str, force: bool) -> None:
    """Raise UsageError where `output` is one of the `inputs`, lies in it or holds it, exists without `force`, or is not
    for us to replace.

    An empty directory is as good as none. `force` replaces only what looks like an earlier output: a directory that
    holds the file `marker`.
    """
    check_apart(output, inputs)
    real = Path(os.path.realpath(output))
    if not real.parent.is_dir():
        raise UsageError(f"{output}: there is no directory {real.parent}")
    if not os.path.lexists(real):
        return
    if not real.is_dir():
        raise UsageError(f"{output}: exists and is not a directory")
    if not any(real.iterdir()):
        return
    if not force:
        raise UsageError(f"{output}: exists already; --force (force=True) replaces it")
    if not (real / marker).is_file():
        raise UsageError(
            f"{output}: exists and has no {marker}, so it is not a directory that --force (force=True) would replace"
        )


def check_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Raise UsageError where a directory to write is one of the `inputs`, lies in it or holds it."""
    real = Path(os.path.realpath(output))
    for source in inputs:
        origin = Path(os.path.realpath(source))
        if real == origin or origin in real.parents or real in origin.parents:
            raise UsageError(f"{output}: is the input {source}, lies in it or holds it; choose another output")


@contextmanager
def new_directory(output: Path, *, force: bool) -> Iterator[Path]:
    """An empty directory beside `output` that takes its place when the block ends well, and is gone when it does not.

    It is locked while it is written, and what dead writers left beside it is removed. Raises OutputError, and
    UsageError where an output appeared meanwhile.
    """
    real = Path(os.path.realpath(output))
    with ExitStack() as stack:
        with explained(output):
            fd, temporary = stack.enter_context(temporary_directory(real))
        yield temporary
        with explained(output):
            os.fsync(fd)
            _publish(temporary, real, force=force)


def _publish(temporary: Path, real: Path, *, force: bool) -> None:
    """Give the complete directory its name. What it replaces is out of the way for the moment between two renames, and
    then removed."""
    with ExitStack() as stack:
        if force and real.is_dir() and any(real.iterdir()):
            stack.enter_context(set_aside(real))
        try:
            os.rename(temporary, real)  # onto nothing, or onto an empty directory; another one is an error
        except OSError as error:
            raise FileExistsError(real) if os.path.lexists(real) else error from None
        sync_directory(real.parent)
