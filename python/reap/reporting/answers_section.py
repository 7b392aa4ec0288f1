"""Answers of the whole and the pruned model side by side, for the page; and what they say of loops, for the card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reap.errors import UsageError
from reap.evaluation.answer_files import AnswerFile, better_settings, pair_up
from reap.evaluation.shares import two_shares
from reap.files.formatting import number_text as number
from reap.files.formatting import percent_text as percent
from reap.reporting.page import Section, Table

_MOST_SHOWN = 100
_MOST_CHARACTERS = 4000


def answers_section(files: Sequence[AnswerFile]) -> Section:
    """The page's section: two files, the prompts that they have in common. UsageError for another number of files."""
    if len(files) != 2:
        raise UsageError(
            f"{len(files)} files of answers were given, expected two: the whole model's and the pruned one's"
        )
    first, second = files
    pairs = pair_up(first, second)
    n_differ = sum(pair.differs for pair in pairs)
    rows = [[_cut(it.question), _cut(it.first.answer), _cut(it.second.answer)] for it in pairs[:_MOST_SHOWN]]
    lead = (
        f"{n_differ:,} of {len(pairs):,} prompts were answered differently; those that part earliest come first. Of the"
        f" answers, {_loops(first)} of {first.by} and {_loops(second)} of {second.by} end in a loop"
        f" (p = {number(_p_value(first, second), 2)})."
    )
    notes = []
    if len(pairs) > _MOST_SHOWN:
        notes.append(f"{len(pairs) - _MOST_SHOWN:,} more pairs are in the files.")
    return Section(
        "answers",
        "Answers",
        lead,
        table=Table(
            ["prompt", f"{first.by} ({first.settings})", f"{second.by} ({second.settings})"], rows, is_text=True
        ),
        notes=notes,
    )


def loop_rows(files: Sequence[AnswerFile]) -> list[list[str]]:
    """Of each file: who answered, how, how many, and which share ended in a loop; text, not escaped."""
    return [[it.by, it.settings, f"{len(it.answers):,}", _loops(it)] for it in files]


def recommended_settings(files: Sequence[AnswerFile]) -> Iterator[str]:
    """A sentence for each setting that a measurement supports; text, not escaped."""
    for better, greedy, p_value in better_settings(files):
        yield (
            f"Run {better.by} with {better.settings}: {_loops(better)} of its answers ended in a loop, and"
            f" {_loops(greedy)} with {greedy.settings} (p = {number(p_value, 2)})."
        )


def _loops(file: AnswerFile) -> str:
    low, high = file.loop_interval
    return f"{percent(file.loops / len(file.answers), 1)} (95 %: {percent(low, 1)} to {percent(high, 1)})"


def _p_value(first: AnswerFile, second: AnswerFile) -> float:
    return two_shares(first.loops, len(first.answers), second.loops, len(second.answers))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"
