"""The names of the files of a split model, NAME-00001-of-00003.gguf, as llama.cpp writes them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from reap.files.paths import PathLike

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_SHARDS = 1000


def shard_path(stem: Path, index: int, count: int) -> Path:
    """STEM-00001-of-00003.gguf for `index` 0 of 3: how llama.cpp names the shards of a split model."""
    return stem.with_name(f"{stem.name}-{index + 1:05d}-of-{count:05d}.gguf")


def is_shard_name(name: str) -> bool:
    """Whether a file name looks like NAME-00001-of-00003.gguf."""
    return _SHARD_NAME.fullmatch(name) is not None


def shard_stem(path: Path) -> tuple[Path, int] | None:
    """(path without its number, number of shards) that a name speaks of; None where it is not a shard's."""
    match = _SHARD_NAME.fullmatch(path.name)
    return None if match is None else (path.parent / match["stem"], int(match["count"]))


def model_paths(path: PathLike) -> list[Path]:
    """The files that belong to the model that `path` is one file of, by their names alone: those of its shards that are
    there, or `path` itself."""
    where = Path(path)
    found = shard_stem(where)
    if found is None or not 1 < found[1] <= _MOST_SHARDS:
        return [where]
    shards = [shard_path(found[0], index, found[1]) for index in range(found[1])]
    return [shard for shard in shards if shard == where or os.path.exists(shard)]
