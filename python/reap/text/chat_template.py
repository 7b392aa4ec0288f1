"""Chat templates: Jinja programs that come with a model, rendered in a sandbox as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from reap.errors import CalibrationError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
Span = tuple[int, int]

# Stands in for an assistant's words when only their place is sought; no template has a reason to change it.
_SENTINEL = "reap0placeholder1of2a3turn"


class ChatTemplate:
    """A compiled template. `origin` is what errors call it; bos and eos are the texts of the model's special tokens.

    Raises CalibrationError where `source` is no Jinja template.
    """

    def __init__(self, source: str, *, origin: str, bos: str = "", eos: str = "") -> None:
        import jinja2

        self.origin = origin
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CalibrationError(f"{origin}: is no chat template: {error}") from error

    def render(self, messages: Sequence[Message], *, tools: object = None, add_generation_prompt: bool = False) -> str:
        """The conversation as text. CalibrationError where the template fails or refuses it."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # a template is a program of someone else's: it can fail in any way
            detail = " ".join(str(error).split())[:200] or type(error).__name__
            raise CalibrationError(f"{self.origin} cannot render the messages: {detail}") from error

    def render_turns(self, messages: Sequence[Message], *, tools: object = None) -> tuple[str, list[Span]]:
        """The conversation as text, and which characters of it [start, end) each assistant turn wrote.

        A turn starts where the conversation before it, rendered with a generation prompt, ends; it ends where the
        conversation up to it ends, or, where the template renders a last turn differently, with the turn's content.
        CalibrationError where neither can be found in the text.
        """
        text = self.render(messages, tools=tools)
        turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        return text, [
            (self._start(text, messages, turn, tools), self._end(text, messages, turn, tools)) for turn in turns
        ]

    def _start(self, text: str, messages: Sequence[Message], turn: int, tools: object) -> int:
        if turn == 0:
            return 0
        before = self.render(messages[:turn], tools=tools)
        asked = self.render(messages[:turn], tools=tools, add_generation_prompt=True)
        # A generation prompt may open a block of thoughts that a finished turn does not have: what both share is the
        # header.
        shared = shared_length(asked, text)
        if shared < len(before):
            self._lost(turn)
        return shared

    def _end(self, text: str, messages: Sequence[Message], turn: int, tools: object) -> int:
        upto = self.render(messages[: turn + 1], tools=tools)
        if text.startswith(upto):
            return len(upto)
        marked = [*messages[:turn], {**messages[turn], "content": _SENTINEL}, *messages[turn + 1 :]]
        _, found, after = self.render(marked, tools=tools).rpartition(_SENTINEL)
        if not found or not text.endswith(after):
            self._lost(turn)
        return len(text) - len(after)

    def _lost(self, turn: int) -> NoReturn:
        raise CalibrationError(
            f"{self.origin} renders message {turn + 1} differently in the whole conversation than at its end, so the"
            " assistant's tokens cannot be told apart; use mask=all"
        )


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many entries two sequences begin with in common."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _environment() -> jinja2.Environment:
    from jinja2 import Environment, TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which training code marks assistant turns with: rendered as it
        stands."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    # Neither autoescape nor jinja2's own tojson: both write HTML entities, which no model was trained on.
    environment: Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
