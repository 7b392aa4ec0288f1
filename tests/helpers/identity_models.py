"""Variants of one small model: its routers stored otherwise, its rows permuted, a sibling; for tests of identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import gguf
from gguf import GGMLQuantizationType
from helpers.gguf_builder import build_moe

N_LAYERS, N_EXPERTS, N_EMBD = 2, 8, 256
ROUTER = "blk.{}.ffn_gate_inp.weight"


def routers(seed: int = 9) -> list[np.ndarray[Any, Any]]:
    """float32 [n_experts, n_embd] of each layer, not to be had in fewer bits."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((N_EXPERTS, N_EMBD)) * 0.05).astype(np.float32) for _ in range(N_LAYERS)]


def bf16(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rounded to BF16, as float32."""
    raw = gguf.quants.quantize(rows, GGMLQuantizationType.BF16)
    return gguf.quants.dequantize(raw, GGMLQuantizationType.BF16)


def model_with(
    path: Path, rows: list[np.ndarray[Any, Any]], kind: GGMLQuantizationType = GGMLQuantizationType.F32, **changes: Any
) -> Path:
    """A model whose routers are `rows`, stored as `kind`; all else is always the same, up to `changes`."""
    typed = {}
    for layer, values in enumerate(rows):
        stored = values.astype(np.float16) if kind.name == "F16" else gguf.quants.quantize(values, kind)
        typed[ROUTER.format(layer)] = (values if kind.name == "F32" else stored, kind)
    return build_moe(path, n_layers=N_LAYERS, n_experts=N_EXPERTS, n_embd=N_EMBD, typed=typed, **changes)
