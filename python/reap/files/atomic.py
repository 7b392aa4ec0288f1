"""Files that appear whole or not at all, one or several of them: every file that reap writes goes through here.

The one rule: what is written has a temporary name beside its place until it is complete and on the disk, and then takes
its place in one step. What a killed process left is removed by the next writer of the same output. A file that is
there, or appeared meanwhile, is replaced with `force` alone. No output is an input or another output.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol

from reap.errors import OutputError, UsageError
from reap.files.copying import drop_cache, memory_bytes
from reap.files.paths import PathLike
from reap.files.ranges import ByteCounter, RawFile, Writable, write_pieces
from reap.files.temporaries import directory_lock, same_name, sync_directory, temporary_file
from reap.progress import ProgressCallback

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


# ---- before anything is written


def check_outputs(outputs: Iterable[PathLike | None], inputs: Iterable[PathLike | None] = (), *, force: bool) -> None:
    """Raise UsageError, before the work begins, for outputs that could not be written or would cost a file.

    As `check_distinct`; and an output that exists needs `force`, and its directory has to be there.
    """
    files = [Path(output) for output in outputs if output is not None and not is_stream(output)]
    check_distinct(files, inputs)
    for output in files:
        _check_place(output, force=force)


def check_distinct(outputs: Iterable[PathLike | None], inputs: Iterable[PathLike | None]) -> None:
    """Raise UsageError where an output is an input or another output.

    outputs: files to write. inputs: files that are read, and directories, whose files are then inputs all of them. In
    both None is passed over, and "-" (standard input) among the inputs. It does not matter how a path is spelled:
    relative, through links, as a hard link, in other letters where the file system does not tell them apart. A pipe or
    /dev/stdout is written into as it is, so nothing of this is asked of it.
    """
    taken = _Taken()
    for source in inputs:
        if source is not None and str(source) != "-":
            taken.add(Path(source), "input")
    for output in outputs:
        if output is None or is_stream(output):
            continue
        if (found := taken.find(Path(output))) is not None:
            raise UsageError(f"{output}: {found}; choose another output")
        taken.add(Path(output), "output")


def paths_of(*sources: object) -> list[PathLike]:
    """Those of the sources of a call that are paths, and not values in memory or None."""
    return [source for source in sources if isinstance(source, str | os.PathLike)]


def check_output(output: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """As `check_outputs` for one output that has to be a regular file."""
    if is_stream(output):
        raise UsageError(f"{output}: exists and is not a regular file")
    check_outputs([output], inputs, force=force)


class _Taken:
    """Paths that an output may not have: those that exist by device and inode, all others by directory and name."""

    def __init__(self) -> None:
        self._existing: dict[tuple[int, int], str] = {}
        self._absent: list[tuple[Path, str]] = []

    def add(self, path: Path, kind: str) -> None:
        found = _stat(path)
        if found is None:
            self._absent.append((_real(path), f"is the {kind} {path} as well"))
        elif stat.S_ISDIR(found.st_mode):
            for identity in _files_below(path):
                self._existing.setdefault(identity, f"is a file of the {kind} {path}")
        else:
            self._existing.setdefault((found.st_dev, found.st_ino), f"is the {kind} {path} itself")

    def find(self, path: Path) -> str | None:
        """What an error says of `path`; None where it may be written."""
        found = _stat(path)
        if found is not None:
            return self._existing.get((found.st_dev, found.st_ino))
        real = _real(path)
        return next((what for other, what in self._absent if same_name(real, other)), None)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _files_below(directory: Path) -> Iterator[tuple[int, int]]:
    for root, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):  # a link to nowhere
                found = os.stat(os.path.join(root, name))
                yield found.st_dev, found.st_ino


def _check_place(output: Path, *, force: bool) -> None:
    try:
        mode = os.stat(output).st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        raise UsageError(f"{output}: cannot be an output: {getattr(error, 'strerror', None) or error}") from None
    if mode is not None and not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise UsageError(f"{output}: exists and is {kind}")
    if mode is not None and not force:
        raise UsageError(f"{output}: exists already; --force (force=True) replaces it")
    parent = _real(output).parent
    if not parent.is_dir():
        raise UsageError(f"{output}: there is no directory {parent}")


def is_stream(output: PathLike) -> bool:
    """Whether an output is a pipe, a terminal or a descriptor of this process, which is written into and not
    replaced."""
    name = os.path.normpath(output)
    if name in ("/dev/stdout", "/dev/stderr") or name.startswith(("/dev/fd/", "/proc/self/fd/")):
        return True
    found = _stat(Path(output))
    return found is not None and (stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode))


def _real(output: Path) -> Path:
    # through a symbolic link, so that the file it names is replaced and not the link
    try:
        return Path(os.path.realpath(output))
    except ValueError:  # a NUL in it, which `_check_place` refuses
        return output


def check_space(output: Path, n_bytes: int) -> None:
    """Raise OutputError where the file system of `output` has less than `n_bytes` free."""
    try:
        room = os.statvfs(_real(output).parent)
    except OSError:
        return
    free = room.f_bavail * room.f_frsize
    if room.f_blocks and free < n_bytes:  # some network file systems report no blocks at all
        raise OutputError(f"{output}: needs {n_bytes:,} bytes, but only {free:,} are free there")


# ---- writing


def write_whole(path: PathLike, data: bytes, *, force: bool) -> Path:
    """Put `data` into `path`: whole, or not at all; into a pipe or /dev/stdout as it comes.

    Raises OutputError where it cannot be written, UsageError where a file is there and `force` is not set.
    """
    target = Path(path)
    if is_stream(target):
        with explained(target), open(target, "wb") as stream:
            stream.write(data)
    else:
        write(target, RawFile((data,)), force=force)
    return target


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
    counter = ByteCounter(total, progress)
    with ExitStack() as stack:
        temporaries = []
        for output, new_file in files:
            with explained(output):
                fd, temporary = stack.enter_context(temporary_file(_real(output)))
                write_pieces(fd, new_file.pieces(), counter)
                os.fsync(fd)
                if total > memory_bytes() // 4:
                    drop_cache(fd, 0, total)
            temporaries.append(temporary)
        if check is not None:
            with explained(files[0][0]):
                check(temporaries)
        _publish_set([output for output, _ in files], temporaries, force=force)


class Savable(Protocol):
    """What is written as one file: a plan, a sweep."""

    def save(self, path: PathLike, *, force: bool) -> Path: ...


class RewrittenOutput:
    """An output that a call writes again and again while it works.

    What was there before needs `force`, as everywhere; what the call wrote itself it replaces.
    """

    def __init__(self, path: PathLike, inputs: Iterable[PathLike | None], *, force: bool) -> None:
        """Raises what `check_outputs` does, before the work begins."""
        self.path = Path(path)
        self._force = force
        check_outputs([path], inputs, force=force)

    def save(self, made: Savable) -> None:
        """Write `made`, whole or not at all. Raises what `write_whole` does."""
        made.save(self.path, force=self._force)
        self._force = True


@contextmanager
def written_elsewhere(output: Path, *, force: bool = False) -> Iterator[Path]:
    """The path of an empty file beside `output` for somebody else to write, which takes its place when the block ends
    well.

    Raises as `write_set`; no temporary file stays behind.
    """
    with explained(output), temporary_file(_real(output)) as (fd, temporary):
        yield temporary
        os.fsync(fd)
        _publish(temporary, _real(output), force=force)
        sync_directory(_real(output).parent)


def _publish_set(outputs: Sequence[Path], temporaries: Sequence[Path], *, force: bool) -> None:
    first, published = _real(outputs[0]), list[Path]()
    # two sets with the same names would otherwise mix
    lock = directory_lock(first.parent) if len(outputs) > 1 else nullcontext()
    with explained(outputs[0]), lock:
        try:
            if len(outputs) > 1 and force:
                with suppress(FileNotFoundError):
                    first.unlink()
                sync_directory(first.parent)
            for output, temporary in reversed(list(zip(outputs, temporaries, strict=True))):
                with explained(output):
                    _publish(temporary, _real(output), force=force)
                published.append(_real(output))
                if len(outputs) > 1:  # the order of names must also be the order on the disk
                    sync_directory(published[-1].parent)
        except BaseException:
            if len(published) < len(outputs):
                for output in published:
                    with suppress(OSError):
                        output.unlink()
            raise
        sync_directory(first.parent)


@contextmanager
def explained(output: Path) -> Iterator[None]:
    """An OSError of what is inside becomes UsageError where the output exists, OutputError otherwise."""
    try:
        yield
    except FileExistsError:
        raise UsageError(f"{output}: exists already; --force (force=True) replaces it") from None
    except OSError as error:
        what = "the disk is full" if error.errno in _NO_SPACE else (error.strerror or str(error))
        raise OutputError(f"{output}: cannot be written: {what}; nothing was left behind") from None


def _publish(temporary: Path, output: Path, *, force: bool) -> None:
    """Give the complete file its name. Without `force` a file that appeared meanwhile is left alone:
    FileExistsError."""
    if force:
        os.replace(temporary, output)
        return
    if output.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output))
    try:
        os.link(temporary, output)
    except FileExistsError:
        raise
    except OSError:  # no hard links here: the look and the rename are then two steps
        if os.path.lexists(output):
            raise FileExistsError(output) from None
        os.replace(temporary, output)
