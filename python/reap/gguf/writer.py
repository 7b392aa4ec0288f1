"""Writes GGUF files made of byte ranges of other files; it knows nothing of experts.

A `NewFile` says what the file will hold, down to the last byte, before anything is written. `write_set` then copies the
ranges inside the kernel where it can, to temporary files beside the outputs, which take the outputs' places only when
all are complete.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reap.errors import FormatError
from reap.files.ranges import Piece, Span, merge_spans, total_bytes
from reap.gguf.parser import DEFAULT_ALIGNMENT, MAGIC, pad
from reap.gguf.reader import GGUFFile
from reap.gguf.tensor_types import SCALAR_CODES, ValueType

_HEADER_BYTES = 24


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write."""

    name: str
    """As in the tensor table."""
    shape: tuple[int, ...]
    """GGUF order: ne[0] first."""
    type: int
    """ggml type id."""
    pieces: tuple[Piece, ...]
    """Its bytes, in order."""

    @property
    def n_bytes(self) -> int:
        """Its size, without padding."""
        return total_bytes(self.pieces)


@dataclass(frozen=True)
class NewFile:
    """A GGUF file to write."""

    version: int
    """Of the format."""
    alignment: int
    """Of the tensors' data, in bytes."""
    n_keys: int
    """Metadata pairs."""
    metadata: tuple[Piece, ...]
    """The whole encoded pairs (key, type, value), in order."""
    tensors: tuple[NewTensor, ...]
    """In the order of their data."""

    def pieces(self) -> Iterator[Piece]:
        """The whole file, in order."""
        header = (
            struct.pack("<4sIQQ", MAGIC, self.version, len(self.tensors), self.n_keys),
            *self.metadata,
            self._tensor_table(),
        )
        yield from header
        yield bytes(pad(total_bytes(header), self.alignment) - total_bytes(header))
        for tensor in self.tensors:
            yield from tensor.pieces
            # llama.cpp expects every tensor where the padded end of the one before is, and the last one padded too
            yield bytes(pad(tensor.n_bytes, self.alignment) - tensor.n_bytes)

    @property
    def n_bytes(self) -> int:
        """The exact size of the file."""
        return total_bytes(self.pieces())

    def _tensor_table(self) -> bytes:
        entries, offset = [], 0
        for tensor in self.tensors:
            entries.append(_table_entry(tensor, offset))
            offset += pad(tensor.n_bytes, self.alignment)
        return b"".join(entries)


def _table_entry(tensor: NewTensor, offset: int) -> bytes:
    name, n_dims = tensor.name.encode(), len(tensor.shape)
    return (
        struct.pack("<Q", len(name)) + name + struct.pack(f"<I{n_dims}QIQ", n_dims, *tensor.shape, tensor.type, offset)
    )


def split(whole: NewFile, max_bytes: int, pairs: Callable[[int, int], Iterable[bytes]]) -> tuple[NewFile, ...]:
    """`whole` as shards of at most `max_bytes` each, tensors in order, the metadata in the first; one that fits is one
    shard.

    pairs: (shard, shards) -> encoded pairs that every shard carries at its end. A tensor that is larger has a shard of
    its own.
    """
    if whole.n_bytes <= max_bytes:
        return (whole,)
    extra = tuple(pairs(0, 0))
    own = (
        []
        if whole.alignment == DEFAULT_ALIGNMENT
        else [encode_pair("general.alignment", whole.alignment, ValueType.UINT32)]
    )
    groups: list[list[NewTensor]] = [[]]
    header, data = _HEADER_BYTES + total_bytes(whole.metadata) + total_bytes(extra), 0
    for tensor in whole.tensors:
        entry, n_bytes = len(_table_entry(tensor, 0)), pad(tensor.n_bytes, whole.alignment)
        if groups[-1] and pad(header + entry, whole.alignment) + data + n_bytes > max_bytes:
            groups.append([])
            header, data = _HEADER_BYTES + total_bytes(own) + total_bytes(extra), 0
        groups[-1].append(tensor)
        header, data = header + entry, data + n_bytes
    shards = []
    for index, tensors in enumerate(groups):
        added = tuple(pairs(index, len(groups)))
        metadata, n_keys = (tuple(own), len(own)) if index else (whole.metadata, whole.n_keys)
        shards.append(NewFile(whole.version, whole.alignment, n_keys + len(added), (*metadata, *added), tuple(tensors)))
    return tuple(shards)


# ---- metadata


def encode_pair(key: str, value: Any, type_id: int, array_type: int | None = None) -> bytes:
    """One metadata pair as stored: key, type id and value. Raises FormatError where the value does not fit the type."""
    name = key.encode()
    body = struct.pack("<I", type_id)
    try:
        if array_type is None:
            body += _encode(value, type_id)
        else:
            body += struct.pack("<IQ", array_type, len(value)) + b"".join(_encode(item, array_type) for item in value)
    except struct.error as error:
        raise FormatError(
            f"metadata {key!r}: {value!r} does not fit its type {ValueType(type_id).name}: {error}"
        ) from None
    return struct.pack("<Q", len(name)) + name + body


def _encode(value: Any, type_id: int) -> bytes:
    if type_id == ValueType.STRING:
        text = str(value).encode()
        return struct.pack("<Q", len(text)) + text
    return struct.pack("<" + SCALAR_CODES[type_id], value)


def edit_metadata(
    file: GGUFFile, *, replace: Mapping[str, bytes], drop: Collection[str] = (), append: Iterable[bytes] = ()
) -> tuple[int, tuple[Piece, ...]]:
    """(number of pairs, pieces): the pairs of `file` in their order, untouched ones as spans of it.

    replace: key -> encoded pair that takes its place. drop: keys to leave out. append: encoded pairs for the end.
    """
    pieces: list[Piece] = [
        replace.get(key, Span(file, pair.offset_bytes, pair.n_bytes))
        for key, pair in file.metadata.items()
        if key not in drop
    ]
    pieces += append
    return len(pieces), merge_spans(pieces)
