"""Evaluate: evaluate, sweep, report, card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import reap
from reap.cli import completion
from reap.cli.commands import Panel
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
    parse_keep,
    parse_metric,
    split_list,
)
from reap.cli.show import json_text, print_facts, print_json, print_table, progress_bar, say
from reap.cli.sweep_text import print_next_plans, print_sweep
from reap.engine.options import EVALUATION_CTX_SIZE, EngineArguments
from reap.errors import ReapError
from reap.files.atomic import write_whole
from reap.files.formatting import bytes_text, number_text, percent_text

if TYPE_CHECKING:
    from reap.evaluation.loops import LoopMetrics
    from reap.evaluation.result import Evaluation

PANEL = Panel("Evaluate")


MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", metavar="N", help="About N tokens of the text, spread over each domain."),
]


@PANEL.command("reap evaluate model.gguf heldout.txt --plan plan.json --loops", ctx_size=EVALUATION_CTX_SIZE)
def evaluate(
    model: Model,
    text: Annotated[
        list[Path],
        typer.Argument(
            metavar="TEXT...", help="Held-out text, or rows as in a calibration; of several files each is a domain."
        ),
        READS,
    ],
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
    loops: Annotated[
        bool, typer.Option("--loops", help="Let the model continue a few prompts, and look for repetition.")
    ] = False,
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
    """Measure how well a model predicts a text, and how far it agrees with another."""
    with progress_bar("evaluating") as progress:
        result = reap.evaluate(
            model,
            text if len(text) > 1 else text[0],
            reference=reference,
            plan=plan,
            loops=loops,
            allow_mismatch=allow_mismatch,
            max_tokens=max_tokens,
            progress=progress,
            **engine,
        )
    if output is not None:
        write_whole(output, json_text(result.to_dict()).encode(), force=force)
    if json:
        return print_json(result.to_dict())
    print_evaluation(result)
    _next_after_evaluate(model, reference, plan, output)


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


def print_evaluation(result: Evaluation) -> None:
    """The figures, a table of the domains, and what they mean."""
    facts: list[tuple[str, object]] = [
        ("perplexity", f"{result.perplexity:.4f} ± {number_text(result.stderr)}"),
        ("tokens", f"{result.tokens:,} scored in {result.windows} windows of {result.ctx_size}"),
        (
            "experts",
            (
                f"{result.plan['keep']} of {result.plan['n_experts']} ({result.plan['metric']}), virtually"
                if result.plan
                else None
            ),
        ),
    ]
    if result.perplexity_ratio is not None:
        quantiles = (
            (50, result.kl_median),
            (90, result.kl_p90),
            (95, result.kl_p95),
            (99, result.kl_p99),
            (100, result.kl_max),
        )
        facts += [
            ("reference", f"{result.reference}, perplexity {number_text(result.reference_perplexity)}"),
            ("perplexity ratio", f"{result.perplexity_ratio:.4f} ± {number_text(result.ratio_stderr)}"),
            ("KL divergence", f"mean {number_text(result.kl_mean)} ± {number_text(result.kl_stderr)} nats"),
            ("its quantiles", ", ".join(f"{share} % {number_text(value)}" for share, value in quantiles)),
            ("same top token", percent_text(result.top1, 1)),
            ("halved", f"{percent_text(result.halved, 1)} of the tokens are at most half as probable"),
        ]
    if result.loops is not None:
        facts += _loop_facts(result.loops)
    facts += [("note", warning) for warning in result.warnings]
    print_facts([*facts, ("time", f"{result.seconds:.1f} s")])
    if result.domains:
        columns = ["domain", "tokens", "perplexity", "ratio", "mean KL", "same top token", "halved"]
        rows = [
            (name, f"{found.tokens:,}", f"{found.perplexity:.4f}", number_text(found.perplexity_ratio),
            number_text(found.kl_mean),
             percent_text(found.top1, 1), percent_text(found.halved, 1))
            for name, found in result.domains.items()
        ]  # fmt: skip
        print_table(columns, rows)
    say(result.meaning)


def _loop_facts(loops: LoopMetrics) -> list[tuple[str, object]]:
    def beside(value: float, reference: float | None) -> str:
        return percent_text(value, 1) + ("" if reference is None else f" (reference {percent_text(reference, 1)})")

    return [
        ("continuations", f"{loops.prompts} of up to {loops.new_tokens} tokens"),
        ("repeated 4-grams", beside(loops.repeated, loops.reference_repeated)),
        ("end in a loop", beside(loops.looping, loops.reference_looping)),
        ("unfinished", beside(loops.unfinished, loops.reference_unfinished)),
    ]


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
    more: dict[str, Any] = {**candidates.arguments(), **engine, "resume": resume, "allow_mismatch": allow_mismatch}
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
    force: Force = False,
) -> None:
    """Write one HTML file that shows what a profile says; it opens without a connection."""
    written = reap.report(profile, output, plan=plan, sweep=sweep, model=model, force=force)
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
        sweep=sweep,
        base_model=base_model,
        license=license,
        force=force,
    )
    print_facts([("model card", written)])
    print_advice("read the card, say what was not tried, and publish it with the model and its plan")
