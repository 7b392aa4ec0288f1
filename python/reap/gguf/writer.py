"""Writes GGUF files made of byte ranges of other files; it knows nothing of experts.

A `NewFile` says what the file will hold, down to the last byte, before anything is written. `write_set` then copies the ranges inside
the kernel where it can, to temporary files beside the outputs, which take the outputs' places only when all are complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from reap.errors import FormatError, OutputError, UsageError
from reap.gguf.copying import Copier, ask_for, forget, is_cached, memory_bytes, write_all
from reap.gguf.reader import DEFAULT_ALIGNMENT, MAGIC, SCALAR_CODES, GGUFFile, RegularFile, ValueType, pad
from reap.progress import Progress, ProgressCallback

# one step of a copy, how much is asked for before its turn, and after how much the disk is told to begin writing
_STEP_BYTES = 8 << 20
_AHEAD_BYTES = 32 << 20
_WRITE_BACK_BYTES = 32 << 20
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TEMPORARY_SUFFIX = ".reap-tmp"
_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
_HEADER_BYTES = 24


@dataclass(frozen=True, slots=True)
class Span:
    """`n_bytes` bytes of an open file, from `offset` on."""

    file: RegularFile
    offset: int
    n_bytes: int


Piece = Span | bytes


def _size(pieces: Iterable[Piece]) -> int:
    return sum(len(piece) if isinstance(piece, bytes) else piece.n_bytes for piece in pieces)


def merge_spans(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The same bytes in as few pieces as possible: neighbouring spans become one."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if piece == b"":
            continue
        if isinstance(piece, Span) and isinstance(last, Span) and last.file is piece.file and last.offset + last.n_bytes == piece.offset:
            merged[-1] = Span(last.file, last.offset, last.n_bytes + piece.n_bytes)
        elif isinstance(piece, bytes) and isinstance(last, bytes):
            merged[-1] = last + piece
        else:
            merged.append(piece)
    return tuple(merged)


class Writable(Protocol):
    """What `write` can write: pieces in order, and their exact size in bytes."""

    def pieces(self) -> Iterator[Piece]:
        """The whole file, in order."""

    @property
    def n_bytes(self) -> int:
        """The exact size of the file."""


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file to write that is nothing but its pieces."""

    parts: tuple[Piece, ...]

    def pieces(self) -> Iterator[Piece]:
        """The whole file, in order."""
        return iter(self.parts)

    @property
    def n_bytes(self) -> int:
        """The exact size of the file."""
        return _size(self.parts)


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write. shape: GGUF order, ne[0] first. type: ggml type id. pieces: its bytes, in order."""

    name: str
    shape: tuple[int, ...]
    type: int
    pieces: tuple[Piece, ...]

    @property
    def n_bytes(self) -> int:
        """Its size, without padding."""
        return _size(self.pieces)


@dataclass(frozen=True)
class NewFile:
    """A GGUF file to write. metadata: whole encoded pairs (key, type, value), `n_keys` of them, in order."""

    version: int
    alignment: int
    n_keys: int
    metadata: tuple[Piece, ...]
    tensors: tuple[NewTensor, ...]

    def pieces(self) -> Iterator[Piece]:
        """The whole file, in order."""
        header = (struct.pack("<4sIQQ", MAGIC, self.version, len(self.tensors), self.n_keys), *self.metadata, self._tensor_table())
        yield from header
        yield bytes(pad(_size(header), self.alignment) - _size(header))
        for tensor in self.tensors:
            yield from tensor.pieces
            # llama.cpp expects every tensor where the padded end of the one before is, and the last one padded too
            yield bytes(pad(tensor.n_bytes, self.alignment) - tensor.n_bytes)

    @property
    def n_bytes(self) -> int:
        """The exact size of the file."""
        return _size(self.pieces())

    def _tensor_table(self) -> bytes:
        entries, offset = [], 0
        for tensor in self.tensors:
            entries.append(_table_entry(tensor, offset))
            offset += pad(tensor.n_bytes, self.alignment)
        return b"".join(entries)


def _table_entry(tensor: NewTensor, offset: int) -> bytes:
    name, n_dims = tensor.name.encode(), len(tensor.shape)
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{n_dims}QIQ", n_dims, *tensor.shape, tensor.type, offset)


def split(whole: NewFile, max_bytes: int, pairs: Callable[[int, int], Iterable[bytes]]) -> tuple[NewFile, ...]:
    """`whole` as shards of at most `max_bytes` each, tensors in order, the metadata in the first; one that fits is one shard.

    pairs: (shard, shards) -> encoded pairs that every shard carries at its end. A tensor that is larger has a shard of its own.
    """
    if whole.n_bytes <= max_bytes:
        return (whole,)
    extra = tuple(pairs(0, 0))
    own = [] if whole.alignment == DEFAULT_ALIGNMENT else [encode_pair("general.alignment", whole.alignment, ValueType.UINT32)]
    groups: list[list[NewTensor]] = [[]]
    header, data = _HEADER_BYTES + _size(whole.metadata) + _size(extra), 0
    for tensor in whole.tensors:
        entry, n_bytes = len(_table_entry(tensor, 0)), pad(tensor.n_bytes, whole.alignment)
        if groups[-1] and pad(header + entry, whole.alignment) + data + n_bytes > max_bytes:
            groups.append([])
            header, data = _HEADER_BYTES + _size(own) + _size(extra), 0
        groups[-1].append(tensor)
        header, data = header + entry, data + n_bytes
    shards = []
    for index, tensors in enumerate(groups):
        added = tuple(pairs(index, len(groups)))
        metadata, n_keys = (tuple(own), len(own)) if index else (whole.metadata, whole.n_keys)
        shards.append(NewFile(whole.version, whole.alignment, n_keys + len(added), (*metadata, *added), tuple(tensors)))
    return tuple(shards)


# ---- metadata


def encode_pair(key: str, value: Any, type_id: int, array_type: int | None = None) -> bytes:
    """One metadata pair as stored: key, type id and value. Raises FormatError where the value does not fit the type."""
    name = key.encode()
    body = struct.pack("<I", type_id)
    try:
        if array_type is None:
            body += _encode(value, type_id)
        else:
            body += struct.pack("<IQ", array_type, len(value)) + b"".join(_encode(item, array_type) for item in value)
    except struct.error as error:
        raise FormatError(f"metadata {key!r}: {value!r} does not fit its type {ValueType(type_id).name}: {error}") from None
    return struct.pack("<Q", len(name)) + name + body


def _encode(value: Any, type_id: int) -> bytes:
    if type_id == ValueType.STRING:
        text = str(value).encode()
        return struct.pack("<Q", len(text)) + text
    return struct.pack("<" + SCALAR_CODES[type_id], value)


def edit_metadata(
    file: GGUFFile, *, replace: Mapping[str, bytes], drop: Collection[str] = (), append: Iterable[bytes] = ()
) -> tuple[int, tuple[Piece, ...]]:
    """(number of pairs, pieces): the pairs of `file` in their order, untouched ones as spans of it.

    replace: key -> encoded pair that takes its place. drop: keys to leave out. append: encoded pairs for the end.
    """
    pieces: list[Piece] = [
        replace.get(key, Span(file, pair.offset_bytes, pair.n_bytes)) for key, pair in file.metadata.items() if key not in drop
    ]
    pieces += append
    return len(pieces), merge_spans(pieces)


# ---- the output


def check_output(output: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Raise UsageError where `output` is one of the `inputs` however it is spelled, exists without `force`, or cannot be a file."""
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

    They get their names in reverse order when all are complete, so that the first, without which the others mean nothing, appears at
    the very end; and where it replaces another, that one goes first of all. A process killed in between leaves no first file.
    check: called with the paths of the complete temporary files before any takes its output's place; what it raises stops the write.
    Raises OutputError where a file cannot be written, UsageError where an output exists and `force` is not set, FormatError
    where a source has become shorter. Whatever is raised, KeyboardInterrupt included, no temporary file stays behind.
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
    """The path of an empty file beside `output` for somebody else to write, which takes its place when the block ends well.

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
    """A new locked file beside `output`, gone when the block ends unless it was renamed. Removes what dead writers left."""
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
        found = [entry.path for entry in entries if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
    for path in found:
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def _publish(temporary: Path, output: Path, *, force: bool) -> None:
    """Give the complete file its name. Without `force` a file that appeared meanwhile is left alone: FileExistsError."""
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


# ---- copying


class _Counter:
    """Bytes done, of all files of a set."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.progress is not None:
            self.progress(Progress(self.done, self.total, "bytes"))


