"""Says what a file is that was given where another kind was expected, by its first bytes."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

from reap.files.paths import PathLike

LFS_POINTER = "a Git LFS pointer: the file itself was not downloaded (git lfs pull)"
#: How much of a file is looked at.
HEAD_BYTES = 4096
_MOST_ENTRIES = 131_072
_GGUF_KINDS = {
    b"imatrix": "an importance matrix",
    b"adapter": "a LoRA adapter in GGUF form",
    b"mmproj": "the vision or audio part of a model (mmproj)",
    b"model": "a GGUF model",
}
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    *((magic, "a GGML file from before GGUF; convert the model again") for magic in (b"lmgg", b"fmgg", b"tjgg")),
    (b"version https://git-lfs", LFS_POINTER),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"PAR1", "a Parquet file"),
    (b"%PDF-", "a PDF document"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\xff\xfe", "a text file (UTF-16)"),
    (b"\xfe\xff", "a text file (UTF-16)"),
)
RESUME_FILE = "a file that an interrupted run resumes from"
_REAP_FORMATS = {
    b"profile": "a profile of reap",
    b"plan": "a plan of reap",
    b"sweep": "a sweep of reap",
    b"checkpoint": RESUME_FILE,
    b"resume": RESUME_FILE,
    b"sweep.resume": RESUME_FILE,
    b"refine.resume": RESUME_FILE,
    b"answers.resume": RESUME_FILE,
    b"hf-prune": "what reap writes beside a pruned checkpoint (reap.json)",
}
#: What is not data to read, although it may pass for JSON or text.
NOT_DATA = frozenset(
    {*_REAP_FORMATS.values(), LFS_POINTER, "a safetensors file", "an importance matrix (in its old form)"}
)
_JSON_KEYS = (
    (b'"weight_map"', "the index of a checkpoint's safetensors files; give the folder"),
    (b'"model_type"', "a checkpoint's config.json; give the folder"),
    (b'"architectures"', "a checkpoint's config.json; give the folder"),
    (b'"added_tokens"', "a tokenizer.json"),
)


def what_is(path: PathLike) -> str | None:
    """ "a GGUF model", "an importance matrix", "a safetensors file", "JSON Lines" and so on; None for what is not known
    or cannot be read. Opens nothing but regular files and folders."""
    where = Path(path)
    try:
        if where.is_dir():
            return "the folder of a Hugging Face checkpoint" if (where / "config.json").is_file() else "a folder"
        if not where.is_file():
            return None
        with open(where, "rb") as file:
            return what_are(file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size)
    except (OSError, ValueError):
        return None


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?", re.ASCII)
_URL = re.compile(r"([a-z][a-z0-9+.-]*):/+(.+)", re.IGNORECASE)


def url_of(path: PathLike) -> str | None:
    """The URL that a path was meant for, None where it is a path. Of a URL's slashes a Path has only one left."""
    text = os.fsdecode(path)
    url = _URL.fullmatch(text)
    return None if url is None or os.path.lexists(text) else f"{url[1]}://{url[2]}"


def absent_text(path: PathLike, *, data: bool = False) -> str:
    """What an error says of a path where there is nothing: that it is a URL, or looks like a name on a hub.

    data: it would be of a data set there, and not of a model.
    """
    text = os.fsdecode(path)
    if url := url_of(path):
        return f"no such file; {url} is a URL: download it, and give the file's path"
    if _HUB_NAME.fullmatch(text) and not os.path.isdir(os.path.dirname(text)):
        repository = text.partition(":")[0]
        if data:
            return (
                "no such file; if this is a data set on the Hugging Face hub, download it (hf download --repo-type"
                f" dataset {repository}) and give the path of its files"
            )
        return (
            f"no such file; if this is a name on the Hugging Face hub, download it (hf download {repository}) and give"
            " the path: a GGUF file, or a checkpoint's directory for convert and hf"
        )
    return "no such file"


def unreadable_text(path: PathLike, error: OSError, *, data: bool = False) -> str:
    """Why a path could not be opened: the system's own words, or, where there is nothing, what the path looks like."""
    absent = absent_text(path, data=data) if isinstance(error, FileNotFoundError) else ""
    return absent if absent not in ("", "no such file") else error.strerror or str(error)


def what_are(head: bytes, n_bytes: int) -> str | None:
    """The same of a file's first bytes, `HEAD_BYTES` of them where it has as many, and its size."""
    if not head:
        return "an empty file"
    for beginning, what in _BEGINNINGS:
        if head.startswith(beginning):
            return what
    for recognise in (_gguf, _safetensors, _pickle, _legacy_imatrix, _zeros, _json, _text):
        found = recognise(head, n_bytes)
        if found is not None:
            return found
    return None


def _gguf(head: bytes, _: int) -> str | None:
    if not head.startswith(b"GGUF"):
        return None
    # general.type, as the pair is stored: the key, the type id of a string, its length, the string
    kind = re.search(rb"general\.type\x08\0\0\0(.)\0{7}([a-z]+)", head, re.DOTALL)
    name = kind[2][: kind[1][0]] if kind else b"model"
    return _GGUF_KINDS.get(name, f"a GGUF file of the type {name.decode()!r}")


def _safetensors(head: bytes, n_bytes: int) -> str | None:
    is_one = len(head) > 9 and head[8:9] == b"{" and 0 < struct.unpack_from("<Q", head)[0] <= n_bytes - 8
    return "a safetensors file" if is_one else None


def _pickle(head: bytes, _: int) -> str | None:
    if head.startswith(b"PK\x03\x04"):
        return "PyTorch weights (a pickle)" if b"data.pkl" in head else "a ZIP archive"
    return "a pickle" if re.match(rb"\x80[\x02-\x05][\x80-\xff(cX}\x8a]", head) else None


def _legacy_imatrix(head: bytes, _: int) -> str | None:
    if len(head) < 16:
        return None
    n_entries, length = struct.unpack_from("<ii", head)
    if not (0 < n_entries <= _MOST_ENTRIES and 0 < length <= 256):
        return None
    name = head[8 : 8 + length]
    return "an importance matrix (in its old form)" if re.fullmatch(rb"[\w.-]+\.weight", name) else None


def _zeros(head: bytes, _: int) -> str | None:
    return "not fully downloaded: it begins with zeros" if len(head) > 64 and not any(head) else None


def _json(head: bytes, _: int) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] not in (b"{", b"[") or not _is_text(head):
        return None
    reap_format = re.search(rb'"format"\s*:\s*"reap\.([\w.-]+)"', text)
    if reap_format and reap_format[1] in _REAP_FORMATS:
        return _REAP_FORMATS[reap_format[1]]
    if re.search(rb"\}\s*\n\s*\{", text) and not text.startswith(b"["):
        return "JSON Lines"
    return next((what for key, what in _JSON_KEYS if key in text), "a JSON file")


def _text(head: bytes, _: int) -> str | None:
    if not _is_text(head):
        return None
    is_page = head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))
    return "a web page (HTML)" if is_page else "a text file"


def _is_text(head: bytes) -> bool:
    try:
        head[: len(head) - 3 if len(head) == HEAD_BYTES else None].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(head) - 6:  # otherwise a character cut in two
            return False
    return not re.search(rb"[\x00-\x08\x0e-\x1a]", head)
