"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.engine.options import EngineField, Listed, Whole, engine_fields
from reap.errors import UsageError

if TYPE_CHECKING:
    from reap.scores.ranking import Keep

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
METRIC_HELP = (
    "Score to rank experts by: reap, weighted_ean_sum, ean_sum, ean_mean, frequency, gate_sum, reap_l2, random."
)
Metric = Annotated[str, typer.Option("--metric", help=METRIC_HELP)]
KeepText = Annotated[
    str, typer.Option("--keep", metavar="N|FRACTION", help="Experts to keep: 0.5 is half of them, 64 is 64 of them.")
]
Protect = Annotated[
    list[str] | None, typer.Option("--protect", metavar="LAYER:ID,...", help="Experts to keep whatever their score.")
]
SuperExperts = Annotated[bool, typer.Option("--super-experts", help="Protect experts with an outlying output as well.")]
BLEND = typer.Option(
    "--blend", metavar="sum|maxmin", help="All tokens together, or the worst-served domain first; sum by default."
)
Blend = Annotated[str, BLEND]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the metric random.")]


def parse_keep(text: str) -> Keep:
    """A value with a point is a fraction, one without is a number."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise UsageError(
            f"--keep should be a number of experts (64) or a fraction with a point (0.5), found {text!r}"
        ) from None


_TIME = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*([smh]?)", re.ASCII)


def parse_time(text: str) -> float:
    """Seconds: 90, 90s, 10m, 1.5h."""
    match = _TIME.fullmatch(text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise UsageError(f"{text!r} is no time such as 90s, 10m or 1.5h")
    return seconds


def split_list(values: Sequence[str] | None) -> list[str]:
    """An option given several times, or once with commas."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def check_output(output: Path, *sources: Path | str) -> None:
    """UsageError, before the work begins, for an output that could not be written or would replace what is read."""
    if not output.parent.is_dir():
        raise UsageError(f"{output}: the folder {output.parent} does not exist")
    if output.is_dir():
        raise UsageError(f"{output}: is a folder")
    if output.exists() and any(Path(source).exists() and output.samefile(source) for source in sources):
        raise UsageError(f"{output}: is the input")


# ---- the engine's options, which every command that runs a model has


def _engine_parameter(field: EngineField, default: Any) -> inspect.Parameter:
    """How a command takes one of them."""
    holds, option = field.option.holds, field.option
    names = [name for name in (field.flag, option.short) if name is not None]
    kind: Any = list[str] if isinstance(holds, Listed) else int if isinstance(holds, Whole) else str
    default = None if isinstance(holds, Listed) else default
    info = typer.Option(*names, metavar=option.metavar, help=option.help)
    hint = Annotated[(kind if default is not None else kind | None, info)]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _engine_value(field: EngineField, value: Any) -> Any:
    """What a command was given, checked under the name that it was given by; a list's items may share one option."""
    if isinstance(field.option.holds, Listed):
        value = split_list(value) or field.default
    return value if value is None else field.option.holds.check(field.flag, value)


def with_engine_options(ctx_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the engine's options; it receives them as one dictionary `engine`, in the names of the library."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def wrapper(**values: Any) -> None:
            engine = {field.name: _engine_value(field, values.pop(field.name)) for field in engine_fields()}
            command(**values, engine=engine)

        own = typing.get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(annotation=own[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "engine"
        ]
        for field in engine_fields():
            parameters.append(_engine_parameter(field, ctx_size if field.name == "ctx_size" else field.default))
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        wrapper.__annotations__ = {it.name: it.annotation for it in parameters}
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return wrapper

    return decorate
