"""Calibration text -> token ids: which tokens a model sees, and which of them are counted."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import chain, groupby
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from reap.errors import CalibrationError, UsageError
from reap.files.paths import PathLike
from reap.text.encoding import MODELS_TEMPLATE, NO_TEMPLATE, Encoder, check_text, check_variables, read_template
from reap.text.encoding import Tokenizer as Tokenizer
from reap.text.messages import normalise_messages, normalise_tools
from reap.text.overlap import Sketch
from reap.text.sample import Sample, SampleLeftOut
from reap.text.samples import FileRecord, SampleReader, Source

MASKS = ("all", "response")
DOMAINS_LIMIT = 256
_SKIPS_NAMED = 100


class TextArguments(TypedDict, total=False):
    """Keyword arguments that a function hands on to `Calibration`, where they are explained."""

    chat_template: PathLike
    mask: str
    parse_special: bool
    max_tokens: int | None
    chat_template_kwargs: Mapping[str, Any] | None
    columns: Mapping[str, str] | None
    skip_bad_lines: bool


@dataclass(frozen=True)
class Window:
    """Tokens that the model sees at once, at most ctx_size of them."""

    tokens: NDArray[np.int32]
    """int32 [n_tokens]."""
    counted: NDArray[np.bool_]
    """bool [n_tokens]: whether the token enters the statistics."""
    domain: str | None
    """None: the line has none."""
    sample: int
    """Number of the sample among those used, from 0; a long sample has several windows, in order."""
    unit: int
    """Number of what is counted whole or not at all, from 0 and without gaps: a sample, or one window of a text
    file."""
    line: int
    """Number of the sample's line in its file, from 1."""
    where: str
    """File and line, for errors."""
    consumed: bytes = b""
    """SHA-256 over all windows up to and including this one: what was read so far, however it lay in files. Two
    calibrations whose windows begin alike have the same value there."""
    source: Sample | None = field(default=None, repr=False, compare=False)
    """The sample itself; of a long text file its first part."""


