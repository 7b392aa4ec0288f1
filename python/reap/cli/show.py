"""Printing: tables and JSON to stdout, bars to stderr."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from reap.files.formatting import bytes_text
from reap.progress import Progress as Step
from reap.progress import ProgressCallback

LINE_SECONDS = 10.0  # between lines of progress where stderr is not a terminal
_PIPE_WIDTH = 200  # rich would cut tables at 80 columns where there is no screen


def console() -> Console:
    """stdout; nothing in what is printed is taken for markup."""
    made = Console(markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = _PIPE_WIDTH
    return made


def print_json(document: object) -> None:
    """One JSON document; what is not finite is null."""
    print(json_text(document))


def json_text(document: object) -> str:
    """The same as a text."""
    return json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False)


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


_quiet = ContextVar("_quiet", default=False)


def be_quiet(quiet: bool) -> None:
    """From now on show progress, or none."""
    _quiet.set(quiet)


class _Pace:
    """How far work is, how fast, and how long it will take.

    The speed is what the work says, or else an average from its first report on: a total that is corrected on the way
    does not begin it anew.
    """

    def __init__(self) -> None:
        self.step = Step(0, None)
        self._first: tuple[float, int] | None = None
        self._reported_at = self._began = time.monotonic()

    def move(self, step: Step) -> None:
        """A report of the work's."""
        self._reported_at = time.monotonic()
        if self._first is None or step.unit != self.step.unit or step.done < self.step.done:  # another stretch of work
            self._first = self._reported_at, step.done
        self.step = step

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    @property
    def has_begun(self) -> bool:
        """Whether there was a report."""
        return self._first is not None

    @property
    def rate(self) -> float | None:
        """Units a second; None where it cannot be known yet."""
        if self.step.rate is not None or self._first is None:
            return self.step.rate
        began, done = self._first
        seconds = self._reported_at - began
        return (self.step.done - done) / seconds if seconds > 0 and self.step.done > done else None

    @property
    def seconds_left(self) -> float | None:
        """None where it cannot be known yet."""
        left = replace(self.step, rate=self.rate).seconds_left
        return None if left is None else max(0.0, left - (time.monotonic() - self._reported_at))

    def count_text(self) -> str:
        """ "1,024 / 4,096"."""
        show = bytes_text if self.step.unit == "bytes" else "{:,}".format
        return show(self.step.done) + (f" / {show(self.step.total)}" if self.step.total else "")

    def speed_text(self) -> str:
        """ "512 tokens/s"; nothing where it cannot be known, or where the unit is time."""
        if self.rate is None or self.step.unit == "seconds":
            return ""
        return (
            f"{bytes_text(int(self.rate))}/s" if self.step.unit == "bytes" else f"{self.rate:,.0f} {self.step.unit}/s"
        )

    def left_text(self) -> str:
        """ "1:02:03"."""
        left = self.seconds_left
        return "-:--:--" if left is None else str(timedelta(seconds=round(left)))

    def line(self, what: str) -> str:
        """All of it, as plain words."""
        if not self.has_begun:
            return f"{what}: preparing, for {self.seconds:.0f} s so far"
        unit = "" if self.step.unit == "bytes" else f" {self.step.unit}"
        left = "" if self.seconds_left is None else f"{self.left_text()} left"
        return f"{what}: " + ", ".join(filter(None, (self.count_text() + unit, self.speed_text(), left)))


class _PaceColumn(ProgressColumn):
    """A column that shows one of the texts of the pace."""

    def __init__(self, text: Callable[[], str], style: str) -> None:
        super().__init__()
        self._text, self._style = text, style

    def render(self, task: Task) -> Text:
        return Text(self._text(), style=self._style)


@contextmanager
def progress_bar(what: str) -> Iterator[ProgressCallback | None]:
    """A callback that moves a bar on stderr, or, where stderr is not a terminal, a line every ten seconds; None after
    `be_quiet`."""
    stderr = Console(stderr=True)
    if _quiet.get():
        yield None
    elif stderr.is_terminal:
        with _bar(what, stderr) as move:
            yield move
    else:
        with _lines(what) as move:
            yield move


@contextmanager
def _bar(what: str, stderr: Console) -> Iterator[ProgressCallback]:
    pace = _Pace()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        _PaceColumn(pace.count_text, ""),
        _PaceColumn(pace.speed_text, "progress.data.speed"),
        _PaceColumn(pace.left_text, "progress.remaining"),
    )
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def move(step: Step) -> None:
            pace.move(step)
            bar.update(task, completed=step.done, total=step.total)

        yield move


@contextmanager
def _lines(what: str) -> Iterator[ProgressCallback]:
    """A line every ten seconds, from a thread of its own: the work may say nothing for minutes."""
    pace, ended = _Pace(), threading.Event()

    def tell() -> None:
        while not ended.wait(LINE_SECONDS):
            print(pace.line(what), file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield pace.move
    finally:
        ended.set()
        thread.join()
