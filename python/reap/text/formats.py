"""Which format a file has, by its name or its content, and its rows or text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from reap.errors import CalibrationError
from reap.files.recognise import HEAD_BYTES, NOT_DATA, what_are
from reap.text.columnar import ColumnarFile
from reap.text.lines import BadLine, Row, json_array, json_lines
from reap.text.shapes import KEY_SETS, KEYS
from reap.text.sources import COLUMNAR_SUFFIXES, JSON_SUFFIXES, SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES
from reap.text.streams import COMPRESSED_SUFFIXES, HEAD_LIMIT, ByteStream, suffix_of
from reap.text.tables import csv_rows, looks_like_csv

JSON_LINES, JSON_ARRAY, CSV, PARQUET, ARROW, TEXT = "JSON Lines", "JSON array", "CSV", "Parquet", "Arrow", "text"

_COLUMNAR_MAGIC = ((b"PAR1", PARQUET), (b"ARROW1", ARROW), (b"\xff\xff\xff\xff", ARROW))
_OTHER_MAGIC = (
    (b"GGUF", "a GGUF model"),
    (b"PK\x03\x04", "a ZIP archive; unpack it first"),
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"\x80\x02", "a pickle, which is never read"),
    (b"\x80\x04", "a pickle, which is never read"),
    (b"\x80\x05", "a pickle, which is never read"),
    (b"SQLite f", "a database"),
)
_TAR_MAGIC_AT = 257
# What follows the bracket of an array: an object, a list, a string, a number and a comma, or the end of it.
_ARRAY = re.compile(rb"""\[\s*([\[{"\]]|(-?\d[\d.eE+-]*|true|false|null)\s*,)""")
_MANY_ZEROS = 0.2


@dataclass
class DataFile:
    """A file that is open, and what it was found to be."""

    stream: ByteStream
    """Its bytes, decompressed."""
    format: str
    """ "JSON Lines", "JSON array", "CSV", "Parquet", "Arrow" or "text"."""
    columnar: ColumnarFile | None = None
    """A Parquet or Arrow file's reader; None of every other."""
    delimiter: str | None = None
    """What parts the columns of a CSV file."""

    @property
    def name(self) -> str:
        return self.stream.name

    @property
    def position(self) -> int:
        """Bytes of the file that are read."""
        return self.columnar.position if self.columnar else self.stream.position

    def rows(self) -> Iterator[Row | BadLine]:
        """The rows of a file that is not text."""
        if self.columnar:
            return self.columnar.rows()
        if self.format == CSV:
            return csv_rows(self.stream, self.delimiter)
        return json_array(self.stream) if self.format == JSON_ARRAY else json_lines(self.stream)


def open_data(path: str, columns: Mapping[str, str] | None = None) -> DataFile:
    """Open a file and find out what it is.

    columns: role -> name, as `parse_sample` takes them. Raises UsageError where it cannot be opened, CalibrationError
    that says what it looks like where it is of no format that is read.
    """
    stream = ByteStream(path)
    try:
        return _recognise(stream, columns)
    except BaseException:
        stream.close()
        raise


def _recognise(stream: ByteStream, columns: Mapping[str, str] | None) -> DataFile:
    columnar = next((name for magic, name in _COLUMNAR_MAGIC if stream.magic.startswith(magic)), None)
    suffix = "" if stream.is_stdin else suffix_of(stream.path)
    if columnar is not None:
        return _columnar(stream, columnar, columns)
    _refuse_others(stream)
    if suffix in COLUMNAR_SUFFIXES:
        _refuse(stream, f"is not a {suffix[1:]} file")
    if suffix in TABLE_SUFFIXES:
        return DataFile(stream, CSV, delimiter="\t" if suffix == ".tsv" else None)
    if suffix in TEXT_SUFFIXES:
        return DataFile(stream, TEXT)
    start = stream.head(lambda head: bool(head.lstrip()))
    if suffix in JSON_SUFFIXES:
        return DataFile(stream, JSON_ARRAY if start.lstrip()[:1] == b"[" and _is_array(stream, suffix) else JSON_LINES)
    return DataFile(stream, _format_by_content(stream, start, columns))


def _is_array(stream: ByteStream, suffix: str) -> bool:
    """Whether a JSON file that begins with a bracket is one array: always, except for Lines that are broken."""
    return suffix == ".json" or bool(_ARRAY.match(_after_bracket(stream)))


def _after_bracket(stream: ByteStream) -> bytes:
    return stream.head(lambda head: len(head.lstrip()) > 32).lstrip()


def _columnar(stream: ByteStream, name: str, columns: Mapping[str, str] | None) -> DataFile:
    if stream.is_stdin or stream.is_compressed:
        how = "from standard input" if stream.is_stdin else "compressed as a whole"
        raise CalibrationError(f"{stream.name}: {name} cannot be read {how}; give the file as it is")
    wanted = KEYS | set((columns or {}).values())
    return DataFile(stream, name, columnar=ColumnarFile(stream.path, wanted))


def _format_by_content(stream: ByteStream, start: bytes, columns: Mapping[str, str] | None) -> str:
    sign = start.lstrip()[:1]
    if sign == b"{":
        return JSON_LINES
    if sign == b"[" and _ARRAY.match(_after_bracket(stream)):
        return JSON_ARRAY
    head = stream.head(lambda head: head.count(b"\n") >= 6)
    known = (*KEY_SETS, frozenset((columns or {}).values())) if columns else KEY_SETS
    return CSV if looks_like_csv(head, known) else TEXT


def _refuse_others(stream: ByteStream) -> None:
    kind = next((kind for magic, kind in _OTHER_MAGIC if stream.magic.startswith(magic)), None)
    if kind is not None:
        _refuse(stream, f"is {kind}")
    beginning = stream.head(lambda head: len(head) >= 512 or b"\n" in head)
    head = beginning[:512]
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        _refuse(stream, "is a tar archive; unpack it first")
    found = what_are(beginning[:HEAD_BYTES], HEAD_LIMIT)
    if found in NOT_DATA:
        _refuse(stream, f"is {found}")
    if head.count(0) > _MANY_ZEROS * len(head):
        _refuse(stream, "is not text in UTF-8; UTF-16 is read where the file begins with its byte-order mark")


def _refuse(stream: ByteStream, problem: str) -> NoReturn:
    raise CalibrationError(
        f"{stream.name}: {problem}; begins with the bytes {stream.magic.hex(' ')}, expected {' '.join(SUFFIXES)}, or"
        f" one of them with {' '.join(COMPRESSED_SUFFIXES)}"
    )
