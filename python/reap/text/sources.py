"""What a calibration is made of: files, folders of files, Python objects, each with its domain."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.errors import CalibrationError, UsageError
from reap.files.paths import PathLike
from reap.files.recognise import absent_text
from reap.text.streams import COMPRESSED_SUFFIXES, STDIN, suffix_of

Source = PathLike | Iterable[Any] | Mapping[Any, Any]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (".csv", ".tsv")
COLUMNAR_SUFFIXES = (".parquet", ".pq", ".arrow")
TEXT_SUFFIXES = (".txt", ".md", ".raw")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *COLUMNAR_SUFFIXES, *TEXT_SUFFIXES)
# Of a data set's folder, not of its data.
_NOT_DATA = re.compile(r"(readme|licen[cs]e|dataset_infos?\.json|dataset_dict\.json|state\.json)", re.IGNORECASE)
_DOMAIN_PREFIX = re.compile(r"([^=/\\]{1,128})=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One file, or objects that were given as such."""

    path: str | None
    """Of the file; "-": standard input; None: objects."""
    objects: Iterable[Any] | None = None
    """As the lines of a JSON Lines file hold them; None: a file."""
    domain: str | None = None
    """Where one is given for all of it."""


def split_domain(text: str) -> tuple[str | None, str]:
    """[DOMAIN=]FILE as the command line has it: the domain and the path. A file that has such a name is a file."""
    found = _DOMAIN_PREFIX.fullmatch(text)
    return (None, text) if found is None or os.path.exists(text) else (found[1], found[2])


def parts_of(source: Source) -> list[Part]:
    """The files and objects of a source, folders taken apart.

    source: a path, or "-"; a list of paths, or of (domain, path); a mapping of domain -> path, paths or objects;
    objects, which are dictionaries. Raises UsageError for anything else, for a folder without data, and for
    standard input given twice.
    """
    parts = list(_parts(source, None))
    if sum(part.path == STDIN for part in parts) > 1:
        raise UsageError("standard input (-) is given more than once; it can be read only once")
    return parts


def _parts(source: Any, domain: str | None) -> Iterator[Part]:
    if isinstance(source, str | os.PathLike):
        yield from (Part(path, domain=domain) for path in files_at(os.fspath(source)))
    elif isinstance(source, Mapping):
        for name, inner in source.items():
            if domain is not None or not isinstance(name, str) or not name:
                raise UsageError(f"a calibration by domains should be of names and files, found {name!r}")
            if isinstance(inner, str) and inner != STDIN and not os.path.exists(inner):
                raise UsageError(
                    f"{inner}: cannot read the calibration of the domain {name!r}: {absent_text(inner, data=True)}; a"
                    " sample is given as a list of one dictionary"
                )
            if isinstance(inner, Mapping):
                raise UsageError(f"the domain {name!r} should be a path, paths or dictionaries, found a dictionary")
            yield from _parts(inner, name)
    elif isinstance(source, list | tuple) and source and all(map(_is_path, source)):
        for item in source:
            own, path = item if isinstance(item, tuple) else (None, item)
            yield from _parts(path, own if own is not None else domain)
    elif isinstance(source, bytes) or not isinstance(source, Iterable):
        raise UsageError(
            f"calibration should be a path, a list of paths or dictionaries, found {type(source).__name__}"
        )
    elif hasattr(source, "itertuples"):  # iterating over one gives the names of its columns
        raise UsageError(f"calibration is a {type(source).__name__}; give its rows: to_dict('records')")
    else:
        yield Part(None, source, domain)


def _is_path(item: Any) -> bool:
    if isinstance(item, tuple):
        return len(item) == 2 and isinstance(item[0], str | None) and _is_path(item[1])
    return isinstance(item, str | os.PathLike)


# ---- folders


def files_at(path: str) -> Sequence[str]:
    """The path itself; of a folder the files of data in it, in order."""
    if path == STDIN or not os.path.isdir(path):
        return [path]
    folder = Path(path)
    if (folder / "state.json").is_file():
        return _saved_dataset(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = _read(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
            raise CalibrationError(f"{folder / 'dataset_dict.json'}: should name the splits, as datasets writes them")
        return [file for split in splits for file in _saved_dataset(folder / split)]
    files = sorted(str(file) for file in folder.rglob("*") if _is_data(file, folder))
    if not files:
        seen = sorted({file.suffix or file.name for file in folder.rglob("*") if file.is_file()})
        raise UsageError(
            f"{path}: the folder holds no data; expected files named {' '.join(SUFFIXES)}, each also with"
            f" {' '.join(COMPRESSED_SUFFIXES)}, found {', '.join(seen[:8]) or 'nothing'}"
        )
    return files


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    return not hidden and not _NOT_DATA.match(file.name) and suffix_of(file.name) in SUFFIXES and file.is_file()


def _saved_dataset(folder: Path) -> list[str]:
    """The Arrow files of a folder that `datasets.save_to_disk` wrote, in order."""
    state = _read(folder / "state.json")
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise CalibrationError(f"{folder / 'state.json'}: should name the data's files, as datasets.save_to_disk does")
    if state.get("_indices_data_files"):
        raise CalibrationError(
            f"{folder}: keeps a selection of its rows apart, as old releases of datasets did; save it again with a"
            " newer one"
        )
    names = [str(entry.get("filename")) for entry in entries]
    wrong = next((name for name in names if os.path.basename(name) != name), None)
    if wrong is not None:
        raise CalibrationError(f"{folder / 'state.json'}: names the file {wrong!r}, which is not in the folder itself")
    return [str(folder / name) for name in names]


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: cannot be read: {' '.join(str(error).split())[:150]}") from error
    return value if isinstance(value, dict) else {}
