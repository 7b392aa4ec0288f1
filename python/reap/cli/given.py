"""What was given where something else belongs: the wrong kind of file, or the right ones in another order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reap.errors import UsageError
from reap.files.recognise import what_is

_MODEL, _PROFILE, _PLAN, _SWEEP = "a GGUF model", "a profile of reap", "a plan of reap", "a sweep of reap"
_CHECKPOINT, _TEXT = "the folder of a Hugging Face checkpoint", "a text"
#: How the help names an argument -> what it should be. What is not here may be anything.
_WANTED = {
    "MODEL": _MODEL,
    "IN.gguf": _MODEL,
    "PRUNED.gguf": _MODEL,
    "PROFILE.json": _PROFILE,
    "A.json": _PROFILE,
    "B.json": _PROFILE,
    "A.json B.json...": _PROFILE,
    "PLAN.json": _PLAN,
    "SWEEP.json": _SWEEP,
    "HF_DIR": _CHECKPOINT,
    "TEXT...": _TEXT,
    "TEXT": _TEXT,
    "[DOMAIN=]CALIBRATION...": _TEXT,
}
_TEXTS = frozenset({"a text file", "JSON Lines"})
#: (what is wanted, what was given) -> what to do.
_ADVICE = {
    (_MODEL, _CHECKPOINT): "`reap convert {path} model.gguf` makes a GGUF file of it; `reap hf` works on it as it is",
    (_MODEL, "a safetensors file"): "`reap convert` makes a GGUF file of the checkpoint's directory {parent}",
    (_MODEL, _PROFILE): "give the model that it is a profile of",
    (_MODEL, _PLAN): "give the model that it is a plan for",
    (_MODEL, "an importance matrix"): "give the model that it was computed on",
    (_PROFILE, _MODEL): "`reap profile {path} CALIBRATION -o PROFILE.json` makes a profile of it",
    (_PROFILE, _PLAN): "give the profile that it was made of",
    (_PLAN, _PROFILE): "`reap plan {path} --keep 0.5 -o PLAN.json` makes a plan of it",
    (_PLAN, _MODEL): "`reap profile` and `reap plan` make one",
    (_CHECKPOINT, _MODEL): "the commands without hf work on GGUF files",
    (_CHECKPOINT, "a safetensors file"): "give the directory that it is in, {parent}",
    (_TEXT, _MODEL): "give a text, or JSON Lines",
}


def check_given(given: Sequence[tuple[str, Path]]) -> None:
    """UsageError where a file is of a kind that another argument wants, with what to give.

    given: (how the help names an argument, a path that it was given), in order. A file of no kind that is known is left
    to what reads it.
    """
    found = {path: _kind(path) for _, path in given}
    for metavar, path in given:
        wanted, kind = _WANTED.get(metavar), found[path]
        if wanted is None or kind is None or kind == wanted or not _is_known(wanted, kind):
            continue
        for other, holder in given:
            if _WANTED.get(other) == kind and found[holder] == wanted:
                raise UsageError(f"{path} is {kind} and {holder} is {wanted}: give them the other way round")
        advice = _ADVICE.get((wanted, kind))
        hint = f"; {advice.format(path=path, parent=path.parent)}" if advice else ""
        raise UsageError(f"{path}: is {kind}, where {metavar} should be {wanted}{hint}")


def _kind(path: Path) -> str | None:
    found = what_is(path)
    return _TEXT if found in _TEXTS else found


def _is_known(wanted: str, kind: str) -> bool:
    """Whether there is something to say that what reads the file would not say."""
    return (wanted, kind) in _ADVICE or kind in (_MODEL, _PROFILE, _PLAN, _SWEEP, _TEXT)
