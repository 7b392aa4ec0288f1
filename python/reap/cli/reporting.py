"""report, card: what was measured, as a page and as a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import reap
from reap.cli.options import check_output
from reap.cli.show import bytes_text, print_facts

Sweep = Annotated[
    Path | None, typer.Option("--sweep", metavar="SWEEP.json", help="A sweep, as `reap sweep` writes it.")
]


def report(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE.json", help="A profile, as `reap profile` writes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")],
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="PLAN.json", help="A plan of it; without one the page shows an example."),
    ] = None,
    sweep: Sweep = None,
    model: Annotated[Path | None, typer.Option("--model", metavar="MODEL", help="The GGUF file, for sizes.")] = None,
) -> None:
    """Write one HTML file that shows what a profile says; it opens without a connection."""
    check_output(output, *(path for path in (profile, plan, sweep, model) if path is not None))
    written = reap.report(profile, output, plan=plan, sweep=sweep, model=model)
    print_facts([("report", written), ("size", bytes_text(written.stat().st_size))])


def card(
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED.gguf", help="A file that `reap prune` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Markdown file to write.")],
    source: Annotated[
        Path | None, typer.Option("--source", metavar="MODEL", help="The model it was pruned from: its size and name.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="PROFILE.json", help="The profile behind the plan: names the calibration."),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--evaluation", metavar="EVAL.json", help="Output of `reap evaluate --json`; may be given again."),
    ] = None,
    sweep: Sweep = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="NAME", help="The source's name on a model hub.")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="The licence's identifier there.")
    ] = None,
) -> None:
    """Write a model card for a pruned model: what was removed, how, and what was measured."""
    inputs = [path for path in (pruned, source, profile, sweep, *(evaluation or ())) if path is not None]
    check_output(output, *inputs)
    written = reap.model_card(
        pruned,
        output,
        source=source,
        profile=profile,
        evaluations=evaluation or (),
        sweep=sweep,
        base_model=base_model,
        license=license,
    )
    print_facts([("model card", written)])
