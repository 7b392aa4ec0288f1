"""reap hf: what works on Hugging Face checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap import hf
from reap.cli.cutting import choose_plan, report_facts
from reap.cli.options import Json
from reap.cli.show import print_facts, print_json, progress_bar

group = typer.Typer(name="hf", no_args_is_help=True, rich_markup_mode="rich", help="Work on Hugging Face checkpoints.")


def prune(
    checkpoint_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A folder with config.json and *.safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    plan: Annotated[Path | None, typer.Option("--plan", metavar="PLAN.json", help="A plan, as `reap plan` writes it.")] = None,
    profile: Annotated[Path | None, typer.Option("--profile", metavar="PROFILE.json", help="A profile to plan by, with --keep.")] = None,
    keep: Annotated[str | None, typer.Option("--keep", metavar="N|FRACTION", help="Experts to keep, with --profile.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="Score to rank experts by, with --profile; reap by default.")] = None,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", metavar="MODEL", help="The GGUF file that was profiled: compare its routers first.")
    ] = None,
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave the prediction (MTP) layers out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say the exact size; write nothing.")] = False,
    verify: Annotated[str, typer.Option("--verify", metavar="fast|full|none", help="How much of the output to read back.")] = "fast",
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that exists.")] = False,
    json: Json = False,
) -> None:
    """Write a checkpoint without the experts that a plan removes; needs no PyTorch."""
    chosen = choose_plan(plan, profile, keep, metric)
    if gguf is not None:
        hf.compare_with_gguf(checkpoint_dir, gguf)
    with progress_bar("writing") as progress:
        report = hf.prune(
            checkpoint_dir,
            output,
            chosen,
            force=force,
            dry_run=dry_run,
            verify=verify,  # type: ignore[arg-type]  # any other word is refused there
            drop_prediction=drop_mtp,
            progress=progress,
        )
    if json:
        return print_json(report.to_dict())
    print_facts(report_facts(report))


for _command, _example in ((prune, "reap hf prune Qwen3-30B-A3B --profile model.reap.json --keep 0.5 -o Qwen3-half"),):
    group.command(_command.__name__.replace("_", "-"), epilog=f"Example: {_example}")(_command)
