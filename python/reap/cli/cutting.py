"""inspect, plan, prune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import reap
from reap.cli.options import (
    BLEND,
    METRIC_HELP,
    Json,
    KeepText,
    Protect,
    Seed,
    SuperExperts,
    check_output,
    parse_keep,
    parse_time,
    with_engine_options,
)
from reap.cli.show import bytes_text, print_facts, print_json, progress_bar
from reap.cli.summary import fit_facts, plan_facts, plan_figures
from reap.engine.options import EVALUATION_CTX_SIZE, EngineArguments
from reap.errors import UsageError
from reap.files.formatting import ranges_text
from reap.reporting.gpu_fit import describe_fit

if TYPE_CHECKING:  # numpy takes longer to import than a header to read
    from reap.gguf.model_info import ModelInfo
    from reap.pruning.gguf import PruneReport
    from reap.scores.plan import PrunePlan

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file.")]


def inspect(model: Model, json: Json = False) -> None:
    """Say what a model is and what its experts weigh; of a pruned one, also where it came from."""
    info = reap.inspect(model)
    if json:
        return print_json(info.to_dict())
    print_facts(_model_facts(info) + fit_facts(info))


def _model_facts(info: ModelInfo) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = [
        ("model", info.name or info.path.name),
        ("architecture", info.architecture),
        (
            "size",
            (
                f"{bytes_text(info.n_bytes)} in {info.n_files} file{'s' * (info.n_files > 1)}, {info.n_parameters:,}"
                " parameters"
            ),
        ),
        ("tensor types", ", ".join(f"{count} {name}" for name, count in info.tensor_types.items())),
        (
            "layers",
            (
                f"{info.n_layers}, the last {info.n_prediction_layers} for prediction"
                if info.n_prediction_layers
                else info.n_layers
            ),
        ),
        ("context", f"{info.context_length:,} tokens"),
    ]
    if not info.is_moe:
        facts.append(("experts", "none: a dense model"))
    else:
        grouped = f" from {info.n_groups_used} of {info.n_groups} groups" if info.n_groups > 1 else ""
        facts += [
            (
                "experts",
                (
                    f"{info.n_experts} in each of {len(info.moe_layers)} layers; a token uses"
                    f" {info.n_experts_used}{grouped}"
                ),
            ),
            (
                "their size",
                f"{bytes_text(info.expert_bytes)}, {info.expert_bytes / max(info.n_bytes, 1):.0%} of the file",
            ),
            ("one expert less", f"saves {bytes_text(info.bytes_per_expert)}"),
        ]
    facts += [("cannot be pruned", reason) for reason in info.refusals]
    facts.append(("fingerprint", info.fingerprint))
    for key, value in (info.provenance or {}).items():
        is_ids = key.startswith("reap.kept.") and isinstance(value, list) and all(type(item) is int for item in value)
        facts.append((key, ranges_text(value) if is_ids else _shorten(value)))
    return facts


def _shorten(value: object, width: int = 100) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= width else text[: width - 1] + "…"


@with_engine_options(ctx_size=EVALUATION_CTX_SIZE)
def plan(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE.json", help="A profile, as `reap profile` writes it.")],
    keep: KeepText,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help=METRIC_HELP)] = None,
    protect: Protect = None,
    super_experts: SuperExperts = False,
    blend: Annotated[str | None, BLEND] = None,
    seed: Seed = 0,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="MODEL", help="A GGUF file: for its exact size, and for --refine.")
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            "--refine",
            metavar="TIME",
            help="Try experts near the cut on --model and --text for so long: 90s, 10m, 1.5h.",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="TEXT", help="Calibration text for --refine, not the text to judge on."),
    ] = None,
    json: Json = False,
    *,
    engine: EngineArguments,
) -> None:
    """Choose the experts that each layer keeps.

    With --refine the choice begins with the criterion that does best on --text (or with --metric) and is improved by
    what the loss says; the engine's options are for that.
    """
    if output is not None:
        check_output(output, profile, *(path for path in (model, *(text or ())) if path is not None))
    measured = reap.Profile.load(profile)
    chosen: dict[str, Any] = {
        "keep": parse_keep(keep),
        "protect": protect or (),
        "seed": seed,
        "protect_super_experts": super_experts,
    }
    if refine is not None:
        if model is None or not text:
            raise UsageError(
                "--refine needs --model MODEL, which is run, and --text TEXT, calibration text to run it on"
            )
        with progress_bar("refining") as progress:
            made = reap.refine(
                model,
                measured,
                text,
                seconds=parse_time(refine),
                metric=metric,
                blend=blend,
                output=output,
                progress=progress,
                **chosen,
                **engine,
            )
    elif text:
        raise UsageError("--text is for --refine TIME")
    else:
        made = reap.plan(measured, metric=metric or "reap", blend=blend or "sum", **chosen)
    from reap.pruning.gguf import size_after

    sizes = None if model is None else (reap.inspect(model).n_bytes, size_after(model, made))
    if output is not None and refine is None:
        made.save(output)
    if json:
        figures = plan_figures(measured, made) | (
            {"n_bytes_before": sizes[0], "n_bytes_after": sizes[1]} if sizes else {}
        )
        return print_json(made.to_dict() | figures)
    print_facts(_plan_facts(made, output, sizes) + plan_facts(measured, made))


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
    measured = [
        (
            what,
            (
                f"{record[f'{key}_after']:.4g}, by {record['best_criterion']} alone {record[f'{key}_before']:.4g}, on"
                " that text"
            ),
        )
        for key, what in (("kl", "divergence"), ("perplexity", "perplexity"))
    ]
    return [
        ("refined", f"from {record['start']}: {done}"),
        *measured,
        ("next", "judge it on other text: reap sweep --plan, reap evaluate --plan"),
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


def prune(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="GGUF file to write.")],
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="PLAN.json", help="A plan, as `reap plan` writes it.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="PROFILE.json", help="A profile to plan by, with --keep.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="N|FRACTION", help="Experts to keep, with --profile.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="Score to rank experts by, with --profile; reap by default.")
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option("--hf", metavar="HF_DIR", help="The checkpoint that was profiled: compare its routers first."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say the exact size; write nothing.")
    ] = False,
    verify: Annotated[
        str, typer.Option("--verify", metavar="fast|full|none", help="How much of the output to read back.")
    ] = "fast",
    name: Annotated[
        str | None, typer.Option("--name", help="New general.name; nothing else of the metadata changes.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    split_max_size: Annotated[
        str | None,
        typer.Option("--split-max-size", metavar="N[K|M|G|T]", help="Most bytes of one file: OUT-00001-of-0000N.gguf."),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="An importance matrix to cut as well.")
    ] = None,
    imatrix_out: Annotated[
        Path | None, typer.Option("--imatrix-out", metavar="FILE", help="Where it goes; OUT.imatrix.gguf by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a model without the experts that a plan removes."""
    if imatrix_out is not None and imatrix is None:
        raise UsageError("--imatrix-out needs --imatrix")
    chosen = choose_plan(plan, profile, keep, metric)
    if hf is not None:
        from reap.hf import compare_with_gguf

        compare_with_gguf(hf, model)
    with progress_bar("writing") as progress:
        report = reap.prune(
            model,
            output,
            chosen,
            name=name,
            force=force,
            dry_run=dry_run,
            verify=verify,  # type: ignore[arg-type]  # any other word is refused there
            split_max_size=split_max_size,
            imatrix=imatrix,
            imatrix_output=imatrix_out,
            progress=progress,
        )
    if json:
        return print_json(report.to_dict())
    print_facts(report_facts(report))


def choose_plan(plan: Path | None, profile: Path | None, keep: str | None, metric: str | None) -> PrunePlan | Path:
    """What `--plan`, or `--profile` and `--keep`, ask for."""
    if plan is not None and not (profile or keep or metric):
        return plan
    if plan is None and profile is not None and keep is not None:
        return reap.plan(profile, keep=parse_keep(keep), metric=metric or "reap")
    raise UsageError("give either --plan, or --profile and --keep (and --metric)")


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
