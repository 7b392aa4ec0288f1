"""Utilities: convert, quantize, devices, rpc-server, demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import reap
from reap.cli import completion, demonstration
from reap.cli.commands import Panel
from reap.cli.next_step import forwarded, print_advice, print_next
from reap.cli.options import READS, WRITES, WRITES_FOLDER, Force, HfDir, Json, TrustRemoteCode, split_list
from reap.cli.show import print_facts, print_json, print_table, progress_bar, say, warn
from reap.errors import UsageError
from reap.files.formatting import bytes_text

if TYPE_CHECKING:
    from reap.engine.quantize import QuantizeReport

PANEL = Panel("Utilities")
NewGguf = Annotated[Path, typer.Argument(metavar="OUT.gguf", help="GGUF file to write."), WRITES]


@PANEL.command("reap convert Qwen3-30B-A3B model-f16.gguf")
def convert(
    checkpoint_dir: HfDir,
    output: NewGguf,
    outtype: Annotated[
        str,
        typer.Option(
            "--outtype",
            metavar="|".join(completion.OUTTYPES),
            help="Type of the matrices.",
            autocompletion=completion.values_of(*completion.OUTTYPES),
        ),
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
        READS,
    ] = None,
    no_mtp: Annotated[bool, typer.Option("--no-mtp", help="Leave prediction (MTP) layers out.")] = False,
    trust_remote_code: TrustRemoteCode = False,
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
    print_next("reap", "inspect", written)


@dataclass(frozen=True)
class TypeChoice:
    """Which tensors get which type."""

    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantise what is quantised already.")
    ] = False
    pure: Annotated[bool, typer.Option("--pure", help="Give every matrix the type itself, and no mixture.")] = False
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", help="Leave output.weight as it is.")
    ] = False
    output_tensor_type: Annotated[
        str | None,
        typer.Option(
            "--output-tensor-type",
            metavar="T",
            help="Type of output.weight.",
            autocompletion=completion.tensor_types(),
        ),
    ] = None
    token_embedding_type: Annotated[
        str | None,
        typer.Option(
            "--token-embedding-type",
            metavar="T",
            help="Type of the embedding.",
            autocompletion=completion.tensor_types(),
        ),
    ] = None
    tensor_type: Annotated[
        list[str] | None,
        typer.Option("--tensor-type", metavar="PATTERN=T", help="Type of the tensors that a pattern finds."),
    ] = None


@PANEL.command("reap quantize model-f16.gguf model.gguf Q4_K_M --imatrix model.imatrix.gguf")
def quantize(
    model: Annotated[
        Path, typer.Argument(metavar="IN.gguf", help="A GGUF file; of a split model, any of its files."), READS
    ],
    output: NewGguf,
    type: Annotated[
        str,
        typer.Argument(
            metavar="TYPE",
            help="Q4_K_M, Q8_0, IQ2_XS, MXFP4_MOE and so on, as llama-quantize has them.",
            autocompletion=completion.file_types(),
        ),
    ],
    types: TypeChoice,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="An importance matrix of this model."), READS
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", metavar="N", help="Threads; the cores that are there by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and estimate the size; write nothing.")
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
            allow_requantize=types.allow_requantize,
            pure=types.pure,
            quantize_output=not types.leave_output_tensor,
            output_tensor_type=types.output_tensor_type,
            token_embedding_type=types.token_embedding_type,
            tensor_types=[_parse_tensor_type(text) for text in split_list(types.tensor_type)],
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    if json:
        return print_json(report.to_dict())
    print_facts(_facts(report))
    if dry_run:
        print_advice("the same without --dry-run")
    else:
        print_next("reap", "evaluate", output, "TEXT", "--reference", model, *forwarded("threads"))


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


@PANEL.command("reap devices")
def devices(json: Json = False) -> None:
    """List the devices that can run a model."""
    from reap.engine.devices import backends
    from reap.engine.devices import devices as list_devices

    found = list_devices()
    unused = [
        f"{backend.name} is installed and not used: {backend.problem}" for backend in backends() if backend.problem
    ]
    if json:
        for line in unused:
            typer.echo(line, err=True)
        return print_json([device.to_dict() for device in found])
    rows = [
        (device.name, device.kind, device.description, bytes_text(device.memory_free), bytes_text(device.memory_total))
        for device in found
    ]
    print_table(["device", "kind", "what it is", "free", "memory"], rows)
    for line in unused:
        say(line)
    device = next((device.name for device in found if device.kind != "cpu"), None)
    where = [] if device is None else ["--device", device]
    print_next("reap", "profile", "MODEL", "CALIBRATION", "-o", "model.reap.json", *where)


@PANEL.command("reap rpc-server --port 50052")
def rpc_server(
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen at.")] = 50052,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", metavar="N", help="Threads of the processor.")
    ] = None,
) -> None:
    """Lend this machine's devices to a `reap profile --rpc` elsewhere.

    The protocol has no password and trusts anyone who connects: keep it on this machine, or inside a network that you
    trust.
    """
    import signal

    from reap.engine.devices import serve_rpc

    if not host.startswith("127.") and host not in ("localhost", "::1"):
        say(
            f"warning: anyone who can reach {host}:{port} can use and read this process; listen on a network that you"
            " trust alone"
        )
    say(f"serving at {host}:{port}; Ctrl-C ends it")
    print_next(
        "reap", "profile", "MODEL", "CALIBRATION", "-o", "model.reap.json", "--rpc", f"{_reachable(host)}:{port}"
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the engine's loop knows no Python
        signal.signal(number, signal.SIG_DFL)
    serve_rpc(host, port, threads)


def _reachable(host: str) -> str:
    """What another machine calls the host: not the address that stands for all of its own."""
    return "HOST" if host in ("0.0.0.0", "::") else host


@PANEL.command("reap demo --out reap-demo")
def demo(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Directory for the model, the profile and the pruned files."),
        WRITES_FOLDER,
    ] = Path("reap-demo"),
) -> None:
    """Profile, prune, evaluate and report on the small model that comes with reap, in under a minute."""
    demonstration.demo(out)
