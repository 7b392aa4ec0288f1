"""JSON that may be hand-edited or hostile, read strictly; and the text of what is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from reap.errors import FormatError, UsageError
from reap.files.paths import PathLike
from reap.files.recognise import HEAD_BYTES, unreadable_text, what_are

# A profile of 60 layers, 512 experts and 8 domains is about 60 MB. A small file can ask for much memory: Python spends
# 8 bytes on a number that took 2 in the file, and 64 on an empty list that took 3, so those are counted before anything
# is made of them.
MAX_BYTES = 80 << 20
MAX_VALUES = 4 << 20
MAX_CONTAINERS = 100_000
# who has a larger profile than that, and made it, may say so
LARGE_VARIABLE = "REAP_LARGE_FILES"
_LARGE_FACTOR = 32
LAYER_LIMIT = 100_000
EXPERT_LIMIT = 1 << 20
_INFINITY = float("inf")


class Node:
    """A JSON value together with the name that an error calls it by."""

    def __init__(self, value: object, where: str) -> None:
        self.value = value
        self.where = where

    def fail(self, problem: str) -> NoReturn:
        raise FormatError(f"{self.where} {problem}")

    def entry(self, index: int) -> Node:
        """One entry of a list."""
        return Node(self.entries()[index], f"{self.where}[{index}]")

    def members(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            self.fail(f"should be an object, found {kind_of(self.value)}")
        return self.value

    def entries(self) -> list[Any]:
        if not isinstance(self.value, list):
            self.fail(f"should be a list, found {kind_of(self.value)}")
        return self.value

    def __contains__(self, key: str) -> bool:
        return key in self.members()

    def __getitem__(self, key: str) -> Node:
        members = self.members()
        if key not in members:
            self.fail(f"lacks {json.dumps(key)}")
        return Node(members[key], f"{self.where}: {key}")

    def items(self) -> Iterator[tuple[str, Node]]:
        for key, value in self.members().items():
            yield key, Node(value, f"{self.where}: {shorten(key, quote=False)}")

    def integer(self, minimum: int = 0, maximum: int = 2**63 - 1) -> int:
        if type(self.value) is not int:
            self.fail(f"should be an integer, found {kind_of(self.value)}")
        if not minimum <= self.value <= maximum:
            self.fail(f"should be an integer from {minimum} to {maximum}, found {shorten(self.value)}")
        return self.value

    def string(self) -> str:
        if not isinstance(self.value, str):
            self.fail(f"should be a string, found {kind_of(self.value)}")
        return self.value

    def number(self) -> float:
        """A finite number of either sign."""
        if type(self.value) not in (int, float):
            self.fail(f"should be a number, found {kind_of(self.value)}")
        try:
            return float(self.value)  # type: ignore[arg-type]
        except OverflowError:
            self.fail("is a number that is too large")

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            self.fail(f"should be true or false, found {kind_of(self.value)}")
        return self.value

    def integers(self, length: int | None = None) -> NDArray[np.int64]:
        """int64 [length], each at least 0."""
        return self._array(length, np.int64, "an integer", lambda value: type(value) is int)

    def numbers(self, length: int | None = None) -> NDArray[np.float64]:
        """float64 [length], finite, each at least 0."""
        return self._array(length, np.float64, "a number", lambda value: type(value) in (int, float))

    def _array(
        self, length: int | None, dtype: type[Any], noun: str, is_good: Callable[[object], bool]
    ) -> NDArray[Any]:
        values = self.entries()
        if length is not None and len(values) != length:
            self.fail(f"has {len(values)} entries where {length} were expected")
        for index, value in enumerate(values):
            if not is_good(value):
                self.entry(index).fail(f"should be {noun}, found {kind_of(value)}")
            if value < 0:
                self.entry(index).fail(f"should not be negative, found {shorten(value)}")
        try:
            return np.array(values, dtype=dtype)
        except OverflowError:
            self.fail("has a number that is too large")


def kind_of(value: object) -> str:
    """How an error names the type of a JSON value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"the string {shorten(value)}"
    if isinstance(value, int | float):
        return f"the number {shorten(value)}"
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else type(value).__name__


def shorten(value: object, width: int = 40, *, quote: bool = True) -> str:
    """A value quoted in an error, cut so that a hostile file cannot flood the terminal."""
    if isinstance(value, int) and value.bit_length() > 512:
        return "a number of more than 150 digits"
    text = json.dumps(value) if isinstance(value, str) else str(value)
    if isinstance(value, str) and not quote:
        text = text[1:-1]
    return text if len(text) <= width else text[: width - 3] + "..."


