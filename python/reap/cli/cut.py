"""Cut: plan, prune."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import reap
from reap.cli.commands import Panel
from reap.cli.next_step import ENGINE, forwarded, print_advice, print_next
from reap.cli.options import (
    BLEND,
    KEEP_FORM,
    METRIC,
    READS,
    WRITES,
    AllowMismatch,
    DryRun,
    Force,
    GoesOn,
    Json,
    Model,
    PlanChoice,
    Protect,
    ResumableOutput,
    Seed,
    SuperExperts,
    Verify,
    check_resumable,
    parse_keep,
    parse_metric,
    parse_time,
)
from reap.cli.show import print_facts, print_json, progress_bar
from reap.cli.summary import engine_facts, plan_facts, plan_figures
from reap.engine.options import EVALUATION_CTX_SIZE, EngineArguments
from reap.errors import UsageError
from reap.files.formatting import bytes_text, ranges_text
from reap.reporting.gpu_fit import describe_fit

if TYPE_CHECKING:
    from reap.pruning.gguf import PruneReport
    from reap.scores.plan import PrunePlan
    from reap.scores.profile import Profile

PANEL = Panel("Cut")


@dataclass(frozen=True)
class Selection:
    """Which experts a plan keeps."""

    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar=KEEP_FORM, help="Experts to keep: 0.5 and 50% are half, 64 is 64."),
    ] = None
    metric: Annotated[str | None, METRIC] = None
    protect: Protect = None
    super_experts: SuperExperts = False
    blend: Annotated[str | None, BLEND] = None
    seed: Seed = 0

    def arguments(self) -> dict[str, Any]:
        """As `plan` and `refine` take them, but the metric and the blend, whose defaults differ."""
        if self.keep is None:
            raise UsageError("Missing option --keep: how many experts to keep, such as 0.5 or 64 (or --sweep FILE)")
        return {
            "keep": parse_keep(self.keep),
            "protect": self.protect or (),
            "seed": self.seed,
            "protect_super_experts": self.super_experts,
        }

    def check_with_sweep(self) -> None:
        """UsageError for what a sweep has decided already."""
        given = {
            "--metric": self.metric,
            "--protect": self.protect,
            "--super-experts": self.super_experts,
            "--blend": self.blend,
            "--seed": self.seed,
        }
        if name := next((name for name, value in given.items() if value), None):
            raise UsageError(f"{name}: the sweep has decided that; with --sweep only --keep may be given")


@dataclass(frozen=True)
class Refinement:
    """A search for better experts than a score finds."""

    refine: Annotated[
        str | None,
        typer.Option(
            "--refine",
            metavar="TIME",
            help="Try experts near the cut on --model and --text for so long: 90s, 10m, 1.5h.",
        ),
    ] = None
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="TEXT", help="Calibration text for --refine, not the text to judge on."),
        READS,
    ] = None

    def check(self, model: Path | None, resume: bool) -> None:
        """UsageError where an option is missing that another needs."""
        if self.refine is not None and (model is None or not self.text):
            raise UsageError("--refine needs --model MODEL, which is run, and --text TEXT, calibration text")
        if self.refine is None and (self.text or resume):
            raise UsageError(f"{'--text' if self.text else '--resume'} is for --refine TIME")


@PANEL.command("reap plan model.reap.json --keep 0.5 -o plan.json", ctx_size=EVALUATION_CTX_SIZE)
def plan(
    selection: Selection,
    search: Refinement,
    profile: Annotated[
        Path | None,
        typer.Argument(
            metavar="PROFILE.json", help="A profile, as `reap profile` writes it; with --sweep the sweep's own."
        ),
        READS,
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option("--sweep", metavar="SWEEP.json", help="Take its winner; of several sizes the one of --keep."),
        READS,
    ] = None,
    output: ResumableOutput = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", metavar="MODEL", help="A GGUF file: for its exact size, and for --refine."),
        READS,
    ] = None,
    allow_mismatch: AllowMismatch = False,
    resume: GoesOn = False,
    force: Force = False,
    json: Json = False,
    *,
    engine: EngineArguments,
) -> None:
    """Choose the experts that each layer keeps.

    With --refine the choice begins with the criterion that does best on --text (or with --metric) and is improved by
    what the loss says; the engine's options are for that. With --sweep it is the choice that did best there.
    """
    search.check(model, resume)
    check_resumable(output, force=force, resume=resume)
    if sweep is not None:
        measured, made = _winner_of(sweep, profile, selection, search)
    else:
        if profile is None:
            raise UsageError("Missing argument PROFILE.json: a profile to plan by (or --sweep SWEEP.json)")
        measured = reap.Profile.load(profile)
        run = {"output": output, "resume": resume, "force": force, "allow_mismatch": allow_mismatch, **engine}
        if model is not None:
            _check_profile(model, measured, allow_mismatch)
        made = _made_plan(measured, selection, search, model, run)
    from reap.pruning.gguf import size_after

    sizes = None
    if model is not None:
        sizes = reap.inspect(model).n_bytes, size_after(model, made, allow_mismatch=allow_mismatch)
    if output is not None and search.refine is None:
        made.save(output, force=force)
    if json:
        figures = plan_figures(measured, made) | (
            {"n_bytes_before": sizes[0], "n_bytes_after": sizes[1]} if sizes else {}
        )
        return print_json(made.to_dict() | figures)
    counts = engine_facts(made.keep, measured.n_groups)
    print_facts(_plan_facts(made, output, sizes) + plan_facts(measured, made) + counts)
    if output is None:
        print_advice("the same with -o plan.json, which keeps it")
    elif search.refine is not None:
        print_next("reap", "evaluate", model, "TEXT", "--plan", output, *forwarded(*ENGINE))
    else:
        print_next("reap", "prune", model or "MODEL", "--plan", output, "-o", "small.gguf")


def _winner_of(
    sweep: Path, profile: Path | None, selection: Selection, search: Refinement
) -> tuple[Profile, PrunePlan]:
    """The profile that a sweep was made with, and its winner's plan."""
    selection.check_with_sweep()
    if search.refine is not None:
        raise UsageError("--refine begins with a criterion of its own choice, so --sweep has nothing to say to it")
    table = reap.Sweep.load(sweep)
    from reap.evaluation.sweep_winner import profile_of, winning_plan

    measured = reap.Profile.load(profile) if profile is not None else profile_of(table, sweep.parent)
    keep = None if selection.keep is None else parse_keep(selection.keep)
    return measured, winning_plan(table, measured, keep=keep)


