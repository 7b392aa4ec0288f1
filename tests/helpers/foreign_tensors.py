"""Stores tensors of a small model as types that the `gguf` package cannot write; knows nothing of reap."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gguf import GGUFReader

ALIGNMENT = 32


class Stored(NamedTuple):
    """How to store a tensor: a type's id, the bytes of each of its rows, and bytes at the end of the tensor."""

    type_id: int
    row_bytes: int
    tail_bytes: int = 0


def store_as(source: Path, target: Path, stored: Mapping[str, Stored], *, seed: int = 0) -> dict[str, bytes]:
    """`source` with the tensors of some names (the part after `blk.N.`) of random bytes in other types; those bytes."""
    reader = GGUFReader(source)
    rng = np.random.default_rng(seed)
    raw = source.read_bytes()
    table, data, made = b"", b"", {}
    for tensor in reader.tensors:
        shape = [int(length) for length in tensor.shape]
        kind = stored.get(tensor.name.split(".", 2)[-1] if tensor.name.startswith("blk.") else tensor.name)
        if kind is None:
            type_id, contents = int(tensor.tensor_type), tensor.data.tobytes()
        else:
            n_rows = int(np.prod(shape[1:]))
            type_id, contents = kind.type_id, rng.bytes(n_rows * kind.row_bytes + kind.tail_bytes)
            made[tensor.name] = contents
        name = tensor.name.encode()
        table += struct.pack("<Q", len(name)) + name
        table += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, len(data))
        data += contents + bytes(-len(contents) % ALIGNMENT)
    header = raw[: int(reader.tensors[0].field.offset)] + table
    target.write_bytes(header + bytes(-len(header) % ALIGNMENT) + data)
    return made
