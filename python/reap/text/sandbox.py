"""The sandbox that chat templates run in: jinja2's own for code of strangers, with bounds on what a template may take.

A template gets the functions and filters that transformers and llama.cpp offer. It may change the lists that it made
itself, never those of the conversation. Its loops, its output and every string that it builds are bounded, so that a
template ends in an error rather than never.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from importlib.metadata import version
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from reap.errors import UsageError

JINJA_FLOOR = (3, 1, 6)
# Around what a template marks as generated, where `Budget.marks_generation` asks for it; in no conversation.
GENERATION_STARTS, GENERATION_ENDS = "\U0010fffc", "\U0010fffd"

_SOURCE_LIMIT = 1 << 20
_NUMBER_LIMIT = 100_000  # a width, a precision, an indent, a length
_BITS_LIMIT = 1 << 14  # of an integer
_LIST_METHODS = frozenset(("append", "extend", "insert", "pop", "remove", "clear", "reverse", "sort"))
_WIDTHS = re.compile(r"\d{6}|\{[^{}]*:[^{}]*\{")  # six digits, or one that is an argument


class InputList(list[Any]):
    """A list of the conversation: a template reads it and cannot change it."""


class WatchedList(InputList):
    """Knows whether it was gone through, to find out what a template does with it."""

    was_read = False

    def __iter__(self) -> Iterator[Any]:
        self.was_read = True
        return super().__iter__()


class WatchedText(str):
    """The same of a text."""

    was_read = False

    def __iter__(self) -> Iterator[str]:
        self.was_read = True
        return super().__iter__()

    def __getitem__(self, key: Any) -> str:
        self.was_read = self.was_read or isinstance(key, int)
        return super().__getitem__(key)


def frozen(value: Any) -> Any:
    """A deep copy of JSON data whose lists a template cannot change."""
    if isinstance(value, WatchedList):
        return value
    if isinstance(value, list | tuple):
        return InputList(frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return value


class Budget:
    """What one rendering may take, by the size of what it is given.

    steps       rounds of loops and calls of macros
    characters  of all strings that are built or written, together
    longest     of one string, or entries of one list
    """

    def __init__(self, n_characters: int, n_messages: int, marks_generation: bool = False) -> None:
        self.steps = 100_000 + 16 * n_messages * n_messages + n_characters
        self.longest = (1 << 20) + 16 * n_characters
        self.characters = 64 * self.longest
        self.marks_generation = marks_generation

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError("the template takes too many steps")

    def check(self, length: int) -> None:
        if length > self.longest:
            raise SecurityError("the template builds too long a value")

    def spend(self, value: object) -> None:
        if isinstance(value, str | list):
            self.check(len(value))
            self.characters -= len(value)
            if self.characters < 0:
                raise SecurityError("the template writes too much")


_BUDGET: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """The budget of what is rendered in this context."""
    token = _BUDGET.set(budget)
    try:
        yield
    finally:
        _BUDGET.reset(token)


def _budget() -> Budget:
    return _BUDGET.get() or Budget(0, 0)  # without one: an expression that jinja2 folds while it compiles


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks what the model writes: rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (
            nodes.Output([self.call_method("mark", [nodes.Const(mark)])]).set_lineno(line)
            for mark in (GENERATION_STARTS, GENERATION_ENDS)
        )
        return [first, *body, last]

    def mark(self, character: str) -> str:
        return character if _budget().marks_generation else ""


class Lenient(jinja2.Undefined):
    """What is not there, taken for an empty text by `+`, as llama.cpp's engine takes it."""

    def __add__(self, other: object) -> Any:
        return other

    __radd__ = __add__


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates; `now` is what they take for the time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, now: datetime, undefined: type[jinja2.Undefined]) -> None:
        # Neither autoescape nor jinja2's own tojson: both write HTML entities, which no model was trained on.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            extensions=[Generation, loopcontrols],
            undefined=undefined,
        )
        self.finalize = _spent
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals |= {
            "dict": _make_dict,
            "namespace": _make_namespace,
            "raise_exception": _raise,
            "strftime_now": now.strftime,
            "tojson": _to_json,
        }
        del self.filters["random"]
        # `safe` would make a text of which `+` escapes what follows
        self.filters |= {"tojson": _to_json, "from_json": _from_json, "safe": str}
        for name in ("strip", "lstrip", "rstrip", "split", "rsplit", "startswith", "endswith"):
            self.filters.setdefault(name, _method(name))
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}

    def compile_template(self, source: str) -> jinja2.Template:
        """`source` compiled. jinja2.TemplateError where it is not a template."""
        if len(source) > _SOURCE_LIMIT:
            raise SecurityError(f"it has {len(source)} characters, more than {_SOURCE_LIMIT}")
        template: jinja2.Template = self.from_string(source)
        return template

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = super()._parse(source, name, filename)
        for block in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            assert isinstance(block, nodes.For | nodes.Macro | nodes.CallBlock)
            block.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("step")))
        bounded: nodes.Template = _Concatenations().visit(tree)
        bounded.set_environment(self)
        for node in bounded.find_all(nodes.Node):
            if getattr(node, "lineno", None) is None:
                node.lineno = 1
        return bounded

    @property
    def step(self) -> None:
        """Spent by being looked at: the compiled template does so in each round of a loop, where a call costs more."""
        _budget().step()

    def concatenate(self, *values: object) -> str:
        """What `~` does, within bounds."""
        text = "".join(map(str, values))
        _budget().spend(text)
        return text

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) is list and attr in _LIST_METHODS:
            return True
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_arguments("format", value.__self__, (), {})
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return _spent(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | list):
            _check_arguments(getattr(__obj, "__name__", ""), owner, args, kwargs)
        return _spent(super().call(__context, __obj, *args, **kwargs))


