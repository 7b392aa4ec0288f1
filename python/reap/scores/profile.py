"""The profile: what calibration measured of each expert, as sums that merge exactly, and the scores made of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.errors import FormatError, ReapWarning, UsageError
from reap.files.strict_json import EXPERT_LIMIT, LARGE_VARIABLE, Node, json_bytes, read_json, too_many, write_whole
from reap.scores.records import (
    _LAYER_KEY,
    MOST_TOKENS,
    SUMS,
    Counts,
    Floats,
    as_arrays,
    check_calibration,
    check_format,
    check_model,
    layer_nodes,
    span,
)

FORMAT = "reap.profile"
VERSION = 1
METRICS = ("reap", "weighted_ean_sum", "ean_sum", "ean_mean", "frequency", "gate_sum", "reap_l2", "random")
_UNKNOWN_TO_REFERENCE = ("gated_norm_sq_sum", "norm_max")
_REFERENCE_MEANS = {"gate_sum": "avg_gate_weight", "norm_sum": "ean_mean", "gated_norm_sum": "reap"}
_DERIVED_TOLERANCE = 1e-6
_LARGEST_SUM = 1e200


@dataclass(frozen=True, eq=False)
class Profile:
    """What calibration measured. Every array is [n_layers, n_experts] unless it says otherwise; none is ever NaN when
    trusted.

    layers             int64 [n_layers]: GGUF block index of each MoE layer, ascending
    total_tokens       int64 [n_layers]: tokens that the layer saw and counted
    counts             int64: tokens routed to the expert
    gate_sum           float64: sum over those tokens of g, the gate that multiplies the expert's output
    norm_sum           float64: sum of ‖f‖₂, f the expert's output with its bias
    gated_norm_sum     float64: sum of g·‖f‖₂
    gated_norm_sq_sum  float64: sum of (g·‖f‖₂)²
    norm_max           float64: largest ‖f‖₂
    model              name, architecture, fingerprint, n_experts, n_experts_used, n_groups, ...
    calibration        files, sha256, samples, tokens, ...
    engine             what measured it
    trusted            False for a file of the reference profiler: its scores are not to be relied on, and what it does
                       not hold (gated_norm_sq_sum, norm_max) is NaN

    Make one with `Profile.from_sums` or `Profile.load`; both check every field.
    """

    layers: Counts
    total_tokens: Counts
    counts: Counts
    gate_sum: Floats
    norm_sum: Floats
    gated_norm_sum: Floats
    gated_norm_sq_sum: Floats
    norm_max: Floats
    model: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    trusted: bool = True
    parts: Mapping[str, Profile] = field(default_factory=dict, repr=False)

    @classmethod
    def from_sums(
        cls,
        *,
        layers: Sequence[int] | Counts,
        total_tokens: Sequence[int] | Counts,
        counts: Counts,
        gate_sum: Floats,
        norm_sum: Floats,
        gated_norm_sum: Floats,
        gated_norm_sq_sum: Floats,
        norm_max: Floats,
        model: Mapping[str, Any],
        calibration: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
        domains: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Profile:
        """A profile of measured sums; `domains` maps a name to the same arrays (without `layers`) of that domain's
        tokens.

        Arrays are copied. Raises FormatError where shapes, signs or sums contradict each other.
        """
        records: dict[str, Any] = dict(
            model=dict(model), calibration=dict(calibration or {}), engine=dict(engine or {})
        )
        arrays = dict(total_tokens=total_tokens, counts=counts, gate_sum=gate_sum, norm_sum=norm_sum)
        arrays |= dict(gated_norm_sum=gated_norm_sum, gated_norm_sq_sum=gated_norm_sq_sum, norm_max=norm_max)
        parts = {str(name): cls(**as_arrays(layers, part), **records) for name, part in sorted((domains or {}).items())}
        whole = cls(**as_arrays(layers, arrays), **records, parts=parts)
        _check(whole, "profile")
        return whole

    @property
    def n_layers(self) -> int:
        return int(self.counts.shape[0])

    @property
    def n_experts(self) -> int:
        return int(self.counts.shape[1])

    @property
    def n_groups(self) -> int:
        """Groups of the router; 1 where it has none."""
        return int(self.model.get("n_groups") or 1)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains that calibration lines carried, sorted."""
        return tuple(self.parts)

    @property
    def never_routed(self) -> NDArray[np.bool_]:
        """bool [n_layers, n_experts]: experts that no token was routed to; their means are undefined."""
        return np.asarray(self.counts == 0)

    def domain(self, name: str) -> Profile:
        """The same measurements over the tokens of one domain. UsageError for a name that the calibration did not
        carry."""
        if name not in self.parts:
            known = ", ".join(self.parts) or "none"
            raise UsageError(f"the profile has no domain {name!r}; it has: {known}")
        return self.parts[name]

    def row(self, layer: int) -> int:
        """Which row of the arrays holds block `layer`. UsageError where it is no MoE layer of the profile."""
        rows = np.flatnonzero(self.layers == layer)
        if not rows.size:
            raise UsageError(f"layer {layer} is no MoE layer of the profile, which has {span(self.layers)}")
        return int(rows[0])

    def score(self, metric: str = "reap", *, seed: int = 0) -> Floats:
        """float64 [n_layers, n_experts]; higher means more worth keeping.

        With n = counts and S = gated_norm_sum: reap = S/n (Lasby et al. 2025, "REAP the Experts", eq. 9) ·
        weighted_ean_sum = S · ean_sum = norm_sum · ean_mean = norm_sum/n · frequency = n/total_tokens · gate_sum ·
        reap_l2 = √(gated_norm_sq_sum/n) · random, drawn by (seed, layer). The means are NaN at n = 0, the sums 0.
        UsageError for another name, or for one whose sums the profile does not hold.
        """
        if metric not in METRICS:
            raise UsageError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
        if metric == "reap_l2" and not self.trusted:
            raise UsageError(
                "metric 'reap_l2' needs sums of squares, which a file of llama-expert-profile does not hold"
            )
        if metric == "random":
            return np.stack([_random_scores(seed, int(layer), self.n_experts) for layer in self.layers])
        return _FORMULAS[metric](self)

    def to_dict(self) -> dict[str, Any]:
        """The document that `save` writes: docs/files.md."""
        document: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        if not self.trusted:
            document["trusted"] = False
        document |= {"model": self.model, "calibration": self.calibration, "engine": self.engine}
        document["layers"] = _layers_document(self)
        document["domains"] = {name: {"layers": _layers_document(part)} for name, part in self.parts.items()}
        return document

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the profile as JSON, whole or not at all; doubles survive exactly. Raises OutputError.

        A ReapWarning says so where the file is so large that reap reads it only on demand.
        """
        data = json_bytes(self.to_dict())
        written = write_whole(path, data)
        if written.is_file() and (problem := too_many(data)):
            message = f"{written}: has {problem}; it is read again with {LARGE_VARIABLE}=1 in the environment only"
            warnings.warn(message, ReapWarning, stacklevel=2)
        return written

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile, or a file of the reference profiler (llama-expert-profile) with a ReapWarning and
        `trusted=False`.

        Raises UsageError where the file cannot be read, FormatError where any field of it is wrong.
        """
        root = read_json(path, what="profile")
        profile = _load_reference(root) if "format" not in root else _load_own(root)
        _check(profile, root.where)
        if not profile.trusted:
            warnings.warn(
                f"{root.where}: written by llama-expert-profile, whose counts and scores are not to be trusted (it"
                " misreads which experts were chosen); profile again with reap",
                ReapWarning,
                stacklevel=2,
            )
        return profile


