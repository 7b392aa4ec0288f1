"""A sample: what one line of a calibration file is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reap.errors import CalibrationError

Message = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One line of a calibration file, or a part of a text file. Exactly one of text, pair, messages and tokens is
    there."""

    where: str
    """ "calib.jsonl:12", for errors."""
    line: int
    """Its number, from 1."""
    domain: str | None = None
    """None: the line has none."""
    text: str | None = None
    """A text by itself."""
    pair: tuple[str, str] | None = None
    """(prompt, response)."""
    messages: list[Message] | None = None
    """Turns of a conversation, as OpenAI's API has them."""
    tokens: list[int] | None = None
    """Token ids."""
    tools: Any = None
    """Of messages, as the line has them; JSON in a string is parsed."""
    system: str | None = None
    """Of a pair: what a template renders as a system turn before it."""
    labelled: list[bool] | None = None
    """Of tokens: which of them the line's labels train on."""
    continues: bool = False
    """The same text file's next part, not a sample of its own."""
    goes_on: bool = False
    """The same text file has another part after this one."""
    is_file: bool = False
    """A text file's part: its windows stand alone, since they were not written as one sample."""
    shape: str = ""
    """The names that it was read from: "prompt+response"."""
    passed_over: tuple[str, ...] = ()
    """Names of the poorer shapes that the line has as well."""


class SampleLeftOut(CalibrationError):
    """One sample that cannot be used, where the run goes on without it and counts it by `reason`: few words, without
    what differs from line to line; `problem` says it in full."""

    def __init__(self, where: str, reason: str, problem: str | None = None) -> None:
        super().__init__(f"{where}: {problem or reason}")
        self.reason = reason
