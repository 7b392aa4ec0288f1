"""The commands put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from reap.cli import checkpoints, cutting, demonstration, measuring
from reap.errors import Interrupted
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
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"reap {version()}")
        raise typer.Exit


@app.callback(epilog="Example: reap demo")
def reap(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Measure what each expert of a Mixture-of-Experts GGUF model contributes, and remove the ones that contribute least."""


for _command, _example in (
    (cutting.inspect, "reap inspect model.gguf"),
    (measuring.profile, "reap profile model.gguf calibration.jsonl -o model.reap.json -ngl 0 -c 2048"),
    (measuring.merge, "reap merge code.reap.json prose.reap.json -o both.reap.json"),
    (measuring.compare, "reap compare a.reap.json b.reap.json --keep 0.5"),
    (cutting.plan, "reap plan model.reap.json --keep 0.5 -o plan.json"),
    (cutting.prune, "reap prune model.gguf --plan plan.json -o small.gguf"),
    (measuring.evaluate, "reap evaluate model.gguf heldout.txt --plan plan.json --loops"),
    (measuring.devices, "reap devices"),
    (measuring.rpc_server, "reap rpc-server --port 50052"),
    (demonstration.demo, "reap demo --out reap-demo"),
):
    app.command(_command.__name__.replace("_", "-"), epilog=f"Example: {_example}")(_command)
app.add_typer(checkpoints.group)