class Calibration:
    """A calibration source and how to read it; `windows` streams it, `summary` says afterwards what was read.

    source         `SampleReader`: a path, "-", a folder, a list of paths, a mapping of domains to these, dictionaries
    ctx_size       longest window; a longer sample is split, nothing of it is dropped, and only its first window has BOS
    chat_template  "none": prompt and response are joined by a newline. "auto": they are a user and an assistant turn of
                   the model's template. A path: of the template in that file. Lines with messages always take the
                   model's, or the file's
    mask           "response": count only the tokens of the response, or of assistant turns; all of text and tokens.
                   "all": count all
    parse_special  read special tokens in text and pairs; in what a template wrote they are always read
    max_tokens     stop after that many tokens, in the middle of a sample if need be
    chat_template_kwargs
                   more of what the template can read, as llama.cpp's server takes them: {"enable_thinking": False}
    now            the time that the template is told, one for the whole run; the present by default
    columns        role -> name, for data whose names are none of those that are known: {"text": "story"}
    skip_bad_lines leave out lines that cannot be used, and count them by reason, where they are an error otherwise

    Raises UsageError for an option that cannot work.
    """

    def __init__(
        self,
        source: Source,
        *,
        ctx_size: int,
        chat_template: PathLike = NO_TEMPLATE,
        mask: str = "all",
        parse_special: bool = True,
        max_tokens: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        now: datetime | None = None,
        columns: Mapping[str, str] | None = None,
        skip_bad_lines: bool = False,
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
        self.template_source = read_template(self.chat_template)
        self.chat_template_kwargs = check_variables(chat_template_kwargs)
        self.now = (now or datetime.now()).replace(microsecond=0)
        self._reader = SampleReader(source, columns=columns, skip_bad_lines=skip_bad_lines)
        self._reset()

    def _reset(self) -> None:
        self.samples = 0
        self._has_ended = False
        self.tokens = 0
        self.counted_tokens = 0
        self.n_windows = 0
        self._units = 0
        self._encoder: Encoder | None = None
        self._skips = Counter[str]()
        self._encoded_tokens = 0
        self._skipped_lines: list[str] = []
        self._untemplated_pairs = 0
        self.texts_left_out = Counter[str]()
        self._sketch = Sketch()
        self._consumed = hashlib.sha256()
        self._domains: set[str] = set()

    @property
    def paths(self) -> list[str]:
        """The files to read, "-" for standard input; [] where the source is Python objects."""
        return self._reader.paths

    @property
    def inputs(self) -> list[str]:
        """All files that are read: `paths`, and the template's, where one was given."""
        return [*self.paths, *([] if self.chat_template in (NO_TEMPLATE, MODELS_TEMPLATE) else [self.chat_template])]

    def check(self) -> None:
        """Look for lines that cannot be used, before a model is loaded for nothing: parse, shape and the form of
        messages, no template and no tokens.

        Files, and lists in Python, are read once from end to end; what cannot be read twice is not. Raises
        CalibrationError that names the first bad line, and how many there are; with `skip_bad_lines` nothing is looked
        for.
        """
        if not self._reader.skip_bad_lines:
            self._reader.check(self.max_tokens, _check_content)

    def stop(self) -> None:
        """Let `windows` end after the unit that it is at, as if the source had ended there."""
        self._has_ended = True

    @property
    def records(self) -> list[FileRecord]:
        """What was found in each file, so far."""
        return self._reader.records

    def options(self) -> dict[str, Any]:
        """The options that say how a text is read, as JSON types."""
        return {
            "chat_template": self.chat_template,
            "chat_template_kwargs": self.chat_template_kwargs,
            "mask": self.mask,
            "parse_special": self.parse_special,
            "max_tokens": self.max_tokens,
            "columns": self._reader.columns,
            "skip_bad_lines": self._reader.skip_bad_lines,
        }

    def windows(self, tokenizer: Tokenizer) -> Iterator[Window]:
        """The windows of all samples, in order.

        Raises CalibrationError that names file and line where a line cannot be used, once all units before it are
        complete, and where no sample is left at all. A sample without tokens (or, with mask "response", without a
        response) is skipped and reported in `summary`.
        """
        self._reset()
        encoder = self._encoder = Encoder(
            tokenizer,
            chat_template=self.chat_template,
            template_source=self.template_source,
            mask=self.mask,
            parse_special=self.parse_special,
            variables=self.chat_template_kwargs,
            now=self.now,
        )
        self.texts_left_out = encoder.texts_left_out
        # The parts of a long text file are one sample.
        with closing(iter(self._reader)) as samples:
            for _, parts in groupby(_number(samples), key=lambda item: item[0]):
                yield from self._limited(self._sample_windows(encoder, (sample for _, sample in parts)))
                if self._is_full() or self._has_ended:
                    self._reader.finish()
                    break
        if not self.samples:
            names = ", ".join(self._reader.files)
            why = f" ({self.skipped_lines[0]})" if self.skipped else ""
            raise CalibrationError(f"{names}: holds no usable sample{why}")

    def _sample_windows(self, encoder: Encoder, parts: Iterator[Sample]) -> Iterator[Window]:
        first = next(parts)
        ids: list[int] = []
        counted: list[bool] = []
        number: int | None = None
        # the next line is looked at only where it may go on with the same text: an error in it comes after this sample
        for part in chain([first], parts) if first.is_file else [first]:
            try:
                part_ids, part_counted = self._encode(encoder, part)
            except SampleLeftOut as left_out:
                self._skip(left_out.reason, str(left_out))
                return
            ids += part_ids
            counted += part_counted
            if number is None and self._has_content(part, ids, counted):
                number, self.samples = self.samples, self.samples + 1
            self._encoded_tokens += len(part_ids) if number is not None else 0
            start = 0
            while number is not None and len(ids) - start > self.ctx_size:
                end = start + self.ctx_size
                yield self._window(first, number, ids[start:end], counted[start:end])
                start = end
            del ids[:start], counted[:start]
        self._untemplated_pairs += (
            number is not None and first.pair is not None and self.chat_template == NO_TEMPLATE and encoder.has_template
        )
        if number is None:
            reason = "no tokens" if not ids else "no response to count" if not any(counted) else "no text"
            self._skip(reason, f"{first.where}: {reason}")
            return
        if ids:
            yield self._window(first, number, ids, counted)
        self._units += not first.is_file  # a skipped sample is not a unit

    def _encode(self, encoder: Encoder, sample: Sample) -> tuple[list[int], list[bool]]:
        if sample.messages == []:
            raise SampleLeftOut(sample.where, "no messages")
        try:
            return encoder.encode(sample)
        except SampleLeftOut:
            raise
        except CalibrationError as error:
            if sample.is_file or not self._reader.skip_bad_lines:
                raise
            problem = str(error).removeprefix(f"{sample.where}: ")
            raise SampleLeftOut(sample.where, "cannot be rendered or tokenised", problem) from error

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
        return Window(tokens, mask, sample.domain, number, unit, sample.line, sample.where, source=sample)

    def _limited(self, windows: Iterator[Window]) -> Iterator[Window]:
        for window in windows:
            room = len(window.tokens) if self.max_tokens is None else self.max_tokens - self.tokens
            cut = replace(window, tokens=window.tokens[:room], counted=window.counted[:room])
            self.tokens += len(cut.tokens)
            self.counted_tokens += int(cut.counted.sum())
            self.n_windows += 1
            self._sketch.add(cut.tokens)
            yield replace(cut, consumed=self._consume(cut))
            # each window of a text file is a unit; a sample is one with all its windows
            if self._is_full() or (self._has_ended and window.source is not None and window.source.is_file):
                return

    def _consume(self, window: Window) -> bytes:
        head = (window.unit, window.domain, len(window.tokens))
        self._consumed.update(repr(head).encode())
        self._consumed.update(window.tokens.tobytes() + window.counted.tobytes())
        return self._consumed.digest()

    def _is_full(self) -> bool:
        return self.max_tokens is not None and self.tokens >= self.max_tokens

    def _skip(self, reason: str, sentence: str) -> None:
        self._skips[reason] += 1
        if len(self._skipped_lines) < _SKIPS_NAMED:
            self._skipped_lines.append(sentence)

    @property
    def skipped_reasons(self) -> dict[str, int]:
        """Why lines were left out -> how many, the most frequent first."""
        bad = sum((record.bad for record in self._reader.records), Counter[str]())
        return dict((self._skips + bad).most_common())

    @property
    def skipped(self) -> int:
        """How many lines were left out."""
        return sum(self.skipped_reasons.values())

    @property
    def skipped_lines(self) -> list[str]:
        """ "file:line: why" of the first of them."""
        return [*self._skipped_lines, *map(str, self._reader.bad_lines)][:_SKIPS_NAMED]

    @property
    def notes(self) -> list[str]:
        """What is worth a look: other shapes in the same lines, pairs without the template that the model has."""
        notes = list(self._reader.notes)
        if self._untemplated_pairs:
            pairs = "1 pair is" if self._untemplated_pairs == 1 else f"{self._untemplated_pairs:,} pairs are"
            notes.append(
                f"{pairs} joined by a newline, without the model's chat template; --chat-template auto"
                ' (chat_template="auto") renders a pair as the turns of a user and an assistant'
            )
        for name, count in self.texts_left_out.most_common():
            notes.append(f"the chat template leaves out the {name} of {count:,} {'turn' if count == 1 else 'turns'}")
        return notes

    def estimated_tokens(self) -> int | None:
        """How many tokens there will be in all, judged by what has been tokenised so far; None where it cannot be
        known."""
        total, read = self._reader.total_bytes(), self._reader.bytes_read
        guess = max(self.tokens, round(self._encoded_tokens * total / read)) if total and read else None
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
            "skipped_lines": self.skipped_lines,
            "skipped_reasons": self.skipped_reasons,
            "shapes": dict(sum((record.shapes for record in self._reader.records), Counter[str]()).most_common()),
            "notes": self.notes,
            "ctx_size": self.ctx_size,
            **self.options(),
            "chat_template_time": self.now.isoformat() if self._encoder and self._encoder.has_rendered else None,
            "texts_left_out": dict(self.texts_left_out),
            "sketch": self._sketch.to_dict(),
        }


def _check_content(sample: Sample) -> None:
    for text in (sample.text, *(sample.pair or ())):
        check_text(text or "")
    if sample.messages is not None:
        for message in normalise_messages(sample.messages):
            check_text(json.dumps(message, ensure_ascii=False))
        normalise_tools(sample.tools)


def _number(samples: Iterator[Sample]) -> Iterator[tuple[int, Sample]]:
    number = 0
    for sample in samples:
        number += not sample.continues
        yield number, sample
