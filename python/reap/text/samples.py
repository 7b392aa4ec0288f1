"""Calibration files, standard input and Python objects as samples: read as a stream, checked line by line."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from reap.errors import CalibrationError
from reap.text.formats import TEXT, open_data
from reap.text.lines import BadLine, Row
from reap.text.sample import Sample as Sample
from reap.text.shapes import check_columns, parse_sample
from reap.text.sources import Part, parts_of
from reap.text.sources import Source as Source
from reap.text.streams import BLOCK, LINE_LIMIT, STDIN, ByteStream

PYTHON = "<python>"
_TEXT_FILE = "text file"
_BAD_NAMED = 100
_NOTES = 20
# no token stands for so many bytes, on average
_BYTES_OF_TOKEN = 16


@dataclass
class FileRecord:
    """What was found in one file."""

    name: str
    """The path, "<stdin>" or "<python>"."""
    format: str
    """ "JSON Lines", "JSON array", "CSV", "Parquet", "Arrow", "text" or "objects"."""
    domain: str | None = None
    """Where one was given for the whole file."""
    sha256: str = ""
    """Of the file as it lies on the disk."""
    shapes: Counter[str] = field(default_factory=Counter)
    """Names that samples were read from, such as "prompt+response" -> lines."""
    bad: Counter[str] = field(default_factory=Counter)
    """Reason -> lines that cannot be used."""


class SampleReader:
    """Iterates over the samples of a source and knows, afterwards, what was read.

    Attributes:
        source: a path, "-" for standard input, a folder, a list of paths, a mapping of domains to these, or
            dictionaries as the lines of a JSON Lines file hold them
        columns: role -> name, for data with other names than `shapes` knows
        skip_bad_lines: leave out lines that cannot be used, and count them in `records` by reason

    Raises UsageError for a file that cannot be opened, CalibrationError that names file and line for one that cannot be
    used (BadLine, where only that line is at fault).
    """

    def __init__(
        self, source: Source, *, columns: Mapping[str, str] | None = None, skip_bad_lines: bool = False
    ) -> None:
        self.source = source
        self.columns = check_columns(columns)
        self.skip_bad_lines = skip_bad_lines
        self._parts: list[Part] | None = None
        self._reset()

    def _reset(self) -> None:
        self.records: list[FileRecord] = []
        self.bad_lines: list[BadLine] = []
        self.notes: list[str] = []
        self.bytes_read = 0
        self._noted: set[tuple[str, ...]] = set()
        self._stream: ByteStream | None = None

    @property
    def parts(self) -> list[Part]:
        """The files and objects of the source."""
        if self._parts is None:
            self._parts = parts_of(self.source)
        return self._parts

    @property
    def paths(self) -> list[str]:
        """The files to read, "-" for standard input; [] where the source is Python objects."""
        return [part.path for part in self.parts if part.path is not None]

    @property
    def files(self) -> list[str]:
        """Names of what was read."""
        return [record.name for record in self.records]

    @property
    def digests(self) -> list[str]:
        """Hex SHA-256 of each, once it was read."""
        return [record.sha256 for record in self.records]

    def total_bytes(self) -> int | None:
        """Size of all files; None where it cannot be known."""
        if len(self.paths) < len(self.parts) or STDIN in self.paths:
            return None
        try:
            return sum(os.stat(path).st_size for path in self.paths) or None
        except OSError:
            return None

    def __iter__(self) -> Generator[Sample, None, None]:
        self._reset()
        for part in self.parts:
            yield from self._read_objects(part) if part.path is None else self._read_file(part.path, part.domain)

    def finish(self) -> None:
        """Hash the rest of the file that is being read, for a reader who stops early."""
        if self._stream is not None:
            self.records[-1].sha256 = self._stream.finish()

    def check(self, max_tokens: int | None = None, is_usable: Callable[[Sample], object] = lambda sample: None) -> None:
        """Read everything that can be read again, once, for lines that cannot be used: not standard input, not an
        iterator's objects.

        max_tokens: no further than so many tokens can reach. is_usable raises CalibrationError for a sample that is
        not. CalibrationError names the first bad line, and says how many there are.
        """
        reader = SampleReader(self.source, columns=self.columns, skip_bad_lines=True)
        reader._parts = [part for part in self.parts if _can_be_read_again(part)]
        for sample in reader:
            try:
                is_usable(sample)
            except CalibrationError as error:
                reader._leave_out(BadLine(sample.where, sample.line, str(error), "content that cannot be used"))
            if max_tokens is not None and reader.bytes_read > max_tokens * _BYTES_OF_TOKEN:
                break
        if reader.bad_lines:
            raise CalibrationError(reader.bad_sentence())

    def bad_sentence(self) -> str:
        """The first bad line, and how many there are of which kind."""
        bad = sum((record.bad for record in self.records), Counter[str]())
        lines = bad.total() + sum(record.shapes.total() for record in self.records)
        kinds = ", ".join(f"{count:,} {reason}" for reason, count in bad.most_common())
        counted = f" ({bad.total():,} bad lines of {lines:,}: {kinds})" if bad.total() > 1 else ""
        return f"{self.bad_lines[0]}{counted}; --skip-bad-lines (skip_bad_lines=True) leaves such lines out"

    # ---- one file

    def _read_file(self, path: str, domain: str | None) -> Iterator[Sample]:
        file = open_data(path, self.columns)
        before = self.bytes_read
        with file.stream as stream:
            self._stream = stream
            record = FileRecord(stream.name, file.format, domain)
            self.records.append(record)
            samples = self._read_text(stream, record) if file.format == TEXT else self._parse(file.rows(), record)
            for sample in samples:
                self.bytes_read = before + file.position
                yield sample
            self.finish()
            self._stream = None

    def _parse(self, rows: Iterator[Row | BadLine], record: FileRecord) -> Iterator[Sample]:
        for row in rows:
            try:
                if isinstance(row, BadLine):
                    raise row
                sample = parse_sample(row.members, row.where, row.number, columns=self.columns, domain=record.domain)
            except BadLine as bad:
                self._leave_out(bad)
                continue
            record.shapes[sample.shape] += 1
            if sample.passed_over:
                self._note(record, sample)
            yield sample

    def _leave_out(self, bad: BadLine) -> None:
        if not self.skip_bad_lines:
            raise bad
        self.records[-1].bad[bad.reason] += 1
        if len(self.bad_lines) < _BAD_NAMED:
            self.bad_lines.append(bad)

    def _note(self, record: FileRecord, sample: Sample) -> None:
        key = (record.name, sample.shape, *sample.passed_over)
        if key not in self._noted and len(self._noted) < _NOTES:
            self._noted.add(key)
            self.notes.append(f"{sample.where}: has {', '.join(sample.passed_over)} as well; {sample.shape} is read")

    def _read_objects(self, part: Part) -> Iterator[Sample]:
        digest = hashlib.sha256()
        record = FileRecord(PYTHON, "objects", part.domain, digest.hexdigest())
        self.records.append(record)

        def rows() -> Iterator[Row | BadLine]:
            for number, item in enumerate(part.objects or (), 1):
                where = f"sample {number}" if part.domain is None else f"{part.domain}: sample {number}"
                if not isinstance(item, Mapping):
                    problem = f"should be a dictionary, found {type(item).__name__}"
                    yield BadLine(where, number, problem, "not a dictionary")
                    continue
                try:
                    members = _plain(item)
                except RecursionError:
                    yield BadLine(where, number, "is nested too deeply, or holds itself", "nested too deeply")
                    continue
                digest.update(json.dumps(members, default=str, sort_keys=True).encode() + b"\n")
                record.sha256 = digest.hexdigest()
                yield Row(where, number, members)

        yield from self._parse(rows(), record)

    def _read_text(self, stream: ByteStream, record: FileRecord) -> Iterator[Sample]:
        record.shapes[_TEXT_FILE] += 1
        yield from _text_parts(stream, record.domain)


def _plain(value: Any) -> Any:
    """A Python value as JSON would have it: arrays and tuples are lists, names are strings, NaN, which a data frame has
    where there is nothing, is None. RecursionError for what holds itself."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays, tensors and their numbers
        return _plain(value.tolist())
    return None if isinstance(value, float) and value != value else value


def _can_be_read_again(part: Part) -> bool:
    if part.path is None:
        return isinstance(part.objects, list | tuple)
    # what is not there is said now, and not after a model was loaded
    return part.path != STDIN and (os.path.isfile(part.path) or not os.path.exists(part.path))


# ---- text


def _text_parts(stream: ByteStream, domain: str | None) -> Iterator[Sample]:
    """A text in parts of some megabytes, cut where a line ends and the next begins with a visible character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, line, continues = "", 1, False
    while True:
        block = stream.read(BLOCK)
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += text.count("\n") + error.object[: error.start].count(b"\n")
            raise CalibrationError(
                f"{stream.name}:{line}: is not UTF-8 text (0x{error.object[error.start]:02x})"
            ) from error
        end = len(text) if not block else _cut(text)
        if end or (not block and not continues):
            where = f"{stream.name}:{line}"
            yield Sample(
                where,
                line,
                domain,
                text=text[:end],
                continues=continues,
                goes_on=bool(block),
                is_file=True,
                shape=_TEXT_FILE,
            )
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
