"""Calibration text -> token ids: which tokens a model sees, and which of them are counted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reap.errors import CalibrationError, UsageError
from reap.text.chat_template import ChatTemplate, Span, shared_length
from reap.text.overlap import Sketch
from reap.text.samples import Sample, SampleReader, Source

MASKS = ("all", "response")
DOMAINS_LIMIT = 256
_SKIPS_NAMED = 100

NO_TEMPLATE = "none"
MODELS_TEMPLATE = "auto"


class Tokenizer(Protocol):
    """What tokenisation needs of a model."""

    n_vocab: int
    has_tokenizer: bool
    add_bos: bool
    bos: int | None
    eos: int | None
    chat_template: str | None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids; add_special adds what the model wants around a text, parse_special reads special tokens in it."""

    def token_text(self, token: int) -> bytes:
        """The bytes that a token stands for, special tokens included."""


@dataclass(frozen=True)
class Window:
    """Tokens that the model sees at once, at most ctx_size of them.

    tokens   int32 [n_tokens]
    counted  bool [n_tokens]: whether the token enters the statistics
    sample   number of the sample among those used, from 0; a long sample has several windows, in order
    unit     number of what is counted whole or not at all, from 0: a sample, or one window of a text file
    where    file and line, for errors
    """

    tokens: NDArray[np.int32]
    counted: NDArray[np.bool_]
    domain: str | None
    sample: int
    unit: int
    line: int
    where: str


