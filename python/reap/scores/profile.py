"""The profile: what calibration measured of each expert, as sums that merge exactly, and the scores made of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reap.errors import FormatError, ReapWarning, UsageError
from reap.files.paths import PathLike
from reap.scores import profile_file
from reap.scores.profile_file import UNKNOWN_TO_REFERENCE
from reap.scores.ranking import Keep, resolve_keep
from reap.scores.records import (
    ARRAYS,
    LATER_SUMS,
    MOST_TOKENS,
    NEEDED_SUMS,
    SUMS,
    Arrays,
    Counts,
    Floats,
    as_arrays,
    mean,
    span,
)
from reap.scores.replicates import Replicates
from reap.scores.stability import Stability, TooFewPartsError, expected_overlaps

if TYPE_CHECKING:
    from typing_extensions import Unpack

METRICS = ("reap", "weighted_ean_sum", "ean_sum", "ean_mean", "frequency", "gate_sum", "reap_l2", "msan", "random")
_LARGEST_SUM = 1e200


@dataclass(frozen=True, eq=False)
class Profile:
    """What calibration measured. Every array is [n_layers, n_experts] unless it says otherwise; none is ever NaN when
    trusted.

    Make one with `Profile.from_sums` or `Profile.load`; both check every field.
    """

    layers: Counts
    """int64 [n_layers]: GGUF block index of each MoE layer, ascending."""
    total_tokens: Counts
    """int64 [n_layers]: tokens that the layer saw and counted."""
    counts: Counts
    """int64: tokens routed to the expert."""
    gate_sum: Floats
    """float64: sum over those tokens of g, the gate that multiplies the expert's output."""
    norm_sum: Floats
    """float64: sum of ‖f‖₂, f the expert's output with its bias."""
    gated_norm_sum: Floats
    """float64: sum of g·‖f‖₂."""
    gated_norm_sq_sum: Floats
    """float64: sum of (g·‖f‖₂)²."""
    norm_sq_sum: Floats
    """float64: sum of ‖f‖₂²; NaN where the file of an earlier release does not hold it."""
    norm_max: Floats
    """float64: largest ‖f‖₂."""
    model: dict[str, Any] = field(default_factory=dict)
    """name, architecture, fingerprint, n_experts, n_experts_used, n_groups, ..."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """files, sha256, samples, tokens, ..."""
    engine: dict[str, Any] = field(default_factory=dict)
    """What measured it."""
    trusted: bool = True
    """False for a file of the reference profiler: its scores are not to be relied on, and what it does not hold
    (gated_norm_sq_sum, norm_sq_sum, norm_max) is NaN."""
    parts: Mapping[str, Profile] = field(default_factory=dict, repr=False)
    """Domain -> the same of its tokens, sorted by name."""
    replicates: Replicates | None = field(default=None, repr=False)
    """What parts of the calibration say for themselves, which `stability` needs; None where it is not known."""

    @classmethod
    def from_sums(
        cls,
        *,
        layers: Sequence[int] | Counts,
        model: Mapping[str, Any],
        calibration: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
        domains: Mapping[str, Mapping[str, Any]] | None = None,
        **arrays: Unpack[Arrays],
    ) -> Profile:
        """A profile of measured sums.

        Args:
            layers: int [n_layers], block index of each MoE layer, ascending.
            model, calibration, engine: what the class says of them.
            domains: name -> the same `arrays` of that domain's tokens.
            arrays: total_tokens, counts and the six sums, as the class describes them; copied. norm_sq_sum may be
                left out, where it is not known.

        Raises:
            FormatError: shapes, signs or sums contradict each other.
        """
        _require_arrays(arrays)
        records: dict[str, Any] = dict(
            model=dict(model), calibration=dict(calibration or {}), engine=dict(engine or {})
        )
        parts = {str(name): cls(**as_arrays(layers, part), **records) for name, part in sorted((domains or {}).items())}
        whole = cls(**as_arrays(layers, arrays), **records, parts=parts)
        _check(whole, "profile")
        return whole

    @classmethod
    def of(cls, profile: Profile | PathLike) -> Profile:
        """The profile itself, or the one in a file. Raises what `load` raises."""
        return profile if isinstance(profile, Profile) else cls.load(profile)

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
    def metrics(self) -> tuple[str, ...]:
        """The metrics that the profile holds the sums for."""
        return tuple(name for name in METRICS if not self._lacks(NEEDED_SUMS.get(name)))

    @property
    def never_routed(self) -> NDArray[np.bool_]:
        """Experts that no token was routed to, whose means are undefined: bool [n_layers, n_experts]."""
        return np.asarray(self.counts == 0)

    def domain(self, name: str) -> Profile:
        """The same measurements over the tokens of one domain. UsageError for a name that the calibration did not
        carry."""
        if name not in self.parts:
            known = ", ".join(self.parts) or "none"
            raise UsageError(f"the profile has no domain {name!r}; it has: {known}")
        return self.parts[name]

    def row(self, layer: int) -> int:
        """Which row of the arrays holds block `layer`. UsageError where it is not a MoE layer of the profile."""
        rows = np.flatnonzero(self.layers == layer)
        if not rows.size:
            raise UsageError(f"layer {layer} is not a MoE layer of the profile, which has {span(self.layers)}")
        return int(rows[0])

    def score(self, metric: str = "reap", *, seed: int = 0) -> Floats:
        """float64 [n_layers, n_experts]; higher means more worth keeping.

        With n = counts and S = gated_norm_sum: reap = S/n (Lasby et al. 2025, "REAP the Experts", eq. 9) ·
        weighted_ean_sum = S · ean_sum = norm_sum · ean_mean = norm_sum/n · frequency = n/total_tokens · gate_sum ·
        reap_l2 = √(gated_norm_sq_sum/n) · msan = √(norm_sq_sum/n) · random, drawn by (seed, layer). The means are NaN
        at n = 0, the sums 0.
        UsageError for another name, or for one whose sums the profile does not hold.
        """
        if metric not in METRICS:
            raise UsageError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
        if self._lacks(needed := NEEDED_SUMS.get(metric)):
            origin = "one of an earlier release of reap" if self.trusted else "a file of llama-expert-profile"
            raise UsageError(
                f"metric {metric!r} needs {needed}, which this profile ({origin}) does not hold; profile again"
            )
        if metric == "random":
            return np.stack([_random_scores(seed, int(layer), self.n_experts) for layer in self.layers])
        return _FORMULAS[metric](self)

    def stability(self, keep: Keep = 0.5, metric: str = "reap") -> Stability:
        """How much of a choice of experts more text could still change.

        `overlap` is the share of the kept experts that another profile of as much text, of the same kind, would keep
        as well: in all, by layer, and by domain, each by its own tokens alone. It is estimated from the parts that a
        profile keeps (docs/formulas.md) and says nothing of text of another kind.

        Raises UsageError for a metric that does not depend on the text (random), where the profile keeps no parts (of
        an earlier release, or merged with one), and where it has fewer than 4 samples.
        """
        if metric == "random":
            raise UsageError("metric 'random' does not depend on the text, so more of it changes nothing")
        if self.replicates is None:
            raise UsageError(
                "the profile keeps no parts of its calibration that could be compared (one of an earlier release of"
                " reap, or merged with one); profile again"
            )
        number = resolve_keep(keep, self.n_experts, self.n_groups, self.model)
        parts, layers = self.replicates.sums(self), self.layers.tolist()
        found = expected_overlaps(parts, partial(self._score_of, metric), number, self.n_groups)
        domains = {}
        for name, part in self.parts.items():
            if part.replicates is not None:
                with suppress(TooFewPartsError):
                    domains[name] = part.stability(number, metric)
        return Stability(metric, number, float(found.mean()), dict(zip(layers, found.tolist(), strict=True)), domains)

    def _score_of(self, metric: str, sums: Mapping[str, Floats]) -> Floats:
        """The score that a part of this profile with these sums has; what is not known of it is NaN."""
        unknown = np.full(self.counts.shape, np.nan)
        values: dict[str, Any] = {name: sums.get(name, unknown) for name in ("counts", *SUMS)}
        return replace(self, **values, total_tokens=sums["counts"].sum(axis=1), parts={}, replicates=None).score(metric)

    def _lacks(self, sum_name: str | None) -> bool:
        return sum_name is not None and bool(np.isnan(getattr(self, sum_name)).all())

    def to_dict(self) -> dict[str, Any]:
        """The document that `save` writes: docs/files.md."""
        records = {"model": self.model, "calibration": self.calibration, "engine": self.engine}
        return profile_file.document(self, self.parts, records)

    def save(self, path: PathLike, *, force: bool = True) -> Path:
        """Write the profile as JSON, whole or not at all; doubles survive exactly; `force=False` refuses to replace a
        file.

        Raises OutputError where it cannot be written, UsageError where a file is there and may not be replaced.
        A ReapWarning says so where the file is so large that reap reads it only on demand.
        """
        return profile_file.write(path, self.to_dict(), force=force)

    @classmethod
    def load(cls, path: PathLike) -> Profile:
        """Read a profile, or a file of the reference profiler (llama-expert-profile) with a ReapWarning and
        `trusted=False`.

        Raises UsageError where the file cannot be read, FormatError where any field of it is wrong.
        """
        stored = profile_file.read(path)
        records: dict[str, Any] = {**stored.records, "trusted": stored.trusted}
        parts = {
            name: cls(**arrays, **records, replicates=stored.replicates.get(name))
            for name, arrays in stored.parts.items()
        }
        profile = cls(**stored.arrays, **records, parts=parts, replicates=stored.replicates.get(None))
        _check(profile, stored.where)
        if not profile.trusted:
            warnings.warn(
                f"{stored.where}: written by llama-expert-profile, whose counts and scores are not to be trusted (it"
                " misreads which experts were chosen); profile again with reap",
                ReapWarning,
                stacklevel=2,
            )
        return profile


def _require_arrays(arrays: Mapping[str, Any]) -> None:
    """TypeError as for any other function, where an array is missing or unknown."""
    missing = [name for name in ARRAYS if name not in {*arrays, *LATER_SUMS}]
    unknown = sorted(set(arrays) - set(ARRAYS))
    if missing or unknown:
        what = f"is missing {', '.join(missing)}" if missing else f"has no argument {unknown[0]!r}"
        raise TypeError(f"Profile.from_sums() {what}")


def _frequency(profile: Profile) -> Floats:
    return mean(profile.counts.astype(np.float64), np.broadcast_to(profile.total_tokens[:, None], profile.counts.shape))


_FORMULAS: dict[str, Callable[[Profile], Floats]] = {
    "reap": lambda p: mean(p.gated_norm_sum, p.counts),
    "weighted_ean_sum": lambda p: p.gated_norm_sum.copy(),
    "ean_sum": lambda p: p.norm_sum.copy(),
    "ean_mean": lambda p: mean(p.norm_sum, p.counts),
    "frequency": _frequency,
    "gate_sum": lambda p: p.gate_sum.copy(),
    "reap_l2": lambda p: np.sqrt(mean(p.gated_norm_sq_sum, p.counts)),
    "msan": lambda p: np.sqrt(mean(p.norm_sq_sum, p.counts)),
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
        may_lack = name in LATER_SUMS or (not profile.trusted and name in UNKNOWN_TO_REFERENCE)
        if may_lack and np.isnan(values).all():
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
