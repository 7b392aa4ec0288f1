"""reap hf: what works on Hugging Face checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from reap import hf
from reap.cli import completion
from reap.cli.commands import Panel
from reap.cli.cut import report_facts
from reap.cli.measure import print_profile
from reap.cli.next_step import print_advice, print_next
from reap.cli.options import (
    READS,
    WRITES_FOLDER,
    AllowMismatch,
    CalibrationPaths,
    DryRun,
    Force,
    HfDir,
    Json,
    Output,
    PlanChoice,
    ResumeOptions,
    TextOptions,
    TrustRemoteCode,
    UntilOptions,
    Verify,
    calibration_source,
)
from reap.cli.show import print_facts, print_json, progress_bar
from reap.engine.options import PROFILE_CTX_SIZE

group = typer.Typer(name="hf", no_args_is_help=True, rich_markup_mode="rich", help="Work on Hugging Face checkpoints.")
PANEL = Panel("Commands")


@dataclass(frozen=True)
class TorchOptions:
    """How PyTorch runs a checkpoint."""

    ctx_size: Annotated[
        int | None, typer.Option("--ctx-size", "-c", help="Tokens of one window.", show_default=str(PROFILE_CTX_SIZE))
    ] = None
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Tokens of one pass; as --ctx-size by default.")
    ] = None
    threads: Annotated[int | None, typer.Option("--threads", "-t", help="Threads of the processor.")] = None
    device: Annotated[
        str | None, typer.Option("--device", metavar="D", help="cpu, cuda, cuda:1, mps; the best there is by default.")
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="auto|T",
            help="float32, bfloat16, float16; auto is the checkpoint's own.",
            autocompletion=completion.values_of(*completion.DTYPES),
        ),
    ] = "auto"
    device_map: Annotated[
        str | None,
        typer.Option("--device-map", metavar="auto|...", help="Let accelerate spread the model over devices."),
    ] = None
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantise to NF4 on loading, by bitsandbytes.")
    ] = False
    stream: Annotated[
        bool, typer.Option("--stream", help="Load one layer at a time, for models larger than memory.")
    ] = False
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class FileOptions:
    """Which files are the checkpoint."""

    trust: Annotated[
        str | None,
        typer.Option(
            "--trust",
            metavar="shards|index",
            help="Where index and files differ: go by what the files hold, or by what the index names.",
            autocompletion=completion.values_of("shards", "index"),
        ),
    ] = None
    other_weights: Annotated[
        str | None,
        typer.Option(
            "--other-weights",
            metavar="carry|leave",
            help="Weights beside the model's own that may speak of experts: copy them as they are, or leave them out.",
            autocompletion=completion.values_of("carry", "leave"),
        ),
    ] = None


@PANEL.command("reap hf profile Nemotron-3-Nano calibration.jsonl -o nemotron.reap.json --device cuda --load-in-4bit")
def profile(
    checkpoint_dir: HfDir,
    calibration: CalibrationPaths,
    output: Output,
    text: TextOptions,
    kept: ResumeOptions,
    enough: UntilOptions,
    torch: TorchOptions,
    force: Force = False,
) -> None:
    """Measure what each expert of a checkpoint contributes on a calibration text."""
    source = calibration_source(calibration)
    with progress_bar("profiling") as progress:
        measured = hf.profile(
            checkpoint_dir,
            source,
            progress=progress,
            **kept.arguments(output),
            **text.arguments(),
            **enough.arguments(),
            **asdict(torch),
        )
    with kept.until_written(output):
        measured.save(output, force=force)
    print_profile(measured, output)
    smaller = Path(f"{checkpoint_dir.resolve().name}-half")
    print_next("reap", "hf", "prune", checkpoint_dir, "--profile", output, "--keep", "0.5", "-o", smaller)


@PANEL.command("reap hf prune Qwen3-30B-A3B --profile model.reap.json --keep 0.5 -o Qwen3-half")
def prune(
    checkpoint_dir: HfDir,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write."), WRITES_FOLDER],
    choice: PlanChoice,
    which: FileOptions,
    gguf: Annotated[
        Path | None,
        typer.Option("--gguf", metavar="MODEL", help="The GGUF file that was profiled: compare its routers first."),
        READS,
    ] = None,
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave the prediction (MTP) layers out.")] = False,
    dry_run: DryRun = False,
    verify: Verify = "fast",
    allow_mismatch: AllowMismatch = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a checkpoint without the experts that a plan removes; needs no PyTorch."""
    chosen = choice.arguments()
    if gguf is not None:
        hf.compare_with_gguf(checkpoint_dir, gguf, drop_prediction=drop_mtp)
    with progress_bar("writing") as progress:
        report = hf.prune(
            checkpoint_dir,
            output,
            **chosen,
            force=force,
            dry_run=dry_run,
            verify=verify,  # type: ignore[arg-type]  # any other word is refused there
            drop_prediction=drop_mtp,
            allow_mismatch=allow_mismatch,
            progress=progress,
            **asdict(which),
        )
    if json:
        return print_json(report.to_dict())
    print_facts(report_facts(report))
    if dry_run:
        print_advice("the same without --dry-run")
    else:
        print_next("reap", "convert", output, Path(f"{output.resolve().name}-f16.gguf"))


for _command in PANEL.commands:
    _command.add_to(group, None)
