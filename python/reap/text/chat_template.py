"""Chat templates: Jinja programs that come with a model, rendered in a sandbox as llama.cpp's server renders them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from reap.errors import CalibrationError
from reap.text import template_habits as habits
from reap.text.left_out import places_left_out
from reap.text.marks import Locator, Place
from reap.text.mask import Span, TurnFinder, marked_spans
from reap.text.mask import shared_length as shared_length
from reap.text.messages import Message, Tool, join_parts, normalise_messages, normalise_tools, parse_arguments

if TYPE_CHECKING:
    import jinja2

# In no template, and such that no template has a reason to change it.
_PROBE = "reap0probe1of2a3template"
_PROBING_SECONDS = 0.5  # of processor time; the slowest template published takes 0.05
_PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "tool1",
        "description": "what it does",
        "parameters": {
            "type": "object",
            "properties": {"arg": {"type": "string", "description": "what it is for"}},
            "required": ["arg"],
        },
    },
}


@dataclass(frozen=True)
class Capabilities:
    """What a template makes of a message, found by rendering a few."""

    takes_strings: bool
    """content as a string"""
    takes_parts: bool
    """content as a list of {"type": "text", "text"}"""
    takes_system: bool
    """a message of the role "system\""""
    takes_objects: bool
    """a call's arguments as an object; else as a JSON string"""