def read_json(path: PathLike, *, what: str, max_bytes: int | None = None) -> Node:
    """The JSON object in `path`, which an error calls `what` ("profile", "plan").

    Raises UsageError where the file cannot be opened, FormatError where it is not strict JSON: NaN, Infinity, numbers
    beyond a double, repeated keys, deep nesting and files over `max_bytes` (None: 80 MiB), and more lists, objects or
    values than a profile has, are refused. REAP_LARGE_FILES=1 in the environment lifts the default to 32 times as much.
    """
    name = os.fspath(path)
    factor, hint = (1, "") if max_bytes is not None else _large()
    max_bytes = (MAX_BYTES if max_bytes is None else max_bytes) * factor
    try:
        with open(name, "rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise UsageError(f"{name}: cannot read the {what}: {unreadable_text(path, error)}") from error
    if raw[:1] != b"{" and (found := what_are(raw[:HEAD_BYTES], len(raw))) not in (None, "a JSON file", "a text file"):
        raise FormatError(f"{name}: is {found}, expected a {what} of reap")
    if len(raw) > max_bytes:
        raise FormatError(f"{name}: is larger than {max_bytes >> 20} MiB and so no {what} of reap{hint}")
    if problem := too_many(raw, factor):
        raise FormatError(f"{name}: has {problem}; no {what} of reap has as many{hint}")
    node = Node(parse_json(raw, name), name)
    node.members()
    return node


def _large() -> tuple[int, str]:
    """By how much the limits are lifted, and what an error says of it."""
    if os.environ.get(LARGE_VARIABLE) == "1":
        return _LARGE_FACTOR, ""
    return 1, f" (where it is one all the same, {LARGE_VARIABLE}=1 reads it)"


@dataclass(frozen=True)
class Bounds:
    """The most that a JSON text may have, counted before anything is made of it: its size alone says little of the
    memory that its values take. What stands inside strings is counted as well."""

    n_bytes: int
    """Size of the text."""
    containers: int
    """Lists and objects."""
    members: int
    """Members of objects."""
    values: int
    """Values of lists and objects, except the first of each."""
    narrow: bool = False
    """A text that is not ASCII may have a quarter of the size: with a wide character Python spends 4 bytes on each."""

    def exceeded(self, raw: bytes, factor: int = 1) -> str | None:
        """What `raw` has more of than this times `factor`; None where there is nothing."""
        counted = (
            ("lists and objects", b"[{", self.containers),
            ("members of objects", b":", self.members),
            ("values", b",", self.values),
        )
        for things, signs, most in counted:
            found = sum(raw.count(sign) for sign in signs)
            if found > most * factor:
                return f"{found:,} {things}, more than {most * factor:,}"
        most_bytes = self.n_bytes * factor // (4 if self.narrow and not raw.isascii() else 1)
        return f"{len(raw):,} bytes, more than {most_bytes:,}" if len(raw) > most_bytes else None


def too_many(raw: bytes, factor: int = 1) -> str | None:
    """What a JSON text has more of than `read_json` takes, times `factor`; None where there is nothing."""
    return Bounds(MAX_BYTES, MAX_CONTAINERS, MAX_CONTAINERS, MAX_VALUES).exceeded(raw, factor)


def parse_json(raw: bytes | str, where: str, *, allow_constants: bool = False, few_floats: bool = False) -> Any:
    """Strict JSON text to Python values; FormatError that begins with `where`. allow_constants: NaN and Infinity as
    Python writes them. few_floats: what is read has many members and hardly a number with a point."""
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
        if allow_constants:
            return json.loads(text, object_pairs_hook=_object, parse_float=_finite)
        if few_floats:
            return json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_refuse)
        # a hook for every number with a point would take longer than all the rest
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
        _check_finite(value)
        return value
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"{where}: is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise FormatError(f"{where}: is nested too deeply") from error
    except ValueError as error:  # our hooks, and the interpreter's limit on the digits of an integer
        raise FormatError(
            f"{where}: is not JSON that reap reads: {shorten(str(error).splitlines()[0], 120, quote=False)}"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(double, quote=False)} appears twice in one object")
    return members


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {shorten(text)} does not fit a double")
    return value


def _check_finite(root: object) -> None:
    """ValueError where a number was too large for a double; the parser makes an infinity of it."""
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            items = list(value.values()) if isinstance(value, dict) else value
            if _INFINITY in items or -_INFINITY in items:
                raise ValueError("a number does not fit a double")
            waiting += [item for item in items if isinstance(item, dict | list)]
        elif value in (_INFINITY, -_INFINITY):
            raise ValueError("a number does not fit a double")


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def json_bytes(document: dict[str, Any]) -> bytes:
    """A document as reap writes it: objects are indented, lists stand on one line, doubles survive exactly."""
    # A file name that is not UTF-8 holds lone surrogates; written out, backslashreplace gives their JSON escape.
    return (_format(document, 0) + "\n").encode("utf-8", "backslashreplace")


def _format(value: object, depth: int) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    pad = "  " * (depth + 1)
    members = (f"{pad}{json.dumps(key, ensure_ascii=False)}: {_format(item, depth + 1)}" for key, item in value.items())
    return "{\n" + ",\n".join(members) + "\n" + "  " * depth + "}"
