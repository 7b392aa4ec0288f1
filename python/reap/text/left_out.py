"""What a template leaves out of a conversation: thoughts of earlier turns, calls, texts of a kind that it ignores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from reap.text.marks import Locator, Place, Unlocated

THINK_START, THINK_END = "<think>", "</think>"


def places_left_out(locator: Locator) -> list[Place]:
    """(message, "content" | "reasoning_content" | "arguments") of the texts that are not in what was rendered.

    What is there word for word is seen at once. Where a text is not, the conversation is rendered with marks, since a
    template may have written it in another way. A content that begins with thoughts, of which only the rest is there,
    is one whose "reasoning_content" was left out.
    """
    missing = {place: core for place, core in _texts(locator) if not _is_written(core, locator.text)}
    if not missing:
        return []
    try:
        marked = locator.marked
    except Unlocated:
        return []  # nothing can be said
    codes = {mark.code for mark in marked.marks}
    left_out = []
    for place, core in missing.items():
        message, name = place
        known = (message, "name") if name == "arguments" and place not in marked.owners else place
        ends = [(2 * i in codes, 2 * i + 1 in codes) for i, owner in enumerate(marked.owners) if owner == known]
        if all(first and last for first, last in ends):
            continue  # it is there, or cannot be followed
        if name == "content" and THINK_END in core and ends[-1][1]:
            thoughts = core.partition(THINK_END)[0].rpartition(THINK_START)[2].strip()
            if not _is_written(thoughts, locator.text):  # else they stand where the template puts thoughts
                left_out.append((message, "reasoning_content"))
        else:
            left_out.append(place)
    return left_out


def _texts(locator: Locator) -> Iterator[tuple[Place, str]]:
    """The texts of a conversation, without the white space around them."""
    for index, message in enumerate(locator.messages):
        for name in ("content", "reasoning_content"):
            for text in _strings(message.get(name)):
                yield (index, name), text
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            for text in _strings(arguments):
                yield (index, "arguments"), text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if core := value.strip():
            yield core
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "type":
                yield from _strings(item)


def _is_written(core: str, text: str) -> bool:
    return core in text or json.dumps(core, ensure_ascii=False)[1:-1] in text or json.dumps(core)[1:-1] in text
