"""The bytes of a data file as they are read: decompressed, in UTF-8 without a mark, and hashed as they lie on the
disk."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any, BinaryIO, cast

from reap.errors import CalibrationError, MissingExtraError, UsageError
from reap.files.recognise import unreadable_text

STDIN = "-"
LINE_LIMIT = 64 << 20
HEAD_LIMIT = 64 << 10
BLOCK = 4 << 20
# a few bytes of input can stand for 128 KiB and more; so little at a time keeps what comes of it small
_PIECE = 1 << 10
_MAGIC_LENGTH = 10

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# the longer mark first: that of UTF-32 begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class ByteStream:
    """A file that is read from its beginning to its end, or standard input ("-").

    name           for errors: the path, or "<stdin>"
    is_compressed  by its content, not by its name

    Raises UsageError where it cannot be opened, CalibrationError where compressed data are damaged or UTF-16 is not,
    MissingExtraError where only an optional package decompresses it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.is_stdin = path == STDIN
        self.name = "<stdin>" if self.is_stdin else path
        self._tap = _Tap(_open(path))
        self._given_out = 0
        self._digest: str | None = None
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        raw = _Rewound(self._tap)
        self.magic = raw.head(lambda head: len(head) >= _MAGIC_LENGTH)[:_MAGIC_LENGTH]
        plain = _decompressed(raw, self.magic, self.name)
        self.is_compressed = plain is not raw
        text = plain if isinstance(plain, _Rewound) else _Rewound(plain)
        mark = text.head(lambda head: len(head) >= len(codecs.BOM_UTF32_LE))[: len(codecs.BOM_UTF32_LE)]
        if self.is_compressed:
            self.magic = text.head(lambda head: len(head) >= _MAGIC_LENGTH)[:_MAGIC_LENGTH]
        for sign, encoding in _MARKS:
            if mark.startswith(sign):
                text.readinto(bytearray(len(sign)))
                if encoding != "utf-8":
                    text = _Rewound(_Transcoded(text, encoding, self.name))
                break
        self._text = text
        self._file = io.BufferedReader(text, 1 << 18)

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if not self.is_stdin:
            self._tap.close_file()

    def head(self, is_enough: Callable[[bytes], bool]) -> bytes:
        """The first bytes, before `read`, which gives them again: up to where `is_enough`, HEAD_LIMIT, or the end."""
        return self._text.head(is_enough)

    def read(self, n_bytes: int) -> bytes:
        """So many bytes, fewer only at the end."""
        data = self._file.read(n_bytes)
        self._given_out += len(data)
        return data

    def read_line(self, limit: int = LINE_LIMIT + 1) -> bytes:
        """Bytes up to and including the next newline, at most `limit`."""
        data = self._file.readline(limit)
        self._given_out += len(data)
        return data

    @property
    def position(self) -> int:
        """Bytes of the file that are read; where it is compressed, a block more."""
        return self._tap.count if self.is_compressed else min(self._given_out, self._tap.count)

    def finish(self) -> str:
        """Hex SHA-256 of all of a file as it lies on the disk, or of what was read of standard input, which may never
        end."""
        if self._digest is None:
            while not self.is_stdin and self._tap.read(BLOCK):
                pass
            self._digest = self._tap.digest.hexdigest()
        return self._digest


def _open(path: str) -> BinaryIO:
    if path == STDIN:
        return sys.stdin.buffer
    try:
        return open(path, "rb")
    except OSError as error:
        raise UsageError(f"{path}: cannot read the calibration: {unreadable_text(path, error, data=True)}") from error


class _Raw(io.RawIOBase):
    """Bytes made of other bytes, some at a time."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _some(self, n_bytes: int) -> bytes:
        """At most so many bytes, b"" at the end."""
        raise NotImplementedError


class _Tap(_Raw):
    """The file itself: what passes is hashed and counted."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.digest = hashlib.sha256()
        self.count = 0

    def _some(self, n_bytes: int) -> bytes:
        # of a pipe what has arrived: who writes to it may wait for an answer
        data: bytes = self._file.read1(n_bytes) if hasattr(self._file, "read1") else self._file.read(n_bytes)
        self.digest.update(data)
        self.count += len(data)
        return data

    def close_file(self) -> None:
        self._file.close()


