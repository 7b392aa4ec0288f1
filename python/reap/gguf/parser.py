"""Walks the header of a GGUF file. Every length in it is taken for a claim and checked against the bytes that are
there."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from reap.errors import FormatError
from reap.files.recognise import HEAD_BYTES, what_are
from reap.gguf.foreign_types import MAX_TYPE_ID, Extent, foreign_type, sizes_in_bytes, type_name
from reap.gguf.tensor_types import SCALAR_CODES, TENSOR_TYPES, ValueType

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
#: Limits far above any real file, so that a forged count costs neither time nor memory.
MAX_KEYS = 65_536
MAX_TENSORS = 131_072
MAX_STRINGS = 2_097_152
MAX_HEADER_BYTES = 96 << 20
_HEADER_LIMIT = f"{MAX_HEADER_BYTES >> 20} MiB"
MAX_NAME_BYTES = 65_535
MAX_ALIGNMENT = 1 << 24

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_HEADER = struct.Struct("<4sIQQ")
HEADER_BYTES = _HEADER.size
# the least a pair (length, key, type, value) and a tensor entry (length, name, axes, type, offset) can take
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8


def pad(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor table."""

    name: str
    """Such as `blk.3.ffn_down_exps.weight`."""
    shape: tuple[int, ...]
    """GGUF order: ne[0] (the contiguous axis) first, so the outermost axis is last."""
    type: int
    """ggml type id."""
    offset_bytes: int
    """Of its data, from the start of its file."""
    n_bytes: int
    """Of its data, without padding."""
    shard: int = 0
    """Which file of the model it is in, from 0."""

    @property
    def type_name(self) -> str:
        """The ggml type's name, such as `Q4_K`."""
        return type_name(self.type)

    @property
    def tail_bytes(self) -> int:
        """Bytes at its end that belong to all of it; 0 for every type of llama.cpp's."""
        return 0 if self.type in TENSOR_TYPES else foreign_type(self.type).tail_bytes

    @property
    def n_elements(self) -> int:
        """Product of the shape."""
        n = 1
        for length in self.shape:
            n *= length
        return n


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """One metadata pair, decoded only when `.value` is asked for."""

    key: str
    """Such as `general.name`."""
    type: int
    """`ValueType` id."""
    array_type: int | None
    """`ValueType` id of an array's elements; None for a scalar."""
    length: int
    """Number of elements; 1 for a scalar."""
    raw: memoryview = field(repr=False)
    """The exact bytes after the value's type id; an array's begin with its element type and its length."""
    offset_bytes: int
    """Where the whole pair, key and type included, begins in the file."""
    n_bytes: int
    """Size of the whole pair."""

    @property
    def value(self) -> Any:
        """The decoded value: int, float, bool, str or a list of one of them. Invalid UTF-8 becomes U+FFFD."""
        if self.array_type is None:
            return _decode(self.raw, self.type, 1)[0]
        return _decode(self.raw[12:], self.array_type, self.length)


def _decode(raw: memoryview, type_id: int, length: int) -> list[Any]:
    if type_id == ValueType.STRING:
        return list(_strings(raw, length))
    values = list(struct.unpack_from(f"<{length}{SCALAR_CODES[type_id]}", raw))
    return [value != 0 for value in values] if type_id == ValueType.BOOL else values


def _strings(raw: memoryview, length: int) -> Iterator[str]:
    position = 0
    for _ in repeat(None, length):
        start = position + 8
        position = start + _U64.unpack_from(raw, position)[0]
        yield str(raw[start:position], "utf-8", "replace")


