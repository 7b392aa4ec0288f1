"""Calibration files: JSON Lines or text, from a path, standard input or Python objects, read as a stream and checked
line by line."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO, NoReturn

from reap.errors import CalibrationError, UsageError
from reap.files.strict_json import kind_of

LINE_LIMIT = 64 << 20
DOMAIN_LIMIT = 128  # characters of a name
_BLOCK = 4 << 20
_SHAPES = '{"prompt", "response"}, {"text"}, {"messages"} or {"tokens"}'
_STDIN = "-"

Source = str | os.PathLike[str] | Iterable[Any]


@dataclass(frozen=True)
class Sample:
    """One line of a calibration file, or one text file's part: exactly one of the four contents is there."""

    where: str  # "calib.jsonl:12", for errors
    line: int
    domain: str | None = None
    text: str | None = None
    pair: tuple[str, str] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: Any = None
    tokens: list[int] | None = None
    continues: bool = False  # the same text file's next part, not a sample of its own
    is_file: bool = False  # a text file's part: its windows stand alone, since nobody wrote them as one sample


@dataclass
class SampleReader:
    """Iterates over the samples of a source and knows, afterwards, what was read.

    source  a path, "-" for standard input, a list of paths, or dictionaries as the lines of a JSON Lines file hold
            them. A file named *.txt is one text; *.jsonl, *.ndjson and *.json are JSON Lines; any other, and standard
            input, is JSON Lines where its first visible character is "{".

    Raises UsageError for a file that cannot be opened, CalibrationError that names file and line for one that cannot be
    used.
    """

    source: Source
    files: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    bytes_read: int = 0
    _stream: _HashedStream | None = field(default=None, repr=False)

    @property
    def paths(self) -> list[str]:
        """The paths to read, [] where the source is Python objects."""
        if isinstance(self.source, str | os.PathLike):
            return [os.fspath(self.source)]
        if (
            isinstance(self.source, list | tuple)
            and self.source
            and all(isinstance(item, str | os.PathLike) for item in self.source)
        ):
            return [os.fspath(item) for item in self.source]
        return []

    def total_bytes(self) -> int | None:
        """Size of all files; None where it cannot be known."""
        try:
            return sum(os.stat(path).st_size for path in self.paths) or None
        except OSError:
            return None

    def __iter__(self) -> Generator[Sample, None, None]:
        self.files, self.digests, self.bytes_read = [], [], 0
        for path in self.paths:
            yield from self._read_file(path)
        if not self.paths:
            yield from self._read_objects()

    def finish(self) -> None:
        """Hash the rest of the file that is being read, for a reader who stops early."""
        if self._stream is not None:
            self.digests[-1] = self._stream.finish()

    def _read_objects(self) -> Iterator[Sample]:
        if isinstance(self.source, str | os.PathLike | bytes | Mapping):
            raise UsageError(
                f"calibration should be a path, a list of paths or dictionaries, found {type(self.source).__name__}"
            )
        digest = hashlib.sha256()
        self.files.append("<python>")
        self.digests.append(digest.hexdigest())
        for number, item in enumerate(self.source, 1):
            if not isinstance(item, Mapping):
                raise CalibrationError(f"sample {number}: should be a dictionary, found {type(item).__name__}")
            digest.update(json.dumps(item, default=str, sort_keys=True).encode() + b"\n")
            self.digests[-1] = digest.hexdigest()
            yield parse_sample(dict(item), f"sample {number}", number)

    def _read_file(self, path: str) -> Iterator[Sample]:
        with _HashedStream(path) as stream:
            self._stream = stream
            self.files.append(stream.name)
            self.digests.append("")
            is_json, first = stream.sniff()
            for sample in _read_lines(stream, first) if is_json else _read_text(stream, first):
                yield sample
                self.bytes_read += stream.take_count()
            self.finish()
            self._stream = None


