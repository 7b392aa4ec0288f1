"""The engine's options, spelled here only: what each may hold, and its name on the command line.

A new option is a field of `EngineOptions`, a key of `EngineArguments`, a field of `SessionOptions` (csrc/session.h) and
its binding. Functions that run a model take `**engine: Unpack[EngineArguments]`; the commands' options are made from
the fields.

What can be checked is checked here, before llama.cpp sees it: it aborts the process where it meets what it did not
expect.
"""

from __future__ import annotations

import inspect
import operator
import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, TypedDict, TypeVar

from reap.errors import UsageError
from reap.files.paths import PathLike

#: Tokens of a window where the caller gives no `ctx_size`: of a profile, and of a text that a model is judged on.
PROFILE_CTX_SIZE = 2048
EVALUATION_CTX_SIZE = 512
#: The same of benchmarks and of texts that a model writes, which are as long as they are.
GENERATION_CTX_SIZE = 4096

DEFAULT_UBATCH = 512
MOST_THREADS = 512  # GGML_MAX_N_THREADS
FLASH_ATTENTION = ("auto", "on", "off")
#: What the engine can keep the cache in: `_core.kv_cache_types()`, here so that it is checked without the engine.
KV_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


# ---- what a field may hold


@dataclass(frozen=True)
class Whole:
    """A whole number."""

    least: int
    """The smallest that may be given."""
    most: int = 2**31 - 1
    """The largest that may be given."""

    def check(self, name: str, value: object) -> int:
        """The number; UsageError where it is out of range or of another type."""
        if not isinstance(value, bool):
            try:
                number = operator.index(value)  # type: ignore[arg-type]  # numpy has whole numbers of its own
            except TypeError:
                pass
            else:
                if self.least <= number <= self.most:
                    return number
        most = "" if self.most == Whole.most else f" and at most {self.most}"
        raise UsageError(f"{name} is {value!r}, expected a whole number of at least {self.least}{most}")


@dataclass(frozen=True)
class Word:
    """A string."""

    choices: tuple[str, ...] = ()
    """What it may be; empty: any string."""

    def check(self, name: str, value: object) -> str:
        """The string."""
        if isinstance(value, str) and (not self.choices or value in self.choices):
            return value
        expected = f"one of {', '.join(self.choices)}" if self.choices else "a string"
        raise UsageError(f"{name} is {value!r}, expected {expected}")


@dataclass(frozen=True)
class Listed:
    """Any number of strings; a string by itself is one of them."""

    form: str
    """What a string should look like, for errors."""
    read: Callable[[str], Any] = str
    """(string) -> what the tuple holds; raises ValueError where it cannot be."""
    separator: str = ","
    """A regular expression: what parts several of them in one text of the command line."""

    def check(self, name: str, value: object) -> tuple[Any, ...]:
        """A tuple of what was read."""
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, Sequence) or isinstance(items, bytes | bytearray):
            raise UsageError(f"{name} is {value!r}, expected a list of {self.form}")
        return tuple(self._item(name, item) for item in items)

    def _item(self, name: str, item: object) -> Any:
        if isinstance(item, str) and item:
            try:
                return self.read(item)
            except ValueError:
                pass
        raise UsageError(f"{name} should be {self.form}, found {item!r}")


@dataclass(frozen=True)
class Tupled(Listed):
    """The same where an item may also be given in its parts."""

    joined: str = "{}={}"
    """How parts are put together to a string, with {} for each."""

    def _item(self, name: str, item: object) -> Any:
        if isinstance(item, Sequence) and not isinstance(item, str):
            if len(item) != self.joined.count("{}") or not all(isinstance(part, str) for part in item):
                raise UsageError(f"{name} should be {self.form}, found {item!r}")
            item = self.joined.format(*item)
        return super()._item(name, item)


@dataclass(frozen=True)
class Paths(Listed):
    """Any number of paths, as strings; one by itself is one of them."""

    separator: str = r"(?!)"
    """Nothing: a path may hold any character."""

    def check(self, name: str, value: object) -> tuple[Any, ...]:
        """A tuple of strings."""
        return super().check(name, (value,) if isinstance(value, os.PathLike) else value)

    def _item(self, name: str, item: object) -> Any:
        return super()._item(name, os.fspath(item) if isinstance(item, os.PathLike) else item)


