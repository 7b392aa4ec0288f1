"""Stored numbers into floats, for the few tensors whose values reap looks at (routers); experts are never dequantised.

The layouts of the blocks are those of ggml's src/ggml-common.h; a test holds each against the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

#: Stored number by number, exactly, in GGUF files and in safetensors files alike.
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


def dequantize(raw: bytes, type_name: str) -> Floats | None:
    """float32 [n]: the numbers in `raw`, whole blocks of a ggml type (or of a safetensors dtype that is as plain).

    None for a type that is not known here; a number of F64 is rounded.
    """
    if type_name in PLAIN_TYPES:
        return _plain(raw, type_name)
    if type_name not in _BLOCKS:
        return None
    n_bytes, unpack = _BLOCKS[type_name]
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite
        return np.ascontiguousarray(unpack(np.frombuffer(raw, dtype=np.uint8).reshape(-1, n_bytes))).reshape(-1)


def _plain(raw: bytes, type_name: str) -> Floats:
    if type_name == "BF16":  # the upper half of an F32
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[type_name]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.frombuffer(raw, dtype=kind).astype(np.float32)


# ---- blocks, each uint8 [n_blocks, n_bytes] -> float32 [n_blocks, n_numbers]


def _half(blocks: Bytes, at: int) -> Floats:
    """float32 [n_blocks, 1]: the F16 at byte `at` of each block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """uint8 [n_blocks, 2n] of [n_blocks, n]: all low halves, then all high halves."""
    halves: Bytes = np.concatenate([packed & 15, packed >> 4], axis=1)
    return halves


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """uint8 [n_blocks, 32]: 16 where the bit of the number is set in the four bytes at `at`."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return bits * np.uint8(16)


def _q4_0(blocks: Bytes) -> Floats:
    numbers: Floats = _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)
    return numbers


def _q4_1(blocks: Bytes) -> Floats:
    numbers: Floats = _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)
    return numbers


def _q5_0(blocks: Bytes) -> Floats:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    values: Floats = _half(blocks, 0) * (numbers.astype(np.float32) - 16)
    return values


def _q5_1(blocks: Bytes) -> Floats:
    numbers: Floats = _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)) + _half(blocks, 2)
    return numbers


def _q8_0(blocks: Bytes) -> Floats:
    numbers: Floats = _half(blocks, 0) * blocks[:, 2:].view(np.int8)
    return numbers


_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def _iq4_nl(blocks: Bytes) -> Floats:
    numbers: Floats = _half(blocks, 0) * _IQ4_VALUES[_nibbles(blocks[:, 2:])]
    return numbers


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """Each float32 [n_blocks, 8, 1], from 12 bytes that hold sixteen numbers of 6 bits."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=1)
    return scales.astype(np.float32)[:, :, None], minima.astype(np.float32)[:, :, None]


def _nibbles_by_64(packed: Bytes) -> Bytes:
    """uint8 [n_blocks, 8, 32] of [n_blocks, 128]: the low halves of 32 bytes, then their high halves, and so on."""
    groups = packed.reshape(-1, 4, 32)
    halves: Bytes = np.stack([groups & 15, groups >> 4], axis=2).reshape(-1, 8, 32)
    return halves


def _q4_k(blocks: Bytes) -> Floats:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale, minimum = _half(blocks, 0)[:, :, None], _half(blocks, 2)[:, :, None]
    numbers: Floats = scale * scales * _nibbles_by_64(blocks[:, 16:]) - minimum * minima
    return numbers


def _q5_k(blocks: Bytes) -> Floats:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale, minimum = _half(blocks, 0)[:, :, None], _half(blocks, 2)[:, :, None]
    bits = (blocks[:, 16:48][:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    numbers: Floats = scale * scales * (_nibbles_by_64(blocks[:, 48:]) | (bits << 4)) - minimum * minima
    return numbers


def _q6_k(blocks: Bytes) -> Floats:
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=2)
    upper = (high >> np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]) & 3
    numbers = (nibbles | (upper << 4)).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)[:, :, None]
    values: Floats = _half(blocks, 208)[:, :, None] * scales * numbers
    return values


_BLOCKS: Mapping[str, tuple[int, Callable[[Bytes], NDArray[Any]]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "IQ4_NL": (18, _iq4_nl),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
#: The types that `dequantize` reads.
READABLE_TYPES = (*PLAIN_TYPES, *_BLOCKS)
