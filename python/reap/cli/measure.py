"""Measure: inspect, preview, profile, merge, compare."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import reap
from reap.cli.commands import Panel
from reap.cli.next_step import ENGINE, forwarded, print_advice, print_next
from reap.cli.options import (
    KEEP_FORM,
    READS,
    WRITES,
    AllowMismatch,
    CalibrationPaths,
    Force,
    Json,
    Metric,
    Model,
    Output,
    ResumeOptions,
    Seed,
    TextOptions,
    UntilOptions,
    calibration_source,
    parse_keep,
    parse_metric,
)
from reap.cli.preview_text import print_preview
from reap.cli.show import print_facts, print_json, print_table, progress_bar
from reap.cli.summary import fit_facts, profile_facts, until_text
from reap.engine.options import PROFILE_CTX_SIZE, EngineArguments
from reap.files.formatting import bytes_text, number_text, ranges_text

if TYPE_CHECKING:  # numpy takes longer to import than a header to read
    from reap.gguf.model_info import ModelInfo
    from reap.scores.profile import Profile

PANEL = Panel("Measure")


@PANEL.command("reap inspect model.gguf")
def inspect(model: Model, json: Json = False) -> None:
    """Say what a model is and what its experts weigh; of a pruned one, also where it came from."""
    info = reap.inspect(model)
    if json:
        return print_json(info.to_dict())
    print_facts(_model_facts(info) + fit_facts(info))
    if info.provenance is not None:
        print_next("reap", "evaluate", model, "TEXT")
    elif info.is_moe and not info.refusals:
        print_next("reap", "profile", model, "CALIBRATION", "-o", _profile_of(model))
    else:
        print_advice("another model; this one has no experts that could be removed")


def _profile_of(model: Path) -> Path:
    """Where a profile of the model would be expected: in the folder where one works."""
    return Path(f"{model.stem}.reap.json")


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
    facts.append(("cannot be run", info.engine_refusal))
    facts += [("missing", sentence) for sentence in info.missing_keys.values()]
    facts.append(("fingerprint", info.fingerprint))
    for key, value in (info.provenance or {}).items():
        is_ids = key.startswith("reap.kept.") and isinstance(value, list) and all(type(item) is int for item in value)
        facts.append((key, ranges_text(value) if is_ids else _shorten(value)))
    return facts


def _shorten(value: object, width: int = 100) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= width else text[: width - 1] + "…"


@PANEL.command("reap preview model.gguf code=github.jsonl chat=ultrachat.parquet", ctx_size=PROFILE_CTX_SIZE)
def preview(
    model: Model,
    calibration: CalibrationPaths,
    text: TextOptions,
    show: Annotated[int, typer.Option("--show", metavar="N", help="Samples to show as the engine gets them.")] = 3,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show where each token of these samples ends.")] = False,
    time: Annotated[
        bool, typer.Option("--time", help="Load the model and run some batches, to estimate a profile's time.")
    ] = False,
    json: Json = False,
    *,
    engine: EngineArguments,
) -> None:
    """Say what a calibration is: shapes, tokens, domains, what is left out, and what the engine gets to see.

    Only the model's tokenizer is read. Lines that cannot be used are counted by reason.
    """
    options = {**text.arguments(), "skip_bad_lines": True}
    with progress_bar("reading") as progress:
        seen = reap.preview(
            model,
            calibration_source(calibration),
            show=show,
            measure_time=time,
            progress=progress,
            **options,
            **engine,
        )
    if json:
        return print_json(seen.to_dict())
    print_preview(seen, tokens)
    texts = forwarded(*(it.name for it in fields(TextOptions)), "ctx_size", *ENGINE)
    print_next("reap", "profile", model, *calibration, "-o", _profile_of(model), *texts)


@PANEL.command("reap profile model.gguf calibration.jsonl -o model.reap.json -ngl 0 -c 2048", ctx_size=PROFILE_CTX_SIZE)
def profile(
    model: Model,
    calibration: CalibrationPaths,
    output: Output,
    text: TextOptions,
    kept: ResumeOptions,
    enough: UntilOptions,
    no_prediction_layers: Annotated[
        bool, typer.Option("--no-prediction-layers", help="Leave the prediction (MTP) layers out.")
    ] = False,
    force: Force = False,
    *,
    engine: EngineArguments,
) -> None:
    """Measure what each expert contributes on a calibration text."""
    source = calibration_source(calibration)
    with progress_bar("profiling") as progress:
        measured = reap.profile(
            model,
            source,
            prediction_layers=not no_prediction_layers,
            progress=progress,
            **kept.arguments(output),
            **text.arguments(),
            **enough.arguments(),
            **engine,
        )
    with kept.until_written(output):
        measured.save(output, force=force)
    print_profile(measured, output)
    print_next("reap", "sweep", model, output, "TEXT", "-o", "sweep.json", *forwarded(*ENGINE))


def print_profile(measured: Profile, output: Path) -> None:
    """What a profile says, in a few lines."""
    record = measured.calibration
    failed = record.get("failed_samples") or []
    print_facts(
        [
            ("profile", output),
            ("experts", f"{measured.n_experts} in each of {measured.n_layers} layers"),
            (
                "tokens",
                (
                    f"{record.get('tokens', 0):,} of {record.get('samples', 0):,} samples in"
                    f" {record.get('windows', 0):,} windows"
                ),
            ),
            (
                "skipped",
                (
                    f"{record['skipped']:,} samples: {', '.join(record['skipped_lines'][:3])}"
                    if record.get("skipped")
                    else None
                ),
            ),
            ("shapes", ", ".join(f"{count:,} {name}" for name, count in (record.get("shapes") or {}).items()) or None),
            *(("note", note) for note in record.get("notes") or ()),
            ("ended", until_text(record)),
            ("failed", f"{len(failed):,} samples: {'; '.join(failed[:3])}" if failed else None),
            ("domains", ", ".join(measured.domains) or None),
            *profile_facts(measured),
        ]
    )


@PANEL.command("reap merge code.reap.json prose.reap.json -o both.reap.json")
def merge(
    profiles: Annotated[list[Path], typer.Argument(metavar="A.json B.json...", help="Profiles of one model."), READS],
    output: Output,
    allow_mismatch: AllowMismatch = False,
    force: Force = False,
) -> None:
    """Add profiles of one model up, exactly."""
    merged = reap.merge(profiles, allow_mismatch=allow_mismatch)
    merged.save(output, force=force)
    print_profile(merged, output)
    print_next("reap", "sweep", "MODEL", output, "TEXT", "-o", "sweep.json")


@PANEL.command("reap compare a.reap.json b.reap.json --keep 0.5")
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A profile."), READS],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another profile of the same model."), READS],
    keep: Annotated[
        str, typer.Option("--keep", metavar=KEEP_FORM, help="Experts to keep: 0.5 and 50% are half, 64 is 64.")
    ] = "0.5",
    metric: Metric = "reap",
    seed: Seed = 0,
    html: Annotated[
        Path | None, typer.Option("--html", "-o", metavar="FILE", help="Write a page of it as well."), WRITES
    ] = None,
    allow_mismatch: AllowMismatch = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Say how far two profiles agree: rank correlation, and overlap of the experts they would keep."""
    chosen: dict[str, Any] = {"keep": parse_keep(keep), "metric": parse_metric(metric), "seed": seed}
    chosen["allow_mismatch"] = allow_mismatch
    result = reap.compare(a, b, **chosen)
    if html is not None:
        reap.comparison_report(a, b, html, force=force, **chosen)
    if json:
        return print_json(result.to_dict())
    rows = [
        (layer.layer, number_text(layer.spearman), number_text(layer.overlap), number_text(layer.jaccard))
        for layer in result.layers
    ]
    mean = ("mean", number_text(result.spearman), number_text(result.overlap), number_text(result.jaccard))
    print_table(["layer", "rank correlation", f"overlap of {result.keep} kept", "Jaccard"], [*rows, mean])
    print_next("reap", "merge", a, b, "-o", "both.reap.json")
