"""What JSON texts still say of single experts and of how many there are, once all that is understood was changed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.files.strict_json import shorten
from reap.hf.disk.config import ELSEWHERE, USED_KEYS

_NAMES_AN_EXPERT = re.compile(r"(?:^|[^a-z])experts?(?:\\?[._]|\[)[\[(?:]*\d", re.IGNORECASE)
_Place = tuple[str | int, ...]
#: Words by the ten thousand, and none of them a module's name.
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json"})
_MOST_BYTES = 4 << 20
_MOST_QUOTED = 3


@dataclass(frozen=True)
class Mentions:
    """Where a JSON value still speaks of experts, as `path: value`."""

    names: tuple[str, ...]
    """Strings that name an expert by number."""
    counts: tuple[str, ...]
    """Numbers that are that of all experts, and lists with an entry for each, under a key that speaks of experts."""


def find_mentions(document: Any, n_experts: int, settled: Collection[str] = ()) -> Mentions:
    """What speaks of single experts or of their number. settled: strings that are known to be right."""
    names: list[str] = []
    counts: list[str] = []
    for path, value in _leaves(document, ()):
        where = ".".join(map(str, path))
        key = next((key for key in reversed(path) if isinstance(key, str)), "")
        if isinstance(value, str):
            if value not in settled and _NAMES_AN_EXPERT.search(value):
                names.append(f"{where}: {shorten(value, 60)}" if where else shorten(value, 60))
        elif "expert" in key.lower() and key not in USED_KEYS and not ELSEWHERE & set(path):
            if type(value) is int and value == n_experts:
                counts.append(f"{where}: {value}")
            elif isinstance(value, list) and len(value) == n_experts and not isinstance(value[0], list | dict | str):
                counts.append(f"{where}: a list of {n_experts}")
    return Mentions(tuple(names), tuple(counts))


def mentions_in_files(files: Iterable[Path], directory: Path, n_experts: int) -> Iterator[str]:
    """A sentence for each JSON file, carried over as it is, that speaks of experts."""
    for path in files:
        if path.suffix != ".json" or path.name in _VOCABULARIES or path.stat().st_size > _MOST_BYTES:
            continue
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # it is not the model; what reads it will say so
        found = find_mentions(document, n_experts)
        if mentioned := (*found.names, *found.counts):
            name = path.relative_to(directory).as_posix()
            yield f"{name} speaks of experts and was left as it is: {_quoted(mentioned)}"


def counts_in_texts(texts: Mapping[str, str], n_experts: int) -> Iterator[str]:
    """A sentence for each text that still states the old number."""
    for name, text in texts.items():
        if found := find_mentions(json.loads(text), n_experts).counts:
            yield f"{name} still says {_quoted(found)}, under a name that reap does not know for the number of experts"


def _quoted(found: Collection[str]) -> str:
    return ", ".join(list(found)[:_MOST_QUOTED]) + f", and {len(found) - _MOST_QUOTED} more" * (
        len(found) > _MOST_QUOTED
    )


def _leaves(value: Any, path: _Place) -> Iterator[tuple[_Place, Any]]:
    """Every key, string, number and list."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from _leaves(item, (*path, key))
        return
    yield path, value
    for place, item in enumerate(value if isinstance(value, list) else ()):
        yield from _leaves(item, (*path, place))
