"""Two or more profiles of one model: merge() adds them up, compare() says how far they agree."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from reap.errors import MismatchError, ReapWarning, UsageError
from reap.overlap import merge_sketches
from reap.ranking import Keep, resolve_keep, select_experts
from reap.scores import SUMS, Floats, Profile, as_arrays, span


def merge(profiles: Iterable[Profile | str | os.PathLike[str]]) -> Profile:
    """One profile of all the tokens that `profiles` (objects or files) saw; independent of their order.

    Sums add, norm_max is the maximum, domains merge by name, calibration records are concatenated. MismatchError where models,
    layers or expert counts differ; a ReapWarning where the routers' bytes differ (another quantisation) or a calibration file
    comes twice.
    """
    loaded = [item if isinstance(item, Profile) else Profile.load(item) for item in profiles]
    if not loaded:
        raise UsageError("merge needs at least one profile")
    for other in loaded[1:]:
        require_same_model(loaded[0], other)
        if loaded[0].trusted != other.trusted:
            raise MismatchError("a file of llama-expert-profile cannot be merged with a profile of reap")
    _warn_of_repeats(loaded)
    records: dict[str, Any] = dict(
        model=_merge_models([profile.model for profile in loaded]),
        calibration=_merge_calibrations([profile.calibration for profile in loaded]),
        engine=_merge_engines([profile.engine for profile in loaded]),
        trusted=loaded[0].trusted,
    )
    names = sorted({name for profile in loaded for name in profile.domains})
    parts = {name: Profile(**_add([profile.parts[name] for profile in loaded if name in profile.parts]), **records) for name in names}
    return Profile(**_add(loaded), **records, parts=parts)


_STRUCTURE = ("n_experts_used", "n_groups", "n_groups_used", "n_embd")


def require_same_model(a: Profile, b: Profile, *, any_form: bool = False) -> None:
    """MismatchError where two profiles are not of one model: fingerprint, layers and expert counts.

    any_form: one may be of the GGUF file and the other of the checkpoint, whose fingerprints say nothing about each other; then what
    both know of the model's structure is compared.
    """
    if a.n_experts != b.n_experts:
        raise MismatchError(f"the profiles are of different models: {a.n_experts} experts and {b.n_experts}")
    if not np.array_equal(a.layers, b.layers):
        raise MismatchError(f"the profiles have different MoE layers: {span(a.layers)} and {span(b.layers)}")
    ours, theirs = a.model.get("fingerprint"), b.model.get("fingerprint")
    if any_form and ours and theirs and ours.partition(":")[0] != theirs.partition(":")[0]:
        for key in _STRUCTURE:
            mine, other = a.model.get(key), b.model.get(key)
            if mine and other and mine != other:
                raise MismatchError(
                    f"the profiles are of different models: {key} is {mine} in {_model_name(a)} and {other} in {_model_name(b)}"
                )
        return
    if ours and theirs and ours != theirs:
        raise MismatchError(f"the profiles are of different models: {_model_name(a)} ({ours[:19]}) and {_model_name(b)} ({theirs[:19]})")


def _model_name(profile: Profile) -> str:
    return str(profile.model.get("name") or profile.model.get("architecture") or "unnamed")


def _warn_of_repeats(profiles: list[Profile]) -> None:
    hashes = [digest for profile in profiles for digest in profile.calibration.get("sha256") or ()]
    if len(set(map(str, hashes))) != len(hashes):
        warnings.warn("the same calibration file is merged more than once", ReapWarning, stacklevel=3)
    routers = {profile.model["router_fingerprint"] for profile in profiles if profile.model.get("router_fingerprint")}
    if len(routers) > 1:
        warnings.warn("the profiles' routers differ in their bytes (another quantisation?)", ReapWarning, stacklevel=3)


def _add(profiles: list[Profile]) -> dict[str, Any]:
    arrays: dict[str, Any] = {"total_tokens": sum(profile.total_tokens for profile in profiles)}
    arrays["counts"] = sum(profile.counts for profile in profiles)
    for name in SUMS[:-1]:
        # fsum rounds once, so that the order of the files does not show in the last bit
        columns = np.stack([getattr(profile, name).ravel() for profile in profiles], axis=1).tolist()
        arrays[name] = np.array([math.fsum(column) for column in columns]).reshape(profiles[0].counts.shape)
    arrays["norm_max"] = np.maximum.reduce([profile.norm_max for profile in profiles])
    return as_arrays(profiles[0].layers, arrays)


def _merge_models(models: list[dict[str, Any]]) -> dict[str, Any]:
    """What all agree on; the first one's word otherwise, but no router fingerprint that only some have."""
    merged = dict(models[0])
    if any(model.get("router_fingerprint") != merged.get("router_fingerprint") for model in models):
        merged.pop("router_fingerprint", None)
    return merged


