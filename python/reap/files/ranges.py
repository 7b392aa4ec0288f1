"""Byte ranges of old files, and bytes of our own, written out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from reap.errors import FormatError
from reap.files.copying import Copier, drop_cache, is_cached, prefetch, write_all
from reap.files.regular import RegularFile
from reap.progress import Progress, ProgressCallback

# one step of a copy, how much is asked for before its turn, and after how much the disk is told to begin writing
_STEP_BYTES = 8 << 20
_AHEAD_BYTES = 32 << 20
_WRITE_BACK_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of an open file."""

    file: RegularFile
    """The file."""
    offset: int
    """Where they begin, in bytes from the start of the file."""
    n_bytes: int
    """How many they are."""


Piece = Span | bytes


def total_bytes(pieces: Iterable[Piece]) -> int:
    return sum(len(piece) if isinstance(piece, bytes) else piece.n_bytes for piece in pieces)


def merge_spans(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The same bytes in as few pieces as possible: neighbouring spans become one."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if piece == b"":
            continue
        if (
            isinstance(piece, Span)
            and isinstance(last, Span)
            and last.file is piece.file
            and last.offset + last.n_bytes == piece.offset
        ):
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
    """Spans of open files, and bytes, in order."""

    def pieces(self) -> Iterator[Piece]:
        """The whole file, in order."""
        return iter(self.parts)

    @property
    def n_bytes(self) -> int:
        """The exact size of the file."""
        return total_bytes(self.parts)


# ---- copying


class ByteCounter:
    """Bytes done, of all files of a set."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.progress is not None:
            self.progress(Progress(self.done, self.total, "bytes"))


def write_pieces(fd: int, pieces: Iterable[Piece], counter: ByteCounter) -> None:
    start, end = 0, 0
    with Copier(fd) as copier:
        for piece, was_cached in _read_ahead(_steps(merge_spans(pieces))):
            for n_bytes in _copy(copier, piece):
                counter.add(n_bytes)
                end += n_bytes
            if isinstance(piece, Span) and not was_cached:
                drop_cache(piece.file.fileno(), piece.offset, piece.n_bytes)
            if end - start >= _WRITE_BACK_BYTES:
                drop_cache(fd, start, end - start)  # that is, begin to write, instead of waiting for fsync
                start = end


def _copy(copier: Copier, piece: Piece) -> Iterator[int]:
    if isinstance(piece, bytes):
        write_all(copier.target, piece)
        yield len(piece)
        return
    done = 0
    for n_bytes in copier.copy(piece.file.fileno(), piece.offset, piece.n_bytes):
        if n_bytes == 0:
            raise FormatError(
                f"{piece.file.path}: ends at byte {piece.offset + done:,}, but was longer when it was opened"
            )
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
    """(piece, whether it was in memory already); what is not is asked for early, since kept experts lie apart from each
    other."""
    waiting: deque[tuple[Piece, bool]] = deque()
    n_waiting = 0
    for piece in pieces:
        was_cached = isinstance(piece, bytes) or is_cached(piece.file.fileno(), piece.offset)
        if isinstance(piece, Span) and not was_cached:
            prefetch(piece.file.fileno(), piece.offset, piece.n_bytes)
        waiting.append((piece, was_cached))
        n_waiting += total_bytes((piece,))
        while n_waiting > _AHEAD_BYTES:
            n_waiting -= total_bytes((waiting[0][0],))
            yield waiting.popleft()
    yield from waiting