class ChatTemplate:
    """A compiled template.

    Args:
        source: the Jinja program.
        origin: what errors call it.
        bos: the text of the model's BOS token, `bos_token` in the template; "" where it has none.
        eos: the same of EOS.
        variables: more of what the template can read, as `chat_template_kwargs` of llama.cpp's server.
        now: the time that the template is told; the present where it is None.

    Raises:
        CalibrationError: `source` is not a Jinja template.
        UsageError: jinja2 is too old to be a sandbox.
    """

    def __init__(
        self,
        source: str,
        *,
        origin: str,
        bos: str = "",
        eos: str = "",
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> None:
        from reap.text.sandbox import sandbox  # jinja2 is loaded where it is needed

        self.origin = origin
        self.source = habits.patch_source(source)
        now = now or datetime.now()
        self._now = now
        self.variables = _variables(dict(variables or {}), now) | {"bos_token": bos, "eos_token": eos}
        self._adapt = habits.adaptation(self.source)
        self._refused: str | None = None
        self._gaps: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})  # without tools, with tools
        environment = sandbox(now)
        try:
            self._template = environment.compile_template(self.source)
        except Exception as error:  # deep nesting ends in a RecursionError, and Python has limits of its own
            raise CalibrationError(f"{origin}: is not a chat template: {_detail(error)}") from error

    @cached_property
    def marks_generation(self) -> bool:
        """Whether the template says itself what the model writes."""
        return "endgeneration" in self.source

    def prepare(self, messages: Sequence[Mapping[str, Any]], tools: object = None) -> Conversation:
        """A conversation as data sets hold it in the form that this template wants.

        Raises CalibrationError that names message and field where that cannot be.
        """
        prepared = normalise_messages(messages)
        if habits.trims_contents(self.source):
            prepared = habits.trim(prepared)
        can = self._capabilities()
        if can.takes_strings != can.takes_parts:
            prepared = [
                {**message, "content": _as_string(message) if can.takes_strings else _as_parts(message)}
                for message in prepared
            ]
        if not habits.keeps_developer(self.source):
            prepared = [
                {**message, "role": "system"} if message["role"] == "developer" else message for message in prepared
            ]
        if not can.takes_system:
            prepared = habits.merge_system(prepared)
        if can.takes_objects:
            prepared = [parse_arguments(message, number) for number, message in enumerate(prepared, 1)]
        return Conversation(prepared, normalise_tools(tools))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: object = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text. CalibrationError where the template fails or refuses it."""
        return self.render_prepared(self.prepare(messages, tools), add_generation_prompt=add_generation_prompt)

    def render_prepared(
        self, conversation: Conversation, *, add_generation_prompt: bool = False, mark_generation: bool = False
    ) -> str:
        """What `prepare` returned as text; with `mark_generation` the template's own marks are in it."""
        messages = self.adapt(conversation.messages)
        try:
            return self._run(messages, conversation.tools, add_generation_prompt, mark_generation)
        except Exception as error:  # a template is a program of someone else's: it can fail in any way
            raise CalibrationError(f"{self.origin} cannot render the messages: {_detail(error)}") from error

    def adapt(self, messages: list[Message]) -> list[Message]:
        """The messages that `prepare` returned as the engine's code for this family of templates changes them."""
        return messages if self._adapt is None else self._adapt(messages)

    def render_turns(self, messages: Sequence[Mapping[str, Any]], *, tools: object = None) -> tuple[str, list[Span]]:
        """The conversation as text, and which characters of it [start, end) the assistant's turns wrote, in order.

        Raises Unlocated, a CalibrationError, where a turn cannot be found in the text.
        """
        rendered = self.read(messages, tools=tools, turns=True)
        return rendered.text, rendered.spans or []

    def read(self, messages: Sequence[Mapping[str, Any]], *, tools: object = None, turns: bool = False) -> Rendered:
        """The conversation as text, with what the template leaves out of it, and, with `turns`, the assistant's turns.

        Raises CalibrationError as `render` does, and Unlocated as `render_turns` does.
        """
        from reap.text.budget import limited

        conversation = self.prepare(messages, tools)
        with limited(_seconds(_size(conversation.messages) + _size(conversation.tools), len(messages))):
            return self._read(conversation, turns)

    def _read(self, conversation: Conversation, turns: bool) -> Rendered:
        text = self.render_prepared(conversation)

        def render(some: Sequence[Message], prompt: bool) -> str:
            return self.render_prepared(Conversation(list(some), conversation.tools), add_generation_prompt=prompt)

        locator = Locator(render, conversation.messages, text)
        spans = self._spans(conversation, locator) if turns else None
        left_out = places_left_out(locator)
        return Rendered(text, spans, left_out)

    def _spans(self, conversation: Conversation, locator: Locator) -> list[Span]:
        if self.marks_generation:
            from reap.text.sandbox import GENERATION_ENDS, GENERATION_STARTS

            marked = self.render_prepared(conversation, mark_generation=True)
            plain, spans = marked_spans(marked, GENERATION_STARTS, GENERATION_ENDS)
            n_turns = sum(message["role"] == "assistant" for message in conversation.messages)
            if plain == locator.text and len(spans) == n_turns and all(start < end for start, end in spans):
                return spans
        cache = self._gaps[conversation.tools is not None]
        return TurnFinder(locator, cache).spans()

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the template can take, judged as llama.cpp's common/jinja/caps.cpp does, its blind spots included."""
        from reap.text.sandbox import WatchedList, WatchedText

        text, empty = WatchedText(_PROBE), WatchedList()
        writes_text = self._writes([{"role": "user", "content": text}])
        parts = text.was_read
        if re.search(r"\bis\s+(not\s+)?string\b", self.source):
            renders_empty = self._try([{"role": "user", "content": empty}]) is not None
            parts = parts or (empty.was_read and renders_empty)
        strings = self._try([{"role": "user", "content": text}]) is not None and (writes_text or not parts)
        system: Any = [{"type": "text", "text": _PROBE}] if parts and not strings else _PROBE
        user = {"role": "user", "content": "question"}
        call = {"id": "call00001", "type": "function", "function": {"name": "tool1", "arguments": {"arg": _PROBE}}}
        objects = self._writes(
            [
                user,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "result", "tool_call_id": "call00001"},
                {"role": "assistant", "content": "answer"},
                user,
            ],
            tools=[_PROBE_TOOL],
        )
        return Capabilities(strings, parts, self._writes([{"role": "system", "content": system}, user]), objects)

    def _capabilities(self) -> Capabilities:
        """The same; CalibrationError where finding them out takes too much."""
        from reap.text.budget import Exhausted, limited

        if self._refused is None:
            try:
                with limited(_PROBING_SECONDS):
                    return self.capabilities
            except Exhausted as error:
                self._refused = f"{self.origin} cannot render a message of three words: {_detail(error)}"
        raise CalibrationError(self._refused)

    def _writes(self, messages: list[Message], tools: list[Tool] | None = None) -> bool:
        """Whether the probe in these messages is written, and not within Python's spelling of what it lies in."""
        text = self._try(messages, tools)
        return text is not None and _PROBE in text and f"'arg': '{_PROBE}'" not in text

    def _try(self, messages: list[Message], tools: list[Tool] | None = None) -> str | None:
        from reap.text.budget import Exhausted

        try:
            return self._run(messages, tools, True, False)
        except Exhausted:
            raise
        except Exception:  # what a template cannot take it may refuse in any way
            return None

    @cached_property
    def _lenient(self) -> jinja2.Template:
        from reap.text.sandbox import sandbox

        return sandbox(self._now, lenient=True).compile_template(self.source)

    def _run(self, messages: list[Message], tools: list[Tool] | None, prompt: bool, marked: bool) -> str:
        """As transformers renders it, which gives a template None for no tools and nothing for what is missing; where
        that fails, as the engine does, which gives it neither."""
        import jinja2

        given: dict[str, Any] = self.variables | {"add_generation_prompt": prompt}
        nothing: dict[str, Any] = {"documents": None, "tools": None}
        if tools is not None:
            given["tools"] = tools
        try:
            return self._run_once(self._template, messages, nothing | given, marked)
        except jinja2.TemplateError as error:
            if not isinstance(error, jinja2.UndefinedError):
                raise
            first: Exception = error
        except TypeError as error:
            first = error
        try:
            return self._run_once(self._lenient, messages, given, marked)
        except Exception:
            raise first from None

    def _run_once(
        self, template: jinja2.Template, messages: list[Message], variables: dict[str, Any], marked: bool
    ) -> str:
        from reap.text.budget import Budget, limited, spending
        from reap.text.sandbox import frozen

        size = _size(messages) + _size(variables.get("tools"))
        with limited(_seconds(size, len(messages))), spending(Budget(size, len(messages), marked)):
            return template.render(messages=frozen(messages), **frozen(variables))


