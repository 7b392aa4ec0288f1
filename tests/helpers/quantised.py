"""Quantised twins of a small F32 model: the same values once as quantised blocks and once as the floats these stand
for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES

import gguf
from gguf import GGMLQuantizationType

Array = np.ndarray[Any, Any]


def write_twins(source: Path, quantised: Path, floats: Path, kind: GGMLQuantizationType) -> None:
    """Copy `source` twice: with its matrices in blocks of `kind`, and with the floats that those blocks decode to."""
    reader = gguf.GGUFReader(str(source))
    in_blocks = gguf.GGUFWriter(str(quantised), "qwen3moe")
    in_floats = gguf.GGUFWriter(str(floats), "qwen3moe")
    for writer in (in_blocks, in_floats):
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        if values.ndim < 2 or "ffn_gate_inp" in tensor.name:
            in_blocks.add_tensor(tensor.name, values)
            in_floats.add_tensor(tensor.name, values)
            continue
        blocks = to_blocks(values, kind)
        in_blocks.add_tensor(tensor.name, blocks, raw_dtype=kind)
        in_floats.add_tensor(tensor.name, gguf.quants.dequantize(blocks, kind).astype(np.float32))
    for writer in (in_blocks, in_floats):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def to_blocks(values: Array, kind: GGMLQuantizationType) -> Array:
    """Quantise where the gguf package can; Q4_K gets random codes of about the same size, which is all a comparison
    needs."""
    if kind != GGMLQuantizationType.Q4_K:
        return gguf.quants.quantize(values, kind)
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.shape[-1] + values.size)
    codes = rng.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    # a super-block is d, dmin (both half floats), 12 bytes of scales and minima, 128 bytes of 4-bit codes. Their means
    # cancel where 7.5 times the mean scale equals the mean minimum
    step = float(values.std()) / 160
    codes[:, 0:4] = np.array([step, 7.5 * step], dtype=np.float16).view(np.uint8)
    return codes.reshape(*values.shape[:-1], values.shape[-1] // block * size)
