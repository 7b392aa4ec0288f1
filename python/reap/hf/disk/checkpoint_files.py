"""A Hugging Face checkpoint as files: which hold weights, which tensor is in which, and what lies beside them.

Nothing here loads a pickle, runs code of the checkpoint or needs torch, transformers or the safetensors package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from reap.errors import FormatError, UsageError
from reap.files.paths import PathLike
from reap.files.strict_json import Node, parse_json, shorten
from reap.hf.disk.discovery import CONFIG, INDEX, check_folder, find_weights, read_text, unnamed_files
from reap.hf.disk.index import Difference, compare_index
from reap.hf.disk.safetensors_file import SafetensorsFile, StoredTensor

#: What a checkpoint is where its index and its files differ: what the files hold, what the index says, or, for those
#: that only read, what the files hold that it names, as transformers has it.
Trust = Literal["shards", "index", "named"]
TRUSTED = ("shards", "index")
PROVENANCE = "reap.json"
#: Where ModelOpt, GPTQ and AWQ name what they quantised, beside or instead of config.json.
QUANTISATIONS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


class Checkpoint:
    """An open checkpoint. Use it as a context manager.

    directory: as it was given. config_text, config: config.json. shards: file name -> open file, in the index's order.
    shard_of: name of a tensor -> its shard's name, in the order of the shards' bytes. index: the index as a Python
    value, None for one file. difference: what differs between the index and the files. trust: what `open` was given.
    """

    def __init__(
        self,
        directory: Path,
        config_text: str,
        shards: Mapping[str, SafetensorsFile],
        index: dict[str, Any] | None,
        trust: Trust | None = None,
        unnamed_files: Sequence[str] = (),
    ) -> None:
        """Use `open`."""
        self.directory, self.config_text, self.shards, self.index = directory, config_text, shards, index
        self.config: dict[str, Any] = parse_json(config_text, str(directory / CONFIG), allow_constants=True)
        difference = Difference() if index is None else compare_index(index["weight_map"], shards, unnamed_files)
        self.difference = difference
        self.trust = trust
        self.shard_of = (
            {} if trust == "index" else {name: shard for shard, file in shards.items() for name in file.tensors}
        )
        if index is not None and trust in ("index", "named"):  # of a tensor in two files it says which is meant
            wrong = {name for name, *_ in (*difference.absent, *difference.elsewhere)}
            self.shard_of |= {name: shard for name, shard in index["weight_map"].items() if name not in wrong}

    @classmethod
    def open(cls, directory: PathLike, trust: Trust | None = None) -> Checkpoint:
        """Open a checkpoint of safetensors files.

        Args:
            trust: where the index and the files differ, which of them says what the checkpoint is; None: neither.

        Raises:
            UsageError: there is none (a checkpoint of pickles is one too few), or it holds a link that may not be
                followed.
            FormatError: its files are damaged, or contradict each other in a way that `trust` does not settle.
        """
        where = Path(directory)
        if trust not in (None, *TRUSTED, "named"):
            raise UsageError(f"unknown trust {trust!r}; known: {', '.join(TRUSTED)}")
        check_folder(where)
        config_text = read_text(where / CONFIG)
        Node(parse_json(config_text, str(where / CONFIG), allow_constants=True), str(where / CONFIG)).members()
        weights = find_weights(where)
        unnamed = unnamed_files(where, weights)
        with ExitStack() as stack:
            names = [*weights.names, *unnamed] if trust == "shards" else weights.names
            shards = {name: stack.enter_context(SafetensorsFile.open(where / name)) for name in names}
            checkpoint = cls(where, config_text, shards, weights.index, trust, unnamed)
            checkpoint._check_index()
            stack.pop_all()
        return checkpoint

    @property
    def tensors(self) -> Iterator[StoredTensor]:
        """All of them, shard by shard, in the order of their bytes."""
        for shard in self.shards:
            yield from self.tensors_of(shard)

    def tensors_of(self, shard: str) -> Iterator[StoredTensor]:
        """Those of one file, in the order of their bytes."""
        for name, tensor in self.shards[shard].tensors.items():
            if self.shard_of.get(name) == shard:
                yield tensor

    def tensor(self, name: str) -> StoredTensor:
        """By name."""
        return self.shards[self.shard_of[name]].tensors[name]

    def read(self, name: str) -> bytes:
        """The bytes of one tensor."""
        found = self.tensor(name)
        return self.shards[self.shard_of[name]].read_range(found.offset_bytes, found.n_bytes)

    @property
    def unnamed_files(self) -> tuple[str, ...]:
        """The safetensors files beside an index that does not name them."""
        return self.difference.files

    @property
    def n_bytes(self) -> int:
        """Of its weights' files."""
        return sum(file.size for file in self.shards.values())

    @property
    def weights_paths(self) -> list[Path]:
        """Of the files that hold its weights."""
        return [file.path for file in self.shards.values()]

    def quantisation_texts(self) -> dict[str, str]:
        """Files that say what is quantised -> their text. Raises FormatError where one is not JSON."""
        texts = {}
        for name in QUANTISATIONS:
            if (self.directory / name).is_file():
                texts[name] = read_text(self.directory / name)
                parse_json(texts[name], str(self.directory / name), allow_constants=True)
        return texts

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
        """No tensor is there twice, and the index and the files say the same, or one of them is gone by."""
        n_tensors = sum(len(file.tensors) for file in self.shards.values())
        if self.trust in (None, "shards") and n_tensors != len(self.shard_of):
            first, second, name = _find_double(self.shards)
            way = "" if self.index is None else "; --trust index takes the one that the index names"
            raise FormatError(f"{self.directory}: {name} is in {first} and in {second}{way}")
        where, found = self.directory / INDEX, self.difference.text
        if self.trust == "index" and not self.difference.is_settled_by_the_index:
            raise FormatError(f"{where}: cannot be gone by, it {found}; --trust shards goes by the files")
        if self.trust is None and self.difference:
            raise FormatError(
                f"{where}: {found}; --trust shards goes by what the files hold, --trust index by what the index names"
            )


def _find_double(shards: Mapping[str, SafetensorsFile]) -> tuple[str, str, str]:
    seen: dict[str, str] = {}
    for shard, file in shards.items():
        for name in file.tensors:
            if name in seen:
                return seen[name], shard, shorten(name, 80, quote=False)
            seen[name] = shard
    raise AssertionError("no name appears twice")
