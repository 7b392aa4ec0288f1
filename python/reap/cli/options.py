"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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


def parse_overrides(values: Sequence[str] | None) -> list[tuple[str, str]]:
    """PATTERN=BUFFER, as llama.cpp writes it."""
    pairs = []
    for text in split_list(values):
        pattern, found, buffer = text.partition("=")
        if not (found and pattern and buffer):
            raise UsageError(f"--override-tensor should be PATTERN=BUFFER, found {text!r}")
        pairs.append((pattern, buffer))
    return pairs


def check_output(output: Path, *sources: Path | str) -> None:
    """UsageError, before the work begins, for an output that could not be written or would replace what is read."""
    if not output.parent.is_dir():
        raise UsageError(f"{output}: the folder {output.parent} does not exist")
    if output.is_dir():
        raise UsageError(f"{output}: is a folder")
    if output.exists() and any(Path(source).exists() and output.samefile(source) for source in sources):
        raise UsageError(f"{output}: is the input")


# ---- the engine's options, which every command that runs a model has

_ENGINE: dict[str, tuple[Any, Any]] = {
    "batch_size": (
        int | None,
        typer.Option("--batch-size", "-b", help="Tokens of one decode; as --ubatch-size by default."),
    ),
    "ubatch_size": (int, typer.Option("--ubatch-size", "-ub", help="Tokens of one pass through the graph.")),
    "threads": (int | None, typer.Option("--threads", "-t", help="Threads; the cores that are there by default.")),
    "gpu_layers": (int, typer.Option("--gpu-layers", "-ngl", help="Layers on the device; -1 is all.")),
    "device": (
        list[str] | None,
        typer.Option("--device", metavar="D", help="Devices to use, as `reap devices` names them."),
    ),
    "override_tensor": (
        list[str] | None,
        typer.Option("--override-tensor", "-ot", metavar="P=D", help="Tensors to place elsewhere."),
    ),
    "rpc": (
        list[str] | None,
        typer.Option("--rpc", metavar="HOST:PORT", help="Servers that compute for this machine."),
    ),
    "type_k": (str, typer.Option("--type-k", "-ctk", help="Type of the K cache.")),
    "type_v": (str, typer.Option("--type-v", "-ctv", help="Type of the V cache.")),
    "flash_attn": (str, typer.Option("--flash-attn", "-fa", metavar="auto|on|off", help="Flash attention.")),
}
_DEFAULTS = {"ubatch_size": 512, "gpu_layers": -1, "type_k": "f16", "type_v": "f16", "flash_attn": "auto"}


def with_engine_options(ctx_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the engine's options; it receives them as one dictionary `engine`, in the names of the library."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def wrapper(**values: Any) -> None:
            engine = {name: values.pop(name) for name in options}
            engine["devices"] = split_list(engine.pop("device")) or None
            engine["override_tensors"] = parse_overrides(engine.pop("override_tensor"))
            engine["rpc"] = split_list(engine["rpc"])
            command(**values, engine=engine)

        option = typer.Option("--ctx-size", "-c", help="Tokens of one window.")
        options = {"ctx_size": (int, option), **_ENGINE}
        defaults = {"ctx_size": ctx_size, **_DEFAULTS}
        hints = {name: Annotated[kind, option] for name, (kind, option) in options.items()}
        own = typing.get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(annotation=own[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "engine"
        ]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=hint)
            for name, hint in hints.items()
        ]
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        wrapper.__annotations__ = {**{name: hint for name, hint in own.items() if name != "engine"}, **hints}
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return wrapper

    return decorate
