"""The options of `plan()` that a function hands on to it, spelled once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, cast

from reap.engine.options import EngineArguments
from reap.evaluation.resume_file import ResumeFile
from reap.files.atomic import RewrittenOutput, paths_of
from reap.files.paths import PathLike
from reap.scores.plan import Protect


class PlanArguments(TypedDict, total=False):
    """Keyword arguments that a function hands on to `reap.plan`, where they are explained."""

    protect: str | Iterable[Protect]
    blend: str | None
    protect_super_experts: bool
    seed: int


class ChoiceArguments(PlanArguments, EngineArguments, total=False):
    """Those of `reap.plan`, those of the engine, and what to make of a profile or a file that is there already.

    allow_mismatch: go on with a profile or plans of another model, where layers and experts are as many; warnings say
    what differs. resume: go on from `OUTPUT.resume`, which an interrupted call left, and replace the output. force:
    replace an output that exists.
    """

    allow_mismatch: bool
    resume: bool
    force: bool


_DEFAULTS: dict[str, Any] = {"protect": (), "blend": "sum", "protect_super_experts": False, "seed": 0}
_FLAGS = ("allow_mismatch", "resume", "force")
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Given:
    """What a function was given, sorted."""

    plan: dict[str, Any]
    """Every argument for `plan`."""
    engine: EngineArguments
    """Those for the engine."""
    allow_mismatch: bool
    """Whether a profile of another model will do."""
    resume: bool
    """Whether to go on from the file that an interrupted call left."""
    force: bool
    """Whether to replace an output that exists."""

    def output(
        self, path: PathLike | None, resume_file: ResumeFile | None, inputs: Sequence[Any]
    ) -> RewrittenOutput | None:
        """The output that a call writes while it works; None where none was asked for.

        inputs: what the call was given to read; what of it are paths no output may be. Raises UsageError.
        """
        if path is None:
            return None
        goes_on = resume_file is not None and resume_file.node is not None
        return RewrittenOutput(path, paths_of(*inputs), force=self.force or goes_on)


def split_options(options: ChoiceArguments, **defaults: Any) -> Given:
    """What a function was given, sorted.

    `defaults` are its own, where they are not plan's.
    """
    plan_options = {**_DEFAULTS, **defaults}
    given = cast(Mapping[str, Any], options)
    plan_options |= {name: value for name, value in given.items() if name in _DEFAULTS}
    if not isinstance(plan_options["protect"], str):
        plan_options["protect"] = list(plan_options["protect"])  # an iterator would be empty for the second plan
    flags = {name: bool(given.get(name, False)) for name in _FLAGS}
    engine = {name: value for name, value in given.items() if name not in _DEFAULTS and name not in _FLAGS}
    return Given(plan_options, cast(EngineArguments, engine), **flags)


def shows_plan_options(**defaults: Any) -> Callable[[_F], _F]:
    """Let the signature of a function with `**options`, as `help` and notebooks show it, name plan's options."""

    def decorate(function: _F) -> _F:
        own = inspect.signature(function)
        shown = list(own.parameters.values())
        hints = PlanArguments.__annotations__ | dict.fromkeys(_FLAGS, "bool")
        shown[-1:-1] = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default={**_DEFAULTS, **dict.fromkeys(_FLAGS, False), **defaults}[name],
                annotation=getattr(hint, "__forward_arg__", hint),
            )
            for name, hint in hints.items()
        ]
        function.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return decorate
