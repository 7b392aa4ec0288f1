"""reap hf: what works on Hugging Face checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reap import hf
from reap.cli.cutting import choose_plan, report_facts
from reap.cli.measuring import Output, print_profile
from reap.cli.options import Json, check_output
from reap.cli.show import print_facts, print_json, progress_bar

group = typer.Typer(name="hf", no_args_is_help=True, rich_markup_mode="rich", help="Work on Hugging Face checkpoints.")


def profile(
    checkpoint_dir: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="A folder with config.json and *.safetensors.")
    ],
    calibration: Annotated[
        list[str], typer.Argument(metavar="CALIBRATION...", help="JSON Lines or text; - is standard input.")
    ],
    output: Output,
    ctx_size: Annotated[int, typer.Option("--ctx-size", "-c", help="Tokens of one window.")] = 2048,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Tokens of one pass; as --ctx-size by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", help="Threads of the processor.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="D", help="cpu, cuda, cuda:1, mps; the best there is by default.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="auto|T", help="float32, bfloat16, float16; auto is the checkpoint's own.")
    ] = "auto",
    device_map: Annotated[
        str | None,
        typer.Option("--device-map", metavar="auto|...", help="Let accelerate spread the model over devices."),
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantise to NF4 on loading, by bitsandbytes.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Load one layer at a time, for models larger than memory.")
    ] = False,
    chat_template: Annotated[
        str, typer.Option("--chat-template", metavar="none|auto|FILE", help="How prompt and response are joined.")
    ] = "none",
    mask: Annotated[str, typer.Option("--mask", metavar="all|response", help="Tokens that are counted.")] = "all",
    no_parse_special: Annotated[
        bool, typer.Option("--no-parse-special", help="Read special tokens in texts as plain text.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="Stop after N tokens.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FILE", help="Keep what is done in FILE, to go on from.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --checkpoint.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")
    ] = False,
) -> None:
    """Measure what each expert of a checkpoint contributes on a calibration text."""
    check_output(output, checkpoint_dir, *calibration)
    source: Any = calibration if len(calibration) > 1 else calibration[0]
    with progress_bar("profiling") as progress:
        measured = hf.profile(
            checkpoint_dir,
            source,
            ctx_size=ctx_size,
            batch_size=batch_size,
            threads=threads,
            device=device,
            dtype=dtype,
            device_map=device_map,
            load_in_4bit=load_in_4bit,
            stream=stream,
            chat_template=chat_template,
            mask=mask,
            parse_special=not no_parse_special,
            max_tokens=max_tokens,
            checkpoint=checkpoint,
            resume=resume,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    measured.save(output)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)  # the profile holds all of it now
    print_profile(measured, output)


def prune(
    checkpoint_dir: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="A folder with config.json and *.safetensors.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
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
    gguf: Annotated[
        Path | None,
        typer.Option("--gguf", metavar="MODEL", help="The GGUF file that was profiled: compare its routers first."),
    ] = None,
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave the prediction (MTP) layers out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say the exact size; write nothing.")
    ] = False,
    verify: Annotated[
        str, typer.Option("--verify", metavar="fast|full|none", help="How much of the output to read back.")
    ] = "fast",
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


for _command, _example in (
    (profile, "reap hf profile Nemotron-3-Nano calibration.jsonl -o nemotron.reap.json --device cuda --load-in-4bit"),
    (prune, "reap hf prune Qwen3-30B-A3B --profile model.reap.json --keep 0.5 -o Qwen3-half"),
):
    group.command(_command.__name__.replace("_", "-"), epilog=f"Example: {_example}")(_command)
