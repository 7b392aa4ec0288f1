"""Writes small checkpoints byte by byte, without the safetensors package and without any of reap's code.

Every tensor's bytes are random, so that a row in the wrong place shows.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

BITS = {"F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "U8": 8, "I8": 8, "I32": 32, "U32": 32, "F4": 4, "I64": 64}
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape

N_EXPERTS, N_EMBD, N_FF = 8, 16, 4
KEPT = {0: (1, 2, 4, 7), 1: (0, 3, 5, 6)}


def qwen(
    layers: Iterable[int] = (0, 1), n_experts: int = N_EXPERTS, dtype: str = "BF16", block: str = "model.layers.{}.mlp"
) -> Tensors:
    """Per-expert tensors, a router, a shared expert with a gate, attention."""
    tensors: Tensors = {"model.embed_tokens.weight": (dtype, (32, N_EMBD))}
    for layer in layers:
        here = block.format(layer)
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = (dtype, (N_EMBD, N_EMBD))
        tensors[f"{here}.gate.weight"] = (dtype, (n_experts, N_EMBD))
        for expert in range(n_experts):
            for kind, shape in (("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF))):
                tensors[f"{here}.experts.{expert}.{kind}_proj.weight"] = (dtype, shape)
        tensors[f"{here}.shared_expert.up_proj.weight"] = (
            dtype,
            (n_experts, N_EMBD),
        )  # as many rows as there are experts
        tensors[f"{here}.shared_expert_gate.weight"] = (dtype, (1, N_EMBD))
    return tensors


def config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": N_EMBD,
        "num_hidden_layers": 2,
        "num_experts": N_EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": 32,
        **changes,
    }


def write_file(
    path: Path, tensors: Tensors, seed: int = 0, metadata: Mapping[str, str] | None = None
) -> dict[str, bytes]:
    """One safetensors file; the bytes of each tensor."""
    generator = random.Random(seed)
    header: dict[str, Any] = {"__metadata__": dict(metadata if metadata is not None else {"format": "pt"})}
    contents, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        n_bytes = prod(shape) * BITS[dtype] // 8
        contents[name] = generator.randbytes(n_bytes)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(contents.values()))
    return contents


def read_file(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape, bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = raw[8 + length :]
    return {
        name: (item["dtype"], tuple(item["shape"]), data[slice(*item["data_offsets"])]) for name, item in header.items()
    }


def build(directory: Path, tensors: Tensors, document: Mapping[str, Any], n_shards: int = 1) -> dict[str, bytes]:
    """A checkpoint of one or several files, with a tokenizer beside it; the bytes of each tensor."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    if n_shards == 1:
        return write_file(directory / "model.safetensors", tensors)
    contents: dict[str, bytes] = {}
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(n_shards):
        part = {name: tensors[name] for name in names[shard::n_shards]}
        file = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        contents |= write_file(directory / file, part, seed=shard)
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(map(len, contents.values()))},
        "weight_map": {name: weight_map[name] for name in names},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return contents
