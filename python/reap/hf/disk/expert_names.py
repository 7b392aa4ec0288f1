"""What a JSON text calls the experts, one by one, in lists, as keys or by patterns: what it has to call them once some
are gone.

A list or a key speaks of modules by full names (under any prefix: `model.`, `language_model.model.` ...), by parts of
names (`mlp.experts.3.up_proj`), by regular expressions (`re:`, `+:`, `-:`) or with wildcards. What chooses the same
modules after the experts are numbered anew stays as it is; what would choose others is replaced by the names that are
meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from reap.errors import UnsupportedModelError
from reap.hf.disk.layout import CheckpointLayout, is_apart

_FULL = re.compile(
    r"(?P<before>(?:[\w-]+\.)*?)(?P<tail>(?:layers|h|blocks)\.\d+(?:\.[\w-]+)*?)"
    r"\.experts\.(?P<expert>\d{1,7})(?P<after>(?:\.[\w-]+)*)"
)
_NUMBER = re.compile(r"(\d{1,7})((?:\.[\w-]+)*)")
_TAIL = re.compile(r"(?:^|\.)((?:layers|h|blocks)\.\d+(?:\.[\w-]+)*)$")
#: A part of an expert's name, which means that expert of every layer.
_PART = re.compile(r"(?P<before>(?:[\w-]+\.)*)experts\.(?P<expert>\d{1,7})(?P<after>(?:\.[\w-]+)*)")
_MARK = re.compile(r"(re:|[+-]:)?(.*)", re.DOTALL)
_WILD = re.compile(r"[*?\[\]\\^$|()+{}]")
#: A repetition of a repetition or of a choice takes forever on some names.
_NESTED = re.compile(r"\((?:[^()\\]|\\.)*[+*}|](?:[^()\\]|\\.)*\)[+*{]")
_MOST_PATTERN = 10_000
_PREFIXES = ("", "model.", "language_model.model.", "model.language_model.", "language_model.")
#: Expert matrices of blocks that store them fused, as lists name them.
_FUSED_MATRICES = (".gate_proj", ".up_proj", ".down_proj", ".gate_up_proj")
#: Lists whose names are those inside of a layer: a full name says nothing there.
_RELATIVE = "modules_in_block_to_quantize"

Matcher = Callable[[str], bool]


@dataclass(frozen=True)
class _Block:
    """A MoE block. kept: ids that stay, none where the whole layer is left out."""

    name: str
    tail: str
    kept: Sequence[int]


@dataclass(frozen=True)
class _Module:
    """An expert's module: its name, and what it is called from now on."""

    old: str
    new: str


