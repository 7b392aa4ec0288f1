"""Which characters of a rendered conversation the assistant wrote.

Where a template marks them itself (`generation`), its marks are taken. Otherwise a turn begins where the generation
prompt after the conversation before it ends, and ends where the conversation up to it ends. Both are judged only by
what lies between the nearest texts (`marks`), so it does not matter that a template leaves out earlier thoughts or
moves the system prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reap.errors import CalibrationError
from reap.text.marks import Locator, Mark, Render, Unlocated
from reap.text.messages import Message

Span = tuple[int, int]

_HEADER_LEAST = 3  # characters of a header that are enough to know it by
_CACHE_LIMIT = 4096
_ASSISTANT = "assistant"
_TAG = re.compile(r"<[^<>\s]{1,80}>|\[/?[A-Z_]{1,40}\]")
_UNITS = re.compile(f"{_TAG.pattern}|.", re.DOTALL)  # tags and characters
_USER: Message = {"role": "user", "content": "question"}


@dataclass(frozen=True)
class Frame:
    """What a template puts around turns, learnt from two short conversations."""

    header: str
    """what it writes to ask for a turn"""
    end_of_turn: str
    """what is between an assistant's text and the header of the user's next turn"""
    trailer: str
    """what it writes after the end of the last turn: a request for another, say, though none was asked for"""

    @classmethod
    def learn(cls, render: Render) -> Frame:
        """The frame that `render` puts around turns; what cannot be learnt is empty."""
        answer: Message = {"role": "assistant", "content": "answer"}
        try:
            plain, asked = (render([_USER], prompt) for prompt in (False, True))
            header = asked[shared_length(plain, asked) :]
        except CalibrationError:
            header = ""
        try:
            alone = Locator.of(render, [_USER, answer]).marked
            whole = Locator.of(render, [_USER, answer, {"role": "user", "content": "next"}]).marked
            opening = alone.text[: alone.of(0)[0].position]
            gap = whole.text[whole.of(1)[-1].position : whole.of(2)[0].position]
            closing = alone.text[alone.of(1)[-1].position :]
        except (CalibrationError, Unlocated, IndexError):
            return cls(header, "", "")
        end = _end_of_turn(opening, gap, closing, header)
        trailer = closing[len(end.rstrip()) :] if end.strip() and closing.startswith(end.rstrip()) else ""
        return cls(header, end, trailer if trailer.strip() else "")


def marked_spans(text: str, starts: str, ends: str) -> tuple[str, list[Span]]:
    """A text without the marks of its generated parts, and where these are."""
    spans: list[Span] = []
    plain = ""
    for piece in re.split(f"([{starts}{ends}])", text):
        if piece == starts:
            spans.append((len(plain), len(plain)))
        elif piece == ends and spans:
            spans[-1] = (spans[-1][0], len(plain))
        else:
            plain += piece
    return plain, spans


class TurnFinder:
    """Finds the assistant's turns in one conversation.

    `cache` keeps, over the conversations of one template, where what lies between two texts is divided.
    """

    def __init__(self, locator: Locator, cache: dict[Any, Any]) -> None:
        self.locator = locator
        self.messages = locator.messages
        self.text = locator.text
        self.marked = locator.marked
        self.cache = cache
        if "frame" not in cache:
            cache["frame"] = Frame.learn(locator.render)
        self.frame: Frame = cache["frame"]

    def spans(self) -> list[Span]:
        """The characters [start, end) of each of the assistant's turns that are in the text.

        Unlocated where one cannot be found.
        """
        spans: list[Span] = []
        for index, message in enumerate(self.messages):
            if message["role"] != _ASSISTANT:
                continue
            for span in self._turn(index):
                if span[0] >= span[1] or any(span[0] < end and start < span[1] for start, end in spans[-2:]):
                    raise _lost(f"where the turn of message {index + 1} is")
                spans.append(span)
        return sorted(spans)

    def _turn(self, index: int) -> list[Span]:
        """Where a turn is: in one place, or, where the template puts what was said after a call's result, in two."""
        runs = self._runs(index)
        if not runs:
            return self._silent(index)
        marks = self.marked.marks
        spans = []
        for number, (first, last) in enumerate(runs):
            start, end = marks[first].position, marks[last].position
            before = marks[first - 1].position if first else 0
            after = marks[last + 1].position if last + 1 < len(marks) else len(self.text)
            role = self.messages[index - 1]["role"] if index else ""
            if number == 0:
                opening = ("start", role, self.text[before:start])
                start = before + self._remember(opening, self._start, index, before, start)
            closing = ("end", self._kind(index), after < len(self.text), self.text[end:after])
            end += self._remember(closing, self._end, index, marks[last], after)
            spans.append((start, end))
        return spans

    def _remember(self, key: Any, find: Callable[..., int], *args: Any) -> int:
        if key not in self.cache:
            if len(self.cache) > _CACHE_LIMIT:
                self.cache.clear()
                self.cache["frame"] = self.frame
            self.cache[key] = find(*args)
        length: int = self.cache[key]
        return length

    def _kind(self, index: int) -> tuple[object, ...]:
        message = self.messages[index]
        return bool(message.get("content")), "reasoning_content" in message, len(message.get("tool_calls", ()))

    def _runs(self, index: int) -> list[tuple[int, int]]:
        """The first and the last mark of each place where a turn is."""
        marks = self.marked.marks
        runs: list[tuple[int, int]] = []
        for place, mark in enumerate(marks):
            if mark.message == index:
                if runs and runs[-1][1] == place - 1:
                    runs[-1] = (runs[-1][0], place)
                else:
                    runs.append((place, place))
        # the names of calls alone: repeated beside their results
        runs = runs[:1] + [run for run in runs[1:] if any(marks[i].name != "name" for i in range(run[0], run[1] + 1))]
        codes = [marks[i].code for i in range(runs[0][0], runs[0][1] + 1)] if runs else []
        if len(set(codes)) < len(codes):
            key = ("own", self._kind(index), tuple(code - codes[0] for code in codes))
            runs[0] = (runs[0][0], runs[0][0] + self._remember(key, self._own, index, codes) - 1)
        return runs

    def _own(self, index: int, codes: list[int]) -> int:
        """How many of these marks are the turn's own, and not beside the results of its calls: as many as there are
        where the conversation ends with it."""
        try:
            alone = [mark.code for mark in self.locator.prefix(index + 1, False).of(index)]
        except CalibrationError:
            return len(codes)
        count = len(codes)
        while count > 1 and codes[:count].count(codes[count - 1]) > alone.count(codes[count - 1]):
            count -= 1
        return count

    # each of these returns a length: of the header from the mark before it, of the closing from the mark before it

    def _start(self, index: int, before: int, start: int) -> int:
        gap, header = self.text[before:start], self.frame.header
        asked, plain = self._tail(index, True), self._tail(index, False)
        if asked is not None and plain is not None:
            length = len(_shared_start(asked, gap))
            if length > len(plain) or (not header and length == len(asked) == len(plain)):
                return length
        for length in range(len(header), _HEADER_LEAST - 1, -1):
            place = gap.rfind(header[:length])
            if place >= 0:
                return place + length
        return len(gap) - len(_shared_end(self._opening(index), gap))

    def _opening(self, index: int) -> str:
        """What the template writes between the header and the first text of the same turn after a question."""
        messages = [_USER, self.messages[index]]
        try:
            marked = Locator.of(self.locator.render, messages).marked
            asked = self.locator.render(messages[:1], True)
        except (CalibrationError, Unlocated):
            return ""
        question, own = marked.of(0), marked.of(1)
        if not question or not own:
            return ""
        start = len(_shared_start(asked, marked.text))
        return marked.text[start : own[0].position] if question[-1].position <= start <= own[0].position else ""

    def _tail(self, count: int, prompt: bool) -> str | None:
        """What is after the last mark of the first messages; None where the template refuses them alone."""
        if not count:
            return None
        try:
            marked = self.locator.prefix(count, prompt)
        except CalibrationError:
            return None
        return marked.text[marked.marks[-1].position if marked.marks else 0 :]

    def _end(self, index: int, last: Mark, after: int) -> int:
        gap = self.text[last.position : after]
        end = self.frame.end_of_turn.strip()
        alone = self._closing_alone(index, last)
        if alone is not None:
            length = len(_shared_start(alone, gap))
            if not alone[length:].strip():
                return self._with_end_of_turn(index, gap, length)
            if end and alone.rstrip().endswith(end):  # a turn that goes on after the result of its call
                length = alone.rindex(end)
                if gap.startswith(alone[:length]) and length:
                    return self._with_end_of_turn(index, gap, length)
        return self._find_end(index, gap, 0)

    def _find_end(self, index: int, gap: str, start: int) -> int:
        """The end of what ends a turn, from `start` on."""
        end = self.frame.end_of_turn.strip()
        end = ([*_TAG.findall(end)] or [end])[-1]  # how a call ends may differ from how a text does
        place = gap.find(end, start) if end else -1
        if place < 0:
            raise _lost(f"where the turn of message {index + 1} ends")
        return _with_space(gap, place + len(end), self.frame.end_of_turn)

    def _closing_alone(self, index: int, last: Mark) -> str | None:
        """What follows the turn's last text where the conversation ends with this turn."""
        try:
            marked = self.locator.prefix(index + 1, False)
        except CalibrationError:
            return None
        places = [place for place, mark in enumerate(marked.marks) if mark.message == index and mark.code == last.code]
        if not places:
            return None
        start = marked.marks[places[-1]].position
        if places[-1] + 1 < len(marked.marks):
            return marked.text[start : marked.marks[places[-1] + 1].position]
        return marked.text[start:].removesuffix(self.frame.trailer)

    def _with_end_of_turn(self, index: int, gap: str, length: int) -> int:
        """A closing that is whole, with what the template writes only where the conversation goes on."""
        end = self.frame.end_of_turn.strip()
        closing, rest = gap[:length].rstrip(), gap[length:]
        if end and rest.lstrip().startswith(end) and not closing.endswith(end):
            return _with_space(gap, gap.index(end, length) + len(end), self.frame.end_of_turn)
        if end and not closing and rest.strip() and rest != self.frame.trailer:
            raise _lost(f"where the turn of message {index + 1} ends")
        return length

    def _silent(self, index: int) -> list[Span]:
        """A turn that has no text, or of which the template shows none: its header and its end, if they are there."""
        marks = self.marked.marks
        before = max((mark.position for mark in marks if mark.message < index), default=0)
        after = min((mark.position for mark in marks if mark.message > index), default=len(self.text))
        if after < before or not index:
            raise _lost(f"where the turn of message {index + 1} is")
        gap = self.text[before:after]
        asked, alone = self._tail(index, True), self._tail(index + 1, False)
        if asked is None or alone is None:
            raise _lost(f"where the turn of message {index + 1} is")
        alone = alone.removesuffix(self.frame.trailer)
        start = len(_shared_start(asked, gap))
        end = len(_shared_start(alone, gap))
        if alone[end:].strip():
            end = self._find_end(index, gap, start)
        elif end > start:
            end = self._with_end_of_turn(index, gap, end)
        return [(before + start, before + end)] if start < end else []


