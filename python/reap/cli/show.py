"""Printing: tables and JSON to stdout, bars to stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from reap.files.formatting import bytes_text
from reap.progress import Progress as Step
from reap.progress import ProgressCallback

_PIPE_WIDTH = 200  # rich would cut tables at 80 columns where nobody looks at a screen


def console() -> Console:
    """stdout; nothing in what is printed is taken for markup."""
    made = Console(markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = _PIPE_WIDTH
    return made


def print_json(document: object) -> None:
    """One JSON document; what is not finite is null."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Names and values in two columns; a value of None is left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value is not None:
            table.add_row(name, str(value))
    console().print(table)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """A table; all columns but the first are set to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console().print(table)


def say(text: str) -> None:
    """A line of plain words."""
    console().print(text, soft_wrap=True)


def warn(text: str) -> None:
    """A line to stderr."""
    Console(stderr=True, markup=False, highlight=False, emoji=False).print(text, soft_wrap=True)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        if not task.speed or unit == "seconds":
            return Text("")
        speed = f"{bytes_text(int(task.speed))}/s" if unit == "bytes" else f"{task.speed:,.0f} {unit}/s"
        return Text(speed, style="progress.data.speed")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        show = bytes_text if task.fields["unit"] == "bytes" else "{:,}".format
        total = f" / {show(int(task.total))}" if task.total else ""
        return Text(f"{show(int(task.completed))}{total}")


_quiet = ContextVar("_quiet", default=False)


def be_quiet(quiet: bool) -> None:
    """From now on show progress, or none."""
    _quiet.set(quiet)


@contextmanager
def progress_bar(what: str) -> Iterator[ProgressCallback | None]:
    """A callback that moves a bar on stderr; None where stderr is not a terminal, or after `be_quiet`."""
    stderr = Console(stderr=True)
    if _quiet.get() or not stderr.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        _Count(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(what, total=None, unit="tokens")

        def move(step: Step) -> None:
            bar.update(task, completed=step.done, total=step.total, unit=step.unit)

        yield move