class _HashedStream:
    """A binary file that hashes what passes, and the rest of a regular file in the end."""

    def __init__(self, path: str) -> None:
        self.is_stdin = path == _STDIN
        self.name = "<stdin>" if self.is_stdin else path
        self._digest = hashlib.sha256()
        self._unreported = 0
        try:
            self._file: BinaryIO = sys.stdin.buffer if self.is_stdin else open(path, "rb")  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise UsageError(f"{path}: cannot read the calibration: {error.strerror or error}") from error

    def __enter__(self) -> _HashedStream:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_stdin:
            self._file.close()

    def read(self, n_bytes: int) -> bytes:
        return self._pass(self._file.read(n_bytes))

    def read_line(self, limit: int) -> bytes:
        return self._pass(self._file.readline(limit))

    def _pass(self, data: bytes) -> bytes:
        self._digest.update(data)
        self._unreported += len(data)
        return data

    def take_count(self) -> int:
        count, self._unreported = self._unreported, 0
        return count

    def sniff(self) -> tuple[bool, list[bytes]]:
        """Whether the file is JSON Lines, and the lines that it took to see it: blank ones and the first visible
        one."""
        suffix = os.path.splitext(self.name)[1].lower()
        if not self.is_stdin and suffix in (".txt", ".jsonl", ".ndjson", ".json"):
            return suffix != ".txt", []
        lines: list[bytes] = []
        while not lines or (lines[-1] and not lines[-1].removeprefix(codecs.BOM_UTF8).strip()):
            lines.append(self.read_line(LINE_LIMIT + 1))
        return lines[-1].removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{", lines

    def finish(self) -> str:
        """Hex SHA-256 of all of a file, or of what was read of standard input, which may never end."""
        while not self.is_stdin and (block := self._file.read(_BLOCK)):
            self._digest.update(block)
        return self._digest.hexdigest()


# ---- JSON Lines


def _read_lines(stream: _HashedStream, first: list[bytes]) -> Iterator[Sample]:
    rest = iter(lambda: stream.read_line(LINE_LIMIT + 1), b"")
    for number, raw in enumerate(chain(first, rest), 1):
        where = f"{stream.name}:{number}"
        if len(raw) > LINE_LIMIT:
            raise CalibrationError(f"{where}: the line is longer than {LINE_LIMIT >> 20} MiB")
        line = _decode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, where)
        if line.strip():
            yield parse_sample(_parse_line(line, where), where, number)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{where}: is not UTF-8 text (byte {error.start} of the line is 0x{raw[error.start]:02x})"
        ) from error


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: is not JSON: {error.msg} (column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise CalibrationError(
            f"{where}: is not JSON that reap reads: nested too deeply, or a number too long"
        ) from error
    if not isinstance(value, dict):
        raise CalibrationError(f"{where}: should be an object on one line (JSON Lines), found {kind_of(value)}")
    return value


def parse_sample(members: dict[str, Any], where: str, line: int) -> Sample:
    """A line's object as a Sample. CalibrationError that begins with `where` for a shape or type that is none of the
    four."""

    def fail(problem: str) -> NoReturn:
        raise CalibrationError(f"{where}: {problem}")

    domain = members.get("domain")
    if domain is not None and (not isinstance(domain, str) or not 0 < len(domain) <= DOMAIN_LIMIT):
        fail(f"domain should be a string of 1 to {DOMAIN_LIMIT} characters, found {kind_of(domain)}")
    shapes = [
        keys
        for keys in (("prompt", "response"), ("text",), ("messages",), ("tokens",))
        if all(key in members for key in keys)
    ]
    if len(shapes) != 1:
        found = ", ".join(json.dumps(key)[:40] for key in list(members)[:8]) or "nothing"
        fail(f"should have one of {_SHAPES}, found {found}")
    for key in shapes[0]:
        expected = str if key in ("text", "prompt", "response") else list
        if not isinstance(members[key], expected):
            fail(f"{key} should be a {'string' if expected is str else 'list'}, found {kind_of(members[key])}")
    if "text" in shapes[0]:
        return Sample(where, line, domain, text=members["text"])
    if "prompt" in shapes[0]:
        return Sample(where, line, domain, pair=(members["prompt"], members["response"]))
    if "tokens" in shapes[0]:
        return Sample(where, line, domain, tokens=_check_tokens(members["tokens"], fail))
    return Sample(where, line, domain, messages=_check_messages(members["messages"], fail), tools=members.get("tools"))


def _check_tokens(tokens: list[Any], fail: Any) -> list[int]:
    for index, token in enumerate(tokens):
        if type(token) is not int:
            fail(f"tokens[{index}] should be an integer, found {kind_of(token)}")
    return tokens


def _check_messages(messages: list[Any], fail: Any) -> list[dict[str, Any]]:
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            fail(f'messages[{index}] should be an object with a "role"')
        if not isinstance(message.get("content", ""), str | list | None):
            fail(f"messages[{index}]: content should be a string, found {kind_of(message['content'])}")
    return messages


# ---- text


def _read_text(stream: _HashedStream, first: list[bytes]) -> Iterator[Sample]:
    """A text in parts of some megabytes, cut where a line ends and the next begins with a visible character."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text, line, continues = "", 1, False
    raw = b"".join(first)
    while True:
        block = stream.read(_BLOCK)
        raw += block
        try:
            text += decoder.decode(raw, final=not block)
        except UnicodeDecodeError as error:
            line += text.count("\n") + error.object[: error.start].count(b"\n")
            raise CalibrationError(f"{stream.name}:{line}: is not UTF-8 text") from error
        raw = b""
        end = len(text) if not block else _cut(text)
        if end or (not block and not continues):
            yield Sample(f"{stream.name}:{line}", line, text=text[:end], continues=continues, is_file=True)
            continues = True
        line += text[:end].count("\n")
        text = text[end:]
        if not block:
            return


def _cut(text: str) -> int:
    """Where to cut a part of a text so that no token is likely to straddle the cut; 0: read on."""
    end = text.rfind("\n")
    while end >= 0 and text[end + 1 : end + 2].strip() == "":
        end = text.rfind("\n", 0, end)
    if end < 0 and len(text) > LINE_LIMIT:
        return len(text)
    return end + 1
