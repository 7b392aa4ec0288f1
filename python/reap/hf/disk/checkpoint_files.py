"""A Hugging Face checkpoint as files: which hold weights, which tensor is in which, and what lies beside them.

Nothing here loads a pickle, runs code of the checkpoint or needs torch, transformers or the safetensors package.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from reap.errors import FormatError
from reap.files.strict_json import Node, parse_json, shorten
from reap.hf.disk.discovery import CONFIG, INDEX, check_folder, find_weights, read_text, walk
from reap.hf.disk.safetensors_file import SafetensorsFile, StoredTensor

PROVENANCE = "reap.json"
QUANTISATION = "hf_quant_config.json"  # where ModelOpt names what it quantised
#: Files that hold weights of some form. None is carried over: they would be those of the whole model.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|gguf|ggml|onnx|onnx_data|h5|msgpack|npz|npy|ot|tflite|mlmodel|distcp)"
    r"(\.index\.json)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SideFile:
    """A file that is carried over as it is."""

    name: str
    """Its path below the checkpoint's directory."""
    path: Path
    """Where it lies."""
    n_bytes: int
    """Its size."""


class Checkpoint:
    """An open checkpoint. Use it as a context manager.

    directory: as it was given. config_text, config: config.json. shards: file name -> open file, in the index's order.
    shard_of: name of a tensor -> its shard's name, in the order of the shards' bytes. index: the index as a Python
    value, None for one file.
    """

    def __init__(
        self, directory: Path, config_text: str, shards: Mapping[str, SafetensorsFile], index: dict[str, Any] | None
    ) -> None:
        """Use `open`."""
        self.directory, self.config_text, self.shards, self.index = directory, config_text, shards, index
        self.config: dict[str, Any] = parse_json(config_text, str(directory / CONFIG), allow_constants=True)
        self.shard_of = {name: shard for shard, file in shards.items() for name in file.tensors}

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Open a checkpoint of safetensors files.

        Raises UsageError where there is none (a checkpoint of pickles is one too few) or where it holds a link that may
        not be followed, FormatError where its files are damaged or contradict each other.
        """
        where = Path(directory)
        check_folder(where)
        config_text = read_text(where / CONFIG)
        Node(parse_json(config_text, str(where / CONFIG), allow_constants=True), str(where / CONFIG)).members()
        weights = find_weights(where)
        with ExitStack() as stack:
            shards = {name: stack.enter_context(SafetensorsFile.open(where / name)) for name in weights.names}
            checkpoint = cls(where, config_text, shards, weights.index)
            checkpoint._check_index()
            stack.pop_all()
        return checkpoint

    @property
    def tensors(self) -> Iterator[StoredTensor]:
        """All of them, shard by shard, in the order of their bytes."""
        for file in self.shards.values():
            yield from file.tensors.values()

    def tensor(self, name: str) -> StoredTensor:
        """By name."""
        return self.shards[self.shard_of[name]].tensors[name]

    def read(self, name: str) -> bytes:
        """The bytes of one tensor."""
        found = self.tensor(name)
        return self.shards[self.shard_of[name]].read_range(found.offset_bytes, found.n_bytes)

    @property
    def n_bytes(self) -> int:
        """Of its weights' files."""
        return sum(file.size for file in self.shards.values())

    @property
    def weights_paths(self) -> list[Path]:
        """Of the files that hold its weights."""
        return [file.path for file in self.shards.values()]

    def side_files(self) -> tuple[list[SideFile], list[str]]:
        """(files to carry over, names of those that hold weights in another form): tokenizer, templates, code, licences
        ... .

        config.json, the index, reap.json and hf_quant_config.json are in neither, since they are written anew.
        """
        carried, left = [], []
        for path in walk(self.directory):
            name = path.relative_to(self.directory).as_posix()
            if name in (CONFIG, INDEX, PROVENANCE, QUANTISATION) or name in self.shards:
                continue
            if _WEIGHTS.fullmatch(path.name):
                left.append(name)
            else:
                carried.append(SideFile(name, path, path.stat().st_size))
        return carried, left

    @property
    def quantisation_text(self) -> str | None:
        """hf_quant_config.json, where there is one. Raises FormatError where it is not JSON."""
        path = self.directory / QUANTISATION
        if not path.is_file():
            return None
        text = read_text(path)
        parse_json(text, str(path))
        return text

    def close(self) -> None:
        """Close the files."""
        for file in self.shards.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_index(self) -> None:
        """The index and the shards name the same tensors, each once."""
        n_tensors = sum(len(file.tensors) for file in self.shards.values())
        if n_tensors != len(self.shard_of):
            first, second, name = _find_double(self.shards)
            raise FormatError(f"{self.directory}: {name} is in {first} and in {second}")
        if self.index is None:
            return
        weight_map: dict[str, str] = self.index["weight_map"]
        for name, shard in weight_map.items():
            if self.shard_of.get(name) != shard:
                found = self.shard_of.get(name, "none of the files")
                raise FormatError(
                    f"{self.directory / INDEX}: says that {shorten(name, 80)} is in {shard}, but it is in {found}"
                )
        if len(weight_map) != n_tensors:
            name = next(name for name in self.shard_of if name not in weight_map)
            raise FormatError(
                f"{self.directory / INDEX}: does not name {shorten(name, 80)}, which is in {self.shard_of[name]}"
            )


def _find_double(shards: Mapping[str, SafetensorsFile]) -> tuple[str, str, str]:
    seen: dict[str, str] = {}
    for shard, file in shards.items():
        for name in file.tensors:
            if name in seen:
                return seen[name], shard, shorten(name, 80)
            seen[name] = shard
    raise AssertionError("no name appears twice")