def _write_pieces(fd: int, pieces: Iterable[Piece], counter: _Counter) -> None:
    start, end = 0, 0
    with Copier(fd) as copier:
        for piece, was_cached in _read_ahead(_steps(merge_spans(pieces))):
            for n_bytes in _copy(copier, piece):
                counter.add(n_bytes)
                end += n_bytes
            if isinstance(piece, Span) and not was_cached:
                forget(piece.file.fileno(), piece.offset, piece.n_bytes)
            if end - start >= _WRITE_BACK_BYTES:
                forget(fd, start, end - start)  # that is, begin to write, instead of waiting for fsync
                start = end


def _copy(copier: Copier, piece: Piece) -> Iterator[int]:
    if isinstance(piece, bytes):
        write_all(copier.target, piece)
        yield len(piece)
        return
    done = 0
    for n_bytes in copier.copy(piece.file.fileno(), piece.offset, piece.n_bytes):
        if n_bytes == 0:
            raise FormatError(f"{piece.file.path}: ends at byte {piece.offset + done:,}, but was longer when it was opened")
        done += n_bytes
        yield n_bytes


def _steps(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same bytes in pieces that are not too large to read ahead of."""
    for piece in pieces:
        if isinstance(piece, bytes):
            yield piece
        else:
            for start in range(0, piece.n_bytes, _STEP_BYTES):
                yield Span(piece.file, piece.offset + start, min(_STEP_BYTES, piece.n_bytes - start))


def _read_ahead(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, bool]]:
    """(piece, whether it was in memory already); what is not is asked for early, since kept experts lie apart from each other."""
    waiting: deque[tuple[Piece, bool]] = deque()
    n_waiting = 0
    for piece in pieces:
        was_cached = isinstance(piece, bytes) or is_cached(piece.file.fileno(), piece.offset)
        if isinstance(piece, Span) and not was_cached:
            ask_for(piece.file.fileno(), piece.offset, piece.n_bytes)
        waiting.append((piece, was_cached))
        n_waiting += _size((piece,))
        while n_waiting > _AHEAD_BYTES:
            n_waiting -= _size((waiting[0][0],))
            yield waiting.popleft()
    yield from waiting