class ExpertNames:
    """The names of a checkpoint's experts before and after."""

    def __init__(self, layout: CheckpointLayout, kept: Mapping[int, Sequence[int]], names: Sequence[str]) -> None:
        """kept: layer -> ids that stay; a MoE layer that is not in it is left out. names: of all tensors."""
        self._layout, self._names = layout, names
        self._blocks = {
            name: _Block(name, _tail(name), kept.get(layer, ()))
            for layer, name in (*layout.blocks.items(), *layout.dropped.items())
        }
        self._by_tail: dict[str, list[_Block]] = {}
        for block in self._blocks.values():
            self._by_tail.setdefault(block.tail, []).append(block)
        self.settled: set[str] = set()

    def renamed(self, document: Any) -> Any:
        """A JSON value with what it calls experts called anew. Raises UnsupportedModelError where that cannot be
        said."""
        return self._value(document, "")

    def _value(self, value: Any, key: str) -> Any:
        """key: that under which it stands, also where lists are around it."""
        if isinstance(value, list):
            return [new for made in self._items(value, key) for new in made]
        if isinstance(value, dict):
            names = self._items(list(value), "")
            return {
                new: self._value(item, name)
                for (name, item), made in zip(value.items(), names, strict=True)
                for new in made
            }
        if isinstance(value, str) and (found := self._full(value)) is not None:
            block, expert, before, after = found
            if expert in block.kept:
                return self._name(block, expert, before, after)
            raise UnsupportedModelError(f"{key}: {value} names an expert that is removed, and is not in a list")
        return value

    # ---- full names

    def _full(self, name: str) -> tuple[_Block, int, str, str] | None:
        """(block, expert, text before the expert's number, text after it) of an expert's full name."""
        head, _, rest = name.partition(".experts.")
        if head in self._blocks and (match := _NUMBER.fullmatch(rest)):
            return self._blocks[head], int(match[1]), f"{head}.experts.", match[2]
        match = _FULL.fullmatch(name)
        if match is None:
            return None
        is_prediction = is_apart(match["before"])
        blocks = [block for block in self._by_tail.get(match["tail"], ()) if is_apart(block.name) == is_prediction]
        if len(blocks) != 1:
            return None
        return blocks[0], int(match["expert"]), f"{match['before']}{match['tail']}.experts.", match["after"]

    def _name(self, block: _Block, expert: int, before: str, after: str) -> str:
        new = f"{before}{list(block.kept).index(expert)}{after}"
        self.settled.add(new)
        return new

    # ---- lists and keys

    def _items(self, items: Sequence[Any], key: str) -> list[list[Any]]:
        """What stands for each item of a list, or each key: one, several or none."""
        made: list[list[Any]] = []
        parts: dict[int, tuple[str, int, str]] = {}
        for place, string in enumerate(items):
            if not isinstance(string, str):
                made.append([self._value(string, key)])
            elif (found := self._full(string)) is not None:
                block, expert, before, after = found
                made.append([self._name(block, expert, before, after)] if expert in block.kept else [])
            elif (match := _PART.fullmatch(string)) is not None:
                parts[place] = (match["before"], int(match["expert"]), match["after"])
                made.append([string])
            else:
                made.append(self._pattern(string) if _is_pattern(string) else [string])
        for place, names in self._parts(parts, key).items():
            made[place] = names
        return made

    def _parts(self, parts: Mapping[int, tuple[str, int, str]], key: str) -> dict[int, list[str]]:
        """What stands for parts of names (mlp.experts.3.up_proj) that mean an expert of every layer they fit."""
        listed: dict[tuple[str, str], set[int]] = {}
        for before, expert, after in parts.values():
            listed.setdefault((before, after), set()).add(expert)
        is_same: dict[tuple[str, str], bool] = {}  # whether the listed ones are the same afterwards
        result: dict[int, list[str]] = {}
        for place, (before, expert, after) in parts.items():
            fitting = [b for b in self._blocks.values() if f".{b.name}.".endswith(f".{before}")]
            if not fitting:
                continue  # of another model, or under names that are not the files'
            blocks = [b for b in fitting if b.kept]
            numbers, string = listed[before, after], f"{before}experts.{expert}{after}"
            self.settled.add(string)
            if (before, after) not in is_same:
                pairs = ((old in numbers, new in numbers) for b in blocks for new, old in enumerate(b.kept))
                is_same[before, after] = all(old == new for old, new in pairs)
            if is_same[before, after]:
                result[place] = [string] if any(expert < len(b.kept) for b in blocks) else []
            elif key == _RELATIVE:
                raise UnsupportedModelError(
                    f"{_RELATIVE} names {string}, but not all experts of a layer; those that stay are not the same in"
                    " every layer, and it cannot say so"
                )
            else:
                result[place] = [self._name(b, expert, f"{b.name}.experts.", after) for b in blocks if expert in b.kept]
        return result

    def _pattern(self, string: str) -> list[str]:
        """A pattern where it chooses the same modules as before, else the names of those that it chose."""
        matchers = _matchers(string)
        if not matchers:
            return [string]
        self.settled.add(string)
        modules: list[_Module] = []
        needed = _needed_text(_MARK.fullmatch(string)[2])  # type: ignore[index]
        for place, text in enumerate(self._texts):  # the files' own names before those that they may have elsewhere
            modules = self._modules[place] if _may_match(string, self._heads[place]) and needed in text else []
            if any(match(name) for module in modules for name in (module.old, module.new) for match in matchers):
                break
        if all(match(module.old) == match(module.new) for module in modules for match in matchers):
            return [string]
        mark = _MARK.fullmatch(string)[1] or ""  # type: ignore[index]
        others = [name for name in self._others if any(match(name) for match in matchers)]
        new = [module.new for module in modules if any(match(module.old) for match in matchers)]
        names = list(dict.fromkeys([*others, *new]))
        made = [f"{mark}{re.escape(name)}$" for name in names] if mark in ("+:", "-:") else names
        self.settled |= {*made}
        return made

    # ---- modules

    @cached_property
    def _heads(self) -> tuple[dict[str, _Block], dict[str, _Block]]:
        """Name of a MoE block -> the block: as the files have it, or an engine that nests the language model otherwise;
        and with all other beginnings."""
        first: dict[str, _Block] = {}
        others: dict[str, _Block] = {}
        for block in self._blocks.values():
            first[block.name] = block
            for prefix in _PREFIXES if block.tail and not is_apart(block.name) else ():
                alike = "language_model." in prefix and "language_model." in block.name
                (first if alike else others)[prefix + block.tail] = block
        return first, {head: block for head, block in others.items() if head not in first}

    @cached_property
    def _suffixes(self) -> dict[str, dict[str, None]]:
        """MoE block -> what its experts' modules are called after the expert's number."""
        suffixes: dict[str, dict[str, None]] = {}
        for how in self._layout.follows.values():
            if how.expert is not None:
                suffixes.setdefault(self._layout.blocks[how.layer], {})[how.suffix.rpartition(".")[0]] = None
        return suffixes

    @cached_property
    def _modules(self) -> tuple[list[_Module], ...]:
        """Those of the experts that stay, for each of `_heads`."""
        return tuple(
            [
                _Module(f"{head}.experts.{old}{suffix}", f"{head}.experts.{new}{suffix}")
                for head, block in heads.items()
                for new, old in enumerate(block.kept)
                for suffix in self._suffixes.get(block.name, _FUSED_MATRICES)
            ]
            for heads in self._heads
        )

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        """All names of `_modules`, one a line: what is not in there matches none of them."""
        return tuple("\n".join(name for one in part for name in (one.old, one.new)) for part in self._modules)

    @cached_property
    def _others(self) -> list[str]:
        """Modules that are not an expert's."""
        return list(
            dict.fromkeys(
                name.rpartition(".")[0]
                for name in self._names
                if (how := self._layout.follows.get(name)) is None or how.expert is None
            )
        )


