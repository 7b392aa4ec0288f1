"""The sandbox that chat templates run in: jinja2's own for code of strangers, with bounds on what a template may take.

A template gets the functions and filters that transformers and llama.cpp offer, and of texts and lists the methods
named here. It may change the lists that it made itself, never those of the conversation. What it takes is bounded
(budget.py), so that a template ends in an error rather than never.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.metadata import version
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from reap.errors import UsageError
from reap.text.budget import ENTRY, budget, check_arguments, check_operands

JINJA_FLOOR = (3, 1, 6)
# Around what a template marks as generated, where `Budget.marks_generation` asks for it; in no conversation.
GENERATION_STARTS, GENERATION_ENDS = "\U0010fffc", "\U0010fffd"

_SOURCE_LIMIT = 1 << 16  # the longest template published has 17,000 characters
_LIST_METHODS = frozenset(("append", "extend", "insert", "pop", "remove", "clear", "reverse", "sort"))
_TEXT_METHODS = frozenset((
    "capitalize", "casefold", "center", "count", "endswith", "find", "format", "format_map", "index", "isalnum",
    "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace",
    "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith",
    "strip", "swapcase", "title", "upper", "zfill",
))  # fmt: skip
#: What a template may call of a text, a list, a tuple and an object; of numbers and bytes nothing.
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, _TEXT_METHODS),
    (list, _LIST_METHODS | {"copy", "count", "index"}),
    (tuple, frozenset(("count", "index"))),
    (dict, frozenset(("copy", "get", "items", "keys", "values"))),
    (int, frozenset()),
    (float, frozenset()),
    (bytes, frozenset()),
)
#: Filters that look neither into the entries of what they are given nor write them: not weighed.
_SHALLOW = frozenset(
    ("attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject",
     "rejectattr", "reverse", "select", "selectattr", "slice")
)  # fmt: skip
#: Tests that compare.
_COMPARING = (
    "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le", "in",
)  # fmt: skip
_JSON_INDENT = 64


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
        return character if budget().marks_generation else ""


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
            optimized=False,  # see `_written`
            extensions=[Generation, loopcontrols],
            undefined=undefined,
        )
        self.finalize = _written
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals |= {
            "dict": _make_dict,
            "namespace": _make_namespace,
            "raise_exception": _raise,
            "strftime_now": now.strftime,
            "tojson": _to_json,
        }
        for name in ("random", "urlize", "wordwrap"):  # the last two take seconds for a long text; no template has them
            del self.filters[name]
        # `safe` would make a text of which `+` escapes what follows
        self.filters |= {"tojson": _to_json, "from_json": _from_json, "safe": str}
        for name in ("strip", "lstrip", "rstrip", "split", "rsplit", "startswith", "endswith"):
            self.filters.setdefault(name, _method(name))
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.tests |= {name: _weighed(cast(Any, self.tests[name])) for name in _COMPARING}

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
        bounded: nodes.Template = _Watched().visit(tree)
        bounded.set_environment(self)
        for node in bounded.find_all(nodes.Node):
            if getattr(node, "lineno", None) is None:
                node.lineno = 1
        return bounded

    @property
    def step(self) -> None:
        """Spent by being looked at: the compiled template does so in each round of a loop, where a call costs more."""
        budget().step()

    @property
    def look(self) -> None:
        """The same in each comparison."""
        budget().look()

    def concatenate(self, *values: object) -> str:
        """What `~` does, within bounds."""
        for value in values:
            budget().weigh(value)
        text = "".join(map(str, values))
        budget().spend(text)
        return text

    def compared(self, value: object) -> object:
        """An operand of a comparison: itself, and weighed."""
        budget().weigh(value)
        return value

    def searched(self, value: object) -> object:
        """The same of `in`, where an object is only looked up in."""
        if isinstance(value, dict):
            budget().tick()
        else:
            budget().weigh(value)
        return value

    def tuple_of(self, *values: object) -> tuple[object, ...]:
        """A tuple, weighed while it is made: its hash goes through all that is in it."""
        budget().weigh(values)
        return values

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS:
            if isinstance(obj, kind) and callable(value) and attr not in methods:
                return False
        if type(obj) is list and attr in _LIST_METHODS:
            return True
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        name, text = value.__name__, value.__self__

        @functools.wraps(wrapped)
        def bounded(*args: Any, **kwargs: Any) -> str:
            check_arguments(name, text, args, kwargs)
            return wrapped(*args, **kwargs)

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operands(operator, left, right)
        return _spent(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(__obj, Macro | LoopContext):  # these hand on what they are given
            owner = getattr(__obj, "__self__", None)
            check_arguments(getattr(__obj, "__name__", ""), owner, args, kwargs)
            result = super().call(__context, __obj, *args, **kwargs)
            if type(owner) is list:
                budget().check(ENTRY * len(owner))
            return _spent(result)
        return _spent(super().call(__context, __obj, *args, **kwargs))


_YES_OR_NO = (nodes.Const, nodes.Compare, nodes.Not, nodes.Test)


class _Watched(NodeTransformer):
    """What jinja2 does not intercept goes through the sandbox all the same: `~`, comparisons and tuples."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides: list[nodes.Compare | nodes.Operand] = [node, *node.ops]
        plain = [side for side in sides if isinstance(side.expr, nodes.Const)]
        if len(sides) == 2 and plain:  # what is compared with a text or a number is not gone through
            look: nodes.Expr = nodes.EnvironmentAttribute("look")
            plain[0].expr = nodes.CondExpr(look, plain[0].expr, plain[0].expr)
            plain[0].expr.set_lineno(node.lineno)
            return node
        for side in sides:
            if not isinstance(side.expr, _YES_OR_NO):
                is_searched = isinstance(side, nodes.Operand) and side.op in ("in", "notin")
                side.expr = _call("searched" if is_searched else "compared", [side.expr], node)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        if node.ctx != "load" or not node.items:
            return node
        return _call("tuple_of", node.items, node)