class Parser:
    """Walks a header. Every step is checked against the end of the file, every failure is a FormatError."""

    def __init__(self, path: Path, data: memoryview, shard: int) -> None:
        self.path, self.data, self.size, self.shard = path, data, len(data), shard
        self.position = 0
        self.limit = min(self.size, MAX_HEADER_BYTES)
        self.n_strings = 0

    def fail(self, message: str) -> FormatError:
        return FormatError(f"{self.path}: {message}")

    def take(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes` and return where they start."""
        start = self.position
        if n_bytes > self.size - start:
            raise self.fail(f"{what} needs {n_bytes:,} bytes at offset {start:,}, but the file ends at {self.size:,}")
        if n_bytes > self.limit - start:
            raise self.fail(f"{what} makes the header larger than the {_HEADER_LIMIT} that it may take")
        self.position = start + n_bytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.take(8, what))[0])

    def name(self, what: str) -> str:
        """A key or a tensor name: unlike other text it must be valid UTF-8."""
        length = self.u64(f"the length of {what}")
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.fail(f"{what} is {length:,} bytes long, expected 1 to {MAX_NAME_BYTES:,}")
        start = self.take(length, what)
        try:
            return str(self.data[start : self.position], "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} at offset {start:,} is not valid UTF-8") from None

    def header(self) -> tuple[int, int, int]:
        """(version, number of tensors, number of keys)."""
        if self.size >= 4 and bytes(self.data[:4]) != MAGIC:
            what = what_are(bytes(self.data[:HEAD_BYTES]), self.size)
            if what is not None:
                raise self.fail(f"not a GGUF file but {what}")
            raise self.fail(f"not a GGUF file: it starts with {bytes(self.data[:4])!r}, expected {MAGIC!r}")
        start = self.take(_HEADER.size, "the GGUF header")
        _, version, n_tensors, n_keys = _HEADER.unpack_from(self.data, start)
        if version & 0xFFFF == 0 and version != 0:
            raise self.fail("this is a big-endian GGUF file; reap reads little-endian ones")
        if version not in (2, 3):
            raise self.fail(f"GGUF version {version}, expected 2 or 3")
        self.check_count(n_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES, "tensors")
        self.check_count(n_keys, MAX_KEYS, _MIN_KEY_BYTES, "metadata keys")
        return version, n_tensors, n_keys

    def check_count(self, count: int, most: int, min_bytes: int, what: str) -> None:
        if count > most or count * min_bytes > self.size - self.position:
            raise self.fail(f"the header claims {count:,} {what}, more than the file can hold")

    def metadata(self, n_keys: int) -> dict[str, MetadataValue]:
        pairs: dict[str, MetadataValue] = {}
        for index in range(n_keys):
            start = self.position
            key = self.name(f"the name of metadata key {index}")
            if key in pairs:
                raise self.fail(f"metadata key {key!r} appears twice")
            pairs[key] = self.pair(key, start)
        return pairs

    def pair(self, key: str, start: int) -> MetadataValue:
        what = f"the value of {key!r}"
        type_id = self.u32(what)
        raw_start, array_type, length = self.position, None, 1
        if type_id == ValueType.ARRAY:
            array_type, length = self.u32(what), self.u64(what)
        self.skip_values(type_id if array_type is None else array_type, length, what)
        raw = self.data[raw_start : self.position]
        return MetadataValue(key, type_id, array_type, length, raw, start, self.position - start)

    def skip_values(self, type_id: int, length: int, what: str) -> None:
        if type_id == ValueType.STRING:
            self.skip_strings(length, what)
        elif type_id in SCALAR_CODES:
            self.take(length * struct.calcsize("<" + SCALAR_CODES[type_id]), what)
        elif type_id == ValueType.ARRAY:
            raise self.fail(f"{what} is an array of arrays, which GGUF readers do not accept")
        else:
            raise self.fail(f"{what} has the unknown type {type_id}")

    def skip_strings(self, length: int, what: str) -> None:
        self.n_strings += length
        if self.n_strings > MAX_STRINGS or length * 8 > self.size - self.position:
            raise self.fail(f"{what} claims {length:,} strings, more than the file can hold")
        position, data, unpack = self.position, self.data[: self.limit], _U64.unpack_from
        try:
            # the hot loop of opening a file: half a million turns; the checks are those of unpack_from
            for _ in repeat(None, length):
                position += 8 + unpack(data, position)[0]
        except (struct.error, OverflowError):
            position = self.size + 1
        if position > self.limit:
            where = (
                f"the end of the file at {self.size:,}"
                if self.limit == self.size
                else f"the {_HEADER_LIMIT} that a header may take"
            )
            raise self.fail(f"{what} holds a string that runs past {where}")
        self.position = position

    def alignment(self, metadata: Mapping[str, MetadataValue]) -> int:
        found = metadata.get("general.alignment")
        if found is None:
            return DEFAULT_ALIGNMENT
        if found.type != ValueType.UINT32:
            raise self.fail("general.alignment has the wrong type, expected a 32-bit unsigned integer")
        alignment = int(found.value)
        if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment}, expected a power of two up to {MAX_ALIGNMENT:,}")
        return alignment

    def tensors(self, n_tensors: int, alignment: int) -> tuple[dict[str, TensorInfo], int]:
        """The tensor table, offsets made absolute, and the offset of the data section."""
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for index in range(n_tensors):
            name = self.name(f"the name of tensor {index}")
            if name in entries:
                raise self.fail(f"tensor {name!r} appears twice")
            shape, type_id = self.shape(name), self.tensor_type(name)
            entries[name] = (shape, type_id, self.u64(f"the offset of tensor {name!r}"))
        data_offset = pad(self.position, alignment)
        foreign = self.foreign_sizes(entries, data_offset, alignment)
        tensors: dict[str, TensorInfo] = {}
        for name, (shape, type_id, offset) in entries.items():
            n_bytes = foreign[name] if name in foreign else self.n_bytes(name, shape, type_id)
            self.check_range(name, offset, n_bytes, data_offset, alignment)
            tensors[name] = TensorInfo(name, shape, type_id, data_offset + offset, n_bytes, self.shard)
        self.check_overlaps(tensors)
        return tensors, data_offset

    def shape(self, name: str) -> tuple[int, ...]:
        n_dims = self.u32(f"the shape of tensor {name!r}")
        if n_dims > MAX_DIMS:
            raise self.fail(f"tensor {name!r} has {n_dims} axes, expected at most {MAX_DIMS}")
        start = self.take(8 * n_dims, f"the shape of tensor {name!r}")
        return struct.unpack_from(f"<{n_dims}Q", self.data, start)

    def tensor_type(self, name: str) -> int:
        type_id = self.u32(f"the type of tensor {name!r}")
        if type_id > MAX_TYPE_ID:
            raise self.fail(f"tensor {name!r} has the unknown type {type_id}")
        return type_id

    def foreign_sizes(
        self, entries: Mapping[str, tuple[tuple[int, ...], int, int]], data_offset: int, alignment: int
    ) -> dict[str, int]:
        """Name -> bytes of each tensor of a type that the pinned engine does not know, from where the next one
        begins."""
        if all(type_id in TENSOR_TYPES for _, type_id, _ in entries.values()):
            return {}
        starts = sorted({offset for _, _, offset in entries.values()})
        ends = dict(zip(starts, [*starts[1:], max(0, self.size - data_offset)], strict=True))
        extents = [
            Extent(name, type_id, shape, max(0, ends[offset] - offset))
            for name, (shape, type_id, offset) in entries.items()
            if type_id not in TENSOR_TYPES
        ]
        sizes = sizes_in_bytes(extents, alignment)
        for extent in extents:
            if sizes[extent.name] < 0:
                raise self.fail(
                    f"tensor {extent.name!r} {list(extent.shape)} of {type_name(extent.type)} has {extent.gap:,} bytes"
                    " before the next one, which do not divide into rows as those of its type do: it is damaged, not"
                    " fully downloaded, or of a type that reap does not know"
                )
        return sizes

    def n_bytes(self, name: str, shape: tuple[int, ...], type_id: int) -> int:
        type_name, block_size, block_bytes = TENSOR_TYPES[type_id]
        row = shape[0] if shape else 1
        if row % block_size:
            raise self.fail(f"tensor {name!r} has rows of {row} elements, not a multiple of {type_name}'s {block_size}")
        n_elements = 1
        for length in shape:
            n_elements *= length
        return n_elements // block_size * block_bytes

    def check_range(self, name: str, offset: int, n_bytes: int, data_offset: int, alignment: int) -> None:
        if offset % alignment:
            raise self.fail(f"tensor {name!r} starts at offset {offset:,}, not a multiple of {alignment}")
        if data_offset + offset + n_bytes > self.size:
            raise self.fail(
                f"tensor {name!r} ends at byte {data_offset + offset + n_bytes:,}, but the file ends at"
                f" {self.size:,}: it is damaged or not fully downloaded"
            )

    def check_overlaps(self, tensors: Mapping[str, TensorInfo]) -> None:
        end, previous = 0, ""
        for tensor in sorted((t for t in tensors.values() if t.n_bytes), key=lambda t: t.offset_bytes):
            if tensor.offset_bytes < end:
                raise self.fail(f"tensors {previous!r} and {tensor.name!r} overlap")
            end, previous = tensor.offset_bytes + tensor.n_bytes, tensor.name
