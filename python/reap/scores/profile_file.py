"""The file of a profile: the document, reading and writing it, and the files of the reference profiler.

It knows arrays and records, not the class `Profile`, which is made of what `read` returns.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from reap.errors import ReapWarning
from reap.files.atomic import write_whole
from reap.files.paths import PathLike
from reap.files.strict_json import EXPERT_LIMIT, LARGE_VARIABLE, Node, json_bytes, read_json, too_many
from reap.scores.records import (
    LATER_SUMS,
    LAYER_KEY,
    SUMS,
    Counts,
    Floats,
    as_arrays,
    check_calibration,
    check_format,
    check_model,
    layer_nodes,
    mean,
)
from reap.scores.replicates import Replicates, read_replicates

FORMAT = "reap.profile"
VERSION = 1
#: Sums that a file of the reference profiler does not hold.
UNKNOWN_TO_REFERENCE = ("gated_norm_sq_sum", *LATER_SUMS, "norm_max")
_REFERENCE_MEANS = {"gate_sum": "avg_gate_weight", "norm_sum": "ean_mean", "gated_norm_sum": "reap"}
_DERIVED_TOLERANCE = 1e-6
_RECORDS = ("model", "calibration", "engine")


class Measured(Protocol):
    """What of a profile the document is made of; the sums by their names besides."""

    @property
    def layers(self) -> Counts: ...
    @property
    def total_tokens(self) -> Counts: ...
    @property
    def counts(self) -> Counts: ...
    @property
    def trusted(self) -> bool: ...
    @property
    def replicates(self) -> Replicates | None: ...


class Stored(NamedTuple):
    """What a file holds."""

    where: str
    """The file, for messages."""
    arrays: dict[str, Any]
    """Name -> array, as `Profile` takes them."""
    parts: dict[str, dict[str, Any]]
    """Domain -> the same arrays of its tokens, sorted by name."""
    records: dict[str, dict[str, Any]]
    """"model", "calibration", "engine"."""
    trusted: bool
    """False for a file of the reference profiler."""
    replicates: dict[str | None, Replicates]
    """Domain, None for the whole -> the parts of its calibration, where the file has them."""


# ---- writing


def document(
    whole: Measured, parts: Mapping[str, Measured], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The document of a profile and of its domains: docs/files.md."""
    made: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if not whole.trusted:
        made["trusted"] = False
    made |= records
    made |= _measured_document(whole)
    made["domains"] = {name: _measured_document(part) for name, part in parts.items()}
    return made


def write(path: PathLike, made: dict[str, Any], *, force: bool) -> Path:
    """Write a document, whole or not at all. Raises OutputError, and UsageError where a file is there without `force`;
    a ReapWarning says so where reap would not read it."""
    data = json_bytes(made)
    written = write_whole(path, data, force=force)
    if written.is_file() and (problem := too_many(data)):
        message = f"{written}: has {problem}; it is read again with {LARGE_VARIABLE}=1 in the environment only"
        warnings.warn(message, ReapWarning, stacklevel=3)
    return written


def _measured_document(part: Measured) -> dict[str, Any]:
    kept = {} if part.replicates is None else {"replicates": part.replicates.to_record()}
    return {"layers": _layers_document(part), **kept}


def _layers_document(part: Measured) -> dict[str, Any]:
    total = np.broadcast_to(part.total_tokens[:, None], part.counts.shape)
    frequency = np.nan_to_num(mean(part.counts.astype(np.float64), total))
    means = {key: np.nan_to_num(mean(getattr(part, name), part.counts)) for name, key in _REFERENCE_MEANS.items()}
    sums = [name for name in SUMS if not np.isnan(getattr(part, name)).all()]
    made = {}
    for row, layer in enumerate(part.layers.tolist()):
        made[str(layer)] = {
            "total_tokens": int(part.total_tokens[row]),
            "activation_counts": part.counts[row].tolist(),
            "activation_frequency": frequency[row].tolist(),
            **{key: values[row].tolist() for key, values in means.items()},
            "never_activated": int((part.counts[row] == 0).sum()),
            **{name: getattr(part, name)[row].tolist() for name in sums},
        }
    return made


# ---- reading


def read(path: PathLike) -> Stored:
    """What a profile holds, or a file of the reference profiler (llama-expert-profile).

    Raises UsageError where the file cannot be read, FormatError where any field of it is wrong. Whether the arrays
    contradict each other is for `Profile` to check.
    """
    root = read_json(path, what="profile")
    return _read_reference(root) if "format" not in root else _read_own(root)