class Calibration:
    """A calibration source and how to read it; `windows` streams it, `summary` says afterwards what was read.

    source         `SampleReader`: a path, "-", a list of paths, or dictionaries
    ctx_size       longest window; a longer sample is split, nothing of it is dropped, and only its first window has BOS
    chat_template  "none": prompt and response are joined by a newline. "auto": they are a user and an assistant turn of
                   the model's template. A path: of the template in that file. Lines with messages always take the
                   model's, or the file's
    mask           "response": count only the tokens of the response, or of assistant turns; all of text and tokens.
                   "all": count all
    parse_special  read special tokens in text and pairs; in what a template wrote they are always read
    max_tokens     stop after that many tokens, in the middle of a sample if need be

    Raises UsageError for an option that cannot work.
    """

    def __init__(
        self,
        source: Source,
        *,
        ctx_size: int,
        chat_template: str | os.PathLike[str] = NO_TEMPLATE,
        mask: str = "all",
        parse_special: bool = True,
        max_tokens: int | None = None,
    ) -> None:
        if mask not in MASKS:
            raise UsageError(f"mask is {mask!r}, expected one of {', '.join(MASKS)}")
        for name, value in (("ctx_size", ctx_size), ("max_tokens", max_tokens)):
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} is {value!r}, expected a whole number of at least 1")
        self.ctx_size = ctx_size
        self.mask = mask
        self.parse_special = parse_special
        self.max_tokens = max_tokens
        self.chat_template = os.fspath(chat_template)
        self.template_source = _read_template(self.chat_template)
        self._reader = SampleReader(source)
        self._reset()

    def _reset(self) -> None:
        self.samples = 0
        self.tokens = 0
        self.counted_tokens = 0
        self.n_windows = 0
        self.skipped = 0
        self._units = 0
        self._skipped_lines: list[str] = []
        self._sketch = Sketch()
        self._domains: set[str] = set()

    @property
    def paths(self) -> list[str]:
        """The files to read, "-" for standard input; [] where the source is Python objects."""
        return self._reader.paths

    def windows(self, tokenizer: Tokenizer) -> Iterator[Window]:
        """The windows of all samples, in order.

        Raises CalibrationError that names file and line where a line cannot be used, and where no sample is left at
        all. A sample without tokens (or, with mask "response", without a response) is skipped and reported in
        `summary`.
        """
        self._reset()
        encoder = _Encoder(tokenizer, self)
        # The parts of a long text file are one sample.
        with closing(iter(self._reader)) as samples:
            for _, parts in groupby(_number(samples), key=lambda item: item[0]):
                yield from self._limited(self._sample_windows(encoder, (sample for _, sample in parts)))
                if self._is_full():
                    self._reader.finish()
                    break
        if not self.samples:
            names = ", ".join(self._reader.files)
            why = f" ({self._skipped_lines[0]})" if self._skipped_lines else ""
            raise CalibrationError(f"{names}: holds no usable sample{why}")

    def _sample_windows(self, encoder: _Encoder, parts: Iterator[Sample]) -> Iterator[Window]:
        first = next(parts)
        ids: list[int] = []
        counted: list[bool] = []
        number: int | None = None
        for part in chain([first], parts):
            part_ids, part_counted = encoder.encode(part)
            ids += part_ids
            counted += part_counted
            if number is None and self._has_content(part, ids, counted):
                number, self.samples = self.samples, self.samples + 1
            start = 0
            while number is not None and len(ids) - start > self.ctx_size:
                end = start + self.ctx_size
                yield self._window(first, number, ids[start:end], counted[start:end])
                start = end
            del ids[:start], counted[:start]
        if number is None:
            self._skip(first, "no tokens" if not ids else "no response to count" if not any(counted) else "no text")
        elif ids:
            yield self._window(first, number, ids, counted)
        self._units += not first.is_file

    def _has_content(self, part: Sample, ids: Sequence[int], counted: Sequence[bool]) -> bool:
        return bool(ids) and any(counted) and part.text != ""  # an empty text may still have its BOS

    def _window(self, sample: Sample, number: int, ids: Sequence[int], counted: Sequence[bool]) -> Window:
        if sample.domain is not None:
            self._domains.add(sample.domain)
            if len(self._domains) > DOMAINS_LIMIT:
                raise CalibrationError(
                    f"{sample.where}: more than {DOMAINS_LIMIT} domains; each keeps statistics of its own"
                )
        unit = self._units
        self._units += sample.is_file
        tokens, mask = np.array(ids, dtype=np.int32), np.array(counted, dtype=np.bool_)
        return Window(tokens, mask, sample.domain, number, unit, sample.line, sample.where)

    def _limited(self, windows: Iterator[Window]) -> Iterator[Window]:
        for window in windows:
            room = len(window.tokens) if self.max_tokens is None else self.max_tokens - self.tokens
            cut = replace(window, tokens=window.tokens[:room], counted=window.counted[:room])
            self.tokens += len(cut.tokens)
            self.counted_tokens += int(cut.counted.sum())
            self.n_windows += 1
            self._sketch.add(cut.tokens)
            yield cut
            if self._is_full():
                return

    def _is_full(self) -> bool:
        return self.max_tokens is not None and self.tokens >= self.max_tokens

    def _skip(self, sample: Sample, reason: str) -> None:
        self.skipped += 1
        if len(self._skipped_lines) < _SKIPS_NAMED:
            self._skipped_lines.append(f"{sample.where}: {reason}")

    def estimated_tokens(self) -> int | None:
        """How many tokens there will be in all, judged by the bytes read so far; None where nobody knows yet."""
        total, read = self._reader.total_bytes(), self._reader.bytes_read
        guess = max(self.tokens, round(self.tokens * total / read)) if total and read else None
        return self.max_tokens if guess is None else min(guess, self.max_tokens or guess)

    def summary(self) -> dict[str, Any]:
        """What was read, for a profile's "calibration"; the digests are of whole files once `windows` has ended."""
        return {
            "files": list(self._reader.files),
            "sha256": list(self._reader.digests),
            "samples": self.samples,
            "tokens": self.tokens,
            "counted_tokens": self.counted_tokens,
            "windows": self.n_windows,
            "skipped": self.skipped,
            "skipped_lines": list(self._skipped_lines),
            "ctx_size": self.ctx_size,
            "chat_template": self.chat_template,
            "mask": self.mask,
            "parse_special": self.parse_special,
            "max_tokens": self.max_tokens,
            "sketch": self._sketch.to_dict(),
        }


def _number(samples: Iterator[Sample]) -> Iterator[tuple[int, Sample]]:
    number = 0
    for sample in samples:
        number += not sample.continues
        yield number, sample


def _read_template(chat_template: str) -> str | None:
    if chat_template in (NO_TEMPLATE, MODELS_TEMPLATE):
        return None
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{chat_template}: cannot read the chat template: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{chat_template}: the chat template is not UTF-8 text") from error


