"""The line that ends every command: what comes next, as a command that a shell takes as it stands."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from reap.cli.show import say
from reap.engine.options import engine_fields

#: Options with which the engine runs a model where another command should run it too.
ENGINE = (
    *(field.name for field in engine_fields() if field.name not in ("ctx_size", "batch_size", "ubatch_size", "lora")),
    "cpu_moe", "n_cpu_moe",
)  # fmt: skip


class GivenOption(Protocol):
    """A parameter of a command."""

    @property
    def name(self) -> str:
        """Of the function's parameter."""

    @property
    def default(self) -> object:
        """What it is where nothing is given."""

    @property
    def flags(self) -> tuple[str, ...]:
        """--name, -n; none of an argument."""


_given: ContextVar[Mapping[str, Sequence[str]] | None] = ContextVar("_given", default=None)


def remember(parameters: Iterable[GivenOption], values: Mapping[str, object]) -> None:
    """What this command was given, as far as it is not what it would have been without."""
    found = {it.name: _words(it, values.get(it.name)) for it in parameters if it.flags}
    _given.set({name: words for name, words in found.items() if words})


def forwarded(*names: str) -> list[str]:
    """The words of those options that this command was given, for a command that takes them as well."""
    given = _given.get() or {}
    return [word for name in names for word in given.get(name, ())]


def _words(parameter: GivenOption, value: object) -> list[str]:
    flag = parameter.flags[0]
    if value is None or value == parameter.default or value is False:
        return []
    if value is True:
        return [flag]
    items = value if isinstance(value, list) else [value]
    return [word for item in items for word in (flag, str(item))]


def command_line(*words: object) -> str:
    """Words as a shell reads them: `reap plan 'my profile.json'`. A path that begins with - is given its folder."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: object) -> str:
    text = os.fspath(word) if isinstance(word, Path) else str(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = f"./{text}"
    if text.isprintable():
        return shlex.quote(text)
    raw = text.encode("utf-8", "surrogateescape")  # line ends, and what is no text at all
    plain = {byte: chr(byte) for byte in range(32, 127) if byte not in b"'\\"}
    return "$'" + "".join(plain.get(byte, f"\\x{byte:02x}") for byte in raw) + "'"


def print_next(*words: object) -> None:
    """The command that comes next."""
    say(f"next: {command_line(*words)}")


def print_advice(text: str) -> None:
    """What comes next where it is not one command."""
    say(f"next: {text}")
