"""What a calibration is, before hours are spent on it: its shapes, tokens and domains, and what may be amiss."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from reap.progress import Progress, ProgressCallback
from reap.text.encoding import THOUGHTS, Tokenizer
from reap.text.windows import Calibration, Window

_SHOWN_TOKENS = 4096
_SHORTEST_RUN = 4


@dataclass
class FilePreview:
    """What was found in one file."""

    name: str
    """Its path, "<stdin>" or "<python>"."""
    format: str
    """What it was found to be, such as "JSON Lines" or "Parquet"."""
    domain: str | None
    """The domain that was given for the whole file; None: none was."""
    shapes: dict[str, int]
    """Names that samples were read from, such as "prompt+response" -> lines."""
    bad: dict[str, int]
    """Reason -> lines that cannot be used."""


@dataclass
class DomainPreview:
    """How much there is of one domain."""

    samples: int = 0
    """Samples of the domain."""
    windows: int = 0
    """Their windows, each of at most ctx_size tokens."""
    tokens: int = 0
    """Tokens of these windows."""
    counted_tokens: int = 0
    """How many of them enter the statistics; the mask leaves out the others."""


@dataclass(frozen=True)
class LongestRun:
    """The longest run of one character; a long one is rarely what a model was trained on."""

    character: str
    """The character."""
    length: int
    """How often it follows itself, in characters."""
    where: str
    """File and line of the sample."""


@dataclass
class ShownSample:
    """The beginning of a sample, as the engine gets it."""

    where: str
    """File and line."""
    shape: str
    """The names that it was read from, such as "prompt+response"."""
    domain: str | None
    """None: the line has none."""
    n_tokens: int = 0
    """Of the whole sample."""
    tokens: list[int] = field(default_factory=list)
    """Token ids, at most 4,096."""
    pieces: list[str] = field(default_factory=list)
    """The text of each token; a token that holds a part of a character is joined to the next."""
    counted: list[bool] = field(default_factory=list)
    """Of each token, whether it enters the statistics."""

    @property
    def text(self) -> str:
        """What the tokens shown stand for."""
        return "".join(self.pieces)


@dataclass
class Preview:
    """What a calibration is. `str()` of it is for people, `to_dict()` for programs."""

    model: str
    """Name of the model whose tokenizer read it."""
    files: list[FilePreview] = field(default_factory=list)
    """Each file, in the order they were read."""
    domains: dict[str | None, DomainPreview] = field(default_factory=dict)
    """None: lines without a domain."""
    samples: int = 0
    """Samples that can be used."""
    windows: int = 0
    """Their windows, each of at most ctx_size tokens."""
    tokens: int = 0
    """Tokens of these windows."""
    counted_tokens: int = 0
    """How many of them enter the statistics; the mask leaves out the others."""
    ctx_size: int = 0
    """The most tokens of a window."""
    skipped: int = 0
    """Lines that cannot be used."""
    skipped_reasons: dict[str, int] = field(default_factory=dict)
    """Why -> how many lines."""
    skipped_lines: list[str] = field(default_factory=list)
    """ "file:line: why" of the first of them."""
    notes: list[str] = field(default_factory=list)
    """Sentences about how the files were read."""
    tool_calls: int = 0
    """Calls of tools in the conversations."""
    turns_with_thoughts: int = 0
    """Turns of the assistant that have a reasoning text."""
    turns_without_thoughts: int = 0
    """Of these the ones whose thoughts the chat template leaves out."""
    duplicates: int = 0
    """Samples whose tokens are those of an earlier one."""
    longest_run: LongestRun | None = None
    """None: no character follows itself often."""
    n_experts: int | None = None
    """Of the model; None where that is not known or it is dense."""
    tokens_per_expert: float | None = None
    """Tokens that an expert will see on average in each layer; None for a dense model."""
    tokens_per_second: float | None = None
    """Of a short measurement, where one was asked for."""
    seconds: float | None = None
    """How long a profile will take at this speed."""
    shown: list[ShownSample] = field(default_factory=list)
    """The first samples, as many as were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types; the domain of lines without one is ""."""
        document = asdict(self)
        document["domains"] = {name or "": asdict(domain) for name, domain in self.domains.items()}
        for sample, shown in zip(document["shown"], self.shown, strict=True):
            sample["text"] = shown.text
        return document


def preview_text(
    calibration: Calibration,
    tokenizer: Tokenizer,
    *,
    model: str,
    show: int = 3,
    progress: ProgressCallback | None = None,
) -> Preview:
    """Read a whole calibration with a model's tokenizer, and say what it is.

    Args:
        calibration: what to read, and how.
        tokenizer: the model's.
        model: its name.
        show: samples to keep, from the first.
        progress: told how many tokens were read.

    Raises CalibrationError as `Calibration.windows`.
    """
    seen = Preview(model, ctx_size=calibration.ctx_size)
    reader = _Reader(seen, tokenizer, show)
    for _, windows in groupby(_told(calibration, tokenizer, progress), key=lambda window: window.sample):
        reader.read(windows)
    seen.samples, seen.windows = calibration.samples, calibration.n_windows
    seen.tokens, seen.counted_tokens = calibration.tokens, calibration.counted_tokens
    seen.skipped, seen.skipped_reasons = calibration.skipped, calibration.skipped_reasons
    seen.turns_without_thoughts = calibration.texts_left_out[THOUGHTS]
    seen.skipped_lines, seen.notes = calibration.skipped_lines, calibration.notes
    seen.files = [
        FilePreview(it.name, it.format, it.domain, dict(it.shapes.most_common()), dict(it.bad.most_common()))
        for it in calibration.records
    ]
    return seen


def _told(calibration: Calibration, tokenizer: Tokenizer, progress: ProgressCallback | None) -> Iterator[Window]:
    for window in calibration.windows(tokenizer):
        yield window
        if progress is not None:
            progress(Progress(calibration.tokens, calibration.estimated_tokens()))


class _Reader:
    """Adds sample after sample to a preview."""

    def __init__(self, seen: Preview, tokenizer: Tokenizer, show: int) -> None:
        self._seen = seen
        self._show = show
        self._pieces = _Pieces(tokenizer)
        self._digests: set[bytes] = set()
        self._runs = _Runs()

    def read(self, windows: Iterator[Window]) -> None:
        """One sample: all of its windows."""
        seen, digest = self._seen, hashlib.blake2b(digest_size=12)
        shown: ShownSample | None = None
        for first, window in enumerate(windows):
            if not first:
                source = window.source
                seen.domains.setdefault(window.domain, DomainPreview()).samples += 1
                if len(seen.shown) < self._show:
                    shown = ShownSample(window.where, source.shape if source else "", window.domain)
                    seen.shown.append(shown)
                self._runs.begin()
            domain = seen.domains[window.domain]
            domain.windows += 1
            domain.tokens += len(window.tokens)
            domain.counted_tokens += int(window.counted.sum())
            self._runs.add(self._pieces.join(window.tokens.tolist()), window.where)
            digest.update(window.tokens.tobytes())
            if shown is not None:
                self._show_window(shown, window)
        seen.longest_run = self._runs.longest
        is_file = source is not None and source.is_file
        seen.duplicates += not is_file and digest.digest() in self._digests
        self._digests.add(digest.digest())
        for message in (source.messages if source else None) or ():
            calls, thoughts = message.get("tool_calls"), message.get("reasoning_content")
            seen.tool_calls += len(calls) if isinstance(calls, list) else 0
            seen.turns_with_thoughts += isinstance(thoughts, str) and bool(thoughts.strip())

    def _show_window(self, shown: ShownSample, window: Window) -> None:
        shown.n_tokens += len(window.tokens)
        room = _SHOWN_TOKENS - len(shown.tokens)
        if room > 0:
            tokens = window.tokens[:room].tolist()
            shown.tokens += tokens
            shown.pieces += self._pieces.texts(tokens)
            shown.counted += window.counted[:room].tolist()


class _Pieces:
    """The text of tokens, each asked for once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        piece = self._known.get(token)
        if piece is None:
            text = self._tokenizer.token_text(token) if self._tokenizer.has_tokenizer else f"[{token}]".encode()
            piece = self._known[token] = text
        return piece

    def join(self, tokens: Sequence[int]) -> bytes:
        return b"".join(map(self.bytes_of, tokens))

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """One string a token: a character that several tokens share is that of the last of them."""
        found, waiting = [], b""
        for token in tokens:
            waiting += self.bytes_of(token)
            try:
                text, waiting = waiting.decode("utf-8"), b""
            except UnicodeDecodeError as error:
                text = ""
                if error.reason != "unexpected end of data":
                    text, waiting = waiting.decode("utf-8", "backslashreplace"), b""
            found.append(text)
        if waiting and found:
            found[-1] += waiting.decode("utf-8", "backslashreplace")
        return found


class _Runs:
    """Looks for the longest run of one character, across the windows of a sample."""

    def __init__(self) -> None:
        self.longest: LongestRun | None = None
        self._open = ""  # the run that the text so far ends in
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a window may end within a character
        self._pattern = _longer_than(_SHORTEST_RUN - 1)

    def begin(self) -> None:
        """A sample begins."""
        self._open = ""
        self._decoder.reset()

    def add(self, raw: bytes, where: str) -> None:
        """More of the sample's text."""
        text = self._open + self._decoder.decode(raw)
        at = 0
        while found := self._pattern.search(text, at):
            self.longest = LongestRun(found[1], len(found[0]), where)
            self._pattern = _longer_than(len(found[0]))
            at = found.end()
        if text:
            self._open = text[len(text.rstrip(text[-1])) :]


def _longer_than(length: int) -> re.Pattern[str]:
    return re.compile(rf"(.)\1{{{length},}}", re.DOTALL)
