"""How a function becomes a command: its panel of the help, its families of options, and what becomes of its paths.

A command is registered where it is defined, by `@PANEL.command(example)`. Each of its parameters is an option or an
argument of typer's, or a family of options: a dataclass of them, which the command receives as one object, or the
engine's options. A parameter that is a path says by `READS`, `WRITES` or `RESUMES` what becomes of it, so that one
check, before any command begins, knows all files that it reads and writes.
"""

from __future__ import annotations

import inspect
import operator
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from reap.cli.completion import device_names, values_of
from reap.cli.given import check_given
from reap.cli.habits import ENGINE_HABITS, engine_habits, put_model_first
from reap.cli.next_step import remember
from reap.cli.options import READS, RESUMES, WRITES, WRITES_FOLDER, PathRole, split_list
from reap.cli.show import be_quiet
from reap.engine.options import EngineArguments, EngineField, Listed, Whole, Word, engine_fields
from reap.errors import UsageError
from reap.files.atomic import check_distinct, check_outputs
from reap.files.atomic_directory import check_apart
from reap.files.recognise import url_of
from reap.gguf.shards import model_paths

_Function = TypeVar("_Function", bound=Callable[..., None])
_NAMED_BY_WORD = ("auto", "none", "-")


@dataclass(frozen=True)
class Parameter:
    """One option or argument of a command: its type, typer's description of it, its default, its role where it is a
    path."""

    name: str
    kind: Any
    info: Any
    default: Any
    role: PathRole | None = None

    @classmethod
    def of(cls, name: str, hint: Any, default: Any) -> Parameter:
        """From an annotation `Annotated[kind, typer.Option(...), READS]`."""
        kind, *notes = typing.get_args(hint)
        role = next((note for note in notes if isinstance(note, PathRole)), None)
        return cls(name, kind, notes[0], default, role)

    @property
    def flags(self) -> tuple[str, ...]:
        """--name, -n; none of an argument."""
        given = (self.info.default, *(self.info.param_decls or ()))  # typer takes the first one for a default
        return tuple(name for name in given if isinstance(name, str) and name.startswith("-"))

    def as_typer_sees_it(self) -> inspect.Parameter:
        """The parameter of the function that typer is given."""
        hint: Any = operator.getitem(Annotated, (self.kind, self.info))
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=hint)


@dataclass(frozen=True)
class _Family:
    """Parameters of a command that reach it as one argument, made by `build` of their values by name."""

    build: Callable[[dict[str, Any]], Any]
    parameters: tuple[Parameter, ...]


_QUIET = Parameter("quiet", bool, typer.Option("--quiet", "-q", help="Show no progress."), False)


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    run: the function. families: argument of `run` -> what it is made of.
    """

    name: str
    example: str
    run: Callable[..., None]
    families: Mapping[str, _Family]

    @classmethod
    def of(cls, function: Callable[..., None], example: str, ctx_size: int | None) -> Command:
        """Of a function whose parameters say what they are."""
        hints = typing.get_type_hints(function, include_extras=True)
        families = {
            name: _family(name, hints[name], parameter.default, ctx_size)
            for name, parameter in inspect.signature(function).parameters.items()
        }
        return cls(function.__name__.replace("_", "-"), example, function, families)

    @property
    def parameters(self) -> list[Parameter]:
        """All that it takes."""
        own = [parameter for family in self.families.values() for parameter in family.parameters]
        return [*own, _QUIET]

    def add_to(self, app: typer.Typer, panel: str | None) -> None:
        """Make it a command of `app`."""

        def callback(**values: Any) -> None:
            be_quiet(values.pop("quiet"))
            self.check_paths(values)
            remember(self.parameters, values)
            arguments = {
                name: family.build({parameter.name: values[parameter.name] for parameter in family.parameters})
                for name, family in self.families.items()
            }
            self.run(**arguments)

        shown = [parameter.as_typer_sees_it() for parameter in self.parameters]
        callback.__doc__ = self.run.__doc__
        callback.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        callback.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        has_model = any("--model" in parameter.flags for parameter in self.parameters)
        app.command(
            self.name,
            epilog=f"Example: {self.example}",
            rich_help_panel=panel,
            cls=TyperCommand if has_model else _ModelFirst,
        )(callback)

    def check_paths(self, values: Mapping[str, Any]) -> None:
        """UsageError, before the work begins, for paths that cannot be right: an output that is another output or an
        input, or needs --force; an input of the kind that another place wants."""
        paths: dict[PathRole | None, list[Path]] = {role: [] for role in PathRole}
        for parameter in self.parameters:
            if parameter.role is not None:
                paths[parameter.role] += _paths_in(values.get(parameter.name))
        for role, named in paths.items():
            _refuse_urls(role, named)
        for directory in paths[WRITES_FOLDER]:
            check_apart(directory, paths[READS])
        inputs = [file for path in paths[READS] for file in model_paths(path)]  # of a split model all its files
        check_distinct([*paths[WRITES], *paths[WRITES_FOLDER], *paths[RESUMES]], inputs)
        check_outputs(paths[WRITES], force=bool(values.get("force")))
        reading = [parameter for parameter in self.parameters if parameter.role is READS]
        check_given([(str(it.info.metavar), path) for it in reading for path in _paths_in(values.get(it.name))])


class _ModelFirst(TyperCommand):
    """A command whose model may be given by -m as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        takes_model = any(getattr(it, "metavar", None) == "MODEL" for it in self.params)
        return super().parse_args(ctx, put_model_first(args) if takes_model else args)