def _check_profile(model: Path, profile: Profile, allow_mismatch: bool) -> None:
    from reap.pruning.compatibility import check_profile  # which takes numpy along

    check_profile(reap.inspect(model), profile, allow_mismatch=allow_mismatch)


def _made_plan(
    measured: Profile,
    selection: Selection,
    search: Refinement,
    model: Path | None,
    run: dict[str, Any],
) -> PrunePlan:
    metric, chosen = parse_metric(selection.metric), selection.arguments()
    if search.refine is None or model is None:
        return reap.plan(measured, metric=metric or "reap", blend=selection.blend or "sum", **chosen)
    seconds = parse_time(search.refine)
    more: dict[str, Any] = {**chosen, **run}
    with progress_bar("refining") as progress:
        return reap.refine(
            model,
            measured,
            search.text or (),
            seconds=seconds,
            metric=metric,
            blend=selection.blend,
            progress=progress,
            **more,
        )


def _plan_facts(made: PrunePlan, output: Path | None, sizes: tuple[int, int] | None) -> list[tuple[str, object]]:
    from reap.scores.plan import router_warning

    protected = made.options.get("protected") or {}
    size = (
        f"{bytes_text(sizes[1])} ({sizes[1]:,} bytes), {sizes[1] / max(sizes[0], 1):.1%} of {bytes_text(sizes[0])}"
        if sizes
        else None
    )
    return [
        ("plan", output),
        ("keeps", f"{made.keep} of {made.n_experts} experts in each of {len(made.layers)} layers, by {made.metric}"),
        ("protected", ", ".join(f"{layer}:{expert}" for layer, ids in protected.items() for expert in ids) or None),
        ("super experts", _super_experts_text(made)),
        *_refinement_facts(made.options.get("refined")),
        ("size", size),
        ("fits in", describe_fit(sizes[1]) if sizes else None),
        ("note", router_warning(made.keep, made.n_experts)),
    ]


def _refinement_facts(record: dict[str, Any] | None) -> list[tuple[str, object]]:
    if record is None:
        return []
    done = (
        f"{record['experts_tried']} experts tried, {record['experts_exchanged']} exchanged in {record['passes']:.1f}"
        f" passes over {record['windows']} of the text's {record['windows_of_the_text']} windows,"
        f" {record['seconds']:.0f} s"
    )
    if record["result"] == "start":
        done += f"; nothing clearly better than {record['best_criterion']} was found, so its choice stays"
    measured = [
        (
            what,
            f"{record[f'{key}_after']:.4g}, by {record['best_criterion']} alone {record[f'{key}_before']:.4g}, on the"
            f" {record['windows_divided']['hold_out']} windows that the search did not see",
        )
        for key, what in (("kl", "divergence"), ("perplexity", "perplexity"))
    ]
    return [
        ("refined", f"from {record['start']}: {done}"),
        *(measured if record["result"] == "refined" else []),
    ]