def _tail(block: str) -> str:
    match = _TAIL.search(block)
    return match[1] if match else ""


def _is_pattern(string: str) -> bool:
    return bool(_MARK.fullmatch(string)[1] or _WILD.search(string))  # type: ignore[index]


def _may_match(string: str, heads: Mapping[str, object]) -> bool:
    """Whether a pattern may match a module of an expert, by the text that it begins with."""
    text = _MARK.fullmatch(string)[2].replace(r"\.", ".")  # type: ignore[index]
    if "|" in text:
        return True
    wild = _WILD.search(text)
    begin = text[: wild.start() - 1] if wild and wild.start() else ""
    return any((head + ".experts.").startswith(begin) or begin.startswith(head + ".experts.") for head in heads)


def _needed_text(pattern: str) -> str:
    """The longest run of letters outside of groups and classes that a name must have to match a pattern; empty where
    none is sure."""
    if "|" in pattern or "[" in pattern or "(?" in pattern:
        return ""
    plain: list[str] = []
    depth = 0
    for token in re.findall(r"\\.|.", pattern.replace(r"\.", "."), re.DOTALL):
        depth += (token == "(") - (token == ")")
        if token in "*?{":
            plain[-1:] = "\n"  # what it stands behind may be absent
        plain.append(token if depth == 0 and (token.isalnum() or token in "_.") else "\n")
    runs = re.split(r"[\n.]", "".join(plain))
    return max((run for run in runs if not run.isdigit()), key=len, default="")


def _matchers(string: str) -> list[Matcher]:
    """How a pattern may be read. Empty where it cannot be."""
    mark, text = _MARK.fullmatch(string).groups()  # type: ignore[union-attr]
    if len(text) > _MOST_PATTERN or _NESTED.search(text):
        return []
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return [] if mark else [lambda name: fnmatchcase(name, text)]
    if mark:
        return [lambda name: pattern.match(name) is not None]
    return [lambda name: pattern.match(name) is not None, lambda name: fnmatchcase(name, text)]
