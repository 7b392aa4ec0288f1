"""One sample -> token ids, and which of them are counted, with one model's tokenizer and chat template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from reap.errors import CalibrationError, UsageError
from reap.files.recognise import unreadable_text
from reap.text.chat_template import ChatTemplate
from reap.text.marks import Unlocated
from reap.text.mask import Span, shared_length
from reap.text.sample import Sample, SampleLeftOut

NO_TEMPLATE = "none"
MODELS_TEMPLATE = "auto"
# what a user calls the texts that a template may leave out
THOUGHTS, CALLS = "thoughts", "tool calls"
_NAMES = {"reasoning_content": THOUGHTS, "arguments": CALLS}


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


def read_template(chat_template: str) -> str | None:
    """The source of the template in a file; None where `chat_template` names no file. UsageError."""
    if chat_template in (NO_TEMPLATE, MODELS_TEMPLATE):
        return None
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{chat_template}: cannot read the chat template: {unreadable_text(chat_template, error)}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{chat_template}: the chat template is not UTF-8 text") from error


def check_variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a template is to read besides the conversation, as JSON has it. UsageError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in given):
        raise UsageError(
            f"chat_template_kwargs is {given!r}, expected names and values, such as enable_thinking: false"
        )
    reserved = next((name for name in given if name in ("messages", "tools", "add_generation_prompt")), None)
    if reserved is not None:
        raise UsageError(f"chat_template_kwargs has {reserved!r}, which comes from the calibration")
    try:
        variables: dict[str, Any] = json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"chat_template_kwargs is not JSON: {error}") from error
    return variables


def check_text(text: str) -> bytes:
    """The text in UTF-8. CalibrationError for a half of a pair of surrogates, which JSON can hold and UTF-8 cannot."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(f"has a lone surrogate (\\u{ord(error.object[error.start]):04x})") from error


class Encoder:
    """Samples to token ids, with one model's tokenizer and template.

    chat_template, mask, parse_special, now: as `Calibration`'s. template_source: of the file that chat_template names.
    variables: `Calibration`'s chat_template_kwargs."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: str = NO_TEMPLATE,
        template_source: str | None = None,
        mask: str = "all",
        parse_special: bool = True,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> None:
        self.texts_left_out = Counter[str]()
        self._variables = variables
        self._now = now
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._template_source = template_source
        self._mask = mask
        self._parse_special = parse_special
        self._template: ChatTemplate | None = None

    @property
    def has_rendered(self) -> bool:
        """Whether a template wrote any of the text so far."""
        return self._template is not None

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template, the model's or a file's."""
        return bool(self._template_source or self._tokenizer.chat_template)

    def encode(self, sample: Sample) -> tuple[list[int], list[bool]]:
        """Token ids of a sample, and which of them count. CalibrationError names the sample's file and line."""
        if sample.tokens is not None:
            all_count = [True] * len(sample.tokens)
            return self._check_ids(sample), (sample.labelled if self._mask == "response" else None) or all_count
        if not self._tokenizer.has_tokenizer:
            raise CalibrationError(f'{sample.where}: the model has no tokenizer, so a line has to give "tokens"')
        try:
            text, spans, is_rendered = self._to_text(sample)
            raw = check_text(text)
        except Unlocated as error:
            raise SampleLeftOut(sample.where, "the assistant's turns cannot be told apart", str(error)) from error
        except CalibrationError as error:
            raise CalibrationError(f"{sample.where}: {error}") from error
        add_special = not sample.continues and self._adds_special(text, is_rendered)
        parse_special = is_rendered or self._parse_special
        ids = self._tokenizer.tokenize(text, add_special=add_special, parse_special=parse_special)
        if sample.continues or sample.goes_on:
            ids = self._end_of_part(ids, sample)
        if spans is None:
            return ids, [True] * len(ids)
        byte_spans = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
        located = self._locate(ids, raw)
        if located is None:
            located = self._locate_by_prefix(ids, text, spans, byte_spans, add_special, parse_special)
        return ids, [any(start < end and a < end and start < b for a, b in byte_spans) for start, end in located]

    def tokens_of(self, text: str, *, is_rendered: bool) -> list[int]:
        """Ids of a text that the model is to go on with; is_rendered: a template wrote it. CalibrationError."""
        if not self._tokenizer.has_tokenizer:
            raise CalibrationError('the model has no tokenizer, so a line has to give "tokens"')
        check_text(text)
        ids = self._tokenizer.tokenize(
            text,
            add_special=self._adds_special(text, is_rendered),
            parse_special=is_rendered or self._parse_special,
        )
        return ids[:-1] if ids and ids[-1] == self._tokenizer.eos and not self._ends_with_eos(text) else ids

    def _adds_special(self, text: str, is_rendered: bool) -> bool:
        return not (is_rendered and self._starts_with_bos(text))

    def _ends_with_eos(self, text: str) -> bool:
        eos = self._special(self._tokenizer.eos)
        return bool(eos) and text.endswith(eos)

    def _end_of_part(self, ids: list[int], sample: Sample) -> list[int]:
        """A text file's part without what the tokenizer puts at the end of a text, except the last part, which has
        it."""
        plain, whole = (self._tokenizer.tokenize("a", add_special=flag, parse_special=False) for flag in (False, True))
        n_end = 0
        while n_end < len(whole) - len(plain) and whole[: len(whole) - n_end][-len(plain) :] != plain:
            n_end += 1
        end = whole[len(whole) - n_end :]
        if sample.goes_on:
            return ids[:-n_end] if end and not sample.continues and ids[-n_end:] == end else ids
        return [*ids, *end]

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
        only_response = self._mask == "response"
        if sample.text is not None:
            return sample.text, None, False
        if sample.pair is not None and self._chat_template == NO_TEMPLATE:
            head = sample.pair[0] + "\n"
            text = head + sample.pair[1]
            return text, [(len(head), len(text))] if only_response else None, False
        messages = sample.messages
        if messages is None:
            prompt, response = sample.pair or ("", "")
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            if sample.system is not None:
                messages.insert(0, {"role": "system", "content": sample.system})
        rendered = self.template().read(messages, tools=sample.tools, turns=only_response)
        self.texts_left_out.update(_NAMES.get(name, name) for _, name in rendered.left_out)
        return rendered.text, rendered.spans, True

    def template(self) -> ChatTemplate:
        """The chat template, the file's or the model's. CalibrationError where there is none."""
        if self._template is None:
            source = self._template_source or self._tokenizer.chat_template
            if not source:
                raise CalibrationError("the model has no chat template; give one in a file with chat_template")
            origin = "the model's chat template" if self._template_source is None else self._chat_template
            self._template = ChatTemplate(
                source,
                origin=origin,
                bos=self._special(self._tokenizer.bos),
                eos=self._special(self._tokenizer.eos),
                variables=self._variables,
                now=self._now,
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
