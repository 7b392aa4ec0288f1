"""llama.cpp's habits on the command line: its options that mean something here under another name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from reap.errors import UsageError

#: The tensors that --cpu-moe and --n-cpu-moe place, as llama.cpp names them (common/common.h, LLM_FFN_EXPS_REGEX).
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"

ENGINE_HABITS: Mapping[str, Any] = {
    "cpu_moe": Annotated[
        bool | None, typer.Option("--cpu-moe", "-cmoe", help="Keep all experts in the processor's memory.")
    ],
    "n_cpu_moe": Annotated[
        int | None,
        typer.Option("--n-cpu-moe", "-ncmoe", metavar="N", help="Keep the experts of the first N layers in it."),
    ],
}


def engine_habits(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tensors that `--cpu-moe` and `--n-cpu-moe` place elsewhere, as `override_tensors` has them."""
    n_layers = values["n_cpu_moe"]
    if n_layers is not None and n_layers < 0:
        raise UsageError(f"--n-cpu-moe is {n_layers}, expected a number of layers from 0 on")
    if values["cpu_moe"]:
        return [(_EXPERTS, "CPU")]
    return [(rf"blk\.{layer}{_EXPERTS}", "CPU") for layer in range(n_layers or 0)]


def put_model_first(arguments: Sequence[str]) -> list[str]:
    """`-m MODEL` and `--model MODEL` become the first argument, where a command takes its model."""
    rest, model = list(arguments), []
    for index, argument in enumerate(rest):
        name, found, value = argument.partition("=")
        if name in ("-m", "--model") and (found or index + 1 < len(rest)):
            model = [value] if found else [rest[index + 1]]
            del rest[index : index + 2 - bool(found)]
            break
        if argument == "--":
            break
    return [*model, *rest]
