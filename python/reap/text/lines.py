"""Lines of JSON, and JSON arrays, as a stream of objects, each with the place it came from."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from reap.errors import CalibrationError
from reap.files.strict_json import kind_of, shorten
from reap.text.streams import LINE_LIMIT, ByteStream

_BLOCK = 1 << 20
# how far before the end of what was read an error may lie that more text could still mend: half an escape, a literal
_TAIL = 16
_SPACE = " \t\n\r"
_OBJECT_OVER_LINES = re.compile(rb'\s*\{\s*"([^"\\]{0,60})"\s*:')


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a file."""

    where: str
    """File and line or row, for errors."""
    number: int
    """Of the line or row, from 1."""
    members: dict[str, Any]
    """Names and values."""


class BadLine(CalibrationError):
    """A line or row that cannot be used; the others can. `reason` is what is counted: few words, the same for all lines
    with the same fault."""

    def __init__(self, where: str, number: int, problem: str, reason: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where, self.number, self.problem, self.reason = where, number, problem, reason


def parse_json(text: str) -> Any:
    """JSON to Python values; ValueError that says what is wrong in few words."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise ValueError("is not JSON that reap reads: nested too deeply, or a number too long") from error


def json_lines(stream: ByteStream) -> Iterator[Row | BadLine]:
    """The objects of JSON Lines; blank lines are none. CalibrationError where the whole file is something else."""
    number = 0
    head = stream.head(lambda head: head.count(b"\n") > 1)
    while raw := stream.read_line(LINE_LIMIT + 1):
        number += 1
        where = f"{stream.name}:{number}"
        if len(raw) > LINE_LIMIT:
            while raw and not raw.endswith(b"\n"):
                raw = stream.read_line(LINE_LIMIT)
            yield BadLine(where, number, f"the line is longer than {LINE_LIMIT >> 20} MiB", "line too long")
        elif raw.strip():
            row = _parse_line(raw, where, number)
            goes_on = number == 1 and isinstance(row, BadLine) and raw.rstrip().endswith((b"{", b"[", b","))
            if goes_on and (spread := _OBJECT_OVER_LINES.match(head)):
                key = shorten(spread[1].decode("utf-8", "replace"))
                looks = f"looks like one JSON object over several lines, whose first key is {key}"
                row = BadLine(where, 1, f"{looks}; expected one object a line, or an array of them", "not JSON")
            yield row


def _parse_line(raw: bytes, where: str, number: int) -> Row | BadLine:
    try:
        value = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start} of the line is 0x{raw[error.start]:02x})"
        return BadLine(where, number, problem, "not UTF-8 text")
    except ValueError as error:
        return BadLine(where, number, str(error), "not JSON")
    if not isinstance(value, dict):
        problem = f"should be an object on one line (JSON Lines), found {kind_of(value)}"
        return BadLine(where, number, problem, "not an object")
    return Row(where, number, value)


def json_array(stream: ByteStream) -> Iterator[Row | BadLine]:
    """The objects of one JSON array, however long it is: what is held at once is one entry and some megabytes.

    CalibrationError where the array is damaged, since nothing says where the next entry would begin.
    """
    text = _Buffer(stream)
    text.skip_space()
    text.take("[")
    number = 0
    while text.skip_space() != "]":
        if number:
            text.take(",", f"after row {number}")
            text.skip_space()
        number += 1
        where = f"{stream.name}: row {number}"
        value = text.value(where)
        if isinstance(value, dict):
            yield Row(where, number, value)
        else:
            yield BadLine(where, number, f"should be an object, found {kind_of(value)}", "not an object")
    text.take("]")
    if rest := text.skip_space():
        raise CalibrationError(f"{stream.name}: goes on after the end of its array, with {shorten(rest + text.rest())}")


class _Buffer:
    """Text that is read as it is needed."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def _grow(self, n_bytes: int) -> None:
        block = self._stream.read(n_bytes)
        self._ended = len(block) < n_bytes
        try:
            self._text = self._text[self._at :] + self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{self._stream.name}: is not UTF-8 text (0x{error.object[error.start]:02x} near byte"
                f" {self._stream.position - len(block) + error.start:,})"
            ) from error
        self._at = 0

    def skip_space(self) -> str:
        """The next visible character, which stays; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._grow(_BLOCK)

    def take(self, sign: str, place: str = "") -> None:
        """Go past `sign`."""
        if self._text[self._at : self._at + 1] != sign:
            found = (
                shorten(self._text[self._at : self._at + 1]) if self._at < len(self._text) else "the end of the file"
            )
            closing = " or ]" if sign == "," else ""
            raise CalibrationError(
                f"{self._stream.name}: {place or 'the array'} should have {sign}{closing}, found {found}"
            )
        self._at += 1

    def rest(self) -> str:
        return self._text[self._at + 1 : self._at + 40]

    def value(self, where: str) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = self._scan(self._text, self._at)
                if end < len(self._text) or self._ended or isinstance(value, dict | list | str):
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated string")
                if self._ended or not (is_open or error.pos >= len(self._text) - _TAIL):
                    is_cut = is_open or error.pos >= len(self._text.rstrip())
                    why = "the file ends within it" if is_cut else error.msg
                    raise CalibrationError(
                        f"{where}: is not JSON: {why}, near {shorten(self._text[error.pos : error.pos + 30])}; rows"
                        " after it cannot be found"
                    ) from error
            except (RecursionError, ValueError) as error:
                raise CalibrationError(
                    f"{where}: is not JSON that reap reads: nested too deeply, or a number too long"
                ) from error
            held = len(self._text) - self._at
            if held > LINE_LIMIT:
                raise CalibrationError(f"{where}: is longer than {LINE_LIMIT >> 20} MiB")
            self._grow(max(_BLOCK, held))