@dataclass(frozen=True)
class Rendered:
    """A conversation as a template wrote it."""

    text: str
    """What it wrote."""
    spans: list[Span] | None
    """the characters [start, end) of the assistant's turns; None where they were not looked for"""
    left_out: list[Place]
    """(message, "content" | "reasoning_content" | "arguments") of the texts that are not in it"""


@dataclass(frozen=True)
class Conversation:
    """What a template is rendered with."""

    messages: list[Message]
    """The turns, as OpenAI's API has them."""
    tools: list[Tool] | None
    """What the assistant may call; None: nothing."""


def _variables(given: dict[str, Any], now: datetime) -> dict[str, Any]:
    """What a template can read apart from the conversation, as the server names it."""
    keeps = given.get("preserve_reasoning", True)
    variables: dict[str, Any] = {
        "enable_thinking": True,
        "datetime": now.strftime("%b %d %Y"),
        "date_string": now.strftime("%d %b %Y"),
    }
    if isinstance(keeps, bool):
        # each family has a name of its own for it: `caps_apply_preserve_reasoning`
        variables["preserve_thinking"] = keeps
        variables |= dict.fromkeys(("clear_thinking", "truncate_history_thinking", "drop_thinking"), not keeps)
    if isinstance(given.get("reasoning_effort"), str):
        variables["reasoning_strength"] = given["reasoning_effort"]
    return variables | given


def _as_string(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else join_parts(content)


def _as_parts(message: Message) -> list[dict[str, str]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, dict):
        return sum(map(_size, value.values())) + sum(map(_size, value)) + 1
    if isinstance(value, list):
        return sum(map(_size, list.__iter__(value))) + 1  # unnoticed by a `WatchedList`
    return 1


def _seconds(n_characters: int, n_messages: int) -> float:
    """Of processor time that one conversation may take: ten times what the slowest template published was seen to."""
    return 0.4 + 0.001 * n_messages * n_messages + 1e-5 * n_characters


def _detail(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
