"""Repair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import reap
from reap.cli.commands import Panel
from reap.cli.next_step import ENGINE, forwarded, print_next
from reap.cli.options import (
    READS,
    WRITES,
    AllowMismatch,
    Force,
    Json,
    TextOptions,
    calibration_source,
)
from reap.cli.show import print_facts, print_json, print_table, progress_bar
from reap.engine.options import EVALUATION_CTX_SIZE, EngineArguments
from reap.errors import ReapError
from reap.files.formatting import bytes_text, number_text, percent_text
from reap.pruning.gguf import parse_size

if TYPE_CHECKING:
    from reap.repairing.run import RepairReport


PANEL = Panel("Repair")


@PANEL.command(
    "reap repair small.gguf --source model.gguf --calibration calibration.jsonl -o repair.gguf",
    ctx_size=EVALUATION_CTX_SIZE,
)
def repair(
    model: Annotated[Path, typer.Argument(metavar="SMALL.gguf", help="A file that `reap prune` wrote."), READS],
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter to write."), WRITES],
    source: Annotated[Path, typer.Option("--source", metavar="MODEL", help="The model it was pruned from."), READS],
    calibration: Annotated[
        list[str],
        typer.Option("--calibration", metavar="[DOMAIN=]FILE", help="Text to fit on; may be given again."),
        READS,
    ],
    text: TextOptions,
    rank: Annotated[int, typer.Option("--rank", metavar="N", help="Of each expert's correction.")] = 16,
    memory: Annotated[
        str,
        typer.Option("--memory", metavar="N[K|M|G|T]", help="For what is captured at a time; the models need theirs."),
    ] = "4G",
    type: Annotated[str, typer.Option("--type", metavar="F16|F32", help="Of the adapter's tensors.")] = "F16",
    allow_mismatch: AllowMismatch = False,
    force: Force = False,
    json: Json = False,
    *,
    engine: EngineArguments,
) -> None:
    """Fit a LoRA adapter that gives back a part of what a pruned model lost; no byte of the model changes.

    A tenth of the calibration has no part in the fit. Where the adapter does not bring the model nearer to its source
    there, nothing is written.
    """
    more: dict[str, Any] = {**text.arguments(), **engine}
    with progress_bar("repairing") as progress:
        report = reap.repair(
            model,
            source=source,
            calibration=calibration_source(calibration),
            output=output,
            rank=rank,
            memory=parse_size(memory),
            type=type,
            allow_mismatch=allow_mismatch,
            force=force,
            progress=progress,
            **more,
        )
    if json:
        print_json(report.to_dict())
    else:
        print_repair(report)
    if not report.helps:
        raise ReapError(
            f"{model}: the adapter does not bring it nearer to {source} on text that had no part in the fit; nothing"
            " was written"
        )
    if not json:
        engine_words = forwarded(*ENGINE)
        print_next("reap", "evaluate", model, "TEXT", "--reference", source, "--lora", output, *engine_words)


def print_repair(report: RepairReport) -> None:
    """What came out, layer by layer and as a whole."""
    print_table(
        ["layer", "ridge", "difference left"],
        [
            (str(layer), number_text(found.ridge) if found.ridge else "no correction", percent_text(found.left, 1))
            for layer, found in report.layers.items()
        ],
    )
    wrote = f"{report.output} ({bytes_text(report.n_bytes)}, rank {report.rank})" if report.output else "nothing"
    print_facts(
        [
            ("wrote", wrote),
            ("fitted on", f"{report.tokens:,} tokens, judged on {report.checked_tokens:,} others"),
            (
                "KL divergence",
                f"{number_text(report.kl_before)} before, {number_text(report.kl_after)} with it"
                f" (± {number_text(report.kl_stderr)}), in nats from {report.source}",
            ),
            *(("note", warning) for warning in report.warnings),
            ("time", f"{report.seconds:.1f} s"),
        ]
    )
