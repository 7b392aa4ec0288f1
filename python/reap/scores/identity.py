"""Are two files of one model? What their records ("model" of a profile, a plan; `record()` of an opened model) say.

Compared are the parts of the identity, or, in files of older releases, the fingerprint; between a GGUF file and a
Hugging Face checkpoint, which have other parts, what both know of the structure; and in every case the numbers of the
routers, where both have a sketch of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap.errors import MismatchError, ReapWarning
from reap.files.strict_json import Node
from reap.gguf.router_sketch import Distance, RouterSketch, measure_distances, read_record, select_rows

#: What a GGUF file and a checkpoint call by the same name; the number of experts is for the callers, who need it equal.
STRUCTURE = ("n_experts_used", "n_groups", "n_groups_used", "n_embd")
#: Fields of "model" that make up the identity, for whatever is made of a profile to carry along.
IDENTITY_KEYS = ("fingerprint", "router_fingerprint", "identity", "routers")
#: How a call goes on with another model, where it can.
ALLOW = "allow_mismatch=True (--allow-mismatch) goes on all the same, and what is written says so"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What comparing two records found."""

    differences: tuple[str, ...]
    """What makes them two models, each with what differs and by how much; empty for one model."""
    notes: tuple[str, ...]
    """What could not be compared."""

    @property
    def text(self) -> str:
        """The differences in one line."""
        return "; ".join(self.differences)


def compare_records(
    first: Record, second: Record, names: tuple[str, str], older: Collection[str] = (), *, any_form: bool = True
) -> Verdict:
    """Compare two records.

    Args:
        first, second: the "model" of a profile or plan, or what `ModelInfo.record` gives.
        names: what a sentence calls them ("the plan", "model.gguf").
        older: fingerprints that older releases gave to the second.
        any_form: whether one may be a GGUF file and the other a checkpoint.
    """
    differences, notes = list(_compare_structure(first, second, names)), []
    ours, theirs = first.get("fingerprint"), second.get("fingerprint")
    is_crossed = bool(ours and theirs and _kind(ours) != _kind(theirs))
    if ours and theirs and is_crossed and not any_form:
        differences.append(f"{names[0]} is of {form_of(ours)} and {names[1]} of {form_of(theirs)}")
    elif ours and theirs and not is_crossed:
        parts = first.get("identity"), second.get("identity")
        found = _compare_parts(parts[0], parts[1], names) if parts[0] and parts[1] else []
        differences += found
        if ours == theirs or ours in older or found:
            pass
        elif all(parts) or not any(parts) or older:  # of the same parts, one of the two is damaged
            differences.append(f"{names[0]} is of a model with fingerprint {ours}, but {names[1]} of one with {theirs}")
        else:
            notes.append(
                f"{_older(first, names)} was written by an older release of reap, whose fingerprint says less; only the"
                " numbers of layers and experts were compared"
            )
    routers = _compare_routers(first, second, names)
    return Verdict((*dict.fromkeys(differences), *routers.differences), tuple(notes) or routers.notes)


def compare_with_pruned(record: Record, routers: RouterSketch, kept: Mapping[int, Sequence[int]]) -> tuple[str, ...]:
    """How the routers of a model differ from those of a file that is said to be pruned from it; empty where they agree.

    Args:
        record: the "model" of a profile or sweep, or what `ModelInfo.record` gives, of the model before.
        routers: of the pruned file.
        kept: layer -> ids of the experts that it kept, in order.
    """
    sketch = _sketch(record)
    if sketch is None:
        return ()
    distances = measure_distances(select_rows(sketch, kept), routers)
    return _differing([found._replace(expert=kept[found.layer][found.expert]) for found in distances])


def require_same(verdict: Verdict, what: str, *, allow_mismatch: bool, advice: str = ALLOW) -> str | None:
    """The differences as a sentence that begins with `what`, None where there are none.

    MismatchError, unless it is allowed; it ends with `advice`.
    """
    if not verdict.differences:
        return None
    sentence = f"{what}: {verdict.text}"
    if not allow_mismatch:
        raise MismatchError("; ".join(filter(None, (sentence, advice))))
    return sentence


def warn_of(verdict: Verdict, what: str, stacklevel: int = 3) -> None:
    """A ReapWarning for each thing that could not be compared."""
    for note in verdict.notes:
        warnings.warn(f"{what}: {note}", ReapWarning, stacklevel=stacklevel)


