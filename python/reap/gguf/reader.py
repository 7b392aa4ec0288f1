"""A lazy, bounds-checked reader of GGUF files; it knows nothing of experts.

The format is the one of ggml's docs/gguf.md, versions 2 and 3, little-endian. Opening a file reads the header
only: arrays of strings (a vocabulary has 150,000) are stepped over and decoded when asked for, tensor data stays
where it is.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from reap.errors import FormatError
from reap.files.paths import PathLike
from reap.files.recognise import what_are
from reap.files.regular import RegularFile, open_regular
from reap.gguf.parser import HEADER_BYTES, MetadataValue, Parser
from reap.gguf.parser import TensorInfo as TensorInfo
from reap.gguf.shards import shard_path, shard_stem
from reap.gguf.tensor_types import INTEGER_TYPES

if TYPE_CHECKING:
    from typing_extensions import Self


class GGUFFile(RegularFile):
    """One open GGUF file. Use it as a context manager; views it handed out keep the mapping alive.

    version: 2 or 3. alignment: bytes. data_offset: where tensor data begins.
    metadata: key -> `MetadataValue`, tensors: name -> `TensorInfo`, both in file order.
    """

    expected: ClassVar[str] = "a GGUF file"
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
    def open(cls, path: PathLike) -> Self:
        """Open `path` and read its header.

        Raises UsageError if it is not a readable regular file, FormatError if it is not a sound GGUF file.
        """
        return super().open(path)

    @classmethod
    def open_shard(cls, path: PathLike, shard: int) -> Self:
        """The same; its tensors say that they are in shard `shard`, counted from 0."""
        where = Path(path)
        return cls(where, open_regular(where, cls.expected), shard)

    def _parse(self, shard: int) -> None:
        if self.size < HEADER_BYTES:
            what = what_are(self.read_range(0, self.size), self.size)
            also = "" if what is None else f" but {what}"
            raise FormatError(f"{self.path}: not a GGUF file{also}: {self.size} bytes are too few for a header")
        self._view = memoryview(mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ))
        parser = Parser(self.path, self._view, shard)
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
    def open(cls, path: PathLike) -> GGUFModel:
        """Open a model; of a split one, any of its shards. Raises UsageError or FormatError."""
        opened = [GGUFFile.open(path)]
        try:
            if opened[0].get("general.type") == "imatrix":
                raise FormatError(f"{opened[0].path}: is an importance matrix, expected a model")
            if _split_count(opened[0]) > 1:
                opened = _open_shards(opened[0], opened)
            return cls(tuple(opened))
        except BaseException:
            for file in opened:
                file.close()
            raise

    def with_tensors(self, tensors: Iterable[TensorInfo]) -> GGUFModel:
        """The same open files, seen with these tensors of theirs only; closing either closes both."""
        seen = copy(self)
        seen.tensors = MappingProxyType({tensor.name: tensor for tensor in tensors})
        return seen

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


def first_file(path: PathLike) -> Path:
    """The first file of the model that `path` is one file of, which the engine has to be given.

    Only where the name is a later shard's is anything read. Raises what `GGUFFile.open` raises, and FormatError where
    the first file is missing.
    """
    where = Path(path)
    named = shard_stem(where)
    if named is None or where == shard_path(named[0], 0, named[1]):
        return where
    with GGUFModel.open(where) as model:
        return model.path


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
    named = shard_stem(given.path)
    if named is None or named[1] != count:
        raise FormatError(
            f"{given.path}: is one of {count} shards, but its name does not end in"
            f" -00001-of-{count:05d}.gguf, so the others cannot be found"
        )
    shards = []
    for index in range(count):
        path = shard_path(named[0], index, count)
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