def _mean(total: Floats, counts: Counts) -> Floats:
    mean: Floats = np.full(counts.shape, np.nan)
    np.divide(total, counts, out=mean, where=counts > 0)
    return mean


def _frequency(profile: Profile) -> Floats:
    return _mean(
        profile.counts.astype(np.float64), np.broadcast_to(profile.total_tokens[:, None], profile.counts.shape)
    )


_FORMULAS: dict[str, Callable[[Profile], Floats]] = {
    "reap": lambda p: _mean(p.gated_norm_sum, p.counts),
    "weighted_ean_sum": lambda p: p.gated_norm_sum.copy(),
    "ean_sum": lambda p: p.norm_sum.copy(),
    "ean_mean": lambda p: _mean(p.norm_sum, p.counts),
    "frequency": _frequency,
    "gate_sum": lambda p: p.gate_sum.copy(),
    "reap_l2": lambda p: np.sqrt(_mean(p.gated_norm_sq_sum, p.counts)),
}


def _random_scores(seed: int, layer: int, n_experts: int) -> Floats:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed should be an integer from 0 on, found {seed!r}")
    return np.random.Generator(np.random.PCG64([seed, layer])).random(n_experts)


def _check(profile: Profile, where: str) -> None:
    """FormatError where the arrays of a profile or of its domains contradict each other."""
    _check_shapes(profile, where)
    _check_values(profile, where)
    for name, part in profile.parts.items():
        place = f"{where}: domain {name!r}"
        if not np.array_equal(part.layers, profile.layers):
            raise FormatError(f"{place}: its layers are not those of the profile")
        _check_shapes(part, place)
        _check_values(part, place)
    if profile.parts and profile.trusted:
        together = np.sum([part.counts for part in profile.parts.values()], axis=0)
        _refuse_where(together > profile.counts, profile, where, "is counted more often in its domains than in total")


