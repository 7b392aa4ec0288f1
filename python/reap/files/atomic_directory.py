"""A directory that appears whole or not at all: written beside its place under another name, then renamed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reap.errors import OutputError, UsageError

_SUFFIX = ".reap-tmp"


def check_output_directory(output: Path, source: Path, *, marker: str, force: bool) -> None:
    """Raise UsageError where `output` is the source, lies in it or holds it, exists without `force`, or is not for us
    to replace.

    An empty directory is as good as none. `force` replaces only what looks like an earlier output: a directory that
    holds the file `marker`.
    """
    real, origin = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    if real == origin or origin in real.parents or real in origin.parents:
        raise UsageError(f"{output}: is the input {source}, lies in it or holds it; choose another output")
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


@contextmanager
def new_directory(output: Path, *, force: bool) -> Iterator[Path]:
    """An empty directory beside `output` that takes its place when the block ends well, and is gone when it does not.

    It is locked while it is written, and what dead writers left beside it is removed. Raises OutputError, and
    UsageError where an output appeared meanwhile.
    """
    real = Path(os.path.realpath(output))
    stem = _stem(real.name)
    try:
        _remove_stale(real.parent, stem)
        temporary, fd = _create(real.parent, stem)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from None
    try:
        yield temporary
        try:
            os.fsync(fd)
            _publish(temporary, real, stem, force=force)
        except FileExistsError:
            raise UsageError(f"{output}: exists already; --force (force=True) replaces it") from None
        except OSError as error:
            raise OutputError(
                f"{output}: cannot be written: {error.strerror or error}; nothing was left behind"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # not there where it was renamed
        os.close(fd)


def _stem(name: str) -> str:
    return f".{name if len(os.fsencode(name)) <= 200 else hashlib.sha256(os.fsencode(name)).hexdigest()}."


def _create(parent: Path, stem: str) -> tuple[Path, int]:
    while True:
        path = parent / f"{stem}{secrets.token_hex(4)}{_SUFFIX}"
        with suppress(FileExistsError):
            path.mkdir()
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            if _lock(fd) and path.exists():
                return path, fd
            os.close(fd)  # another writer took it for stale in the moment before the lock


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # not every file system has locks
        return True
    return True


def _remove_stale(parent: Path, stem: str) -> None:
    """Remove temporary directories of the same output that no living process holds."""
    pattern = re.compile(re.escape(stem) + "[0-9a-f]{8}" + re.escape(_SUFFIX))
    for path in [path for path in parent.iterdir() if pattern.fullmatch(path.name) and not path.is_symlink()]:
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


def _publish(temporary: Path, real: Path, stem: str, *, force: bool) -> None:
    """Give the complete directory its name. What it replaces is out of the way for the moment between two renames, and
    then removed."""
    old: Path | None = None
    if force and real.is_dir() and any(real.iterdir()):
        old = real.parent / f"{stem}{secrets.token_hex(4)}{_SUFFIX}"
        os.rename(real, old)
    try:
        os.rename(temporary, real)  # onto nothing, or onto an empty directory; another one is an error
    except OSError as error:
        if old is not None:
            os.rename(old, real)
        raise FileExistsError(real) if real.exists() else error from None
    _sync(real.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    with suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
