"""Evaluate: evaluate, sweep, report, card."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import reap
from reap.cli import completion
from reap.cli.commands import Panel
from reap.cli.evaluation_text import print_evaluation, print_tasks
from reap.cli.next_step import command_line, print_advice, print_next
from reap.cli.options import (
    BLEND,
    KEEP_FORM,
    READS,
    WRITES,
    AllowMismatch,
    Force,
    GoesOn,
    Json,
    Model,
    ProfilePath,
    Protect,
    ResumableOutput,
    SuperExperts,
    SweepPath,
    check_resumable,
    parse_count,
    parse_keep,
    parse_metric,
    split_list,
)
from reap.cli.show import json_text, print_facts, print_json, progress_bar, say
from reap.cli.sweep_text import print_next_plans, print_sweep
from reap.engine.options import EVALUATION_CTX_SIZE, EngineArguments
from reap.errors import ReapError
from reap.files.atomic import write_whole
from reap.files.formatting import bytes_text, shortened_list

if TYPE_CHECKING:
    from reap.evaluation.result import Evaluation
    from reap.evaluation.tasks import TaskEvaluation

PANEL = Panel("Evaluate")


MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", metavar="N", help="About N tokens of the text, spread over each domain."),
]


@dataclass(frozen=True)
class TaskChoice:
    """Tasks of lm-evaluation-harness."""

    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="NAME,...", help="Instead of TEXT: tasks of lm-evaluation-harness."),
    ] = None
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", metavar="DIR", help="A folder with task files of your own, with --tasks."),
        READS,
    ] = None
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Only N questions of each task, with --tasks.")
    ] = None
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", metavar="N", help="Answered questions before each, with --tasks."),
    ] = None


@dataclass(frozen=True)
class LoopChoice:
    """What the model is let continue."""

    loops: Annotated[
        bool, typer.Option("--loops", help="Let the model continue a few prompts, and look for repetition.")
    ] = False
    loop_prompts: Annotated[
        str | None,
        typer.Option(
            "--loop-prompts", metavar="N|PROMPTS", help="As --loops, with N beginnings of the text or prompts of yours."
        ),
        READS,
    ] = None

    def arguments(self) -> dict[str, Any]:
        """As `evaluate` takes them."""
        said = self.loop_prompts
        return {"loops": self.loops, "loop_prompts": int(said) if said and said.isdecimal() else said}


def _evaluate_tasks(model: Path, choice: TaskChoice, **options: Any) -> TaskEvaluation:
    with redirect_stdout(sys.stderr), progress_bar("evaluating") as progress:  # a task is code, and may print
        return reap.evaluate_tasks(
            model,
            split_list(choice.tasks),
            include_path=choice.include_path,
            limit=choice.limit,
            num_fewshot=choice.num_fewshot,
            progress=progress,
            **options,
        )


@PANEL.command("reap evaluate model.gguf heldout.txt --plan plan.json --loops", ctx_size=EVALUATION_CTX_SIZE)
def evaluate(
    model: Model,
    tasks: TaskChoice,
    probe: LoopChoice,
    text: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="TEXT...", help="Held-out text, or rows as in a calibration; of several files each is a domain."
        ),
        READS,
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="MODEL", help="Compare with this model, the one before pruning say."),
        READS,
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="PLAN.json", help="Evaluate as if MODEL were pruned so; nothing is written."),
        READS,
    ] = None,
    allow_mismatch: AllowMismatch = False,
    max_tokens: MaxTokens = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep what --json prints in this file as well."), WRITES
    ] = None,
    force: Force = False,
    json: Json = False,
    *,
    engine: EngineArguments,
) -> None:
    """Measure how well a model predicts a text and how far it agrees with another, or how it does in benchmarks."""
    compared: dict[str, Any] = {"reference": reference, "plan": plan, "allow_mismatch": allow_mismatch, **engine}
    if tasks.tasks:
        if text or probe != LoopChoice() or max_tokens is not None:
            raise reap.UsageError("--tasks does not go with TEXT, --loops, --loop-prompts or --max-tokens")
        of_tasks = _evaluate_tasks(model, tasks, **compared)
        _keep(of_tasks, output, force=force)
        if json:
            return print_json(of_tasks.to_dict())
        print_tasks(of_tasks)
        return _next_after_evaluate(model, reference, plan, output)
    if not text or tasks != TaskChoice():
        raise reap.UsageError("give a TEXT, or --tasks (--include-path, --limit and --num-fewshot are of tasks)")
    with progress_bar("evaluating") as progress:
        result = reap.evaluate(
            model,
            text if len(text) > 1 else text[0],
            **probe.arguments(),
            max_tokens=max_tokens,
            progress=progress,
            **compared,
        )
    _keep(result, output, force=force)
    if json:
        return print_json(result.to_dict())
    if any(path.is_dir() for path in text):
        say(f"The text is of {len(result.text):,} files: {shortened_list(result.text)}.")
    print_evaluation(result)
    _next_after_evaluate(model, reference, plan, output)


def _keep(result: Evaluation | TaskEvaluation, output: Path | None, *, force: bool) -> None:
    if output is not None:
        write_whole(output, json_text(result.to_dict()).encode("utf-8", "backslashreplace"), force=force)


def _next_after_evaluate(model: Path, reference: Path | None, plan: Path | None, output: Path | None) -> None:
    if plan is not None:
        return print_next("reap", "prune", model, "--plan", plan, "-o", "small.gguf")
    if not _is_pruned(model):
        return print_next("reap", "profile", model, "CALIBRATION", "-o", Path(f"{model.stem}.reap.json"))
    if output is None:
        return print_advice("the same with -o evaluation.json, which keeps the figures for reap card")
    source = [] if reference is None else ["--source", reference]
    print_next("reap", "card", model, *source, "--evaluation", output, "-o", "MODEL_CARD.md")


def _is_pruned(model: Path) -> bool:
    try:
        return reap.inspect(model).provenance is not None
    except ReapError:  # it has gone since
        return False


@dataclass(frozen=True)
class Candidates:
    """What a sweep compares."""

    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar=f"{KEEP_FORM},...", help="Experts to keep; 0.75,0.5,0.25 by default."),
    ] = None
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME,...",
            help="Scores to compare; reap,frequency,weighted_ean_sum,random by default.",
            autocompletion=completion.metrics(),
        ),
    ] = None
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Selections of the metric random.")] = 1
    plan: Annotated[
        list[Path] | None,
        typer.Option("--plan", metavar="PLAN.json", help="A plan to judge as well; may be repeated."),
        READS,
    ] = None
    experts_used: Annotated[
        list[str] | None,
        typer.Option(
            "--experts-used",
            metavar="N,...",
            help="Also try everything with so many experts for each token, fewer than the model uses.",
        ),
    ] = None
    target_size: Annotated[
        str | None,
        typer.Option(
            "--target-size", metavar="N[K|M|G|T]", help="Also find what fits: the most experts in so many bytes."
        ),
    ] = None
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            "--max-ppl-increase", metavar="5%", help="Also find the fewest experts at which perplexity rises no more."
        ),
    ] = None
    protect: Protect = None
    super_experts: SuperExperts = False
    blend: Annotated[str, BLEND] = "sum"

    def words(self) -> list[str]:
        """What of it `reap plan` has to be told as well, to make the same choice."""
        protected = [word for entry in self.protect or () for word in ("--protect", entry)]
        blend = [] if self.blend == "sum" else ["--blend", self.blend]
        return [*protected, *(["--super-experts"] if self.super_experts else []), *blend]

    def arguments(self) -> dict[str, Any]:
        """As `sweep` takes them."""
        return {
            "keep": [parse_keep(item) for item in split_list(self.keep)] or None,
            "metric": [parse_metric(item) for item in split_list(self.metric)] or None,
            "seeds": self.seeds,
            "plans": self.plan or (),
            "experts_used": [parse_count("--experts-used", item) for item in split_list(self.experts_used)],
            "target_size": self.target_size,
            "max_ppl_increase": self.max_ppl_increase,
            "protect": self.protect or (),
            "protect_super_experts": self.super_experts,
            "blend": self.blend,
        }


@PANEL.command(
    "reap sweep model.gguf model.reap.json heldout.txt --keep 0.75,0.5 --metric reap,frequency,random -o sweep.json",
    ctx_size=EVALUATION_CTX_SIZE,
)
def sweep(
    model: Model,
    profile: ProfilePath,
    text: Annotated[
        list[Path],
        typer.Argument(metavar="TEXT...", help="Held-out text; of several files each is a domain."),
        READS,
    ],
    candidates: Candidates,
    max_tokens: MaxTokens = None,
    output: ResumableOutput = None,
    resume: GoesOn = False,
    allow_mismatch: AllowMismatch = False,
    force: Force = False,
    json: Json = False,
    *,
    engine: EngineArguments,
) -> None:
    """Judge many sizes and criteria on held-out text, without writing a model; the weights are loaded once.

    While it runs the output holds the rows so far; without one they are printed when it is stopped.
    """
    check_resumable(output, force=force, resume=resume)
    more: dict[str, Any] = {**candidates.arguments(), **engine, "resume": resume, "force": force}
    more["allow_mismatch"] = allow_mismatch
    try:
        with progress_bar("sweeping") as progress:
            table = reap.sweep(model, profile, text, output=output, max_tokens=max_tokens, progress=progress, **more)
    except reap.Interrupted as stop:
        if output is None and isinstance(stop.result, reap.Sweep) and not json:
            print_sweep(stop.result)
        elif output is None and isinstance(stop.result, reap.Sweep):
            print_json(stop.result.to_dict())
        raise
    if json:
        return print_json(table.to_dict())
    print_sweep(table)
    if output is not None:
        say(f"\nThe table is in {output}.")
    say("")
    print_next_plans(table, model, profile, output, candidates.words())


@PANEL.command("reap report model.reap.json --plan plan.json --model model.gguf -o report.html")
def report(
    profile: ProfilePath,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write."), WRITES],
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="PLAN.json", help="A plan of it; without one the page shows an example."),
        READS,
    ] = None,
    sweep: SweepPath = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", metavar="MODEL", help="The GGUF file, for sizes."), READS
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation",
            metavar="EVAL.json",
            help="Of `reap evaluate -o`, with --reference or --tasks; may be repeated.",
        ),
        READS,
    ] = None,
    answers: Annotated[
        list[Path] | None,
        typer.Option(
            "--answers", metavar="ANSWERS.jsonl", help="Output of `reap generate`, given twice: shown side by side."
        ),
        READS,
    ] = None,
    force: Force = False,
) -> None:
    """Write one HTML file that shows what a profile says; it opens without a connection."""
    written = reap.report(
        profile,
        output,
        plan=plan,
        sweep=sweep,
        model=model,
        evaluations=evaluation or (),
        answers=answers or (),
        force=force,
    )
    print_facts([("report", written), ("size", bytes_text(written.stat().st_size))])
    if plan is None:
        print_next("reap", "plan", profile, *(["--sweep", sweep] if sweep else []), "--keep", "0.5", "-o", "plan.json")
    else:
        print_advice(f"open {command_line(written)} in a browser")


@PANEL.command("reap card small.gguf --source model.gguf --profile model.reap.json -o MODEL_CARD.md")
def card(
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED.gguf", help="A file that `reap prune` wrote."), READS],
    output: Annotated[Path, typer.Option("--output", "-o", help="Markdown file to write."), WRITES],
    source: Annotated[
        Path | None,
        typer.Option("--source", metavar="MODEL", help="The model it was pruned from: its size and name."),
        READS,
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="PROFILE.json", help="The profile of the plan: names the calibration."),
        READS,
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--evaluation", metavar="EVAL.json", help="Output of `reap evaluate --json`; may be given again."),
        READS,
    ] = None,
    answers: Annotated[
        list[Path] | None,
        typer.Option(
            "--answers", metavar="ANSWERS.jsonl", help="Output of `reap generate`: loops; may be given again."
        ),
        READS,
    ] = None,
    sweep: SweepPath = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="NAME", help="The source's name on a model hub.")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="The licence's identifier there.")
    ] = None,
    force: Force = False,
) -> None:
    """Write a model card for a pruned model: what was removed, how, and what was measured."""
    written = reap.model_card(
        pruned,
        output,
        source=source,
        profile=profile,
        evaluations=evaluation or (),
        answers=answers or (),
        sweep=sweep,
        base_model=base_model,
        license=license,
        force=force,
    )
    print_facts([("model card", written)])
    print_advice("read the card, say what was not tried, and publish it with the model and its plan")
