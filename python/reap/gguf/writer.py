"""Writes GGUF files made of byte ranges of other files; it knows nothing of experts.

A `NewFile` says what the file will hold, down to the last byte, before anything is written. `write` then copies the ranges inside
the kernel where it can, to a temporary file beside the output, which takes the output's place only when it is complete.
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.errors import FormatError, OutputError, UsageError
from reap.gguf.reader import MAGIC, SCALAR_CODES, GGUFFile, ValueType, pad
from reap.progress import Progress, ProgressCallback

BUFFER_BYTES = 8 << 20
# one kernel call copies at most this much, so that Ctrl-C and progress are never far away
_KERNEL_CHUNK_BYTES = 64 << 20
# what a kernel or a file system answers when it does not offer a way of copying
_NOT_OFFERED = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EBADF, errno.ENOTSOCK}
)
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TEMPORARY_SUFFIX = ".reap-tmp"


@dataclass(frozen=True, slots=True)
class Span:
    """`n_bytes` bytes of an open file, from `offset` on."""

    file: GGUFFile
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
            name = tensor.name.encode()
            n_dims = len(tensor.shape)
            entries.append(struct.pack("<Q", len(name)) + name)
            entries.append(struct.pack(f"<I{n_dims}QIQ", n_dims, *tensor.shape, tensor.type, offset))
            offset += pad(tensor.n_bytes, self.alignment)
        return b"".join(entries)


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
    new_file: NewFile,
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Write `new_file` to `output`: whole, or not at all.

    check: called with the path of the complete temporary file before it takes the output's place; what it raises stops the write.
    Raises OutputError where the file cannot be written, UsageError where `output` exists and `force` is not set, FormatError
    where a source has become shorter. Whatever is raised, KeyboardInterrupt included, no temporary file stays behind.
    """
    total = new_file.n_bytes
    check_space(output, total)
    with _explained(output), _temporary(_real(output)) as (fd, temporary):
        _write_pieces(fd, new_file.pieces(), total, progress)
        os.fsync(fd)
        if check is not None:
            check(temporary)
        _publish(temporary, _real(output), force=force)
        _sync_directory(_real(output).parent)


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
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(fd)


def _temporary_stem(output: Path) -> str:
    name = output.name
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


def _write_pieces(fd: int, pieces: Iterable[Piece], total: int, progress: ProgressCallback | None) -> None:
    done = 0
    copier = _Copier(fd)
    for piece in merge_spans(pieces):
        for n_bytes in copier.literal(piece) if isinstance(piece, bytes) else copier.span(piece):
            done += n_bytes
            if progress is not None:
                progress(Progress(done, total, "bytes"))


_Way = Callable[[int, int, int, int], int]


def _by_copy_file_range(source: int, target: int, offset: int, n_bytes: int) -> int:
    return os.copy_file_range(source, target, min(n_bytes, _KERNEL_CHUNK_BYTES), offset_src=offset)


def _by_sendfile(source: int, target: int, offset: int, n_bytes: int) -> int:
    return os.sendfile(target, source, offset, min(n_bytes, _KERNEL_CHUNK_BYTES))


def _by_buffer(source: int, target: int, offset: int, n_bytes: int) -> int:
    chunk = os.pread(source, min(n_bytes, BUFFER_BYTES), offset)
    _write_all(target, chunk)
    return len(chunk)


def _write_all(target: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(target, view) :]


class _Copier:
    """Appends to a file, by the fastest way that kernel and file systems offer; each step yields the bytes it wrote."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.ways: list[_Way] = [_by_sendfile, _by_buffer]
        if hasattr(os, "copy_file_range"):
            self.ways.insert(0, _by_copy_file_range)

    def literal(self, chunk: bytes) -> Iterator[int]:
        _write_all(self.target, chunk)
        yield len(chunk)

    def span(self, span: Span) -> Iterator[int]:
        offset, end = span.offset, span.offset + span.n_bytes
        while offset < end:
            n_bytes = self.step(span.file.fileno(), offset, end - offset)
            if n_bytes == 0:
                raise FormatError(f"{span.file.path}: ends at byte {offset:,}, but was longer when it was opened")
            offset += n_bytes
            yield n_bytes

    def step(self, source: int, offset: int, n_bytes: int) -> int:
        while len(self.ways) > 1:
            try:
                copied = self.ways[0](source, self.target, offset, n_bytes)
                if copied:
                    return copied
            except OSError as error:
                if error.errno not in _NOT_OFFERED:
                    raise
            # not offered, or nothing copied although there is more: some file systems lie about both
            del self.ways[0]
        return self.ways[0](source, self.target, offset, n_bytes)
