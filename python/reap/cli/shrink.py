"""Shrink: all of it in one job."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import reap
from reap.cli import completion
from reap.cli.commands import Panel
from reap.cli.next_step import command_line, print_advice
from reap.cli.options import (
    BLEND,
    KEEP_FORM,
    READS,
    WRITES_FOLDER,
    Force,
    Json,
    Model,
    Protect,
    SuperExperts,
    TextOptions,
    calibration_source,
    parse_keep,
    parse_metric,
    split_list,
)
from reap.cli.show import print_facts, print_json, print_table, progress_bar, say
from reap.engine.options import PROFILE_CTX_SIZE, EngineArguments
from reap.files.formatting import bytes_text
from reap.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from reap.pipeline.shrink_estimate import ShrinkEstimate
    from reap.pipeline.shrink_result import ShrinkResult

PANEL = Panel("Shrink")
#: What a step is called while it runs.
_DOING = {
    "text": "dividing the text",
    "profile": "profiling",
    "sweep": "comparing criteria",
    "plan": "choosing",
    "prune": "writing",
    "evaluate": "judging",
    "page": "drawing",
    "card": "describing",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How small the model is to become."""

    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar=KEEP_FORM, help="Experts to keep: 0.5 and 50% are half, 64 is 64."),
    ] = None
    target_size: Annotated[
        str | None, typer.Option("--target-size", metavar="N[K|M|G|T]", help="Bytes that the new file may have.")
    ] = None
    max_ppl_increase: Annotated[
        str | None,
        typer.Option("--max-ppl-increase", metavar="5%", help="By how much perplexity may rise on half of the text."),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """As `shrink` takes them."""
        return {**dataclasses.asdict(self), "keep": None if self.keep is None else parse_keep(self.keep)}


@dataclasses.dataclass(frozen=True)
class Choosing:
    """How the experts are chosen."""

    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME,...",
            help="Scores to compare; reap,weighted_ean_sum,frequency,random by default.",
            autocompletion=completion.metrics(),
        ),
    ] = None
    also_keep: Annotated[
        list[str] | None,
        typer.Option("--also-keep", metavar=f"{KEEP_FORM},...", help="Sizes to try as well, for the page."),
    ] = None
    protect: Protect = None
    super_experts: SuperExperts = False
    blend: Annotated[str, BLEND] = "sum"
    max_text_tokens: Annotated[
        int | None, typer.Option("--max-text-tokens", metavar="N", help="About N tokens of the text, spread over it.")
    ] = None
    loops: Annotated[
        bool, typer.Option("--loops", help="Let the pruned model continue a few prompts, and look for repetition.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """As `shrink` takes them."""
        return {
            "metric": [parse_metric(item) for item in split_list(self.metric)] or None,
            "also_keep": [parse_keep(item) for item in split_list(self.also_keep)],
            "protect": self.protect or (),
            "protect_super_experts": self.super_experts,
            "blend": self.blend,
            "max_text_tokens": self.max_text_tokens,
            "loops": self.loops,
        }


@PANEL.command(
    "reap shrink model.gguf --calibration calibration.jsonl --text heldout.txt --target-size 12G -o small",
    ctx_size=PROFILE_CTX_SIZE,
)
def shrink(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for all files."), WRITES_FOLDER],
    calibration: Annotated[
        list[str],
        typer.Option(
            "--calibration",
            metavar="[DOMAIN=]CALIBRATION...",
            help="Text like that the model is for, as of `reap profile`; may be given again.",
        ),
        READS,
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            metavar="TEXT...",
            help="Other text, to choose and judge on; of several files each is a domain.",
        ),
        READS,
    ],
    size: Size,
    choosing: Choosing,
    texts: TextOptions,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would run, how long it should take, and how large it gets."),
    ] = False,
    force: Force = False,
    json: Json = False,
    *,
    engine: EngineArguments,
) -> None:
    """Make a model smaller, in one job: profile, compare criteria, choose, prune, judge, describe.

    Every step leaves its ordinary file in DIR. The same command again goes on where it was stopped, and runs only what
    an option or a file changed. One half of the text chooses, the other half judges the result.
    """
    given: dict[str, Any] = {
        "calibration": calibration_source(calibration),
        "text": text if len(text) > 1 else text[0],
        "force": force,
        **size.arguments(),
        **choosing.arguments(),
        **texts.arguments(),
        **engine,
    }
    if dry_run:
        from reap.pipeline.shrink_estimate import estimate_shrink

        found = estimate_shrink(model, output, **given)
        return print_json(found.to_dict()) if json else print_estimate(found)
    with step_bars() as bars:
        result = reap.shrink(model, output, on_step=bars.begin, progress=bars.move, **given)
    if json:
        return print_json(result.to_dict())
    print_result(result)


class StepBars:
    """A progress bar for the step that runs, one after the other."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._move: ProgressCallback | None = None

    def begin(self, step: str) -> None:
        """A step begins; that of the one before is over."""
        self._stack.close()
        self._move = self._stack.enter_context(progress_bar(_DOING.get(step, step)))

    def move(self, progress: Progress) -> None:
        """How far it is."""
        if self._move is not None:
            self._move(progress)


@contextmanager
def step_bars() -> Iterator[StepBars]:
    """Bars that are gone when it ends."""
    with ExitStack() as stack:
        yield StepBars(stack)


def print_result(result: ShrinkResult) -> None:
    """What was done, and the five lines."""
    run = [step for step in result.steps if step.was_run]
    seconds = sum(step.seconds for step in result.steps)
    kept = [step.name for step in result.steps if not step.was_run]
    done = ", ".join(f"{step.name} {step.seconds:.1f} s" for step in run) or "nothing was left to do"
    say(
        f"{result.folder}: {done}"
        + (f"; done before: {', '.join(kept)}" if kept and run else "")
        + f"; {seconds:.1f} s"
    )
    print_facts([*result.lines, ("run", command_line("llama-server", "-m", result.model))])


def print_estimate(found: ShrinkEstimate) -> None:
    """A table of the steps, and the size."""
    rows = [
        (step.name, "runs" if step.runs else "is done", _time(step.seconds) if step.runs else "", step.what)
        for step in found.steps
    ]
    print_table(["step", "", "takes about", "on"], rows)
    least, most = found.n_bytes_after
    size = f"{bytes_text(least)} ({least:,} bytes)" if least == most else f"{bytes_text(least)} to {bytes_text(most)}"
    fewest, highest = found.keep
    keep = str(fewest) if fewest == highest else f"{fewest} to {highest}"
    print_facts(
        [
            ("size", f"{bytes_text(found.n_bytes_before)} before, {size} after: {keep} of {found.n_experts} experts"),
            (
                "time",
                f"about {_time(found.seconds)}" if any(step.runs for step in found.steps) else "nothing is left to do",
            ),
        ]
    )
    print_advice("the same without --dry-run")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "a moment"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