class _Rewound(_Raw):
    """Bytes whose beginning can be looked at before it is read."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__()
        self._raw = raw
        self._head = b""

    def head(self, is_enough: Callable[[bytes], bool]) -> bytes:
        while len(self._head) < HEAD_LIMIT and not is_enough(self._head):
            more = self._raw.read(HEAD_LIMIT - len(self._head))
            if not more:
                break
            self._head += more
        return self._head

    def _some(self, n_bytes: int) -> bytes:
        if self._head:
            data, self._head = self._head[:n_bytes], self._head[n_bytes:]
            return data
        return self._raw.read(n_bytes) or b""


class _Transcoded(_Raw):
    """UTF-16 or UTF-32 as UTF-8."""

    def __init__(self, raw: io.RawIOBase, encoding: str, name: str) -> None:
        super().__init__()
        self._raw, self._name, self._encoding = raw, name, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready = b""
        self._at_end = False

    def _some(self, n_bytes: int) -> bytes:
        while not self._ready and not self._at_end:
            block = self._raw.read(HEAD_LIMIT) or b""
            self._at_end = not block
            try:
                self._ready = self._decoder.decode(block, final=self._at_end).encode()
            except UnicodeError as error:
                kind = self._encoding[:6].upper()
                raise CalibrationError(f"{self._name}: begins with the mark of {kind}, but is not {kind}") from error
        data, self._ready = self._ready[:n_bytes], self._ready[n_bytes:]
        return data


# ---- compression


def _decompressed(raw: _Rewound, magic: bytes, name: str) -> io.RawIOBase:
    """What a stream that begins with `magic` holds; the stream itself where it is not compressed."""
    if magic.startswith(b"\x1f\x8b"):
        return _Decompressed(cast(BinaryIO, gzip.GzipFile(fileobj=io.BufferedReader(raw))), name)
    if magic[:3] == b"BZh" and magic[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return _Decompressed(_Frames(raw, bz2.BZ2Decompressor), name)
    if magic.startswith(b"\xfd7zXZ\0"):
        return _Decompressed(_Frames(raw, lzma.LZMADecompressor, padding=b"\0"), name)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return _Decompressed(_zstd_file(raw, name), name)
    return raw


class _Decompressed(_Raw):
    """A decompressor's output, its errors in the file's name."""

    def __init__(self, file: Any, name: str) -> None:
        super().__init__()
        # what is there before what cannot be read: gzip's `read` would lose it
        self._read = getattr(file, "read1", file.read)
        self._name = name

    def _some(self, n_bytes: int) -> bytes:
        try:
            return bytes(self._read(n_bytes))
        except EOFError as error:
            raise CalibrationError(
                f"{self._name}: the compressed data end too early, as after a broken download"
            ) from error
        except (OSError, zlib.error, lzma.LZMAError, ValueError, _DamagedError) as error:
            raise CalibrationError(f"{self._name}: the compressed data are damaged: {error}") from error


class _DamagedError(Exception):
    """Compressed data that are damaged."""


def _zstd_file(raw: io.RawIOBase, name: str) -> _Frames:
    if sys.version_info >= (3, 14):
        return _Frames(raw, import_module("compression.zstd").ZstdDecompressor)
    try:
        zstandard: Any = import_module("zstandard")
    except ModuleNotFoundError:
        raise MissingExtraError(
            f"{name}: to read Zstandard needs zstandard: pip install 'reap-moe[data]', or decompress it with zstd -d"
        ) from None
    return _Frames(raw, lambda: zstandard.ZstdDecompressor().decompressobj(), error=zstandard.ZstdError)


class _Frames:
    """The streams of a compressed file, one after the other, each whole. The libraries' own readers take a file cut
    short for a whole one (zstandard), or end without a word where a later stream is damaged (bz2, lzma)."""

    def __init__(
        self,
        raw: io.RawIOBase,
        decompressor: Callable[[], Any],
        *,
        padding: bytes = b"",
        error: type[Exception] = OSError,
    ) -> None:
        self._raw, self._decompressor, self._padding, self._error = raw, decompressor, padding, error
        self._frame: Any = None
        self._waiting, self._ready = b"", b""

    def read(self, n_bytes: int) -> bytes:
        while not self._ready:
            piece = self._waiting or self._raw.read(BLOCK >> 4) or b""
            if not piece:
                if self._frame is not None:
                    raise EOFError
                return b""
            self._waiting, piece = piece[_PIECE:], piece[:_PIECE]
            self._ready = self._decompress(piece)
        data, self._ready = self._ready[:n_bytes], self._ready[n_bytes:]
        return data

    def _decompress(self, piece: bytes) -> bytes:
        if self._frame is None:
            piece = piece.lstrip(self._padding) if self._padding else piece
            if not piece:
                return b""
            self._frame = self._decompressor()
        try:
            out: bytes = self._frame.decompress(piece)
        except self._error as error:
            raise _DamagedError(str(error)) from error
        if self._frame.eof:
            self._waiting = self._frame.unused_data + self._waiting
            self._frame = None
        return out


def suffix_of(path: str) -> str:
    """The suffix that says what a file holds, in small letters: ".jsonl" of "c.jsonl.gz"."""
    base, suffix = os.path.splitext(path.lower())
    return os.path.splitext(base)[1] if suffix in COMPRESSED_SUFFIXES else suffix