def _merge_calibrations(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists are concatenated, numbers of things added, options kept where all agree."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for record in records for key in record):
        values = [record[key] for record in records if key in record]
        if all(isinstance(value, list) for value in values):
            merged[key] = [item for value in values for item in value]
        elif key in ("samples", "tokens", "counted_tokens", "windows"):
            merged[key] = sum(values)
        elif key == "sketch":
            merged[key] = merge_sketches(values)
        elif len(values) == len(records) and all(value == values[0] for value in values):
            merged[key] = values[0]
    return merged


def _merge_engines(engines: list[dict[str, Any]]) -> dict[str, Any]:
    unique = [engine for index, engine in enumerate(engines) if engine not in engines[:index]]
    return dict(unique[0]) if len(unique) == 1 else {"merged": unique}


# ---- comparing


@dataclass(frozen=True)
class LayerComparison:
    """How far two profiles agree on one layer."""

    layer: int
    spearman: float  # rank correlation of the scores, -1 to 1; NaN where one side gives all experts the same score
    overlap: float  # share of the kept experts that both keep
    jaccard: float  # kept by both / kept by either


@dataclass(frozen=True)
class Comparison:
    """How far two profiles agree: means over the layers, and each layer."""

    metric: str
    keep: int
    spearman: float
    overlap: float
    jaccard: float
    layers: tuple[LayerComparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an undefined correlation is null."""
        return {
            "metric": self.metric,
            "keep": self.keep,
            **{name: _or_none(getattr(self, name)) for name in ("spearman", "overlap", "jaccard")},
            "layers": [{item.name: _or_none(getattr(layer, item.name)) for item in fields(LayerComparison)} for layer in self.layers],
        }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def compare(
    a: Profile | str | os.PathLike[str],
    b: Profile | str | os.PathLike[str],
    *,
    keep: Keep = 0.5,
    metric: str = "reap",
    seed: int = 0,
) -> Comparison:
    """How far two profiles of one model agree: rank correlation of the scores and overlap of the kept sets, per layer.

    One may be of a GGUF file and the other of the checkpoint that it was made of. An expert that was never routed to ranks below
    every other. MismatchError where layers, expert counts or models differ.
    """
    first, second = (item if isinstance(item, Profile) else Profile.load(item) for item in (a, b))
    require_same_model(first, second, any_form=True)
    number = resolve_keep(keep, first.n_experts, first.n_groups)
    scores = first.score(metric, seed=seed), second.score(metric, seed=seed)
    layers = []
    for row, layer in enumerate(first.layers.tolist()):
        ranks = [_ranks(score[row]) for score in scores]
        kept = [
            set(select_experts(score[row], profile.counts[row], number, first.n_groups))
            for score, profile in zip(scores, (first, second), strict=True)
        ]
        both = len(kept[0] & kept[1])
        layers.append(LayerComparison(layer, _correlation(*ranks), both / number, both / len(kept[0] | kept[1])))
    return Comparison(
        metric,
        number,
        _mean_of([layer.spearman for layer in layers]),
        _mean_of([layer.overlap for layer in layers]),
        _mean_of([layer.jaccard for layer in layers]),
        tuple(layers),
    )


def _ranks(score: Floats) -> Floats:
    """Ranks from 0, ties averaged; undefined scores share the lowest ranks."""
    values = np.where(np.isnan(score), -np.inf, score)
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return np.asarray((last - (sizes + 1) / 2)[inverse], dtype=np.float64)


def _correlation(x: Floats, y: Floats) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return min(1.0, max(-1.0, float(x @ y) / scale)) if scale else math.nan


def _mean_of(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
