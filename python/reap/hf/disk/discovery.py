"""Which files of a folder hold a checkpoint's weights: one answer for all that read one, on disk or into memory.

Nothing here loads a pickle. Of links only those into the `blobs` of the hub's cache that the folder lies in are
followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.errors import FormatError, UsageError
from reap.files.recognise import absent_text, what_is
from reap.files.strict_json import Bounds, Node, parse_json, shorten

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: A member and a value for each tensor. Kimi-K2 in NVFP4 (60 layers of 384 experts, three matrices each, of four
#: tensors) has 277,000 and 30 MB of text. At these bounds an index is read in 190 MB and less than a second.
_INDEX_BOUNDS = Bounds(n_bytes=40 << 20, containers=4096, members=327_680, values=327_680, narrow=True)
_CONFIG_BOUNDS = Bounds(n_bytes=16 << 20, containers=100_000, members=100_000, values=1 << 20)
_MOST_SHARDS = 4096
_SHARD_NAME = re.compile(r"[^/\\\x00]+\.safetensors")
_PICKLES = re.compile(r"pytorch_model.*\.bin(\.index\.json)?|.*\.(pt|pth|ckpt|pkl)")
_HIDDEN_FOLDERS = frozenset({".git", ".cache", "__pycache__"})


@dataclass(frozen=True)
class Weights:
    """Which files hold the weights."""

    index: dict[str, Any] | None
    """The index as a Python value; None for one file."""
    names: list[str]
    """Of the files, in the index's order."""


def check_folder(directory: Path) -> None:
    """Raise UsageError where `directory` is not the folder of a checkpoint, or holds a link that may not be
    followed."""
    if not directory.is_dir():
        found = what_is(directory)
        if found is None and not directory.exists():
            raise UsageError(f"{directory}: {absent_text(directory)}; a Hugging Face checkpoint was expected")
        raise UsageError(
            f"{directory}: {f'is {found}' if found else 'no directory'}, where a Hugging Face checkpoint was expected"
        )
    if not (directory / CONFIG).is_file():
        raise UsageError(f"{directory}: no Hugging Face checkpoint, it has no {CONFIG}")
    for _ in walk(directory):
        pass


def walk(directory: Path) -> Iterator[Path]:
    """Regular files below `directory`, sorted, without .git and caches.

    Links are followed as a hub's cache has them, from a snapshot to a file in the cache's own `blobs`. Raises
    UsageError for any other: what it leads to would be copied into an output.
    """
    blobs = _blobs_of(directory)
    for root, folders, names in os.walk(directory):
        for name in folders:
            _check_link(Path(root, name), blobs)
        folders[:] = sorted(name for name in folders if name not in _HIDDEN_FOLDERS)
        for name in sorted(names):
            path = Path(root, name)
            _check_link(path, blobs)
            if path.is_file():
                yield path


def _blobs_of(directory: Path) -> Path | None:
    """CACHE/models--a--b/blobs for CACHE/models--a--b/snapshots/REVISION and folders in it."""
    real = Path(os.path.realpath(directory))
    for parent in real.parents:
        if parent.name == "snapshots":
            blobs = parent.parent / "blobs"
            return blobs if blobs.is_dir() and not blobs.is_symlink() else None
    return None


def _check_link(path: Path, blobs: Path | None) -> None:
    if not path.is_symlink():
        return
    real = Path(os.path.realpath(path))
    if blobs is None or blobs not in real.parents or not real.is_file():
        raise UsageError(
            f"{path}: is a link to {os.readlink(path)}; reap follows only links from a snapshot of a hub's cache into"
            " its blobs: put the file itself there"
        )


def find_weights(directory: Path) -> Weights:
    """What transformers would load: one file before an index.

    Raises UsageError where there is neither (a checkpoint of pickles is one too few), FormatError for an index that is
    damaged or names what is not there.
    """
    if (directory / SINGLE).is_file():
        return Weights(None, [SINGLE])
    if not (directory / INDEX).is_file():
        raise UsageError(f"{directory}: has neither {SINGLE} nor {INDEX}{_pickle_advice(directory)}")
    return _read_index(directory)


def other_weights(directory: Path) -> list[str]:
    """Files that an index beside `model.safetensors` names, and `find_weights` passes over. Raises FormatError."""
    if not ((directory / SINGLE).is_file() and (directory / INDEX).is_file()):
        return []
    return [name for name in _read_index(directory).names if name != SINGLE]


def unnamed_files(directory: Path, weights: Weights) -> list[str]:
    """The safetensors files that lie beside an index which does not name them."""
    if weights.index is None:
        return []
    named = {*weights.names, SINGLE}
    return sorted(
        path.name
        for path in directory.iterdir()
        if path.name not in named and _SHARD_NAME.fullmatch(path.name) and path.name[0] != "." and path.is_file()
    )


def _read_index(directory: Path) -> Weights:
    where = str(directory / INDEX)
    index = Node(parse_json(read_text(directory / INDEX, _INDEX_BOUNDS), where, few_floats=True), where)
    weight_map = index["weight_map"].members()
    names: dict[str, str] = {}
    for tensor, name in weight_map.items():
        if type(name) is not str or name not in names:
            _check_shard_name(name, f"{where}: weight_map: {shorten(tensor, quote=False)}")
            names[name] = name
            if len(names) > _MOST_SHARDS:
                raise FormatError(f"{where}: names more than {_MOST_SHARDS:,} files")
        weight_map[tensor] = names[name]  # the file's own name once, and not once for each of its tensors
    if not names:
        raise FormatError(f"{where}: names no file")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FormatError(f"{where}: names {shorten(missing[0], 80)}, which is not there")
    return Weights(index.members(), list(names))


def _check_shard_name(name: Any, where: str) -> None:
    node = Node(name, where)
    if not _SHARD_NAME.fullmatch(node.string()) or name.startswith("."):
        node.fail(f"should name a .safetensors file beside the index, found {shorten(name)}")


def _pickle_advice(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir() if _PICKLES.fullmatch(path.name))
    if not names:
        return ""
    return (
        f"; it holds a pickle ({names[0]}), which reap never loads, since loading one can run anything: where you trust"
        " it, write it as safetensors first (transformers:"
        " AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR))"
    )


def read_text(path: Path, bounds: Bounds = _CONFIG_BOUNDS) -> str:
    """A JSON text, bounded before anything is made of it. Raises UsageError, FormatError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(bounds.n_bytes + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if problem := bounds.exceeded(raw):
        raise FormatError(f"{path}: has {problem}; no checkpoint has as many")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not UTF-8 text (byte {error.start})") from error
