"""Samples as prompts: what a model is asked, and the line of a calibration that its answer completes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict

from reap.errors import CalibrationError
from reap.files.paths import PathLike
from reap.text.encoding import MODELS_TEMPLATE, NO_TEMPLATE, Encoder, Tokenizer, check_variables, read_template
from reap.text.messages import normalise_tools
from reap.text.sample import Sample
from reap.text.samples import SampleReader, Source


class PromptArguments(TypedDict, total=False):
    """Keyword arguments that a function hands on to `Prompts`, where they are explained."""

    chat_template: PathLike
    chat_template_kwargs: Mapping[str, Any] | None
    columns: Mapping[str, str] | None
    skip_bad_lines: bool


@dataclass(frozen=True)
class Asked:
    """One prompt."""

    tokens: tuple[int, ...]
    """What the model is given."""
    line: dict[str, Any]
    """The line that it comes from, up to the question: "messages" (and "tools"), "prompt", "text" or "tokens"."""
    where: str
    """File and line."""
    tools: list[dict[str, Any]] | None
    """The tools that it may call, in the form of today; None: none."""

    def answered(self, answer: str, tokens: tuple[int, ...]) -> dict[str, Any]:
        """The line with the answer (its text, and its token ids) in it, as a line of a calibration."""
        line = dict(self.line)
        if "messages" in line:
            line["messages"] = [*line["messages"], {"role": "assistant", "content": answer}]
        elif "prompt" in line:
            line["response"] = answer
        elif "text" in line:
            line["text"] += answer
        else:
            line["tokens"] = [*line["tokens"], *tokens]
        return line


class Prompts:
    """Prompts in any shape that a calibration has (`SampleReader`), for one model.

    A conversation is asked up to its last user turn, and a pair its first half. chat_template: "auto": the model's own,
    and a pair without one is its prompt and a newline; "none": pairs are so in any case; or the path of a template.
    chat_template_kwargs, columns, skip_bad_lines: as `Calibration`'s.

    Raises UsageError for an option that cannot work.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        chat_template: PathLike = MODELS_TEMPLATE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
        skip_bad_lines: bool = False,
        now: datetime | None = None,
    ) -> None:
        self._reader = SampleReader(source, columns=columns, skip_bad_lines=skip_bad_lines)
        self._chat_template = os.fspath(chat_template)
        #: What the template is told of the time.
        self.now = now or datetime.now().replace(microsecond=0)
        self._encoder = Encoder(
            tokenizer,
            chat_template=self._chat_template,
            template_source=read_template(self._chat_template),
            variables=check_variables(chat_template_kwargs),
            now=self.now,
        )

    @property
    def names(self) -> list[str]:
        """Of the files that were read."""
        return list(self._reader.files)

    @property
    def bad_lines(self) -> int:
        """How many lines were left out so far."""
        return sum(record.bad.total() for record in self._reader.records)

    def __iter__(self) -> Iterator[Asked]:
        """The prompts, in order.

        Raises CalibrationError that names the file and line of one that cannot be asked, or where there is none.
        """
        n_asked = 0
        for sample in self._reader:
            try:
                asked = self._asked(sample)
            except CalibrationError as error:
                problem = str(error).removeprefix(f"{sample.where}: ")
                raise CalibrationError(f"{sample.where}: {problem}") from error
            n_asked += 1
            yield asked
        if not n_asked:
            raise CalibrationError(f"{', '.join(self.names)}: holds no prompt")

    def _asked(self, sample: Sample) -> Asked:
        if sample.is_file:
            raise CalibrationError(
                "is a text file, which is not a prompt; prompts are lines of JSON, or rows of a table"
            )
        line: dict[str, Any] = {} if sample.domain is None else {"domain": sample.domain}
        messages = self._messages(sample)
        tools = None
        if messages is not None:
            line["messages"] = messages
            tools = normalise_tools(sample.tools)
            if sample.tools:
                line["tools"] = sample.tools
            text = self._encoder.template().render(messages, tools=sample.tools, add_generation_prompt=True)
            tokens = self._encoder.tokens_of(text, is_rendered=True)
        elif sample.pair is not None:
            line["prompt"] = sample.pair[0]
            tokens = self._encoder.tokens_of(sample.pair[0] + "\n", is_rendered=False)
        elif sample.text is not None:
            line["text"] = sample.text
            tokens = self._encoder.tokens_of(sample.text, is_rendered=False)
        else:
            tokens, _ = self._encoder.encode(sample)
            line["tokens"] = tokens
        if not tokens:
            raise CalibrationError("has no tokens to go on from")
        return Asked(tuple(tokens), line, sample.where, tools)

    def _messages(self, sample: Sample) -> list[dict[str, Any]] | None:
        """What is asked as a conversation; None: the sample is none."""
        if sample.messages is not None:
            last = max((n for n, it in enumerate(sample.messages) if it.get("role") == "user"), default=-1)
            if last < 0:
                raise CalibrationError("has no user turn to answer")
            return list(sample.messages[: last + 1])
        if sample.pair is None or self._chat_template == NO_TEMPLATE or not self._encoder.has_template:
            return None
        system = [] if sample.system is None else [{"role": "system", "content": sample.system}]
        return [*system, {"role": "user", "content": sample.pair[0]}]