def _split_pair(text: str) -> tuple[str, str]:
    """PATTERN=BUFFER, as llama.cpp writes it."""
    pattern, _, buffer = text.rpartition("=")
    if not (pattern and buffer):
        raise ValueError
    return pattern, buffer


_METADATA = re.compile(r"([^=]+)=(int|float|bool|str):(.*)", re.DOTALL)


def _split_metadata(text: str) -> tuple[str, str, str]:
    """KEY=TYPE:VALUE, as llama.cpp writes it."""
    match = _METADATA.fullmatch(text)
    if match is None:
        raise ValueError
    return match[1], match[2], match[3]


@dataclass(frozen=True)
class Option:
    """What a field may hold, and how it is given on the command line."""

    holds: Whole | Word | Listed
    """Checks a value."""
    short: str | None
    """llama.cpp's short name; None: it has none."""
    help: str
    """For the command line."""
    flag: str | None = None
    """Where it is not made of the field's name."""
    metavar: str | None = None
    """What stands for the value in the help."""
    setting: str | None = None
    """Its name in the native module, where it is another."""


# ---- the options themselves


class EngineArguments(TypedDict, total=False):
    """Keyword arguments that a function hands on to `EngineOptions`, where they are explained."""

    ctx_size: int
    batch_size: int | None
    ubatch_size: int
    threads: int | None
    gpu_layers: int
    devices: Sequence[str] | None
    override_tensors: Sequence[str | tuple[str, str]]
    override_kv: Sequence[str | tuple[str, str, str]]
    rpc: Sequence[str]
    lora: PathLike | Sequence[PathLike]
    type_k: str
    type_v: str
    flash_attn: str


