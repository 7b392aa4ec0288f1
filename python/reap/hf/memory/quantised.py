"""Checkpoints whose weights are published quantised: which are decoded as they are read, by the libraries that own the
formats, and which are refused, with the way that works."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reap.errors import UnsupportedModelError
from reap.hf.disk.checkpoint_files import QUANTISATIONS, Checkpoint
from reap.hf.disk.layout import is_apart, is_of_prediction
from reap.hf.disk.safetensors_file import DTYPE_BITS

#: Decoded by transformers to the type that the model computes in, on any device.
_DECODED = ("fp8", "mxfp4", "compressed-tensors")
#: Run by transformers as they are, where their library is installed.
_RUN = ("bitsandbytes",)
_PLAIN = frozenset({"F16", "BF16", "F32", "F64", "I64", "I32", "BOOL"})
_OF_A_WEIGHT = re.compile(
    r"weight_(scale|zero_point|packed|global_scale)|scale_inv|qweight|qzeros|absmax|_proj_scale|\.(scales|biases|SCB)$"
)
_WAY = (
    "profile the checkpoint that it was quantised from, or a GGUF file of the same model: the profile serves this one"
    " as well (reap hf prune --profile)"
)


def decode_when_read(folder: Path, config: Any) -> None:
    """Let transformers decode what a checkpoint has quantised, as it loads it; `config` says so afterwards.

    Raises UnsupportedModelError for a form that cannot be run, or that config.json says nothing of: read without its
    scales, it would be another model.
    """
    held = [one for one in (config, _inner(config)) if isinstance(getattr(one, "quantization_config", None), dict)]
    if not held:
        _refuse_untold(folder, config)
        return
    for one in held:
        method = str(one.quantization_config.get("quant_method") or "").lower()
        if method in _DECODED:
            one.quantization_config = {**one.quantization_config, "dequantize": True}
        elif method not in _RUN:
            raise UnsupportedModelError(
                f"{folder}: its weights are quantised by {method or 'a method without a name'}, which reap does not"
                f" run; {_WAY}"
            )


def refuse_unused(folder: Path, names: Iterable[str], n_layers: int) -> None:
    """UnsupportedModelError where something that belongs to a quantised weight was read and not used: the weight was
    taken for what it is not. n_layers: those that transformers runs."""
    unused = sorted(
        name for name in names if _OF_A_WEIGHT.search(name) and not (is_apart(name) or is_of_prediction(name, n_layers))
    )
    if unused:
        raise UnsupportedModelError(
            f"{folder}: {unused[0][:80]} belongs to a quantised weight, and transformers does not use it; {_WAY}"
        )


def _inner(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None


def _refuse_untold(folder: Path, config: Any) -> None:
    for name in QUANTISATIONS:
        if (folder / name).is_file():
            raise UnsupportedModelError(
                f"{folder}: {name} says that its weights are quantised ({_algorithm(folder / name)}), which"
                f" transformers does not read; {_WAY}"
            )
    if isinstance(getattr(config, "quantization", None), Mapping):
        raise UnsupportedModelError(f"{folder}: its weights are quantised by MLX, which reap does not run; {_WAY}")
    with Checkpoint.open(folder, trust="named") as checkpoint:
        odd = next((t for t in checkpoint.tensors if t.dtype not in _PLAIN and len(t.shape) > 1), None)
    if odd is not None:
        raise UnsupportedModelError(
            f"{folder}: {odd.name[:80]} is stored as {odd.dtype} ({DTYPE_BITS[odd.dtype]} bits), and config.json does"
            f" not say how it is quantised; {_WAY}"
        )


def _algorithm(path: Path) -> str:
    try:
        document = json.loads(path.read_bytes())
        inner = document.get("quantization", document)
        return str(inner.get("quant_algo") or inner.get("quant_method") or f"{inner['bits']} bits")[:40]
    except (OSError, ValueError, LookupError, AttributeError, RecursionError):
        return "as it is"
