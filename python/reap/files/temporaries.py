"""Temporary files and directories beside an output: named after it, locked while a living process writes them, and
removed by the next writer of the same output where none does."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".reap-tmp"
_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
_LONGEST_NAME = 200  # bytes of the output's name; with ours around it, it must stay below the 255 of a file name


@contextmanager
def temporary_file(output: Path) -> Iterator[tuple[int, Path]]:
    """(descriptor, path) of a new empty locked file beside `output`; gone when the block ends unless it was renamed.

    What dead writers of `output` left is removed first. Raises OSError.
    """
    with _temporary(output, _make_file) as made:
        yield made


@contextmanager
def temporary_directory(output: Path) -> Iterator[tuple[int, Path]]:
    """The same, a directory; what it holds goes with it."""
    with _temporary(output, _make_directory) as made:
        yield made


@contextmanager
def set_aside(directory: Path) -> Iterator[Path]:
    """A directory under a temporary name of its own, for another to take its place; removed when the block ends well,
    back in its place when it does not."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        _lock(fd)  # or another writer would take it for stale
        aside = directory.parent / _new_name(directory)
        os.rename(directory, aside)
        try:
            yield aside
        except BaseException:
            os.rename(aside, directory)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(fd)


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Only one process at a time is inside, where the file system has locks."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def sync_directory(directory: Path) -> None:
    """The names in it to the disk. Some file systems refuse it; what was renamed is renamed all the same."""
    with suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def same_name(first: Path, second: Path) -> bool:
    """Whether two real paths to files that are not there yet would be one file: the same name in the same directory,
    or names that the directory does not tell apart, which is tried out."""
    if first == second:
        return True
    if _folded(first.name) != _folded(second.name):
        return False
    try:
        if not os.path.samefile(first.parent, second.parent):
            return False
        if first.name == second.name:
            return True
        with temporary_file(first) as (_, made):
            random_part = made.name.removeprefix(_stem(first))
            return os.path.exists(made.with_name(_stem(second) + random_part))
    except OSError:  # nothing can be written there in any case
        return False


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@contextmanager
def _temporary(output: Path, make: Callable[[Path], int]) -> Iterator[tuple[int, Path]]:
    _remove_stale(output)
    fd, path = _create_locked(output, make)
    try:
        yield fd, path
    finally:
        _remove(path)  # not there where it was renamed
        os.close(fd)


def _create_locked(output: Path, make: Callable[[Path], int]) -> tuple[int, Path]:
    while True:
        path = output.parent / _new_name(output)
        try:
            fd = make(path)
        except FileExistsError:
            continue
        with suppress(FileNotFoundError):  # another writer took it for stale in the moment before the lock
            if _lock(fd) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd, path
        os.close(fd)


def _make_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _make_directory(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)


def _lock(fd: int) -> bool:
    """False if another process holds the lock; True also where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _new_name(output: Path) -> str:
    return f"{_stem(output)}{secrets.token_hex(4)}{SUFFIX}"


def _stem(output: Path) -> str:
    name = _SHARD_SUFFIX.sub("", output.name)  # however many shards the next set has, it finds what this one left
    # llama.cpp's converter fills in {templates} in a name
    if len(os.fsencode(name)) > _LONGEST_NAME or "{" in name:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


def _remove_stale(output: Path) -> None:
    """Remove temporaries of the same output that no living process holds."""
    pattern = re.compile(re.escape(_stem(output)) + "[0-9a-f]{8}" + re.escape(SUFFIX))
    with os.scandir(output.parent) as entries:
        found = [
            (Path(entry.path), entry.is_dir(follow_symlinks=False))
            for entry in entries
            if pattern.fullmatch(entry.name) and not entry.is_symlink()
        ]
    for path, is_directory in found:
        with suppress(OSError):
            how = os.O_RDONLY | os.O_DIRECTORY if is_directory else os.O_RDWR | os.O_NONBLOCK
            fd = os.open(path, how | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
