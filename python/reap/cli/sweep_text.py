"""A sweep in words: the table, the curve, and the best criterion for each size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from reap.cli.next_step import command_line, print_advice, print_next
from reap.cli.show import console, print_table, say
from reap.errors import UsageError
from reap.files.formatting import bytes_text, number_text

if TYPE_CHECKING:
    from reap.evaluation.sweep_table import Sweep, SweepRow
    from reap.evaluation.sweep_winner import Winner

MARKS = "oxv+#*%@&$"
CURVE_HEIGHT = 14
CURVE_WIDTH = 64


def print_sweep(table: Sweep) -> None:
    """Table, curve and verdicts."""
    print_table(
        ["by", "experts", "size", "perplexity", "", "rises by", "KL", "top-1"],
        [_cells(row, table.baseline.bytes) for row in table.select()],
    )
    if table.domains:
        by_candidate = zip(*(table.select(domain=domain) for domain in table.domains), strict=True)
        rows = [
            (_name(row[0]), row[0].keep, *(f"{number_text(part.perplexity)} {rise_text(part)}" for part in row))
            for row in by_candidate
        ]
        print_table(["by", "experts", *table.domains], rows, title="perplexity on each domain, and its rise")
    for used in table.experts_used:
        _print_with(table, used)
    say("")
    console().print("\n".join(curve(table)), soft_wrap=True)
    say("")
    for line in (*verdict_lines(table), *target_lines(table)):
        say(line)
    say(
        "\nPerplexity ± its standard error. The rise is against the model with all experts, on the same tokens, so its"
        " error is smaller. KL: how far the predictions are from that model's, in nats a token; top-1: how often both"
        " hold the same token most probable."
    )


def _print_with(table: Sweep, used: int) -> None:
    """The rows of fewer experts for each token, each beside the same choice with as many as the model uses."""
    own = {(row.metric, row.seed, row.keep): row for row in table.select()}
    rows = []
    for row in table.select(experts_used=used):
        before = own.get((row.metric, row.seed, row.keep))
        rows.append(
            (
                "whole model" if row.metric == table.baseline.metric else _name(row),
                str(row.keep),
                number_text(row.perplexity),
                f"± {number_text(row.stderr)}",
                _rise_text(row),
                "" if before is None or before.metric == table.baseline.metric else _rise_text(before),
                number_text(row.kl_mean),
                f"{row.top1:.1%}",
            )
        )
    active = table.model.get("active_bytes") or {}
    saved = ""
    if isinstance(active, dict) and active.get(str(used)) and active.get("own"):
        number, whole = active[str(used)], active["own"]
        saved = f": {bytes_text(number)} of weights in use for a token, {number / whole:.0%} of the"
        saved += f" {bytes_text(whole)} with the model's own {table.model.get('n_experts_used')}"
    columns = ["by", "experts", "perplexity", "", "rises by", "with the model's own", "KL", "top-1"]
    print_table(columns, rows, title=f"with {used} experts for each token{saved}")


def _name(row: SweepRow) -> str:
    return row.metric if row.seed is None else f"{row.metric} (seed {row.seed})"


def rise_text(row: SweepRow) -> str:
    """+6.4% ± 0.7%: of the perplexity over that of the model as it is, which has none."""
    return "" if row.metric == "baseline" else _rise_text(row)


def _rise_text(row: SweepRow) -> str:
    ratio = math.exp(min(row.loss_increase, 700))
    return f"{ratio - 1:+.1%} ± {ratio * row.loss_increase_stderr:.1%}"


def _cells(row: SweepRow, n_bytes: int) -> Sequence[str]:
    return (
        _name(row),
        str(row.keep),
        f"{bytes_text(row.bytes)} ({row.bytes / max(n_bytes, 1):.0%})",
        number_text(row.perplexity),
        f"± {number_text(row.stderr)}",
        rise_text(row),
        number_text(row.kl_mean),
        f"{row.top1:.1%}",
    )


def verdict_lines(table: Sweep) -> Iterator[str]:
    """One sentence for each size, on all of the text and on each domain."""
    from reap.evaluation.sweep_winner import verdict_text  # which takes numpy along

    for keep in table.best():
        for domain in (None, *table.domains):
            verdict = table.best(domain).get(keep)
            if verdict is not None:
                yield verdict_text(verdict)


def print_next_plans(table: Sweep, model: Path, profile: Path, output: Path | None, words: Sequence[str]) -> None:
    """The command that makes the winner's plan; where each size has one, a command for each.

    output: the sweep's file. words: options of `reap plan` that held for every candidate.
    """
    try:
        only: Winner | None = table.winner()
    except UsageError:
        only = None
    if only is not None and output is not None and not _is_given(table, only):
        print_next("reap", "plan", profile, "--sweep", output, "--model", model, "-o", "plan.json")
        return
    sizes = sorted({row.keep for row in table.select() if row.metric != "baseline"}, reverse=True)
    for keep in sizes if only is None else [only.row.keep]:
        with suppress(UsageError):  # there is no perplexity at that size
            winner = table.winner(keep)
            print_advice(f"for {keep} experts: {_plan_command(table, winner, profile, ['--model', model, *words])}")


def _plan_command(table: Sweep, winner: Winner, profile: Path, words: Sequence[object]) -> str:
    row = winner.row
    if _is_given(table, winner):
        return f"the plan {row.metric} that it was given is best; reap prune MODEL --plan with its file"
    seed = [] if row.seed is None else ["--seed", row.seed]
    chosen = ["--keep", row.keep, "--metric", row.metric, *seed, *words]
    return command_line("reap", "plan", profile, *chosen, "-o", f"plan-{row.keep}.json")


def _is_given(table: Sweep, winner: Winner) -> bool:
    return winner.row.metric in table.choice.get("plans", ())


def target_lines(table: Sweep) -> Iterator[str]:
    """What each limit allows, one sentence for each criterion."""
    for target in table.targets:
        what = f"{target.keep} experts by {target.metric}: {bytes_text(target.bytes)} ({target.bytes:,} bytes)"
        if target.kind == "size":
            yield f"Within {bytes_text(int(target.limit))}: {what}, perplexity {number_text(target.perplexity)}."
        else:
            yield (
                f"Perplexity at most {100 * target.limit:g} % higher: {what}, perplexity"
                f" {number_text(target.perplexity)}."
            )


# ---- the curve


def curve(table: Sweep, width: int = CURVE_WIDTH, height: int = CURVE_HEIGHT) -> list[str]:
    """Perplexity (logarithmic) against size in plain characters, a mark for each criterion; "=" is the model as it
    is."""
    rows = [row for row in table.select() if math.isfinite(row.perplexity) and row.perplexity > 0]
    marks = {metric: MARKS[index % len(MARKS)] for index, metric in enumerate(table.metrics)} | {"baseline": "="}
    sizes = [row.bytes for row in rows]
    heights = [math.log(row.perplexity) for row in rows]
    low, high = min(heights), max(heights)
    grid = [[" "] * width for _ in range(height)]
    for row, value in sorted(zip(rows, heights, strict=True), key=lambda item: item[1], reverse=True):
        x = round((row.bytes - min(sizes)) / max(max(sizes) - min(sizes), 1) * (width - 1))
        y = round((high - value) / max(high - low, 1e-9) * (height - 1))
        grid[y][x] = marks[row.metric]
    labels = [
        number_text(math.exp(high - (high - low) * line / (height - 1))) if line % 3 == 0 or line == height - 1 else ""
        for line in range(height)
    ]
    margin = max(map(len, labels))
    ends = bytes_text(min(sizes)), bytes_text(max(sizes))
    return [
        "perplexity",
        *(f"{label:>{margin}} |{''.join(line).rstrip()}" for label, line in zip(labels, grid, strict=True)),
        f"{'':>{margin}} +{'-' * width}",
        f"{'':>{margin}}  {ends[0]}{ends[1]:>{max(width - len(ends[0]), 1)}}",
        "  ".join(f"{mark} {name}" for name, mark in marks.items()),
    ]
