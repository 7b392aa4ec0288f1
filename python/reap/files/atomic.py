"""Files that appear whole or not at all, one or several of them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from reap.errors import OutputError, UsageError
from reap.files.copying import forget, memory_bytes
from reap.files.ranges import Writable, _Counter, _write_pieces
from reap.progress import ProgressCallback

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TEMPORARY_SUFFIX = ".reap-tmp"
_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")


# ---- the output


def check_output(output: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Raise UsageError where `output` is one of the `inputs` however it is spelled, exists without `force`, or cannot
    be a file."""
    for source in inputs:
        with suppress(OSError):
            if os.path.samefile(output, source):
                raise UsageError(f"{output}: is the input {source} itself; choose another output")
    try:
        mode = os.stat(output).st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise UsageError(f"{output}: cannot be an output: {error.strerror}") from None
    if mode is not None and not stat.S_ISREG(mode):
        raise UsageError(f"{output}: exists and is not a regular file")
    if mode is not None and not force:
        raise UsageError(f"{output}: exists already; --force (force=True) replaces it")
    parent = _real(output).parent
    if not parent.is_dir():
        raise UsageError(f"{output}: there is no directory {parent}")


def _real(output: Path) -> Path:
    # through a symbolic link, so that the file it names is replaced and not the link
    return Path(os.path.realpath(output))


def check_space(output: Path, n_bytes: int) -> None:
    """Raise OutputError where the file system of `output` has less than `n_bytes` free."""
    try:
        room = os.statvfs(_real(output).parent)
    except OSError:
        return
    free = room.f_bavail * room.f_frsize
    if room.f_blocks and free < n_bytes:  # some network file systems report no blocks at all
        raise OutputError(f"{output}: needs {n_bytes:,} bytes, but only {free:,} are free there")


def write(
    output: Path,
    new_file: Writable,
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Write `new_file` to `output`: whole, or not at all. As `write_set` with one file."""

    def check_one(temporaries: Sequence[Path]) -> None:
        if check is not None:
            check(temporaries[0])

    write_set([(output, new_file)], force=force, check=check_one, progress=progress)


def write_set(
    files: Sequence[tuple[Path, Writable]],
    *,
    force: bool = False,
    check: Callable[[Sequence[Path]], None] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Write files that belong together: all or none, as far as names can tell.

    They get their names in reverse order when all are complete, so that the first, without which the others mean
    nothing, appears at the very end; and where it replaces another, that one goes first of all. A process killed in
    between leaves no first file. check: called with the paths of the complete temporary files before any takes its
    output's place; what it raises stops the write. Raises OutputError where a file cannot be written, UsageError where
    an output exists and `force` is not set, FormatError where a source has become shorter. Whatever is raised,
    KeyboardInterrupt included, no temporary file stays behind.
    """
    total = sum(new_file.n_bytes for _, new_file in files)
    check_space(files[0][0], total)
    counter = _Counter(total, progress)
    with ExitStack() as stack:
        temporaries = []
        for output, new_file in files:
            with _explained(output):
                fd, temporary = stack.enter_context(_temporary(_real(output)))
                _write_pieces(fd, new_file.pieces(), counter)
                os.fsync(fd)
                if total > memory_bytes() // 4:
                    forget(fd, 0, total)
            temporaries.append(temporary)
        if check is not None:
            with _explained(files[0][0]):
                check(temporaries)
        _publish_set([output for output, _ in files], temporaries, force=force)


@contextmanager
def written_elsewhere(output: Path, *, force: bool = False) -> Iterator[Path]:
    """The path of an empty file beside `output` for somebody else to write, which takes its place when the block ends
    well.

    Raises as `write_set`; no temporary file stays behind.
    """
    with _explained(output), _temporary(_real(output)) as (fd, temporary):
        yield temporary
        os.fsync(fd)
        _publish(temporary, _real(output), force=force)
        _sync_directory(_real(output).parent)


def _publish_set(outputs: Sequence[Path], temporaries: Sequence[Path], *, force: bool) -> None:
    first, published = _real(outputs[0]), list[Path]()
    with _explained(outputs[0]), _directory_lock(first.parent, needed=len(outputs) > 1):
        try:
            if len(outputs) > 1 and force:
                with suppress(FileNotFoundError):
                    first.unlink()
                _sync_directory(first.parent)
            for output, temporary in reversed(list(zip(outputs, temporaries, strict=True))):
                with _explained(output):
                    _publish(temporary, _real(output), force=force)
                published.append(_real(output))
                if len(outputs) > 1:  # the order of names must also be the order on the disk
                    _sync_directory(published[-1].parent)
        except BaseException:
            if len(published) < len(outputs):
                for output in published:
                    with suppress(OSError):
                        output.unlink()
            raise
        _sync_directory(first.parent)


@contextmanager
def _directory_lock(directory: Path, *, needed: bool) -> Iterator[None]:
    """While the names of a set change: two sets with the same names would otherwise mix."""
    if not needed:
        yield
        return
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UsageError(f"{output}: exists already; --force (force=True) replaces it") from None
    except OSError as error:
        what = "the disk is full" if error.errno in _NO_SPACE else (error.strerror or str(error))
        raise OutputError(f"{output}: cannot be written: {what}; nothing was left behind") from None


@contextmanager
def _temporary(output: Path) -> Iterator[tuple[int, Path]]:
    """A new locked file beside `output`, gone when the block ends unless it was renamed. Removes what dead writers
    left."""
    stem = _temporary_stem(output)
    _remove_stale(output.parent, stem)
    fd, path = _create_locked(output.parent, stem)
    try:
        yield fd, path
    finally:
        with suppress(OSError):  # not there where it was renamed
            os.unlink(path)
        os.close(fd)


def _temporary_stem(output: Path) -> str:
    name = _SHARD_SUFFIX.sub("", output.name)  # however many shards the next set has, it finds what this one left
    if len(os.fsencode(name)) > 200:  # the temporary name must stay below the 255 bytes of a file name
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


def _create_locked(directory: Path, stem: str) -> tuple[int, Path]:
    while True:
        path = directory / f"{stem}{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        if _lock(fd) and os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)  # another writer took it for stale in the moment before the lock


def _lock(fd: int) -> bool:
    """False if another process holds the lock; True also where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove_stale(directory: Path, stem: str) -> None:
    """Remove temporary files of the same output that no living process holds."""
    pattern = re.compile(re.escape(stem) + "[0-9a-f]{8}" + re.escape(_TEMPORARY_SUFFIX))
    with os.scandir(directory) as entries:
        found = [
            entry.path for entry in entries if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        ]
    for path in found:
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def _publish(temporary: Path, output: Path, *, force: bool) -> None:
    """Give the complete file its name. Without `force` a file that appeared meanwhile is left alone:
    FileExistsError."""
    if force:
        os.replace(temporary, output)
        return
    try:
        os.link(temporary, output)
    except FileExistsError:
        raise
    except OSError:  # no hard links here: the look and the rename are then two steps
        if os.path.lexists(output):
            raise FileExistsError(output) from None
        os.replace(temporary, output)


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # some file systems refuse it; the rename is done all the same
        fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