def _call(name: str, arguments: list[nodes.Expr], place: nodes.Node) -> nodes.Expr:
    """The node of a call of a method of the sandbox."""
    call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
    call.set_lineno(place.lineno)
    return call


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
    """jinja2's namespace, without names that begin with an underscore; written out it does not show what it holds."""

    __repr__ = object.__repr__

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
        shown = repr(bad[:40]) if isinstance(bad, str) else type(bad).__name__
        raise SecurityError(f"a namespace cannot have {shown}")


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
    budget().weigh(value)
    if isinstance(value, WatchedList):
        value = list.copy(value)  # writing it is not going through it
    spaces = [len(text) if isinstance(text, str) else text for text in (indent, *(separators or ()))]
    if any(isinstance(number, int) and number > _JSON_INDENT for number in spaces):
        raise SecurityError(f"tojson is given an indent or a separator of more than {_JSON_INDENT} characters")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, check_circular=True
    )
    pieces = []
    for piece in encoder.iterencode(value):  # with an indent piece by piece: depth times indent, in each line
        budget().spend(piece)
        pieces.append(piece)
    return "".join(pieces)


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
    budget().spend(value)
    return value


@jinja2.pass_context  # else jinja2 writes, while it compiles, what is constant: there, nothing counts how much
def _written(_: Context, value: Any) -> Any:
    """What is about to become text."""
    budget().weigh(value)
    return _spent(value)


def _weighed(test: Callable[..., bool]) -> Callable[..., bool]:
    """A test that compares what it is given."""

    @functools.wraps(test)
    def bounded(*values: Any) -> bool:
        if isinstance(values[-1], str | int | None):
            budget().look()
        else:
            budget().weigh(values)
        return test(*values)

    return bounded


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers and result are bounded."""

    @functools.wraps(function)  # jinja2's marks of what else it is passed are attributes, and copied
    def bounded(*args: Any, **kwargs: Any) -> Any:
        plain = [arg for arg in args if not isinstance(arg, Context | jinja2.Environment | nodes.EvalContext)]
        if name not in _SHALLOW:
            budget().weigh(plain[:1])
        check_arguments(name, plain[0] if plain else "", plain[1:], kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):  # a list, as llama.cpp makes it: `tojson` can write it
            result = _listed(result)
        return _spent(result)

    return bounded


def _listed(results: Iterator[Any]) -> list[Any]:
    kept: list[Any] = []
    while piece := list(itertools.islice(results, 4096)):
        kept += piece
        budget().check(ENTRY * len(kept))
        budget().tick()
    return kept
