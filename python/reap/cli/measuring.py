"""profile, merge, compare, evaluate, devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import reap
from reap.cli.options import Json, Metric, Seed, check_output, parse_keep, with_engine_options
from reap.cli.show import bytes_text, number_text, percent_text, print_facts, print_json, print_table, progress_bar, say
from reap.cli.summary import profile_facts
from reap.engine.options import EVALUATION_CTX_SIZE, PROFILE_CTX_SIZE, EngineArguments

if TYPE_CHECKING:
    from reap.evaluation.loops import LoopMetrics
    from reap.evaluation.result import Evaluation
    from reap.scores.profile import Profile

Output = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]


@with_engine_options(ctx_size=PROFILE_CTX_SIZE)
def profile(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file.")],
    calibration: Annotated[
        list[str], typer.Argument(metavar="CALIBRATION...", help="JSON Lines or text; - is standard input.")
    ],
    output: Output,
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
    *,
    engine: EngineArguments,
) -> None:
    """Measure what each expert contributes on a calibration text."""
    check_output(output, model, *calibration)
    source: Any = calibration if len(calibration) > 1 else calibration[0]
    kept: dict[str, Any] = {"checkpoint": checkpoint, "resume": resume} if checkpoint or resume else {}
    with progress_bar("profiling") as progress:
        measured = reap.profile(
            model,
            source,
            chat_template=chat_template,
            mask=mask,
            parse_special=not no_parse_special,
            max_tokens=max_tokens,
            progress=progress,
            **kept,
            **engine,
        )
    measured.save(output)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)  # the profile holds all of it now
    print_profile(measured, output)


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
            ("failed", f"{len(failed):,} samples: {'; '.join(failed[:3])}" if failed else None),
            ("domains", ", ".join(measured.domains) or None),
            *profile_facts(measured),
        ]
    )


def merge(
    profiles: Annotated[list[Path], typer.Argument(metavar="A.json B.json...", help="Profiles of one model.")],
    output: Output,
) -> None:
    """Add profiles of one model up, exactly."""
    check_output(output)
    merged = reap.merge(profiles)
    merged.save(output)
    print_profile(merged, output)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A profile.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another profile of the same model.")],
    keep: Annotated[
        str, typer.Option("--keep", metavar="N|FRACTION", help="Experts to keep: 0.5 is half, 64 is 64.")
    ] = "0.5",
    metric: Metric = "reap",
    seed: Seed = 0,
    html: Annotated[
        Path | None, typer.Option("--html", "-o", metavar="FILE", help="Write a page of it as well.")
    ] = None,
    json: Json = False,
) -> None:
    """Say how far two profiles agree: rank correlation, and overlap of the experts they would keep."""
    if html is not None:
        check_output(html, a, b)
    result = reap.compare(a, b, keep=parse_keep(keep), metric=metric, seed=seed)
    if html is not None:
        reap.comparison_report(a, b, html, keep=parse_keep(keep), metric=metric, seed=seed)
    if json:
        return print_json(result.to_dict())
    rows = [
        (layer.layer, number_text(layer.spearman), number_text(layer.overlap), number_text(layer.jaccard))
        for layer in result.layers
    ]
    mean = ("mean", number_text(result.spearman), number_text(result.overlap), number_text(result.jaccard))
    print_table(["layer", "rank correlation", f"overlap of {result.keep} kept", "Jaccard"], [*rows, mean])


@with_engine_options(ctx_size=EVALUATION_CTX_SIZE)
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file.")],
    text: Annotated[
        list[Path],
        typer.Argument(
            metavar="TEXT...", help="Held-out text, or JSON Lines with domains; of several files each is a domain."
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="MODEL", help="Compare with this model, the one before pruning say."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="PLAN.json", help="Evaluate as if MODEL were pruned so; nothing is written."),
    ] = None,
    loops: Annotated[
        bool, typer.Option("--loops", help="Let the model continue a few prompts, and look for repetition.")
    ] = False,
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
            progress=progress,
            **engine,
        )
    if json:
        return print_json(result.to_dict())
    print_evaluation(result)


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
            ("same top token", percent_text(result.top1)),
            ("halved", f"{percent_text(result.halved)} of the tokens are at most half as probable"),
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
             percent_text(found.top1), percent_text(found.halved))
            for name, found in result.domains.items()
        ]  # fmt: skip
        print_table(columns, rows)
    say(result.meaning)


def _loop_facts(loops: LoopMetrics) -> list[tuple[str, object]]:
    def beside(value: float, reference: float | None) -> str:
        return percent_text(value) + ("" if reference is None else f" (reference {percent_text(reference)})")

    return [
        ("continuations", f"{loops.prompts} of up to {loops.new_tokens} tokens"),
        ("repeated 4-grams", beside(loops.repeated, loops.reference_repeated)),
        ("end in a loop", beside(loops.looping, loops.reference_looping)),
        ("unfinished", beside(loops.unfinished, loops.reference_unfinished)),
    ]


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


def rpc_server(
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen at.")] = 50052,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", metavar="N", help="Threads of the processor.")
    ] = None,
) -> None:
    """Lend this machine's devices to a `reap profile --rpc` elsewhere.

    The protocol has no password and trusts whoever connects: keep it on this machine, or inside a network that you
    trust.
    """
    import signal

    from reap.engine.devices import serve_rpc

    if not host.startswith("127.") and host not in ("localhost", "::1"):
        say(
            f"warning: whoever can reach {host}:{port} can use and read this process; listen on a network that you"
            " trust alone"
        )
    say(f"serving at {host}:{port}; Ctrl-C ends it")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the engine's loop knows no Python
    serve_rpc(host, port, threads)