def _check_shapes(profile: Profile, where: str) -> None:
    layers, counts = profile.layers, profile.counts
    if counts.ndim != 2 or not counts.size:
        raise FormatError(f"{where}: counts should be [n_layers, n_experts], found {list(counts.shape)}")
    if layers.shape != counts.shape[:1] or profile.total_tokens.shape != counts.shape[:1]:
        raise FormatError(f"{where}: {layers.size} layers where the counts have {counts.shape[0]}")
    if (layers < 0).any() or (np.diff(layers) <= 0).any():
        raise FormatError(f"{where}: the layers should ascend from 0, found {span(layers)}")
    for name in SUMS:
        if getattr(profile, name).shape != counts.shape:
            found = list(getattr(profile, name).shape)
            raise FormatError(f"{where}: {name} should be {list(counts.shape)}, found {found}")
    said = profile.model.get("n_experts")
    if said is not None and said != profile.n_experts:
        raise FormatError(f"{where}: {profile.n_experts} experts where the model says {said}")


def _check_values(profile: Profile, where: str) -> None:
    counts = profile.counts
    _refuse_where((counts < 0) | (counts > MOST_TOKENS), profile, where, "has a count that cannot be")
    if (profile.total_tokens < 0).any() or (profile.total_tokens > MOST_TOKENS).any():
        raise FormatError(
            f"{where}: total_tokens of a layer cannot be {profile.total_tokens.min()} to {profile.total_tokens.max()}"
        )
    for name in SUMS:
        values = getattr(profile, name)
        if not profile.trusted and name in _UNKNOWN_TO_REFERENCE:
            continue
        _refuse_where(~np.isfinite(values), profile, where, f"has a {name} that is not finite")
        _refuse_where(values < 0, profile, where, f"has a negative {name}")
        _refuse_where(values > _LARGEST_SUM, profile, where, f"has a {name} above {_LARGEST_SUM:g}")
        _refuse_where((counts == 0) & (values != 0), profile, where, f"was never routed to, yet its {name} is not 0")
    if profile.trusted:
        _refuse_where(
            counts > profile.total_tokens[:, None], profile, where, "has a count above the layer's total_tokens"
        )
        _refuse_where(
            profile.norm_max > profile.norm_sum * (1 + 1e-9), profile, where, "has a norm_max above its norm_sum"
        )


