"""A strict reader of safetensors headers, and a writer of them; it knows nothing of experts and loads no tensor.

The format is the one of the safetensors package: 8 bytes with the header's length, a JSON object, then the tensors'
bytes without holes. Every number in the header is taken for a claim and checked against the bytes that are there.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from math import prod
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from reap.errors import FormatError
from reap.files.recognise import HEAD_BYTES, what_are
from reap.files.regular import RegularFile
from reap.files.strict_json import Bounds, Node, parse_json, shorten

MAX_DIMS = 64
MAX_TENSORS = 100_000
_MAX_METADATA = 10_000
#: Of a tensor the header has an object, two lists, four members, and its dimensions. A shard has some thousands of
#: tensors, some tens of thousands where it has 50 GB; at these bounds a header takes 190 MB and under a second.
_BOUNDS = Bounds(
    n_bytes=18 << 20,
    containers=4 * MAX_TENSORS,
    members=4 * MAX_TENSORS + _MAX_METADATA,
    values=10 * MAX_TENSORS,
    narrow=True,
)
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_MAX_OFFSET = 2**62
_BY_PLACE = attrgetter("offset_bytes", "n_bytes")

#: dtype as stored -> bits of one number
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)


class StoredTensor(NamedTuple):
    """One entry of a header."""

    name: str
    """Of the tensor."""
    dtype: str
    """As safetensors names it, such as `BF16`."""
    shape: tuple[int, ...]
    """Outermost axis first."""
    offset_bytes: int
    """Of its data, from the start of the file."""
    n_bytes: int
    """Of its data."""

    @property
    def n_elements(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


class SafetensorsFile(RegularFile):
    """An open safetensors file. Use it as a context manager.

    metadata: the `__metadata__` of its header. tensors: name -> `StoredTensor`, in the order of their bytes.
    """

    expected: ClassVar[str] = "a safetensors file"

    def __init__(self, path: Path, fd: int) -> None:
        """Use `open`; it raises UsageError if `path` is not a readable regular file, FormatError if it is no sound
        safetensors file."""
        super().__init__(path, fd)
        try:
            self.metadata, self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        length, raw = self._header_bytes()
        if problem := _BOUNDS.exceeded(raw):
            raise FormatError(f"{self.path}: its header has {problem}; no file of a checkpoint has as many")
        header = Node(parse_json(raw, f"{self.path}: header", few_floats=True), f"{self.path}: header")
        if len(header.members()) > MAX_TENSORS:
            raise FormatError(f"{self.path}: has {len(header.members()):,} tensors, expected at most {MAX_TENSORS:,}")
        metadata = _read_metadata(header[_METADATA]) if _METADATA in header else {}
        start = _LENGTH.size + length
        tensors = [
            _read_sound_entry(name, entry, start) or _read_entry(name, header, start)
            for name, entry in header.members().items()
            if name != _METADATA
        ]
        tensors.sort(key=_BY_PLACE)
        self._check_coverage(tensors, start)
        return metadata, {tensor.name: tensor for tensor in tensors}

    def _header_bytes(self) -> tuple[int, bytes]:
        what = what_are(self.read_range(0, min(self.size, HEAD_BYTES)), self.size)
        is_not = f"{self.path}: is not a safetensors file" + (
            "" if what in (None, "a safetensors file") else f" but {what}"
        )
        if self.size < _LENGTH.size:
            raise FormatError(f"{is_not}: {self.size} bytes are too few")
        (length,) = _LENGTH.unpack(self.read_range(0, _LENGTH.size))
        if length > min(_BOUNDS.n_bytes, self.size - _LENGTH.size):
            raise FormatError(
                f"{is_not}, or cut short: its header would take {length:,} bytes, where the file has"
                f" {self.size - _LENGTH.size:,} and {_BOUNDS.n_bytes:,} are the most"
            )
        raw = self.read_range(_LENGTH.size, length)
        if not raw.startswith(b"{"):
            raise FormatError(f"{is_not}: its header does not begin with {{")
        return length, raw

    def _check_coverage(self, tensors: list[StoredTensor], start: int) -> None:
        """The tensors follow one another, from the header's end to the end of the file."""
        end = start
        for tensor in tensors:
            if tensor.offset_bytes != end:
                what = "overlaps the one before it" if tensor.offset_bytes < end else "leaves a hole before it"
                name = shorten(tensor.name, 80, quote=False)
                raise FormatError(
                    f"{self.path}: {name} begins at byte {tensor.offset_bytes:,} where {end:,} was expected: it {what}"
                )
            end += tensor.n_bytes
        if end != self.size:
            raise FormatError(f"{self.path}: its tensors end at byte {end:,}, but the file at {self.size:,}")


def _read_metadata(node: Node) -> dict[str, str]:
    if len(node.members()) > _MAX_METADATA:
        node.fail(f"has {len(node.members()):,} members, expected at most {_MAX_METADATA:,}")
    return {key: value.string() for key, value in node.items()}


def _read_sound_entry(name: str, entry: Any, start: int) -> StoredTensor | None:
    """The tensor of an entry with nothing out of the ordinary; None where `_read_entry` has to look at it.

    That takes six times as long, and a header may have 100,000 entries.
    """
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (type(shape) is list and type(begin) is type(end) is int):
            return None
        if not name.isascii():
            name.encode()
        if len(shape) > MAX_DIMS or not 0 <= begin <= end <= _MAX_OFFSET:
            return None
        for size in shape:
            if type(size) is not int or not 0 <= size <= _MAX_OFFSET:
                return None
        if prod(shape) * DTYPE_BITS[dtype] != 8 * (end - begin):
            return None
    except (KeyError, TypeError, ValueError):
        return None
    return StoredTensor(name, dtype, tuple(shape), start + begin, end - begin)


def _read_entry(name: str, header: Node, start: int) -> StoredTensor:
    node = Node(header.members()[name], f"{header.where}: {shorten(name, quote=False)}")
    try:
        name.encode()
    except UnicodeEncodeError:
        node.fail("has a name that is not valid Unicode")
    dtype = node["dtype"].string()
    if dtype not in DTYPE_BITS:
        node["dtype"].fail(f"is {shorten(dtype)}, which is not a type of safetensors that reap knows")
    shape = _numbers(node["shape"], MAX_DIMS)
    offsets = _numbers(node["data_offsets"], 2)
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        node["data_offsets"].fail(f"should be a begin and an end, found {shorten(node['data_offsets'].value)}")
    n_bits, n_bytes = prod(shape) * DTYPE_BITS[dtype], offsets[1] - offsets[0]
    if n_bits != 8 * n_bytes:
        node.fail(f"takes {n_bytes:,} bytes where {dtype} {shorten(list(shape))} takes {-(-n_bits // 8):,}")
    return StoredTensor(name, dtype, shape, start + offsets[0], n_bytes)


def _numbers(node: Node, most: int) -> tuple[int, ...]:
    values = node.entries()
    if len(values) > most:
        node.fail(f"has {len(values):,} entries, expected at most {most}")
    return tuple(node.entry(index).integer(0, _MAX_OFFSET) for index in range(len(values)))


def encode_header(metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The header of a file that holds `tensors` (name, dtype, shape, bytes) in this order, padded as the safetensors
    package does."""
    document: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape, n_bytes in tensors:
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return _LENGTH.pack(len(raw)) + raw
