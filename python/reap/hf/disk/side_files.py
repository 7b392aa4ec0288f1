"""What lies beside the weights of a checkpoint: what is carried over as it is, what is left out because it was asked
for, what is refused by name. Weights are never left behind in silence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypedDict

from reap.errors import FormatError, UsageError
from reap.hf.disk.checkpoint_files import PROVENANCE, QUANTISATIONS, TRUSTED, Checkpoint
from reap.hf.disk.discovery import CONFIG, INDEX, walk
from reap.hf.disk.layout import CheckpointLayout, speaks_of_experts
from reap.hf.disk.safetensors_file import SafetensorsFile

OTHER_WEIGHTS = ("carry", "leave")
_INDEX_END = ".index.json"
#: Files that hold weights of some form.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|gguf|ggml|onnx|onnx_data|h5|msgpack|npz|npy|ot|tflite|mlmodel|distcp)",
    re.IGNORECASE,
)
#: What a trainer leaves beside: pickles, but no weights.
_SETTINGS = re.compile(r"(.*/)?(training_args\.bin|scheduler\.pt|rng_state(_\d+)?\.pth)")
_MOST_QUOTED = 3


class FileArguments(TypedDict, total=False):
    """Keyword arguments that a function hands on to `FileOptions`, where they are explained."""

    trust: Literal["shards", "index"] | None
    other_weights: Literal["carry", "leave"] | None


@dataclass(frozen=True)
class FileOptions:
    """Which files are the checkpoint."""

    trust: Literal["shards", "index"] | None = None
    """Where the index and the safetensors files beside it differ, what the checkpoint is: all that the files hold
    ("shards"), or what the index names ("index"). None: a difference is an error that lists it."""
    other_weights: Literal["carry", "leave"] | None = None
    """Files with weights that are not the model's own and that may hold experts, or cannot be read: copy them as they
    are ("carry"), or leave them out ("leave"). None: they are an error that names them."""

    def check(self) -> None:
        """UsageError for another word."""
        for name, value, known in (
            ("trust", self.trust, TRUSTED),
            ("other_weights", self.other_weights, OTHER_WEIGHTS),
        ):
            if value is not None and value not in known:
                raise UsageError(f"unknown {name} {value!r}; known: {', '.join(known)}")


@dataclass(frozen=True)
class SideFile:
    """A file that is carried over as it is."""

    name: str
    """Below the checkpoint's directory."""
    path: Path
    """Where it is."""
    n_bytes: int
    """Its size."""


def sort_side_files(
    checkpoint: Checkpoint, layout: CheckpointLayout, options: FileOptions
) -> tuple[list[SideFile], list[str]]:
    """(files to carry over, names of weights that are left out): tokenizer, templates, code, licences, other models.

    config.json, the index, reap.json and what says how it is quantised are in neither, since they are written anew.
    Weights beside the model's own are carried over where they are safetensors none of whose tensors speaks of experts.

    Raises:
        UsageError: there are others, and `options` do not say what to do with them.
    """
    written = {CONFIG, INDEX, PROVENANCE, *QUANTISATIONS, *checkpoint.shards}
    paths = {path.relative_to(checkpoint.directory).as_posix(): path for path in walk(checkpoint.directory)}
    paths = {name: path for name, path in paths.items() if name not in written}
    weights = [name for name in paths if _WEIGHTS.fullmatch(name) and not _SETTINGS.fullmatch(name)]
    unnamed = checkpoint.unnamed_files if options.trust == "index" else ()
    unsure = {
        name: problem
        for name in weights
        if name not in unnamed and (problem := _problem(paths[name], layout.n_experts)) is not None
    }
    if unsure and options.other_weights is None:
        raise UsageError(_refusal(checkpoint.directory, unsure))
    left = [*unnamed, *(unsure if options.other_weights == "leave" else ())]
    folders = {str(PurePosixPath(name).parent) for name in weights if name not in left}
    # an index goes where the files go that it names
    left += [
        name
        for name in paths
        if _WEIGHTS.fullmatch(name.removesuffix(_INDEX_END))
        and name.endswith(_INDEX_END)
        and str(PurePosixPath(name).parent) not in folders
    ]
    carried = [SideFile(name, path, path.stat().st_size) for name, path in paths.items() if name not in left]
    return carried, sorted(left)


def _problem(path: Path, n_experts: int) -> str | None:
    """Why a file of weights is not carried over unasked."""
    if path.suffix.lower() != ".safetensors":
        return "is in a form that reap does not read"
    try:
        with SafetensorsFile.open(path) as file:
            found = next((t.name for t in file.tensors.values() if speaks_of_experts(t, n_experts)), None)
    except FormatError:
        return "cannot be read"
    return None if found is None else f"holds {found[:80]}"


def _refusal(directory: Path, unsure: dict[str, str]) -> str:
    quoted = [f"{name} {problem}" for name, problem in list(unsure.items())[:_MOST_QUOTED]]
    more = f", and {len(unsure) - _MOST_QUOTED} more" if len(unsure) > _MOST_QUOTED else ""
    what = "a file" if len(unsure) == 1 else f"{len(unsure):,} files"
    return (
        f"{directory}: has {what} with weights that are not among the model's own and may speak of its experts"
        f" ({', '.join(quoted)}{more}); --other-weights leave leaves out what is not the model's, --other-weights carry"
        " copies it as it is"
    )


def left_out(names: Sequence[str]) -> str:
    """The sentence of a report about files that were left out."""
    return (
        f"{len(names)} files with other weights were not carried over: {', '.join(names[:5])}{' …' * (len(names) > 5)}"
    )
