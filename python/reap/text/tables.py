"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain

from reap.errors import CalibrationError
from reap.files.strict_json import shorten
from reap.text.lines import BadLine, Row
from reap.text.streams import LINE_LIMIT, ByteStream

DELIMITERS = ",\t;|"
_SNIFFED_ROWS = 5
_NAME = re.compile(r"[^\W\d][\w.-]{0,63}")


def csv_rows(stream: ByteStream, delimiter: str | None = None) -> Iterator[Row | BadLine]:
    """The rows of a CSV file, by the names in its first line; every value is a string, an empty `domain` is none.

    delimiter: None for the one of comma, tab, semicolon and bar that the first line has most of. CalibrationError
    where the first line cannot be one of names.
    """
    _allow_long_fields()
    lines = _Lines(stream)
    first = next(lines, "")
    if delimiter is None:
        delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    names = _header(reader, stream.name)
    end = lines.number
    while True:
        number = end + 1
        where = f"{stream.name}:{number}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            end = lines.number
            if str(error) == "unexpected end of data" or "field limit" in str(error):
                raise CalibrationError(
                    f"{where}: a quoted value of this row does not end; rows after it cannot be found"
                ) from error
            yield BadLine(where, number, f"is not CSV: {error}", "not CSV")
            continue
        end = lines.number
        if not _is_text(values):
            yield BadLine(where, number, "is not UTF-8 text", "not UTF-8 text")
        elif len(values) == len(names):
            cells = zip(names, values, strict=True)
            yield Row(where, number, {name: value for name, value in cells if value or name != "domain"})
        elif values:
            problem = f"has {len(values)} values where the first line has {len(names)} names"
            yield BadLine(where, number, problem, "another number of values than names")


def _is_text(values: Sequence[str]) -> bool:
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


class _Lines:
    """Lines of text as csv wants them, counted."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._stream.read_line(LINE_LIMIT + 1)
        if not raw:
            raise StopIteration
        self.number += 1
        where = f"{self._stream.name}:{self.number}"
        if len(raw) > LINE_LIMIT:
            raise CalibrationError(f"{where}: the line is longer than {LINE_LIMIT >> 20} MiB")
        return raw.decode("utf-8", "surrogateescape")  # what is not UTF-8 is told row by row


def _header(reader: Iterator[Sequence[str]], name: str) -> list[str]:
    try:
        names = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise CalibrationError(f"{name}:1: is not CSV: {error}") from error
    double = next((cell for cell in names if names.count(cell) > 1), None)
    if double is not None:
        raise CalibrationError(
            f"{name}:1: names the column {shorten(double)} twice; the first line should name each once"
        )
    return names


def _allow_long_fields() -> None:
    # one limit for the whole process: only ever raised, so that threads cannot take it from one another
    if csv.field_size_limit() < LINE_LIMIT:
        csv.field_size_limit(LINE_LIMIT)


def looks_like_csv(head: bytes, known: Sequence[frozenset[str]]) -> bool:
    """Whether a text begins as a table does: a line of names, and rows of as many values.

    known: sets of names, any of which a table that can be used has. Words of prose with commas between them are not
    names: a space follows the comma.
    """
    text = head.decode("utf-8", "ignore")
    whole = text if len(head) < 1 << 12 else text[: text.rfind("\n") + 1]
    first = whole.partition("\n")[0].rstrip("\r")
    if first.strip().strip('"') in {name for names in known if len(names) == 1 for name in names}:
        return "\n" in text
    delimiter = max(DELIMITERS, key=first.count)
    try:
        rows = [
            row
            for _, row in zip(
                range(_SNIFFED_ROWS), csv.reader(whole.splitlines(True), delimiter=delimiter), strict=False
            )
        ]
    except csv.Error:
        return False
    if len(rows) < 2 or len(rows[0]) < 2 or not all(map(_NAME.fullmatch, rows[0])):
        return False
    # the last may be cut off
    return any(names <= set(rows[0]) for names in known) or all(len(row) == len(rows[0]) for row in rows[:-1] or rows)
