"""Changes values inside a JSON text and leaves every other byte as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Path = tuple[str | int, ...]
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+)', re.DOTALL)


def replace_values(text: str, changes: Mapping[Path, Any]) -> str:
    """`text` with other values at the given paths (keys of objects, indices of lists). Raises KeyError for a path that
    is not there."""
    spans = _spans(text)
    for path in sorted(changes, key=lambda path: spans[path], reverse=True):
        start, end = spans[path]
        text = text[:start] + json.dumps(changes[path]) + text[end:]
    return text


def changed_values(before: Any, after: Any, path: Path = ()) -> dict[Path, Any]:
    """The innermost values that differ between two JSON values: path -> what is there after."""
    if before == after and type(before) is type(after):
        return {}
    if isinstance(before, dict) and isinstance(after, dict) and list(before) == list(after):
        inner = [changed_values(before[key], after[key], (*path, key)) for key in before]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        inner = [changed_values(*pair, (*path, place)) for place, pair in enumerate(zip(before, after, strict=True))]
    else:
        return {path: after}
    return {place: value for changes in inner for place, value in changes.items()}


def _spans(text: str) -> dict[Path, tuple[int, int]]:
    """Where the value of each path begins and ends. `text` is valid JSON."""
    spans: dict[Path, tuple[int, int]] = {}
    path: list[str | int] = []  # of the value that comes next
    opened: list[int] = []  # where each object and list around it begins
    key_comes = False
    for match in _TOKEN.finditer(text):
        token, start = match[1], match.start(1)
        if token in "{[":
            opened.append(start)
            path.append(0)
            key_comes = token == "{"
        elif token in "}]":
            path.pop()
            spans[tuple(path)] = (opened.pop(), match.end(1))
        elif token == ",":
            key_comes = text[opened[-1]] == "{"
            last = path[-1]
            path[-1] = last + 1 if isinstance(last, int) else last
        elif token == ":":
            key_comes = False
        elif key_comes:
            path[-1] = json.loads(token)
        else:
            spans[tuple(path)] = (start, match.end(1))
    return spans