def _read_own(root: Node) -> Stored:
    check_format(root, FORMAT, VERSION)
    trusted = not ("trusted" in root and root["trusted"].value is False)
    model = root["model"]
    n_experts = model["n_experts"].integer(1, EXPERT_LIMIT)
    check_model(model)
    check_calibration(root["calibration"])
    records = {name: root[name].members() for name in _RECORDS}
    domains = dict(sorted(root["domains"].items()) if "domains" in root else ())
    parts = {name: _load_layers(node["layers"], n_experts, trusted) for name, node in domains.items()}
    whole = _load_layers(root["layers"], n_experts, trusted)
    measured: list[tuple[str | None, Node]] = [(None, root), *domains.items()]
    replicates = {
        name: read_replicates(node["replicates"], len(whole["layers"]), n_experts)
        for name, node in measured
        if "replicates" in node
    }
    return Stored(root.where, whole, parts, records, trusted, replicates)


def _load_layers(layers: Node, n_experts: int, trusted: bool) -> dict[str, Any]:
    nodes = layer_nodes(layers)
    rows = [_load_layer(node, n_experts, trusted) for node in nodes.values()]
    return _stack(list(nodes), rows)


def _load_layer(node: Node, n_experts: int, trusted: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"total_tokens": node["total_tokens"].integer()}
    row["counts"] = node["activation_counts"].integers(n_experts)
    for name in SUMS:
        unknown = (not trusted and name in UNKNOWN_TO_REFERENCE) or (name in LATER_SUMS and name not in node)
        row[name] = np.full(n_experts, np.nan) if unknown else node[name].numbers(n_experts)
    _check_derived(node, row)
    return row


def _check_derived(node: Node, row: dict[str, Any]) -> None:
    """FormatError where a derived value says otherwise than the sums: an edit of it alone would change nothing,
    silently."""
    counts = row["counts"]
    for name, key in _REFERENCE_MEANS.items():
        if key in node:
            _compare_derived(node[key], row[name] / np.maximum(counts, 1), name)
    if "activation_frequency" in node:
        _compare_derived(node["activation_frequency"], counts / max(row["total_tokens"], 1), "activation_counts")
    if "never_activated" in node and node["never_activated"].integer() != int((counts == 0).sum()):
        found = node["never_activated"]
        found.fail(f"is {found.value}, but {int((counts == 0).sum())} experts have a count of 0")


def _compare_derived(node: Node, expected: Floats, source: str) -> None:
    values = node.numbers(expected.size)
    bad = np.flatnonzero(np.abs(values - expected) > _DERIVED_TOLERANCE * np.maximum(np.abs(expected), 1e-30))
    if bad.size:
        expert = int(bad[0])
        node.entry(expert).fail(
            f"is {values[expert]:.6g}, but {source} gives {expected[expert]:.6g}; scores are made of the sums"
        )


def _stack(layers: list[int], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return as_arrays(layers, {name: [row[name] for row in rows] for name in ("total_tokens", "counts", *SUMS)})


def _read_reference(root: Node) -> Stored:
    """A file of llama-expert-profile: layers at the top level, means instead of sums, so that a sum is n · mean."""
    layers = {key: value for key, value in root.members().items() if LAYER_KEY.fullmatch(key)}
    if not layers:
        root.fail(f'is not a profile: it has neither "format": "{FORMAT}" nor layers at the top level')
    nodes = layer_nodes(Node(layers, root.where))
    n_experts = len(next(iter(nodes.values()))["activation_counts"].entries())
    if not n_experts:
        root.fail("is not a profile: its layers have no experts")
    rows = [_load_reference_layer(node, n_experts) for node in nodes.values()]
    records: dict[str, dict[str, Any]] = {
        "model": {"n_experts": n_experts},
        "calibration": {},
        "engine": {"tool": "llama-expert-profile"},
    }
    return Stored(root.where, _stack(list(nodes), rows), {}, records, trusted=False, replicates={})


def _load_reference_layer(node: Node, n_experts: int) -> dict[str, Any]:
    counts = node["activation_counts"].integers(n_experts)
    row: dict[str, Any] = {"total_tokens": node["total_tokens"].integer(), "counts": counts}
    for name, key in _REFERENCE_MEANS.items():
        row[name] = counts * node[key].numbers(n_experts)
    for name in UNKNOWN_TO_REFERENCE:
        row[name] = np.full(n_experts, np.nan)
    return row