def _super_experts_text(made: PrunePlan, most: int = 12) -> str | None:
    found = made.options.get("super_experts")
    if found is None:
        return None
    if not found:
        return "none found"
    shown = [
        f"{item['layer']}:{item['expert']} ({item['ratio']:.0f} times the median norm,"
        f" {'kept' if item['kept'] else 'REMOVED'})"
        for item in found[:most]
    ]
    return ", ".join(shown) + (f" and {len(found) - most} more" if len(found) > most else "")


@dataclass(frozen=True)
class ImatrixFiles:
    """An importance matrix that is cut with the model."""

    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="An importance matrix to cut as well."), READS
    ] = None
    imatrix_out: Annotated[
        Path | None,
        typer.Option("--imatrix-out", metavar="FILE", help="Where it goes; OUT.imatrix.gguf by default."),
        WRITES,
    ] = None


@dataclass(frozen=True)
class HeaderChanges:
    """What changes besides the experts."""

    name: Annotated[
        str | None,
        typer.Option("--name", help="New general.name; by default the old one and the number of experts left."),
    ] = None
    keep_label: Annotated[
        bool, typer.Option("--keep-label", help="Leave general.name and general.size_label as they are.")
    ] = False
    drop_prediction_layers: Annotated[
        bool,
        typer.Option(
            "--drop-prediction-layers",
            help="Leave the multi-token-prediction layers out; without a plan, nothing else.",
        ),
    ] = False


@PANEL.command("reap prune model.gguf --plan plan.json -o small.gguf")
def prune(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="GGUF file to write."), WRITES],
    choice: PlanChoice,
    matrix: ImatrixFiles,
    changes: HeaderChanges,
    hf: Annotated[
        Path | None,
        typer.Option("--hf", metavar="HF_DIR", help="The checkpoint that was profiled: compare its routers first."),
        READS,
    ] = None,
    dry_run: DryRun = False,
    verify: Verify = "fast",
    split_max_size: Annotated[
        str | None,
        typer.Option("--split-max-size", metavar="N[K|M|G|T]", help="Most bytes of one file: OUT-00001-of-0000N.gguf."),
    ] = None,
    allow_mismatch: AllowMismatch = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a model without the experts that a plan removes."""
    if matrix.imatrix_out is not None and matrix.imatrix is None:
        raise UsageError("--imatrix-out needs --imatrix")
    chosen = None if changes.drop_prediction_layers and choice.is_empty else choice.choose()
    if choice.profile is not None:
        _check_profile(model, reap.Profile.load(choice.profile), allow_mismatch)
    if hf is not None:
        from reap.hf import compare_with_gguf

        compare_with_gguf(hf, model)
    with progress_bar("writing") as progress:
        report = reap.prune(
            model,
            output,
            chosen,
            force=force,
            dry_run=dry_run,
            verify=verify,  # type: ignore[arg-type]  # any other word is refused there
            split_max_size=split_max_size,
            imatrix=matrix.imatrix,
            imatrix_output=matrix.imatrix_out,
            allow_mismatch=allow_mismatch,
            progress=progress,
            name=changes.name,
            keep_label=changes.keep_label,
            drop_prediction_layers=changes.drop_prediction_layers,
        )
    if json:
        return print_json(report.to_dict())
    print_facts(report_facts(report))
    if dry_run:
        print_advice("the same without --dry-run")
    else:
        print_next("reap", "evaluate", report.output, "TEXT", "--reference", model, "-o", "evaluation.json")


def report_facts(report: PruneReport) -> list[tuple[str, object]]:
    """What was written, in lines; of many files the sum."""
    wrote = "would write" if report.dry_run else "wrote"
    share = report.n_bytes_after / max(report.n_bytes_before, 1)
    return [
        *((wrote, text) for text in _files_text(report)),
        (
            "size",
            (
                f"{bytes_text(report.n_bytes_after)} ({report.n_bytes_after:,} bytes), {share:.1%} of"
                f" {bytes_text(report.n_bytes_before)} ({report.n_bytes_before:,} bytes)"
            ),
        ),
        (
            "experts",
            (
                f"{report.n_experts_after} of {report.n_experts_before} in each of {len(report.kept)} layers, by"
                f" {report.metric}"
            ),
        ),
        *(_layer_facts(report) if report.dry_run else ()),
        ("time", f"{report.seconds:.1f} s"),
        *(("note", warning) for warning in report.warnings),
    ]


def _files_text(report: PruneReport) -> list[str]:
    if report.output in report.files:
        return [f"{path} ({n_bytes:,} bytes)" for path, n_bytes in report.files.items()]
    return [f"{report.output} ({sum(report.files.values()):,} bytes in {len(report.files)} files)"]  # a folder


def _layer_facts(report: PruneReport) -> list[tuple[str, object]]:
    removed = report.removed
    return [
        ("", f"layer {layer}: keeps {ranges_text(kept)}; removes {ranges_text(removed[layer])}")
        for layer, kept in report.kept.items()
    ]