class _Encoder:
    """Samples to token ids, with one model's tokenizer and template."""

    def __init__(self, tokenizer: Tokenizer, options: Calibration) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._template: ChatTemplate | None = None

    def encode(self, sample: Sample) -> tuple[list[int], list[bool]]:
        """Token ids of a sample, and which of them count. CalibrationError names the sample's file and line."""
        if sample.tokens is not None:
            return self._check_ids(sample), [True] * len(sample.tokens)
        if not self._tokenizer.has_tokenizer:
            raise CalibrationError(f'{sample.where}: the model has no tokenizer, so a line has to give "tokens"')
        try:
            text, spans, is_rendered = self._to_text(sample)
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CalibrationError(
                f"{sample.where}: has a lone surrogate (\\u{ord(error.object[error.start]):04x})"
            ) from error
        except CalibrationError as error:
            raise CalibrationError(f"{sample.where}: {error}") from error
        add_special = not sample.continues and not (is_rendered and self._starts_with_bos(text))
        parse_special = is_rendered or self._options.parse_special
        ids = self._tokenizer.tokenize(text, add_special=add_special, parse_special=parse_special)
        if spans is None:
            return ids, [True] * len(ids)
        byte_spans = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
        located = self._locate(ids, raw)
        if located is None:
            located = self._locate_by_prefix(ids, text, spans, byte_spans, add_special, parse_special)
        return ids, [any(start < end and a < end and start < b for a, b in byte_spans) for start, end in located]

    def _check_ids(self, sample: Sample) -> list[int]:
        tokens = sample.tokens or []
        bad = next((token for token in tokens if not 0 <= token < self._tokenizer.n_vocab), None)
        if bad is not None:
            raise CalibrationError(
                f"{sample.where}: token {bad} is not one of the model's, 0 to {self._tokenizer.n_vocab - 1}"
            )
        return list(tokens)

    def _to_text(self, sample: Sample) -> tuple[str, list[Span] | None, bool]:
        """The text, the characters that the mask counts (None: all), and whether a template wrote it."""
        only_response = self._options.mask == "response"
        if sample.text is not None:
            return sample.text, None, False
        if sample.pair is not None and self._options.chat_template == NO_TEMPLATE:
            head = sample.pair[0] + "\n"
            text = head + sample.pair[1]
            return text, [(len(head), len(text))] if only_response else None, False
        messages = sample.messages
        if messages is None:
            prompt, response = sample.pair or ("", "")
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        if only_response:
            return *self._chat().render_turns(messages, tools=sample.tools), True
        return self._chat().render(messages, tools=sample.tools), None, True

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            source = self._options.template_source or self._tokenizer.chat_template
            if not source:
                raise CalibrationError("the model has no chat template; give one in a file with chat_template")
            origin = (
                "the model's chat template" if self._options.template_source is None else self._options.chat_template
            )
            self._template = ChatTemplate(
                source, origin=origin, bos=self._special(self._tokenizer.bos), eos=self._special(self._tokenizer.eos)
            )
        return self._template

    def _special(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.token_text(token).decode("utf-8", "replace")

    def _starts_with_bos(self, text: str) -> bool:
        bos = self._special(self._tokenizer.bos)
        return bool(bos) and text.startswith(bos)

    def _locate(self, ids: Sequence[int], raw: bytes) -> list[Span] | None:
        """Which bytes of the text each token stands for, by the tokens' own bytes; None where they do not spell the
        text.

        Added specials stand for none; a space that a tokenizer puts before a text or after a special token is allowed
        for.
        """
        position = 0
        spans = []
        for index, token in enumerate(ids):
            piece = self._tokenizer.token_text(token)
            if not raw.startswith(piece, position):
                if piece.startswith(b" ") and raw.startswith(piece[1:], position):
                    piece = piece[1:]
                elif index in (0, len(ids) - 1):  # BOS, EOS
                    piece = b""
                else:
                    return None
            spans.append((position, position + len(piece)))
            position += len(piece)
        return spans if position == len(raw) else None

    def _locate_by_prefix(
        self,
        ids: Sequence[int],
        text: str,
        spans: Sequence[Span],
        byte_spans: Sequence[Span],
        add_special: bool,
        parse_special: bool,
    ) -> list[Span]:
        """As `_locate`, for tokenizers that change the text: a boundary lies where the ids of the text before it cease
        to agree."""
        located = [(0, 0)] * len(ids)
        for (start, end), byte_span in zip(spans, byte_spans, strict=True):
            edges = []
            for edge in (start, end):
                head = self._tokenizer.tokenize(text[:edge], add_special=add_special, parse_special=parse_special)
                edges.append(len(ids) if edge == len(text) else shared_length(head, ids))
            located[edges[0] : edges[1]] = [byte_span] * (edges[1] - edges[0])
        return located