class _Concatenations(NodeTransformer):
    """`a ~ b` becomes a call, because jinja2 intercepts operators and not this one."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        function = nodes.EnvironmentAttribute("concatenate")
        return nodes.Call(function, node.nodes, [], None, None).set_lineno(node.lineno)


def sandbox(now: datetime, *, lenient: bool = False) -> Sandbox:
    """A sandbox for one template; `lenient`: with `Lenient` for what is not there.

    UsageError where jinja2 is too old to be one.
    """
    check_version(version("jinja2"))
    return Sandbox(now, Lenient if lenient else jinja2.Undefined)


def check_version(found: str) -> None:
    """UsageError where jinja2 of this version lets a template out."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    if numbers < JINJA_FLOOR:
        floor = ".".join(map(str, JINJA_FLOOR))
        raise UsageError(
            f"jinja2 {found} lets a chat template run programs; {floor} or newer is needed: pip install -U jinja2"
        )


# ---- what a template is given


class _Namespace(Namespace):
    """jinja2's namespace, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_names([name])
        super().__setitem__(name, value)


def _make_namespace(*args: Any, **kwargs: Any) -> Namespace:
    values = dict(*args, **kwargs)
    _check_names(values)
    return _Namespace(values)


def _check_names(names: Any) -> None:
    bad = next((name for name in names if not isinstance(name, str) or name.startswith("_")), None)
    if bad is not None:
        raise SecurityError(f"a namespace cannot have {bad!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise(message: str = "") -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(value, jinja2.Undefined):
        raise jinja2.UndefinedError("tojson of a value that is undefined")
    if isinstance(value, WatchedList):
        value = list.copy(value)  # writing it is not going through it
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _from_json(text: object) -> Any:
    if not isinstance(text, str):
        raise jinja2.TemplateError("from_json wants a string")
    return json.loads(text)


def _method(name: str) -> Callable[..., Any]:
    """A string's method as a filter, as llama.cpp has them."""

    def apply(value: object, *args: Any) -> Any:
        return getattr(str(value), name)(*args)

    apply.__name__ = name
    return apply


# ---- bounds


def _spent(value: Any) -> Any:
    _budget().spend(value)
    return value


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers and result are bounded."""

    @functools.wraps(function)  # jinja2's marks of what else it is passed are attributes, and copied
    def bounded(*args: Any, **kwargs: Any) -> Any:
        plain = [arg for arg in args if not isinstance(arg, Context | jinja2.Environment | nodes.EvalContext)]
        _check_arguments(name, plain[0] if plain else "", plain[1:], kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):  # a list, as llama.cpp makes it: `tojson` can write it
            result = list(itertools.islice(result, _budget().longest + 1))
        return _spent(result)

    return bounded


def _check_arguments(name: str, value: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """SecurityError where a filter or method would build something huge before its result can be measured."""
    given = [*args, *kwargs.values()]
    if any(isinstance(arg, int) and abs(arg) > _NUMBER_LIMIT for arg in given):
        raise SecurityError(f"{name} is given a number beyond {_NUMBER_LIMIT}")
    if name in ("format", "format_map") and _WIDTHS.search(str(value)):
        raise SecurityError(f"{name} is given a width of six digits or more, or one from an argument")
    if name == "replace" and len(given) > 1 and isinstance(value, str):
        old, new = str(given[0]), str(given[1])
        _budget().check(value.count(old) * len(new))
    if name == "join" and hasattr(value, "__len__") and given:
        separator, pieces = (given[0], value) if isinstance(value, list | tuple) else (value, given[0])
        if hasattr(pieces, "__len__"):
            _budget().check(len(pieces) * len(str(separator)))
    if name == "indent":
        width = next((arg for arg in given if isinstance(arg, int | str) and not isinstance(arg, bool)), 4)
        _budget().check(str(value).count("\n") * (width if isinstance(width, int) else len(width)))


def _check_operands(operator: str, left: Any, right: Any) -> None:
    integers = isinstance(left, int) and isinstance(right, int)
    if operator == "*" and integers:
        if left.bit_length() + right.bit_length() > _BITS_LIMIT:
            raise SecurityError("a number is too large")
    elif operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if hasattr(sequence, "__len__") and isinstance(times, int):
                _budget().check(len(sequence) * max(times, 0))
    elif operator == "**" and integers:
        if left.bit_length() * max(right, 0) > _BITS_LIMIT:
            raise SecurityError("a number is too large")
    elif operator == "%" and isinstance(left, str) and _WIDTHS.search(left):
        raise SecurityError("% is given a width of six digits or more")
    elif operator == "%" and isinstance(left, str) and "*" in left:
        raise SecurityError("% is given a width from an argument")