def _lost(what: str) -> Unlocated:
    return Unlocated(f"{what} cannot be told; mask=all counts the whole conversation")


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many entries two sequences begin with in common."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _end_of_turn(opening: str, gap: str, closing: str, header: str) -> str:
    """What of the gap between an assistant's text and the user's next one is not the header of the latter.

    Args:
        opening: what is before the first user's text.
        gap: what is between the assistant's text and the user's next.
        closing: what is after the assistant's text at the end of a conversation.
        header: what the template writes to ask for a turn.
    """
    shared = _shared_start(closing, gap)
    if closing.strip() and shared == closing:
        return closing
    tags = _TAG.match(header)
    if tags and gap.rfind(tags[0]) > 0:  # the user's header begins as the assistant's does
        return gap[: gap.rfind(tags[0])]
    units = _UNITS.findall(shared)
    if shared.strip() and closing.strip():  # what is after that is a header too, and both begin with one tag
        is_header = len(units) > 1 and _TAG.match(units[-1]) and any(map(_TAG.match, units[:-1]))
        return "".join(units[:-1]) if is_header else shared
    user_header = _shared_end(opening, gap)
    return gap[: len(gap) - len(user_header)]


def _shared_start(a: str, b: str) -> str:
    """What two texts begin with in common; a tag in it is whole."""
    length = shared_length(a, b)
    for text in (a, b):
        tag = next((tag for tag in _TAG.finditer(text) if tag.start() < length < tag.end()), None)
        length = length if tag is None else tag.start()
    return a[:length]


def _shared_end(a: str, b: str) -> str:
    """What two texts end with in common; a tag in it is whole."""
    first, second = ([*reversed(_UNITS.findall(text))] for text in (a, b))
    return "".join(reversed(second[: shared_length(first, second)]))


def _with_space(gap: str, end: int, model: str) -> int:
    """`end`, and as much white space after it as `model` ends with."""
    space = model[len(model.rstrip()) :]
    return end + shared_length(space, gap[end:])
