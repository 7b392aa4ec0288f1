"""convert, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import reap
from reap.cli.options import Json, split_list
from reap.cli.show import bytes_text, print_facts, print_json, progress_bar, warn
from reap.errors import UsageError

if TYPE_CHECKING:
    from reap.engine.quantize import QuantizeReport

Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]


def convert(
    checkpoint_dir: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="A folder with config.json and *.safetensors.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="GGUF file to write.")],
    outtype: Annotated[
        str, typer.Option("--outtype", metavar="f32|f16|bf16|q8_0|auto", help="Type of the matrices.")
    ] = "f16",
    pre: Annotated[
        str | None,
        typer.Option(
            "--pre", metavar="NAME", help="The tokenizer's regular expression, where the converter does not know it."
        ),
    ] = None,
    converter: Annotated[
        Path | None,
        typer.Option("--converter", metavar="DIR", help="A llama.cpp source tree to take the converter from."),
    ] = None,
    no_mtp: Annotated[bool, typer.Option("--no-mtp", help="Leave prediction (MTP) layers out.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")
    ] = False,
    force: Force = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the converter says.")] = False,
    json: Json = False,
) -> None:
    """Make a GGUF file of a Hugging Face checkpoint, by llama.cpp's own converter."""
    written = reap.convert(
        checkpoint_dir,
        output,
        outtype=outtype,
        pre=pre,
        converter=converter,
        prediction=not no_mtp,
        trust_remote_code=trust_remote_code,
        force=force,
        log=warn if verbose else None,
    )
    n_bytes = written.stat().st_size
    if json:
        return print_json(
            {"source": str(checkpoint_dir), "output": str(written), "outtype": outtype, "n_bytes": n_bytes}
        )
    print_facts([("wrote", f"{written} ({n_bytes:,} bytes)")])


def quantize(
    model: Annotated[Path, typer.Argument(metavar="IN.gguf", help="A GGUF file; of a split model, any of its files.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="GGUF file to write.")],
    type: Annotated[
        str,
        typer.Argument(metavar="TYPE", help="Q4_K_M, Q8_0, IQ2_XS, MXFP4_MOE and so on, as llama-quantize has them."),
    ],
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="An importance matrix of this model.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", metavar="N", help="Threads; the cores that are there by default.")
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantise what is quantised already.")
    ] = False,
    pure: Annotated[bool, typer.Option("--pure", help="Give every matrix the type itself, and no mixture.")] = False,
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", help="Leave output.weight as it is.")
    ] = False,
    output_tensor_type: Annotated[
        str | None, typer.Option("--output-tensor-type", metavar="T", help="Type of output.weight.")
    ] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option("--token-embedding-type", metavar="T", help="Type of the embedding.")
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option("--tensor-type", metavar="PATTERN=T", help="Type of the tensors that a pattern finds."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and foretell the size; write nothing.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a model in another type, by llama.cpp's own quantiser."""
    with progress_bar("quantising") as progress:
        report = reap.quantize(
            model,
            output,
            type,
            imatrix=imatrix,
            threads=threads,
            allow_requantize=allow_requantize,
            pure=pure,
            quantize_output=not leave_output_tensor,
            output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type,
            tensor_types=[_parse_tensor_type(text) for text in split_list(tensor_type)],
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    if json:
        return print_json(report.to_dict())
    print_facts(_facts(report))


def _parse_tensor_type(text: str) -> tuple[str, str]:
    pattern, found, kind = text.rpartition("=")
    if not (found and pattern and kind):
        raise UsageError(f"--tensor-type should be PATTERN=TYPE, found {text!r}")
    return pattern, kind


def _facts(report: QuantizeReport) -> list[tuple[str, object]]:
    after, before = report.n_bytes_after, report.n_bytes_before
    size = f"{bytes_text(after)} ({after:,} bytes), {after / max(before, 1):.1%} of {bytes_text(before)}"
    return [
        ("would write" if report.dry_run else "wrote", f"{report.output}, {report.type}"),
        ("size", f"about {bytes_text(after)}" if report.dry_run else size),
        ("tensor types", ", ".join(f"{count} {name}" for name, count in report.tensor_types.items()) or None),
        ("time", f"{report.seconds:.1f} s"),
        *(("note", warning) for warning in report.warnings),
    ]
