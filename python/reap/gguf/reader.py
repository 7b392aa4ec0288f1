"""A lazy, bounds-checked reader of GGUF files; it knows nothing of experts.

The format is the one of ggml's docs/gguf.md, versions 2 and 3, little-endian. Opening a file reads the header
only: arrays of strings (a vocabulary has 150,000) are stepped over and decoded when asked for, tensor data stays
where it is. Every length in the file is taken for a claim and checked against the bytes that are there.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import repeat
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from reap.errors import FormatError

if TYPE_CHECKING:
    from typing_extensions import Self

from reap.files.regular import RegularFile, open_regular

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
# the least a pair (length, key, type, value) and a tensor entry (length, name, axes, type, offset) can take
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class ValueType(IntEnum):
    """The type ids of metadata values, as stored."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


#: struct code of each value type of fixed size; a bool is read as a byte, since any byte but 0 is true
SCALAR_CODES: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
)
INTEGER_TYPES = frozenset({0, 1, 2, 3, 4, 5, 10, 11})


class TensorType(NamedTuple):
    """How a ggml type is stored: `block_size` elements of a row share `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


#: ggml type id -> storage; a test compares it with the `gguf` package
TENSOR_TYPES: Mapping[int, TensorType] = MappingProxyType(
    {
        0: TensorType("F32", 1, 4),
        1: TensorType("F16", 1, 2),
        2: TensorType("Q4_0", 32, 18),
        3: TensorType("Q4_1", 32, 20),
        6: TensorType("Q5_0", 32, 22),
        7: TensorType("Q5_1", 32, 24),
        8: TensorType("Q8_0", 32, 34),
        9: TensorType("Q8_1", 32, 40),
        10: TensorType("Q2_K", 256, 84),
        11: TensorType("Q3_K", 256, 110),
        12: TensorType("Q4_K", 256, 144),
        13: TensorType("Q5_K", 256, 176),
        14: TensorType("Q6_K", 256, 210),
        15: TensorType("Q8_K", 256, 292),
        16: TensorType("IQ2_XXS", 256, 66),
        17: TensorType("IQ2_XS", 256, 74),
        18: TensorType("IQ3_XXS", 256, 98),
        19: TensorType("IQ1_S", 256, 50),
        20: TensorType("IQ4_NL", 32, 18),
        21: TensorType("IQ3_S", 256, 110),
        22: TensorType("IQ2_S", 256, 82),
        23: TensorType("IQ4_XS", 256, 136),
        24: TensorType("I8", 1, 1),
        25: TensorType("I16", 1, 2),
        26: TensorType("I32", 1, 4),
        27: TensorType("I64", 1, 8),
        28: TensorType("F64", 1, 8),
        29: TensorType("IQ1_M", 256, 56),
        30: TensorType("BF16", 1, 2),
        34: TensorType("TQ1_0", 256, 54),
        35: TensorType("TQ2_0", 256, 66),
        39: TensorType("MXFP4", 32, 17),
        40: TensorType("NVFP4", 64, 36),
        41: TensorType("Q1_0", 128, 18),
        42: TensorType("Q2_0", 64, 18),
    }
)


def pad(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor table.

    shape: GGUF order, ne[0] (the contiguous axis) first, so the outermost axis is last. type: ggml type id.
    offset_bytes: from the start of its file. shard: which file of the model it is in.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset_bytes: int
    n_bytes: int
    shard: int = 0

    @property
    def type_name(self) -> str:
        """The ggml type's name, such as `Q4_K`."""
        return TENSOR_TYPES[self.type].name

    @property
    def n_elements(self) -> int:
        """Product of the shape."""
        n = 1
        for length in self.shape:
            n *= length
        return n


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """One metadata pair, decoded only when `.value` is asked for.

    type, array_type: `ValueType` ids; array_type is None for a scalar. length: number of elements, 1 for a scalar.
    raw: the exact bytes behind the value's type id; an array's begin with its element type and its length.
    offset_bytes, n_bytes: where the whole pair, key and type included, lies in the file.
    """

    key: str
    type: int
    array_type: int | None
    length: int
    raw: memoryview = field(repr=False)
    offset_bytes: int
    n_bytes: int

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


class _Parser:
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
        tensors: dict[str, TensorInfo] = {}
        for name, (shape, type_id, offset) in entries.items():
            n_bytes = self.n_bytes(name, shape, type_id)
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
        if type_id not in TENSOR_TYPES:
            raise self.fail(f"tensor {name!r} has the unknown type {type_id}")
        return type_id

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