def crosses_over(first: Record, second: Record) -> bool:
    """Whether one record is of a GGUF file and the other of a checkpoint."""
    kinds = {_kind(record["fingerprint"]) for record in (first, second) if record.get("fingerprint")}
    return len(kinds) > 1


def check_identity(model: Node) -> None:
    """FormatError where the parts or the sketch in a file's "model" cannot be what reap wrote; absent ones pass."""
    if "identity" in model:
        for _, part in model["identity"].items():
            part.string()
    if "routers" in model:
        read_record(model["routers"])


def _kind(fingerprint: str) -> str:
    return fingerprint.partition(":")[0]


def form_of(fingerprint: str | None) -> str:
    """What a fingerprint says that its model is."""
    return "a GGUF file" if _kind(fingerprint or "") == "sha256" else "a Hugging Face checkpoint"


def _older(first: Record, names: tuple[str, str]) -> str:
    return names[1] if first.get("identity") else names[0]


def _compare_structure(first: Record, second: Record, names: tuple[str, str]) -> list[str]:
    return [
        f"{key} is {first[key]} in {names[0]} and {second[key]} in {names[1]}"
        for key in STRUCTURE
        if first.get(key) and second.get(key) and first[key] != second[key]
    ]


def _compare_parts(first: Mapping[str, str], second: Mapping[str, str], names: tuple[str, str]) -> list[str]:
    found = []
    for key in dict.fromkeys([*first, *second]):
        ours, theirs = first.get(key), second.get(key)
        if ours == theirs or (key == "tokenizer" and None in (ours, theirs)):
            continue  # a checkpoint may be without the files of its tokenizer
        if max(len(str(ours)), len(str(theirs))) > 12 and " " not in key:
            found.append(f"{key} differs")
        elif " " in key:
            found.append(f"the {key} differ")
        else:
            found.append(f"{key} is {ours or 'absent'} in {names[0]} and {theirs or 'absent'} in {names[1]}")
    return found


# ---- the routers


def _compare_routers(first: Record, second: Record, names: tuple[str, str]) -> Verdict:
    sketches = [_sketch(record) for record in (first, second)]
    if any(sketch is None for sketch in sketches):
        missing = [name for name, sketch in zip(names, sketches, strict=True) if sketch is None]
        # two files of older releases are compared as they always were
        is_new = len(missing) == 1 and first.get("fingerprint") != second.get("fingerprint")
        return Verdict((), (f"{missing[0]} has no sketch of the routers, whose numbers were not compared",) * is_new)
    ours, theirs = sketches[0] or {}, sketches[1] or {}
    distances = measure_distances(ours, theirs)
    measured = {distance.layer for distance in distances}
    unread = {
        layer: sketch[layer].type
        for sketch in (ours, theirs)
        for layer in sketch
        if layer in ours and layer in theirs and layer not in measured and sketch[layer].rows is None
    }
    notes = [f"routers stored as {_listed(unread.values())} were not compared ({len(unread)} layers)"] if unread else []
    counts = {
        layer: (len(a), len(b))
        for layer in sorted(set(ours) & set(theirs))
        if (a := ours[layer].rows) is not None and (b := theirs[layer].rows) is not None and len(a) != len(b)
    }
    if counts:
        layer, (n_ours, n_theirs) = next(iter(counts.items()))
        found = f"the router of layer {layer} has {n_ours} rows in {names[0]} and {n_theirs} in {names[1]}"
        return Verdict((found,), ())
    return Verdict(_differing(distances), tuple(notes))


def _sketch(record: Record) -> RouterSketch | None:
    return read_record(Node(record["routers"], "model: routers")) if record.get("routers") else None


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(set(names)))


def _differing(distances: list[Distance]) -> tuple[str, ...]:
    differing = [distance for distance in distances if distance.differs]
    if not differing:
        return ()
    worst = max(differing, key=lambda distance: distance.distance)
    types = worst.types[0] if len(set(worst.types)) == 1 else " and ".join(worst.types)
    reordered = all(distance.is_reordered for distance in differing)
    how = ", and hold the same rows in another order" if reordered else ""
    return (
        f"the routers of {len(differing)} of {len(distances)} layers differ{how}: most in layer {worst.layer}, by"
        f" {worst.distance:.2g} of their size, where {types} accounts for at most {worst.bound:.2g} (expert"
        f" {worst.expert}: {worst.row_distance:.2g})",
    )
