"""The commands put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from reap.cli import checkpoints, converting, cutting, demonstration, measuring, reporting, sweeping
from reap.errors import Interrupted, ReapError
from reap.version import version


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:  # where typer would exit with 1, and without a word
            raise Interrupted("interrupted; no output was written") from stop


app = typer.Typer(
    name="reap",
    cls=_Group,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print("\n".join((f"reap {version()}", *_engine_lines())))
        raise typer.Exit


def _engine_lines() -> list[str]:
    from reap.engine import native
    from reap.engine.devices import backends

    try:
        commit = native.load().__llama_cpp_commit__
        usable = [f"{backend.name} ({backend.library})" for backend in backends() if not backend.problem]
    except ReapError as error:
        return [f"no engine: {error}"]
    return [f"llama.cpp {commit}", f"backends: {', '.join(usable)}"]


@app.callback(epilog="Example: reap demo")
def reap(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the version, llama.cpp's commit and the backends.",
        ),
    ] = False,
) -> None:
    """Measure what each expert of a Mixture-of-Experts GGUF model contributes, and remove the ones that contribute
    least.

    [bold]The road.[/bold] Each step leaves a file that a person can read; `reap demo` walks it on a small model that
    comes along.

    \b
      reap inspect model.gguf
      reap profile model.gguf calibration.jsonl -o model.reap.json
      reap plan model.reap.json --keep 0.5 -o plan.json
      reap prune model.gguf --plan plan.json -o small.gguf
      reap evaluate small.gguf heldout.txt

    [bold]Calibration[/bold] is JSON Lines, a line one sample with "text", "prompt" and "response", "messages" or
    "tokens"; or a .txt file. Evaluate on other text: a pruned model is flattered by what it was measured on.

    [bold]--keep[/bold] with a point is a fraction (0.5 is half), without one a number of experts (64 is 64).

    [bold]Output.[/bold] Results go to stdout, progress and warnings to stderr; --json prints one JSON document. Files
    appear whole or not at all.

    [bold]Exit codes.[/bold] 0 done; 1 the work failed; 2 the call was wrong; 130 interrupted (it says what was kept).

    [bold]Environment.[/bold] REAP_TRACEBACK=1 shows where an error arose.
    """


_PANELS = {
    "Measure": ("inspect", "profile", "merge", "compare"),
    "Cut": ("plan", "prune"),
    "PlanEvaluator": ("evaluate", "sweep", "report", "card"),
    "Around it": ("convert", "quantize", "hf", "devices", "rpc-server", "demo"),
}
_PANEL_OF = {name: panel for panel, names in _PANELS.items() for name in names}

for _command, _example in (
    (cutting.inspect, "reap inspect model.gguf"),
    (measuring.profile, "reap profile model.gguf calibration.jsonl -o model.reap.json -ngl 0 -c 2048"),
    (measuring.merge, "reap merge code.reap.json prose.reap.json -o both.reap.json"),
    (measuring.compare, "reap compare a.reap.json b.reap.json --keep 0.5"),
    (cutting.plan, "reap plan model.reap.json --keep 0.5 -o plan.json"),
    (cutting.prune, "reap prune model.gguf --plan plan.json -o small.gguf"),
    (measuring.evaluate, "reap evaluate model.gguf heldout.txt --plan plan.json --loops"),
    (
        sweeping.sweep,
        (
            "reap sweep model.gguf model.reap.json heldout.txt --keep 0.75,0.5 --metric reap,frequency,random -o"
            " sweep.json"
        ),
    ),
    (reporting.report, "reap report model.reap.json --plan plan.json --model model.gguf -o report.html"),
    (reporting.card, "reap card small.gguf --source model.gguf --profile model.reap.json -o MODEL_CARD.md"),
    (converting.convert, "reap convert Qwen3-30B-A3B model-f16.gguf"),
    (converting.quantize, "reap quantize model-f16.gguf model.gguf Q4_K_M --imatrix model.imatrix.gguf"),
    (measuring.devices, "reap devices"),
    (measuring.rpc_server, "reap rpc-server --port 50052"),
    (demonstration.demo, "reap demo --out reap-demo"),
):
    _name = _command.__name__.replace("_", "-")
    app.command(_name, epilog=f"Example: {_example}", rich_help_panel=_PANEL_OF.get(_name))(_command)
app.add_typer(checkpoints.group, rich_help_panel=_PANEL_OF["hf"])
