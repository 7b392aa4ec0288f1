"""Marks in the texts of a conversation, to see where a template puts them.

A conversation is rendered once more with marks at both ends of every text in it: single characters that occur in no
text, placed inside its white space, so that a template that trims or splits does the same as without them. Where that
rendering without its marks is the first one to the letter, the marks' places are places in the first. Where it is not,
because a template looks at how a text begins, marks further inside are tried, or none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from reap.errors import CalibrationError
from reap.text.messages import Message

Render = Callable[[Sequence[Message], bool], str]
# (message, "content" | "reasoning_content" | "name" | "arguments")
Place = tuple[int, str]
# Where a text is marked: how far inside its first and its last visible character.
Plan = dict[Place, int]

AT_THE_EDGES, INSIDE = 0, 1
PLACES = ("content", "reasoning_content", "name", "arguments")
_PLANES = (0x10_0000, 0xF_0000)  # private characters
_PLANE_SIZE = 0xFFF0
_JSON_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?')  # the colon: it is a key


class Unlocated(CalibrationError):
    """The place of a turn cannot be told; the message says of which."""


@dataclass(frozen=True)
class Mark:
    """One end of a text, in what was rendered."""

    position: int
    """in the text without marks"""
    message: int
    """index of the message in the conversation"""
    name: str
    """which text of the message: one of PLACES"""
    code: int
    """a number of its own: even at the beginning of a text, and one more at its end"""


@dataclass(frozen=True)
class Marked:
    """A rendered text, and where marks were in it."""

    text: str
    """without the marks"""
    marks: list[Mark]
    """in the order of their positions"""
    owners: tuple[Place, ...]
    """the texts that were marked: the one at i with the codes 2 i and 2 i + 1"""

    def of(self, message: int) -> list[Mark]:
        return [mark for mark in self.marks if mark.message == message]


class _Marker:
    """Puts marks into messages and takes them out of what was rendered."""

    def __init__(self, plan: Mapping[Place, int], plane: int) -> None:
        self._plan = plan
        self._plane = plane
        self._owners: list[Place] = []
        pattern = f"[{chr(plane)}-{chr(plane + 0xFFFF)}]"
        high = 0xD800 + ((plane - 0x10000) >> 10)
        escaped = rf"\\u({high >> 8:x}[{'c-f' if plane == _PLANES[0] else '8-9a-b'}][0-9a-f])\\u(d[c-f][0-9a-f]{{2}})"
        self._pattern = re.compile(f"({pattern})|{escaped}")

    def mark(self, messages: Sequence[Message]) -> list[Message]:
        return [self._mark_message(message, index) for index, message in enumerate(messages)]

    def read(self, text: str) -> Marked:
        pieces, marks, end, length = [], [], 0, 0
        for found in self._pattern.finditer(text):
            pieces.append(text[end : found.start()])
            length += found.start() - end
            end = found.end()
            character = found[1] or json.loads(f'"{found[0]}"')
            code = ord(character) - self._plane
            if code // 2 >= len(self._owners):
                raise Unlocated("a mark that was not set")
            message, name = self._owners[code // 2]
            marks.append(Mark(length, message, name, code))
        return Marked("".join(pieces) + text[end:], marks, tuple(self._owners))

    def _mark_message(self, message: Message, index: int) -> Message:
        marked = dict(message)
        for name in ("content", "reasoning_content"):
            if name in message:
                marked[name] = self._mark_value(message[name], (index, name))
        if "tool_calls" in message:
            marked["tool_calls"] = [self._mark_call(call, index) for call in message["tool_calls"]]
        return marked

    def _mark_call(self, call: dict[str, Any], index: int) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = _JSON_TEXT.sub(lambda found: self._mark_json(found, (index, "arguments")), arguments)
        else:
            arguments = self._mark_value(arguments, (index, "arguments"))
        name = self._mark_text(function["name"], (index, "name"))
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _mark_json(self, found: re.Match[str], place: Place) -> str:
        if found[2] is not None or self._plan.get(place) != AT_THE_EDGES:  # further inside, an escape could be cut
            return found[0]
        return f'"{self._mark_text(found[1], place)}"'

    def _mark_value(self, value: Any, place: Place) -> Any:
        if isinstance(value, str):
            return self._mark_text(value, place)
        if isinstance(value, list):
            return [self._mark_value(item, place) for item in value]
        if isinstance(value, dict):
            return {key: item if key == "type" else self._mark_value(item, place) for key, item in value.items()}
        return value

    def _mark_text(self, text: str, place: Place) -> str:
        depth = self._plan.get(place)
        core = text.strip()
        if depth is None or len(core) <= 2 * depth or 2 * len(self._owners) >= _PLANE_SIZE:
            return text
        start = text.index(core) + depth
        end = start + len(core) - 2 * depth
        first = self._plane + 2 * len(self._owners)
        self._owners.append(place)
        return f"{text[:start]}{chr(first)}{text[start:end]}{chr(first + 1)}{text[end:]}"


def _free_plane(text: str) -> int:
    for plane in _PLANES:
        if not re.search(f"[{chr(plane)}-{chr(plane + 0xFFFF)}]", text):
            return plane
    raise Unlocated("the conversation holds characters of both private planes")


@dataclass
class Locator:
    """Finds the marks of one conversation."""

    render: Render
    """(messages, whether with a generation prompt) -> the conversation, or its beginning, as text."""
    messages: Sequence[Message]
    """As `ChatTemplate.prepare` made them."""
    text: str
    """`render(messages, False)`."""

    def __post_init__(self) -> None:
        self.plane = _free_plane(json.dumps(self.messages, ensure_ascii=False) + self.text)
        self.plan: Plan = {}

    @classmethod
    def of(cls, render: Render, messages: Sequence[Message]) -> Locator:
        return cls(render, messages, render(messages, False))

    @cached_property
    def marked(self) -> Marked:
        """The text with as many of the marks as can be set without changing it."""
        places = list(self._places())
        marked = self._try(dict.fromkeys(places, AT_THE_EDGES))
        if marked is None:
            self._build(places)
            marked = self._try(self.plan)
        else:
            self.plan = dict.fromkeys(places, AT_THE_EDGES)
        if marked is None:
            raise Unlocated("the template changes with each mark")
        return marked

    def prefix(self, count: int, prompt: bool) -> Marked:
        """The first `count` messages, with the same marks as in `marked`."""
        marker = _Marker(self.plan, self.plane)
        return marker.read(self.render(marker.mark(self.messages[:count]), prompt))

    def _places(self) -> Iterator[Place]:
        for index, message in enumerate(self.messages):
            for name in PLACES:
                if name in message or (name in ("name", "arguments") and "tool_calls" in message):
                    yield index, name

    def _build(self, places: list[Place]) -> None:
        """Add marks to the plan, in ever smaller groups where a larger one changes the text."""
        if not places:
            return
        for depth in (AT_THE_EDGES, INSIDE):
            if self._try(dict.fromkeys(places, depth)) is not None:
                self.plan |= dict.fromkeys(places, depth)
                return
        if len(places) > 1:
            half = len(places) // 2
            self._build(places[:half])
            self._build(places[half:])

    def _try(self, plan: Plan) -> Marked | None:
        marker = _Marker(plan, self.plane)
        try:
            marked = marker.read(self.render(marker.mark(self.messages), False))
        except (CalibrationError, Unlocated):
            return None
        return marked if marked.text == self.text else None
