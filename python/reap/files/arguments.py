"""Keyword arguments that go through a function as a set: told apart, and shown in its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def divide(function: str, arguments: Mapping[str, Any], *kinds: Any) -> tuple[Any, ...]:
    """The arguments of each kind, a TypedDict with optional keys, as a dictionary.

    Raises TypeError for one that is of none of them, as a call of `function` would.
    """
    known = {name for kind in kinds for name in kind.__optional_keys__}
    strange = next((name for name in arguments if name not in known), None)
    if strange is not None:
        raise TypeError(f"{function}() got an unexpected keyword argument {strange!r}")
    return tuple({name: arguments[name] for name in kind.__optional_keys__ if name in arguments} for kind in kinds)


def shows(*explained: tuple[Any, Callable[..., Any]]) -> Callable[[_Function], _Function]:
    """Let the signature of a function with `**options`, as `help` and notebooks show it, name them with their defaults.

    explained: a TypedDict of names, and what has parameters of these names.
    """

    def decorate(function: _Function) -> _Function:
        own = inspect.signature(function)
        shown = [it for it in own.parameters.values() if it.kind is not inspect.Parameter.VAR_KEYWORD]
        for kind, home in explained:
            parameters = inspect.signature(home).parameters
            shown += [
                it.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                for it in parameters.values()
                if it.name in kind.__optional_keys__
            ]
        function.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return decorate