def _refuse_where(bad: NDArray[np.bool_], profile: Profile, where: str, problem: str) -> None:
    if bad.any():
        row, expert = (int(index) for index in np.argwhere(bad)[0])
        raise FormatError(f"{where}: layer {int(profile.layers[row])}: expert {expert} {problem}")


# ---- the file


def _layers_document(profile: Profile) -> dict[str, Any]:
    frequency = np.nan_to_num(profile.score("frequency"))
    means = {
        key: np.nan_to_num(_mean(getattr(profile, name), profile.counts)) for name, key in _REFERENCE_MEANS.items()
    }
    sums = [name for name in SUMS if profile.trusted or name not in _UNKNOWN_TO_REFERENCE]
    document = {}
    for row, layer in enumerate(profile.layers.tolist()):
        document[str(layer)] = {
            "total_tokens": int(profile.total_tokens[row]),
            "activation_counts": profile.counts[row].tolist(),
            "activation_frequency": frequency[row].tolist(),
            **{key: values[row].tolist() for key, values in means.items()},
            "never_activated": int((profile.counts[row] == 0).sum()),
            **{name: getattr(profile, name)[row].tolist() for name in sums},
        }
    return document


def _load_own(root: Node) -> Profile:
    check_format(root, FORMAT, VERSION)
    trusted = not ("trusted" in root and root["trusted"].value is False)
    model = root["model"]
    n_experts = model["n_experts"].integer(1, EXPERT_LIMIT)
    check_model(model)
    check_calibration(root["calibration"])
    records: dict[str, Any] = {name: root[name].members() for name in ("model", "calibration", "engine")}
    domains = root["domains"].items() if "domains" in root else ()
    parts = {
        name: Profile(**_load_layers(node["layers"], n_experts, trusted), **records, trusted=trusted)
        for name, node in sorted(domains, key=lambda item: item[0])
    }
    return Profile(**_load_layers(root["layers"], n_experts, trusted), **records, trusted=trusted, parts=parts)


def _load_layers(layers: Node, n_experts: int, trusted: bool) -> dict[str, Any]:
    nodes = layer_nodes(layers)
    rows = [_load_layer(node, n_experts, trusted) for node in nodes.values()]
    return _stack(list(nodes), rows)


def _load_layer(node: Node, n_experts: int, trusted: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"total_tokens": node["total_tokens"].integer()}
    row["counts"] = node["activation_counts"].integers(n_experts)
    for name in SUMS:
        unknown = not trusted and name in _UNKNOWN_TO_REFERENCE
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


def _load_reference(root: Node) -> Profile:
    """A file of llama-expert-profile: layers at the top level, means instead of sums, so that a sum is n · mean."""
    layers = {key: value for key, value in root.members().items() if _LAYER_KEY.fullmatch(key)}
    if not layers:
        root.fail(f'is no profile: it has neither "format": "{FORMAT}" nor layers at the top level')
    nodes = layer_nodes(Node(layers, root.where))
    n_experts = len(next(iter(nodes.values()))["activation_counts"].entries())
    if not n_experts:
        root.fail("is no profile: its layers have no experts")
    rows = [_load_reference_layer(node, n_experts) for node in nodes.values()]
    model = {"n_experts": n_experts}
    return Profile(**_stack(list(nodes), rows), model=model, engine={"tool": "llama-expert-profile"}, trusted=False)


def _load_reference_layer(node: Node, n_experts: int) -> dict[str, Any]:
    counts = node["activation_counts"].integers(n_experts)
    row: dict[str, Any] = {"total_tokens": node["total_tokens"].integer(), "counts": counts}
    for name, key in _REFERENCE_MEANS.items():
        row[name] = counts * node[key].numbers(n_experts)
    for name in _UNKNOWN_TO_REFERENCE:
        row[name] = np.full(n_experts, np.nan)
    return row
