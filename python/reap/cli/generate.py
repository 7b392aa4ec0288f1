"""Generate: generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import reap
from reap.cli import completion
from reap.cli.commands import Panel
from reap.cli.next_step import print_next
from reap.cli.options import (
    READS,
    RESUMES,
    AllowMismatch,
    CalibrationPaths,
    Columns,
    Force,
    Json,
    Model,
    SkipBadLines,
    TemplateVariables,
    calibration_source,
    check_resumable,
    parse_variables,
)
from reap.cli.show import print_facts, print_json, progress_bar
from reap.engine.options import GENERATION_CTX_SIZE, EngineArguments
from reap.evaluation.answers import MOST_NEW_TOKENS, PARALLEL
from reap.text.shapes import parse_columns

PANEL = Panel("Generate")


@dataclass(frozen=True)
class WritingOptions:
    """How answers are written."""

    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", help="Tokens of one answer, at most.")
    ] = MOST_NEW_TOKENS
    temperature: Annotated[
        float, typer.Option("--temperature", "--temp", metavar="T", help="0 takes the most probable token each time.")
    ] = 0.0
    top_k: Annotated[int, typer.Option("--top-k", metavar="N", help="Of the N most probable tokens; 0: of all.")] = 0
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", help="Of the most probable tokens that have this share together.")
    ] = 1.0
    min_p: Annotated[
        float, typer.Option("--min-p", metavar="P", help="Of tokens this probable, beside the most probable one.")
    ] = 0.0
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the draws; each prompt has its own.")] = 0


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are read."""

    chat_template: Annotated[
        str,
        typer.Option(
            "--chat-template",
            metavar="none|auto|FILE",
            help="What a pair's prompt is asked with; auto is the model's, where it has one.",
            autocompletion=completion.values_of(*completion.TEMPLATES),
        ),
        READS,
    ] = "auto"
    chat_template_kwargs: TemplateVariables = None
    columns: Columns = None
    skip_bad_lines: SkipBadLines = False

    def arguments(self) -> dict[str, Any]:
        """As `generate` takes them."""
        return {
            "chat_template": self.chat_template,
            "chat_template_kwargs": parse_variables(self.chat_template_kwargs),
            "columns": parse_columns(self.columns or ()) or None,
            "skip_bad_lines": self.skip_bad_lines,
        }


@PANEL.command(
    "reap generate model.gguf prompts.jsonl -o answers.jsonl --plan plan.json --max-new-tokens 256",
    ctx_size=GENERATION_CTX_SIZE,
)
def generate(
    model: Model,
    prompts: CalibrationPaths,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write."), RESUMES],
    writing: WritingOptions,
    reading: PromptOptions,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="PLAN.json", help="Answer as if MODEL were pruned so; no model is written."),
        READS,
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", "-np", metavar="N", help="Prompts that share a batch.")
    ] = PARALLEL,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUTPUT.resume, which an interrupted run left.")
    ] = False,
    allow_mismatch: AllowMismatch = False,
    force: Force = False,
    json: Json = False,
    *,
    engine: EngineArguments,
) -> None:
    """Let a model answer prompts, with all of its experts or as if pruned; the answers are a calibration file."""
    check_resumable(output, force=force, resume=resume)
    more: dict[str, Any] = {**vars(writing), **reading.arguments(), **engine}
    with progress_bar("answering") as progress:
        result = reap.generate(
            model,
            calibration_source(prompts),
            output,
            plan=plan,
            parallel=parallel,
            resume=resume,
            allow_mismatch=allow_mismatch,
            force=force,
            progress=progress,
            **more,
        )
    said = result.to_dict()
    if json:
        return print_json(said)
    skipped = ", ".join(f"{count:,} {why}" for why, count in result.skipped.items())
    print_facts(
        [
            ("answers", f"{len(result.answers):,} in {output}"),
            ("by", result.by),
            ("new tokens", f"{said['new_tokens']:,}"),
            ("ended", ", ".join(f"{count:,} by {_ENDS[why]}" for why, count in said["ended"].items())),
            ("left out", skipped or None),
            *(("note", warning) for warning in result.warnings),
            ("time", f"{result.seconds:.1f} s"),
        ]
    )
    print_next("reap", "profile", model, output, "-o", Path(f"{output.stem}.reap.json"))


_ENDS = {"text": "the end of the text", "length": "the limit of tokens"}