@dataclass
class Panel:
    """A group of the help: its title and its commands, in order."""

    title: str
    commands: list[Command] = field(default_factory=list)

    def command(self, example: str, *, ctx_size: int | None = None) -> Callable[[_Function], _Function]:
        """Register a function under its name. `ctx_size`: the default where it takes the engine's options."""

        def register(function: _Function) -> _Function:
            self.commands.append(Command.of(function, example, ctx_size))
            return function

        return register

    def add_to(self, app: typer.Typer) -> None:
        """Make its commands those of `app`."""
        for command in self.commands:
            command.add_to(app, self.title)


def _family(name: str, hint: Any, default: Any, ctx_size: int | None) -> _Family:
    if hint is EngineArguments:
        return _engine_family(ctx_size)
    if isinstance(hint, type) and is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        made_of = tuple(
            Parameter.of(it.name, hints[it.name], inspect.Parameter.empty if it.default is MISSING else it.default)
            for it in fields(hint)
        )
        return _Family(lambda values: hint(**values), made_of)
    return _Family(lambda values: values[name], (Parameter.of(name, hint, default),))


def _paths_in(value: Any) -> list[Path]:
    """The paths that an option's value names: DOMAIN=PATH is one as well, the words that stand for no file are not."""
    items = value if isinstance(value, list) else [value]
    return [_path_of(str(item)) for item in items if item is not None and str(item) not in _NAMED_BY_WORD]


def _path_of(text: str) -> Path:
    domain, found, path = text.partition("=")
    return Path(path if found and domain.isidentifier() and not Path(text).exists() else text)


def _refuse_urls(role: PathRole | None, paths: list[Path]) -> None:
    for path in paths:
        if url := url_of(path):
            what = "download it, and give the file's path" if role is READS else "an output is a file on this machine"
            raise UsageError(f"{url} is a URL: {what}")


# ---- the engine's options


def _engine_family(ctx_size: int | None) -> _Family:
    if ctx_size is None:
        raise TypeError("a command with the engine's options says its ctx_size")
    own = [_engine_parameter(it, ctx_size if it.name == "ctx_size" else None) for it in engine_fields()]
    habits = [Parameter.of(name, hint, None) for name, hint in ENGINE_HABITS.items()]
    return _Family(_engine_arguments, (*own, *habits))


def _engine_parameter(field: EngineField, usual: int | None) -> Parameter:
    """How a command takes one of them. usual: what the library takes where none is given, unless a model was trained
    with less."""
    holds, option = field.option.holds, field.option
    kind: Any = list[str] if isinstance(holds, Listed) else int if isinstance(holds, Whole) else str
    default = None if isinstance(holds, Listed) or usual is not None else field.default
    words = values_of(*holds.choices) if isinstance(holds, Word) and holds.choices else None
    if field.name == "devices":
        words = device_names()
    names = [name for name in (field.flag, option.short) if name is not None]
    shown = True if usual is None else str(usual)
    info = typer.Option(*names, metavar=option.metavar, help=option.help, autocompletion=words, show_default=shown)
    return Parameter(field.name, kind if default is not None else kind | None, info, default)


def _engine_arguments(values: dict[str, Any]) -> EngineArguments:
    """What a command was given, checked under the names that it was given by."""
    placed = engine_habits(values)
    fields = [it for it in engine_fields() if it.name != "ctx_size" or values[it.name] is not None]
    given = {it.name: _engine_value(it, values[it.name]) for it in fields}
    given["override_tensors"] = (*given["override_tensors"], *placed)
    return typing.cast("EngineArguments", given)


def _engine_value(field: EngineField, value: Any) -> Any:
    if isinstance(field.option.holds, Listed):
        value = split_list(value, field.option.holds.separator) or field.default
    return value if value is None else field.option.holds.check(field.flag, value)
