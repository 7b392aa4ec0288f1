"""What one rendering of a chat template may take: steps, characters, the size of a value, processor time.

A small template can ask for much in a single operation: a list of a million times one long text, lists that hold each
other twice sixty levels deep, a text with ten thousand tabs. So what an operation would go through or write is measured
before it is done, and time is looked at between operations.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import ItemsView, Iterator, KeysView, Sequence, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError

ENTRY = 32  #: characters that an entry of a list counts for
_NUMBER_LIMIT = 100_000  # a width, a precision, an indent, a length
_BITS_LIMIT = 1 << 14  # of an integer
_WIDTHS = re.compile(r"\d{6}|\{[^{}]*:[^{}]*\{")  # six digits, or one that is an argument
_DIGITS = re.compile(r"\d+")
_STEPS_A_LOOK = 32  # at the clock, which takes as long as some steps


class Exhausted(SecurityError):
    """A template took more than it may."""


class Budget:
    """What one rendering may take, by the size of what it is given.

    steps       rounds of loops and calls of macros
    characters  of all strings that are built or written, together
    longest     of one value: its characters, and 32 for each entry of a list, however deep
    """

    def __init__(self, n_characters: int, n_messages: int, marks_generation: bool = False) -> None:
        self.steps = 100_000 + 16 * n_messages * n_messages + n_characters
        self.longest = (1 << 20) + 16 * n_characters
        self.characters = 16 * self.longest
        self.marks_generation = marks_generation
        self._deadline = _DEADLINE.get()
        self._looks = 0

    def step(self) -> None:
        """One more."""
        self.steps -= 1
        if self.steps < 0:
            raise Exhausted("the template takes too many steps")
        self.look()

    def look(self) -> None:
        """Look at the clock now and then."""
        self._looks += 1
        if self._looks % _STEPS_A_LOOK == 0:
            self.tick()

    def tick(self) -> None:
        """Look at the clock now."""
        if _seconds() > self._deadline:
            raise Exhausted("the template takes too long")

    def check(self, length: int) -> None:
        """Of a value that is about to be made."""
        if length > self.longest:
            raise Exhausted("the template builds too long a value")

    def spend(self, value: object) -> None:
        """For a value that was made."""
        if isinstance(value, str | list | tuple):
            length = len(value) if isinstance(value, str) else ENTRY * len(value)
            self.check(length)
            self.characters -= length
            if self.characters < 0:
                raise Exhausted("the template writes too much")

    def weigh(self, value: object) -> int:
        """Characters and entries of all that is in `value`, each as often as it is there; Exhausted where there are too
        many. Of a text by itself this is its length."""
        if isinstance(value, str):
            if len(value) > _NUMBER_LIMIT:
                self.tick()
            return len(value)
        total, waiting = 0, [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str):
                total += len(one)
            elif isinstance(one, list | tuple | ValuesView | KeysView):
                total += ENTRY * len(one)
                self.check(total)
                waiting += list.__iter__(one) if isinstance(one, list) else one  # unnoticed by a `WatchedList`
            elif isinstance(one, dict | ItemsView):
                pairs = one.items() if isinstance(one, dict) else one
                total += 2 * ENTRY * len(pairs)
                self.check(total)
                for pair in pairs:
                    waiting += pair
            self.check(total)
        if total > _NUMBER_LIMIT:
            self.tick()
        return total


class _Collecting:
    """Processor time that Python's garbage collector took: with the size of the process, not with the template's."""

    def __init__(self) -> None:
        self.seconds = self._started = 0.0

    def note(self, phase: str, _info: object) -> None:
        """The collector starts or stops."""
        if phase == "start":
            self._started = time.thread_time()
        else:
            self.seconds += max(0.0, time.thread_time() - self._started)


_COLLECTING = _Collecting()
gc.callbacks.append(_COLLECTING.note)


def _seconds() -> float:
    """Processor time of this thread, without what the garbage collector took."""
    return time.thread_time() - _COLLECTING.seconds


_BUDGET: ContextVar[Budget | None] = ContextVar("budget", default=None)
_DEADLINE: ContextVar[float] = ContextVar("deadline", default=float("inf"))


def budget() -> Budget:
    """Of what is rendered now."""
    return _BUDGET.get() or Budget(0, 0)  # without one: an expression that jinja2 folds while it compiles


@contextmanager
def spending(allowed: Budget) -> Iterator[None]:
    """The budget of what is rendered in this context."""
    token = _BUDGET.set(allowed)
    try:
        yield
    finally:
        _BUDGET.reset(token)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """All that is rendered in this context takes together `seconds` of processor time at most."""
    token = _DEADLINE.set(min(_DEADLINE.get(), _seconds() + seconds))
    try:
        yield
    finally:
        _DEADLINE.reset(token)


# ---- before something is done


def check_arguments(name: str, value: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """SecurityError where a filter or method would build something huge before its result can be measured."""
    now = budget()
    now.tick()
    given = [*args, *kwargs.values()]
    weight = now.weigh(given)
    if any(isinstance(arg, int) and abs(arg) > _NUMBER_LIMIT for arg in given):
        raise Exhausted(f"{name} is given a number beyond {_NUMBER_LIMIT}")
    if name in ("format", "format_map"):
        _check_format(str(value), weight)
    if name == "replace" and len(given) > 1 and isinstance(value, str):
        old, new = str(given[0]), str(given[1])
        now.check(value.count(old) * len(new))
    if name == "join" and hasattr(value, "__len__") and given:
        separator, pieces = (given[0], value) if isinstance(value, list | tuple) else (value, given[0])
        if hasattr(pieces, "__len__"):
            now.check(len(pieces) * len(str(separator)))  # the pieces were weighed
    if name == "indent":
        width = next((arg for arg in given if isinstance(arg, int | str) and not isinstance(arg, bool)), 4)
        now.check(str(value).count("\n") * (width if isinstance(width, int) else len(width)))
    if name in ("count", "index", "remove", "sort") and isinstance(value, list | tuple):
        now.weigh(value)


def _check_format(text: str, weight: int) -> None:
    """Each field of `text` may write all that is given, of `weight`, and be as wide as it says."""
    if _WIDTHS.search(text):
        raise Exhausted("format is given a width of six digits or more, or one from an argument")
    widest = max(map(int, _DIGITS.findall(text)), default=0)
    budget().check((text.count("{") + text.count("%")) * max(weight, widest))


def check_operands(operator: str, left: Any, right: Any) -> None:
    """SecurityError where `left operator right` would be huge."""
    now = budget()
    now.tick()
    integers = isinstance(left, int) and isinstance(right, int)
    if operator == "*" and integers:
        if left.bit_length() + right.bit_length() > _BITS_LIMIT:
            raise Exhausted("a number is too large")
    elif operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if hasattr(sequence, "__len__") and isinstance(times, int):
                size = 1 if isinstance(sequence, str | bytes) else ENTRY
                now.check(size * len(sequence) * max(times, 0))
    elif operator == "**" and integers:
        if left.bit_length() * max(right, 0) > _BITS_LIMIT:
            raise Exhausted("a number is too large")
    elif operator == "%" and isinstance(left, str):
        if "*" in left:
            raise Exhausted("% is given a width from an argument")
        _check_format(left, now.weigh(right))
