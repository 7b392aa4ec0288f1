"""Importance matrices for tests, in the two forms of llama.cpp's imatrix program; knows nothing of reap."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gguf import GGUFReader, GGUFWriter

Array = np.ndarray[Any, Any]
#: name of a weight -> (matrices, values of one)
Sizes = Mapping[str, tuple[int, int]]


def matrix_values(sizes: Sizes, seed: int = 0) -> dict[str, tuple[Array, Array]]:
    """Name -> (sums of squares float32 [matrices, values], counts float32 [matrices, 1]); one expert was never seen."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, (n_matrices, n_values) in sizes.items():
        counts = rng.integers(1, 500, (n_matrices, 1)).astype(np.float32)
        sums = (rng.random((n_matrices, n_values)) * counts).astype(np.float32)
        if n_matrices > 1:
            counts[1], sums[1] = 0, 0
        made[name] = (sums, counts)
    return made


def write_gguf_imatrix(path: Path, sizes: Sizes, seed: int = 0) -> Path:
    writer = GGUFWriter(str(path), "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in matrix_values(sizes, seed).items():
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_legacy_imatrix(path: Path, sizes: Sizes, seed: int = 0) -> Path:
    parts = [struct.pack("<i", len(sizes))]
    for name, (sums, counts) in matrix_values(sizes, seed).items():
        means = (sums / np.maximum(counts, 1)).astype(np.float32)
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", 3, means.size), means.tobytes()]
    parts += [struct.pack("<ii", 3, 15), b"calibration.txt"]
    path.write_bytes(b"".join(parts))
    return path


def read_gguf_imatrix(path: Path) -> dict[str, Array]:
    """Every tensor, by the `gguf` package."""
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def read_legacy_imatrix(path: Path) -> tuple[dict[str, tuple[int, Array]], bytes]:
    """(name -> (calls, values), what follows), as llama.cpp reads it."""
    data, position, entries = path.read_bytes(), 4, {}
    for _ in range(struct.unpack_from("<i", data)[0]):
        (length,) = struct.unpack_from("<i", data, position)
        name = data[position + 4 : position + 4 + length].decode()
        calls, n_values = struct.unpack_from("<ii", data, position + 4 + length)
        position += 12 + length
        entries[name] = (calls, np.frombuffer(data, np.float32, n_values, position))
        position += 4 * n_values
    return entries, data[position:]


def sizes_of(model: Path) -> dict[str, tuple[int, int]]:
    """What a matrix of this model has: every weight of two or three axes, norms and the embedding left out."""
    sizes = {}
    for tensor in GGUFReader(model).tensors:
        shape = [int(length) for length in tensor.shape]
        if tensor.name.endswith(".weight") and len(shape) > 1 and tensor.name != "token_embd.weight":
            sizes[tensor.name] = (shape[2] if len(shape) == 3 else 1, shape[0])
    return sizes