class GGUFFile(RegularFile):
    """One open GGUF file. Use it as a context manager; views it handed out keep the mapping alive.

    version: 2 or 3. alignment: bytes. data_offset: where tensor data begins.
    metadata: key -> `MetadataValue`, tensors: name -> `TensorInfo`, both in file order.
    """

    version: int
    alignment: int
    data_offset: int
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, path: Path, fd: int, shard: int = 0) -> None:
        """Takes over `fd`, an open regular file. Use `open` or `open_shard`."""
        super().__init__(path, fd)
        self._view: memoryview | None = None
        try:
            self._parse(shard)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open `path` and read its header.

        Raises UsageError if it is not a readable regular file, FormatError if it is not a sound GGUF file.
        """
        return super().open(path)

    @classmethod
    def open_shard(cls, path: str | os.PathLike[str], shard: int) -> Self:
        """The same; its tensors say that they are in shard `shard`, counted from 0."""
        where = Path(path)
        return cls(where, open_regular(where), shard)

    def _parse(self, shard: int) -> None:
        if self.size < _HEADER.size:
            raise FormatError(f"{self.path}: not a GGUF file: {self.size} bytes are too few for a header")
        self._view = memoryview(mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ))
        parser = _Parser(self.path, self._view, shard)
        self.version, n_tensors, n_keys = parser.header()
        metadata = parser.metadata(n_keys)
        self.alignment = parser.alignment(metadata)
        tensors, self.data_offset = parser.tensors(n_tensors, self.alignment)
        self.metadata, self.tensors = MappingProxyType(metadata), MappingProxyType(tensors)

    def get(self, key: str, default: Any = None) -> Any:
        """The decoded value of a metadata key, or `default`."""
        found = self.metadata.get(key)
        return default if found is None else found.value

    def data(self, tensor: TensorInfo) -> memoryview:
        """The bytes of a tensor of this file, without a copy."""
        assert self._view is not None
        return self._view[tensor.offset_bytes : tensor.offset_bytes + tensor.n_bytes]

    def close(self) -> None:
        """Close the descriptor; the mapping goes with the last view of it. Calling it again does nothing."""
        super().close()
        if getattr(self, "_view", None) is not None:
            self._view.release()  # type: ignore[union-attr]


class GGUFModel:
    """A model in one GGUF file or in the shards of a split one, seen as one.

    files: the shards in order. metadata: of the first shard, which holds the model's. tensors: name -> `TensorInfo`
    of all shards, whose `shard` indexes `files`.
    """

    files: tuple[GGUFFile, ...]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, files: tuple[GGUFFile, ...]) -> None:
        self.files = files
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, tensor in file.tensors.items():
                if name in tensors:
                    other = files[tensors[name].shard].path.name
                    raise FormatError(f"{file.path}: tensor {name!r} is also in {other}")
                tensors[name] = tensor
        self.tensors = MappingProxyType(tensors)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFModel:
        """Open a model; of a split one, any of its shards. Raises UsageError or FormatError."""
        opened = [GGUFFile.open(path)]
        try:
            if _split_count(opened[0]) > 1:
                opened = _open_shards(opened[0], opened)
            return cls(tuple(opened))
        except BaseException:
            for file in opened:
                file.close()
            raise

    @property
    def path(self) -> Path:
        """The first file, which stands for the model in messages."""
        return self.files[0].path

    @property
    def size(self) -> int:
        """Bytes on disk, all shards together."""
        return sum(file.size for file in self.files)

    @property
    def version(self) -> int:
        """GGUF version of the first file."""
        return self.files[0].version

    @property
    def alignment(self) -> int:
        """Alignment of the first file, in bytes."""
        return self.files[0].alignment

    @property
    def metadata(self) -> Mapping[str, MetadataValue]:
        """The first file's metadata."""
        return self.files[0].metadata

    def get(self, key: str, default: Any = None) -> Any:
        """The decoded value of a metadata key, or `default`."""
        return self.files[0].get(key, default)

    def data(self, tensor: TensorInfo) -> memoryview:
        """The bytes of a tensor, without a copy."""
        return self.files[tensor.shard].data(tensor)

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()

    def __enter__(self) -> GGUFModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def shard_path(stem: Path, index: int, count: int) -> Path:
    """STEM-00001-of-00003.gguf for `index` 0 of 3: how llama.cpp names the shards of a split model."""
    return stem.with_name(f"{stem.name}-{index + 1:05d}-of-{count:05d}.gguf")


def is_shard_name(name: str) -> bool:
    """Whether a file name looks like NAME-00001-of-00003.gguf."""
    return _SHARD_NAME.fullmatch(name) is not None


def _split_count(file: GGUFFile) -> int:
    return _split_key(file, "split.count", 1)


def _split_key(file: GGUFFile, key: str, default: int) -> int:
    found = file.metadata.get(key)
    if found is None:
        return default
    if found.type not in INTEGER_TYPES:
        raise FormatError(f"{file.path}: {key} is not an integer")
    return int(found.value)


def _open_shards(given: GGUFFile, opened: list[GGUFFile]) -> list[GGUFFile]:
    """All shards of the model that `given` is one of; `opened` collects what to close if this fails."""
    count = _split_count(given)
    match = _SHARD_NAME.fullmatch(given.path.name)
    if match is None or int(match["count"]) != count:
        raise FormatError(
            f"{given.path}: is one of {count} shards, but its name does not end in"
            f" -00001-of-{count:05d}.gguf, so the others cannot be found"
        )
    shards = []
    for index in range(count):
        path = shard_path(given.path.parent / match["stem"], index, count)
        if not path.exists():
            raise FormatError(
                f"{path}: is missing, but {given.path.name} is one of {count} shards of a model: the set is not"
                " complete"
            )
        shard = GGUFFile.open_shard(path, index)
        opened.append(shard)
        number = _split_key(shard, "split.no", -1)
        if number != index or _split_count(shard) != count:
            found = f"shard {number + 1} of {_split_count(shard)}"
            raise FormatError(f"{path}: says it is {found}, expected {index + 1} of {count}")
        shards.append(shard)
    n_tensors = sum(len(shard.tensors) for shard in shards)
    expected = _split_key(shards[0], "split.tensors.count", n_tensors)
    if n_tensors != expected:
        raise FormatError(f"{shards[0].path}: its {count} shards hold {n_tensors} tensors, expected {expected}")
    given.close()
    return shards
