"""What `reap preview` prints."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from reap.cli.show import console, print_facts, print_table, say

if TYPE_CHECKING:
    from reap.text.preview import Preview, ShownSample

_SHOWN_CHARACTERS = 1500
_LINES_NAMED = 5
_STYLES = (("bold green", "bold green on grey15"), ("dim", "dim on grey15"))  # counted, not counted; every other token
_OPEN, _CLOSE, _BETWEEN = "⟦", "⟧", "│"
Facts = list[tuple[str, object]]


def print_preview(seen: Preview, tokens: bool) -> None:
    """Tables, facts and the first samples."""
    rows = [(it.name, it.format, it.domain or "", _counts(it.shapes) or "none", _counts(it.bad)) for it in seen.files]
    print_table(["file", "format", "domain", "lines by shape", "cannot be used"], rows)
    if len(seen.domains) > 1 or None not in seen.domains:
        print_table(
            ["domain", "samples", "windows", "tokens", "counted"],
            [
                (name or "(none)", f"{it.samples:,}", f"{it.windows:,}", f"{it.tokens:,}", f"{it.counted_tokens:,}")
                for name, it in seen.domains.items()
            ],
        )
    print_facts(_facts(seen))
    for number, sample in enumerate(seen.shown, 1):
        _print_sample(number, sample, tokens)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _facts(seen: Preview) -> Facts:
    run = seen.longest_run
    uncounted = seen.tokens - seen.counted_tokens
    facts: Facts = [
        ("samples", f"{seen.samples:,} in {seen.windows:,} windows of at most {seen.ctx_size:,} tokens"),
        ("tokens", f"{seen.tokens:,}" + (f", of which {seen.counted_tokens:,} are counted" if uncounted else "")),
    ]
    if seen.tokens_per_expert is not None:
        facts.append(
            ("for each expert", f"{seen.tokens_per_expert:,.0f} tokens on average, of {seen.n_experts} in a layer")
        )
    facts += [
        ("left out", f"{seen.skipped:,} lines: {_counts(seen.skipped_reasons)}" if seen.skipped else None),
        *(("", line) for line in seen.skipped_lines[:_LINES_NAMED]),
        ("tool calls", f"{seen.tool_calls:,}" if seen.tool_calls else None),
        ("thoughts", _thoughts(seen)),
        ("duplicates", f"{seen.duplicates:,} samples are the same as an earlier one" if seen.duplicates else "none"),
        ("longest run", f"{run.length:,} times {run.character!r}, in {run.where}" if run else None),
        *(("note", note) for note in seen.notes),
    ]
    if seen.seconds is not None:
        facts.append(("a profile takes", f"about {_duration(seen.seconds)}, at {seen.tokens_per_second:,.0f} tokens/s"))
    return facts


def _thoughts(seen: Preview) -> str | None:
    if not seen.turns_with_thoughts:
        return None
    left_out = (
        f"; the template leaves {seen.turns_without_thoughts:,} of them out" if seen.turns_without_thoughts else ""
    )
    return f"{seen.turns_with_thoughts:,} turns have thoughts{left_out}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- the first samples


def _print_sample(number: int, sample: ShownSample, tokens: bool) -> None:
    domain = f", domain {sample.domain}" if sample.domain is not None else ""
    what = f"sample {number}: {sample.where} ({sample.shape}{domain}), {sample.n_tokens:,} tokens"
    out = console()
    out.print()
    out.rule(what, align="left")
    marks = not out.color_system and not all(sample.counted)
    if marks:
        say(f"What is counted stands between {_OPEN} and {_CLOSE}.")
    out.print(_shown_text(sample, tokens, marks, bool(out.color_system)), soft_wrap=True)


def _shown_text(sample: ShownSample, tokens: bool, marks: bool, colours: bool) -> Text:
    shown, room = Text(), _SHOWN_CHARACTERS
    index = 0
    for counted, group in groupby(_within(sample, room), key=lambda piece: piece[1]):
        shown.append(_OPEN if marks and counted else "")
        for piece, _ in group:
            style = _STYLES[not counted][tokens and index % 2] if colours else ""
            shown.append(_visible(piece, tokens), style=style)
            shown.append(_BETWEEN if tokens and not colours else "")
            index += 1
        shown.append(_CLOSE if marks and counted else "")
    if index < len(sample.pieces) or sample.n_tokens > len(sample.tokens):
        shown.append(f" … and {sample.n_tokens - index:,} tokens more")
    return shown


def _within(sample: ShownSample, room: int) -> Iterator[tuple[str, bool]]:
    for piece, counted in zip(sample.pieces, sample.counted, strict=True):
        if room <= 0:
            return
        yield piece, counted
        room -= len(piece)


def _visible(piece: str, tokens: bool) -> str:
    """Nothing in a data set may command the terminal."""
    text = "".join(sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1] for sign in piece)
    return text.replace("\n", "↵\n") if tokens else text
