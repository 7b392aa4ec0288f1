"""Two or more profiles of one model: merge() adds them up, compare() says how far they agree."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from reap.errors import MismatchError, ReapWarning, UsageError
from reap.files.paths import PathLike
from reap.scores.hash_routing import HASH_ROUTING, tokens_of
from reap.scores.identity import compare_records, require_same, warn_of
from reap.scores.profile import Profile
from reap.scores.records import COUNTED, SUMS, TALLIES, as_arrays, span
from reap.scores.replicates import added, fit
from reap.text.overlap import merge_sketches


def merge(profiles: Iterable[Profile | PathLike], *, allow_mismatch: bool = False) -> Profile:
    """One profile of all the tokens that `profiles` (objects or files) saw; independent of their order.

    Sums add, norm_max is the maximum, domains merge by name, calibration records are concatenated. MismatchError where
    models, layers or expert counts differ; a ReapWarning where the routers' bytes differ (another quantisation) or a
    calibration file comes twice. allow_mismatch: profiles of different models are added all the same, where their
    layers and experts are as many, and the result's model["mismatch"] says what differs.
    """
    loaded = [Profile.of(item) for item in profiles]
    if not loaded:
        raise UsageError("merge needs at least one profile")
    mismatches: list[str] = []
    for other in loaded[1:]:
        found = require_same_model(loaded[0], other, allow_mismatch=allow_mismatch)
        mismatches += [] if found is None else [found]
        if loaded[0].trusted != other.trusted:
            raise MismatchError("a file of llama-expert-profile cannot be merged with a profile of reap")
    _warn_of_repeats(loaded)
    records: dict[str, Any] = dict(
        model=_merge_models([profile.model for profile in loaded], mismatches),
        calibration=_merge_calibrations([profile.calibration for profile in loaded]),
        engine=_merge_engines([profile.engine for profile in loaded]),
        trusted=loaded[0].trusted,
    )
    names = sorted({name for profile in loaded for name in profile.domains})
    parts = {
        name: Profile(**_add([profile.parts[name] for profile in loaded if name in profile.parts]), **records)
        for name in names
    }
    return _with_replicates(Profile(**_add(loaded), **records, parts=parts), loaded)


def require_same_model(a: Profile, b: Profile, *, any_form: bool = False, allow_mismatch: bool = False) -> str | None:
    """What makes two profiles those of two models, None where they are of one: `reap.scores.identity`.

    any_form: one may be of the GGUF file and the other of the checkpoint. MismatchError where they differ and that is
    not allowed, and always where layers or numbers of experts do.
    """
    if a.n_experts != b.n_experts:
        raise MismatchError(f"the profiles are of different models: {a.n_experts} experts and {b.n_experts}")
    if not np.array_equal(a.layers, b.layers):
        raise MismatchError(f"the profiles have different MoE layers: {span(a.layers)} and {span(b.layers)}")
    verdict = compare_records(a.model, b.model, (_name(a), _name(b)), any_form=any_form)
    found = require_same(
        verdict,
        f"the profiles are of different models: {_described(a)} and {_described(b)}",
        allow_mismatch=allow_mismatch,
    )
    warn_of(verdict, "the profiles", stacklevel=4)
    return found


def _name(profile: Profile) -> str:
    return str(profile.model.get("name") or profile.model.get("architecture") or "unnamed")


def _described(profile: Profile) -> str:
    return f"{_name(profile)} ({str(profile.model.get('fingerprint') or 'no fingerprint')[:19]})"


def _warn_of_repeats(profiles: list[Profile]) -> None:
    hashes = [digest for profile in profiles for digest in profile.calibration.get("sha256") or ()]
    if len(set(map(str, hashes))) != len(hashes):
        warnings.warn("the same calibration file is merged more than once", ReapWarning, stacklevel=3)
    routers = {profile.model["router_fingerprint"] for profile in profiles if profile.model.get("router_fingerprint")}
    if len(routers) > 1 and not all(profile.model.get("routers") for profile in profiles):
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


def _with_replicates(merged: Profile, profiles: list[Profile]) -> Profile:
    """With the parts of all added up, of each domain and of the whole, where each of the profiles has them."""
    parts = {
        name: _with_replicates(part, [profile.parts[name] for profile in profiles if name in profile.parts])
        for name, part in merged.parts.items()
    }
    known = [(profile, profile.replicates) for profile in profiles if profile.replicates is not None]
    whole = added(known) if len(known) == len(profiles) else None
    return fit(replace(merged, parts=parts, replicates=whole))


def _merge_models(models: list[dict[str, Any]], mismatches: list[str]) -> dict[str, Any]:
    """What all agree on; otherwise the word of the first that knows most, but no router fingerprint that only some
    have."""
    merged = dict(next((model for model in models if model.get("identity")), models[0]))
    if measured := [model[HASH_ROUTING] for model in models if model.get(HASH_ROUTING)]:
        merged[HASH_ROUTING] = max(measured, key=tokens_of)  # rankings do not add up; the best measured one stays
    if any(model.get("router_fingerprint") != merged.get("router_fingerprint") for model in models):
        merged.pop("router_fingerprint", None)
    mismatches = [*(model["mismatch"] for model in models if model.get("mismatch")), *mismatches]
    return merged | ({"mismatch": "; ".join(dict.fromkeys(mismatches))} if mismatches else {})


def _merge_calibrations(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists are concatenated, numbers of things added, options kept where all agree."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for record in records for key in record):
        values = [record[key] for record in records if key in record]
        if all(isinstance(value, list) for value in values):
            merged[key] = [item for value in values for item in value]
        elif key in COUNTED:
            merged[key] = sum(values)
        elif key in TALLIES:
            merged[key] = _add_tallies(values)
        elif key == "sketch":
            merged[key] = merge_sketches(values)
        elif len(values) == len(records) and all(value == values[0] for value in values):
            merged[key] = values[0]
    return merged


def _add_tallies(tallies: list[Any]) -> dict[str, int]:
    """Name -> number, over all that are so."""
    added = Counter[str]()
    for tally in tallies:
        if isinstance(tally, dict):
            added.update({name: count for name, count in tally.items() if type(count) is int})
    return dict(added.most_common())


def _merge_engines(engines: list[dict[str, Any]]) -> dict[str, Any]:
    unique = [engine for index, engine in enumerate(engines) if engine not in engines[:index]]
    return dict(unique[0]) if len(unique) == 1 else {"merged": unique}
