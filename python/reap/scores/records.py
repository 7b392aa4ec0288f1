"""What profiles and plans have in common: array types, the names of the sums, and checks of the fields of their
files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from reap.files.strict_json import EXPERT_LIMIT, LAYER_LIMIT, Node
from reap.scores.identity import check_identity
from reap.text.overlap import read_sketch

if TYPE_CHECKING:
    from typing_extensions import NotRequired

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class Sums(TypedDict):
    """The sums of a set of tokens, each float64 [n_layers, n_experts], over the tokens routed to an expert. The order
    is that of a file."""

    gate_sum: Floats
    """Σ g, the gate's weight."""
    norm_sum: Floats
    """Σ ‖f‖₂, the norm of the expert's output."""
    gated_norm_sum: Floats
    """Σ g · ‖f‖₂."""
    gated_norm_sq_sum: Floats
    """Σ (g · ‖f‖₂)²."""
    norm_sq_sum: NotRequired[Floats]
    """Σ ‖f‖₂²; left out or NaN where it is not known."""
    norm_max: Floats
    """max ‖f‖₂."""


class Arrays(Sums):
    """What is measured of a set of tokens: the sums, and what they are sums over."""

    total_tokens: Sequence[int] | Counts
    counts: Counts


#: Their names; the last is the maximum of its kind, all others add.
SUMS = tuple(Sums.__annotations__)
#: Not in the files of earlier releases: NaN where it is unknown.
LATER_SUMS = ("norm_sq_sum",)
#: Numbers of things in a file's "calibration": those of merged profiles add.
COUNTED = ("samples", "tokens", "counted_tokens", "windows", "skipped", "failed")
#: Objects of name -> number there, which add by name.
TALLIES = ("shapes", "skipped_reasons", "texts_left_out")
ARRAYS = ("total_tokens", "counts", *SUMS)
#: The sum that a metric cannot do without, where some files do not hold it.
NEEDED_SUMS = {"reap_l2": "gated_norm_sq_sum", "msan": "norm_sq_sum"}
LAYER_KEY = re.compile(r"0|[1-9][0-9]{0,5}", re.ASCII)
MOST_TOKENS = 1 << 50  # so that sums of counts fit an int64, and a product with one a double


def span(layers: Counts) -> str:
    known = layers.tolist()
    return ", ".join(map(str, known)) if len(known) <= 8 else f"{len(known)} of them from {known[0]} to {known[-1]}"


def mean(total: Floats, counts: NDArray[Any]) -> Floats:
    """float64: total / counts, NaN where nothing was counted."""
    quotient: Floats = np.full(counts.shape, np.nan)
    np.divide(total, counts, out=quotient, where=counts > 0)
    return quotient


def add_up(groups: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, Any]:
    """The sums over all groups; of the largest norm the largest."""
    together: dict[str, Any] = {}
    for sums in groups:
        for name, values in sums.items():
            if name not in together:
                together[name] = values
            else:
                combine = np.maximum if name == "norm_max" else np.add
                together[name] = combine(together[name], values)
    return together


# ---- checks that hold for every profile, wherever it came from


def as_arrays(layers: Sequence[int] | Counts, arrays: Mapping[str, Any]) -> dict[str, Any]:
    typed: dict[str, Any] = {"layers": np.array(layers, dtype=np.int64)}
    for name in ("total_tokens", "counts"):
        typed[name] = np.array(arrays[name], dtype=np.int64)
    for name in SUMS:
        unknown = name in LATER_SUMS and name not in arrays
        typed[name] = np.full(typed["counts"].shape, np.nan) if unknown else np.array(arrays[name], dtype=np.float64)
    return typed


def check_format(root: Node, name: str, version: int) -> None:
    """FormatError where a document is not of the format `name` in a version that this release reads."""
    found = root["format"]
    if found.string() != name:
        found.fail(f"should be {name!r}, found {found.value!r}")
    said = root["version"]
    if said.integer() != version:
        said.fail(f"is {said.value}; this release of reap reads version {version}")


def check_model(model: Node) -> None:
    """FormatError where the fields of a file's "model" that a check relies on have the wrong type; absent ones pass."""
    for key in ("name", "architecture", "fingerprint", "router_fingerprint", "mismatch"):
        if key in model and model[key].value is not None:
            model[key].string()
    for key in ("n_experts", "n_experts_used", "n_groups", "n_groups_used"):
        if key in model:
            model[key].integer(1, EXPERT_LIMIT)
    if "n_embd" in model:
        model["n_embd"].integer()
    check_identity(model)
    if "n_groups" in model and "n_experts" in model:
        n_experts, n_groups = model["n_experts"].integer(), model["n_groups"].integer()
        if n_experts % n_groups:
            model.fail(f"has {n_experts} experts, which {n_groups} groups cannot share equally")


def check_calibration(record: Node) -> None:
    """FormatError where the fields of a file's "calibration" that reap reads have the wrong type; absent ones pass."""
    for key in ("files", "sha256", "skipped_lines", "failed_samples"):
        if key in record:
            for index in range(len(record[key].entries())):
                record[key].entry(index).string()
    for key in COUNTED:
        if key in record:
            record[key].integer(0, MOST_TOKENS)
    if "sketch" in record:
        read_sketch(record["sketch"])


def layer_nodes(layers: Node) -> dict[int, Node]:
    """The members of a "layers" object by block index, ascending. FormatError for none, or for a key that is not a
    plain
    number."""
    nodes = {}
    for key, node in layers.items():
        if not LAYER_KEY.fullmatch(key):
            node.fail("is not a layer number")
        nodes[int(key)] = Node(node.value, f"{layers.where.removesuffix(': layers')}: layer {key}")
    if not 0 < len(nodes) <= LAYER_LIMIT:
        layers.fail(f"holds {len(nodes)} layers")
    return dict(sorted(nodes.items()))
