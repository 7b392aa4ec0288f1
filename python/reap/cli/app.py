"""The commands put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from reap.cli import cut, evaluate, generate, hf, measure, repair, shrink, utilities
from reap.errors import Interrupted, ReapError
from reap.files.version import version


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

    [bold]Pipeline.[/bold] `reap shrink` does all of it in one job, `reap demo` shows that on a small model that comes
    with reap. Step by step, each leaves a file that a person can read:

    \b
      reap inspect model.gguf
      reap profile model.gguf calibration.jsonl -o model.reap.json
      reap plan model.reap.json --keep 0.5 -o plan.json
      reap prune model.gguf --plan plan.json -o small.gguf
      reap evaluate small.gguf heldout.txt

    [bold]Calibration[/bold] is JSON Lines, a line one sample with "text", "prompt" and "response", "messages" or
    "tokens"; or a .txt file. Evaluate on other text: a pruned model is flattered by what it was measured on.

    [bold]--keep[/bold] is a number of experts (64), or a fraction of them (0.5 or 50%).

    [bold]Output.[/bold] Results go to stdout, progress and warnings to stderr; --json prints one JSON document. Files
    appear whole or not at all, and none that exists is replaced without --force.

    [bold]Exit codes.[/bold] 0 done; 1 the work failed; 2 the call was wrong; 130 interrupted (it says what was kept).

    [bold]Environment.[/bold] REAP_TRACEBACK=1 shows where an error arose.
    """


PANELS = (
    shrink.PANEL,
    measure.PANEL,
    cut.PANEL,
    repair.PANEL,
    evaluate.PANEL,
    generate.PANEL,
    utilities.PANEL,
)
for _panel in PANELS:
    _panel.add_to(app)
app.add_typer(hf.group, rich_help_panel=utilities.PANEL.title)