_OVERRIDES = Tupled("PATTERN=BUFFER", _split_pair)
_METADATA_OVERRIDES = Tupled(
    "KEY=TYPE:VALUE with int, float, bool or str as the type",
    _split_metadata,
    separator=r",(?=[^,=]+=(?:int|float|bool|str):)",
    joined="{}={}:{}",
)
_CACHE = Word(KV_CACHE_TYPES)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options that go through to llama.cpp, with its own names.

    Of what is a list, one item may be given by itself. Lists become tuples.

    Raises UsageError for a value that is out of range or of another type.
    """

    ctx_size: Annotated[int, Option(Whole(0), "-c", "Tokens of one window.")] = PROFILE_CTX_SIZE
    """Tokens of one sequence; 0: what the model was trained with."""
    batch_size: Annotated[int | None, Option(Whole(1), "-b", "Tokens of one decode; as --ubatch-size by default.")] = (
        None
    )
    """Tokens of one decode; None: ubatch_size."""
    ubatch_size: Annotated[int, Option(Whole(1), "-ub", "Tokens of one pass through the graph.")] = DEFAULT_UBATCH
    """Tokens of one pass through the graph."""
    threads: Annotated[
        int | None, Option(Whole(1, MOST_THREADS), "-t", "Threads; the cores that are there by default.")
    ] = None
    """Threads that compute; None: the cores that this process may use."""
    gpu_layers: Annotated[int, Option(Whole(-(2**31)), "-ngl", "Layers on the device; -1 is all.")] = -1
    """Layers on the device; negative: all."""
    devices: Annotated[
        Sequence[str] | None,
        Option(Listed("names of devices"), None, "Devices to use, as `reap devices` names them.", "--device", "D"),
    ] = None
    """Names as `reap devices` prints them; None: all there are."""
    override_tensors: Annotated[
        Sequence[str | tuple[str, str]],
        Option(_OVERRIDES, "-ot", "Tensors to place elsewhere.", "--override-tensor", "P=D"),
    ] = ()
    """(regular expression of tensor names, buffer type), or "PATTERN=BUFFER": tensors to place elsewhere."""
    override_kv: Annotated[
        Sequence[str | tuple[str, str, str]],
        Option(
            _METADATA_OVERRIDES,
            None,
            "What the engine takes for a key of the model's metadata; TYPE is int, float, bool or str.",
            metavar="KEY=TYPE:VALUE",
            setting="kv_overrides",
        ),
    ] = ()
    """(key of the model's metadata, type, value), or "KEY=TYPE:VALUE": what the engine takes for it."""
    rpc: Annotated[
        Sequence[str],
        Option(Listed("host:port"), None, "Servers that compute for this machine.", metavar="HOST:PORT"),
    ] = ()
    """ "host:port" of the servers that compute for this machine."""
    lora: Annotated[
        PathLike | Sequence[PathLike],
        Option(
            Paths("the path of an adapter"),
            None,
            "A LoRA adapter, a repair say, to run with the model; may be given again.",
            metavar="ADAPTER",
            setting="adapters",
        ),
    ] = ()
    """LoRA adapters in llama.cpp's own format, each in full force; `reap repair` writes one."""
    type_k: Annotated[str, Option(_CACHE, "-ctk", "Type of the K cache.")] = "f16"
    """ggml type of the K cache."""
    type_v: Annotated[str, Option(_CACHE, "-ctv", "Type of the V cache.")] = "f16"
    """ggml type of the V cache."""
    flash_attn: Annotated[
        str, Option(Word(FLASH_ATTENTION), "-fa", "Flash attention.", metavar="|".join(FLASH_ATTENTION))
    ] = "auto"
    """ "auto", "on" or "off"."""

    def __post_init__(self) -> None:
        for field in engine_fields():
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, field.option.holds.check(field.name, value))
        if self.batch_size is not None and self.batch_size < self.ubatch_size:
            raise UsageError(f"batch_size is {self.batch_size}, less than ubatch_size, which is {self.ubatch_size}")

    @classmethod
    def of(cls, arguments: EngineArguments, *, ctx_size: int) -> EngineOptions:
        """The options that a function was given; `ctx_size` where it was given none."""
        given: EngineArguments = {"ctx_size": ctx_size, **arguments}
        return cls(**given)

    def within(self, arguments: EngineArguments, trained: int) -> EngineOptions:
        """The same; where `arguments` gave no ctx_size, at most the `trained` tokens of the model's own context."""
        if "ctx_size" in arguments or not 0 < trained < self.ctx_size:
            return self
        return replace(self, ctx_size=trained)

    def given_metadata(self) -> tuple[tuple[str, str, str], ...]:
        """(key, type, value) of override_kv."""
        return tuple(pair for pair in self.override_kv if not isinstance(pair, str))

    @property
    def adapters(self) -> tuple[str, ...]:
        """The paths of `lora`."""
        return tuple(os.fspath(path) for path in typing.cast(Sequence[PathLike], self.lora))

    def record(self) -> dict[str, Any]:
        """What a profile keeps of them, as JSON types."""
        return {field.name: _as_json(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True)
class EngineField:
    """A field of `EngineOptions`."""

    name: str
    """Of the field."""
    default: Any
    """What it holds where it is not given."""
    option: Option
    """What it may hold, and how a command takes it."""

    @property
    def flag(self) -> str:
        """--its-name."""
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def setting(self) -> str:
        """Its name among the native module's `SessionOptions`."""
        return self.option.setting or self.name


def engine_fields() -> tuple[EngineField, ...]:
    """The fields of `EngineOptions`, in their order."""
    if not _FIELDS:
        hints = typing.get_type_hints(EngineOptions, include_extras=True)
        _FIELDS.extend(EngineField(it.name, it.default, hints[it.name].__metadata__[0]) for it in fields(EngineOptions))
    return tuple(_FIELDS)


_FIELDS: list[EngineField] = []
_F = TypeVar("_F", bound=Callable[..., Any])


def shows_engine_options(*, ctx_size: int) -> Callable[[_F], _F]:
    """Let the signature of a function with `**engine: Unpack[EngineArguments]`, as `help` and notebooks show it, name
    the options with their defaults."""

    def decorate(function: _F) -> _F:
        own = inspect.signature(function)
        shown = [it for it in own.parameters.values() if it.kind is not inspect.Parameter.VAR_KEYWORD]
        hints = EngineArguments.__annotations__
        for field in engine_fields():
            default = ctx_size if field.name == "ctx_size" else field.default
            shown.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=getattr(hints[field.name], "__forward_arg__", hints[field.name]),
                )
            )
        function.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return decorate


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, tuple) else value


def usable_cores() -> int:
    """Cores that this process may use, as the scheduler sees it; no more than the engine can."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(n_cores, MOST_THREADS)
