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

from reap.errors import FormatError, UsageError
from reap.files.strict_json import Node, parse_json, shorten
from reap.hf.disk.safetensors_file import SafetensorsFile, StoredTensor

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROVENANCE = "reap.json"
QUANTISATION = "hf_quant_config.json"  # where ModelOpt names what it quantised
_MAX_CONFIG_BYTES = 16 << 20
_MAX_INDEX_BYTES = 256 << 20
_MOST_SHARDS = 4096
_SHARD_NAME = re.compile(r"[^/\\\x00]+\.safetensors")
#: Files that hold weights of some form. None is carried over: they would be those of the whole model.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|gguf|ggml|onnx|onnx_data|h5|msgpack|npz|npy|ot|tflite|mlmodel|distcp)"
    r"(\.index\.json)?",
    re.IGNORECASE,
)
_PICKLE_INDEX = re.compile(r"pytorch_model.*\.bin(\.index\.json)?|.*\.(pt|pth|ckpt|pkl)")
_HIDDEN_FOLDERS = frozenset({".git", ".cache", "__pycache__"})


@dataclass(frozen=True)
class SideFile:
    """A file that is carried over as it is. name: below the checkpoint's directory."""

    name: str
    path: Path
    n_bytes: int


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

        Raises UsageError where there is none (a checkpoint of pickles is one too few), FormatError where its files are
        damaged or contradict each other.
        """
        where = Path(directory)
        if not where.is_dir():
            raise UsageError(f"{where}: no directory, where a Hugging Face checkpoint was expected")
        if not (where / CONFIG).is_file():
            raise UsageError(f"{where}: no Hugging Face checkpoint, it has no {CONFIG}")
        config_text = _read_text(where / CONFIG, _MAX_CONFIG_BYTES)
        Node(parse_json(config_text, str(where / CONFIG), allow_constants=True), str(where / CONFIG)).members()
        index, names = _find_shards(where)
        with ExitStack() as stack:
            shards = {name: stack.enter_context(SafetensorsFile.open(where / name)) for name in names}
            checkpoint = cls(where, config_text, shards, index)
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
        for path in _walk(self.directory):
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
        text = _read_text(path, _MAX_CONFIG_BYTES)
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


def _find_shards(directory: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """(the index or None, names of the files): what transformers would load, one file before an index."""
    if (directory / SINGLE).is_file():
        return None, [SINGLE]
    if not (directory / INDEX).is_file():
        raise UsageError(f"{directory}: has neither {SINGLE} nor {INDEX}{_pickle_advice(directory)}")
    where = str(directory / INDEX)
    index = Node(parse_json(_read_text(directory / INDEX, _MAX_INDEX_BYTES), where), where)
    names: dict[str, None] = {}
    for _, node in index["weight_map"].items():
        name = node.string()
        if not _SHARD_NAME.fullmatch(name) or name.startswith("."):
            node.fail(f"should name a .safetensors file beside the index, found {shorten(name)}")
        names[name] = None
    if not 0 < len(names) <= _MOST_SHARDS:
        raise FormatError(f"{where}: names {len(names):,} files, expected 1 to {_MOST_SHARDS:,}")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FormatError(f"{where}: names {shorten(missing[0], 80)}, which is not there")
    return index.members(), list(names)


def _pickle_advice(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir() if _PICKLE_INDEX.fullmatch(path.name))
    if not names:
        return ""
    return (
        f"; it holds a pickle ({names[0]}), which reap never loads, since loading one can run anything: where you trust"
        " it, write it as safetensors first (transformers:"
        " AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR))"
    )


def _read_text(path: Path, max_bytes: int) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > max_bytes:
        raise FormatError(f"{path}: is larger than {max_bytes >> 20} MiB")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def _walk(directory: Path) -> Iterator[Path]:
    """Regular files below `directory`, sorted; links to files are followed, as a cache of checkpoints has them, links
    to folders not."""
    for root, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if name not in _HIDDEN_FOLDERS)
        for name in sorted(names):
            path = Path(root, name)
            if path.is_file():
                yield path
