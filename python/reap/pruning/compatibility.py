"""Does a plan fit a model?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from reap.errors import MismatchError, UnsupportedModelError, UsageError
from reap.gguf.model_info import require_moe
from reap.scores.identity import ALLOW, Record, Verdict, compare_records, crosses_over, form_of, require_same
from reap.scores.plan import PrunePlan
from reap.scores.profile import Profile
from reap.scores.ranking import check_keep, resolve_keep

# ---- does the plan fit the model


class Prunable(Protocol):
    """What `check_plan` has to know of a model, GGUF file or checkpoint; the names are those of ModelInfo."""

    @property
    def path(self) -> Path: ...
    @property
    def architecture(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_prediction_layers(self) -> int: ...
    @property
    def moe_layers(self) -> tuple[int, ...]: ...
    @property
    def is_moe(self) -> bool: ...
    @property
    def n_experts(self) -> int: ...
    @property
    def n_experts_used(self) -> int: ...
    @property
    def n_groups(self) -> int: ...
    @property
    def n_groups_used(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def refusals(self) -> tuple[str, ...]: ...
    @property
    def older_fingerprints(self) -> tuple[str, ...]: ...
    def record(self) -> dict[str, Any]: ...


def check_plan(info: Prunable, plan: PrunePlan, *, allow_mismatch: bool = False) -> str | None:
    """Raise unless `plan` can be carried out on the model that `info` describes.

    What both say of their model is compared (`reap.scores.identity`): the parts of its identity, and the routers'
    numbers. A plan made of the same model in the other form (GGUF file, Hugging Face checkpoint) has other parts; then
    experts, groups and widths are compared.

    Returns:
        What makes it the plan of another model, where `allow_mismatch` lets that pass; else None.

    Raises:
        MismatchError: it was made for another model, or has other layers or numbers of experts, which nothing allows.
        UnsupportedModelError: a model that cannot be pruned.
        UsageError: a choice of experts that llama.cpp or the router could not live with.
    """
    require_moe(info)
    if info.refusals:
        raise UnsupportedModelError(info.refusals[0])
    named = f" ({plan.model['name']})" if plan.model.get("name") else ""
    what = f"the plan is of a model{named} other than {info.path}"
    mismatch = require_same(_compare(info, plan.model), what, allow_mismatch=allow_mismatch)
    if plan.n_experts != info.n_experts:
        raise MismatchError(
            f"the plan is of a model with {plan.n_experts} experts, but {info.path} has {info.n_experts}"
        )
    _check_layers(info, plan)
    resolve_keep(plan.keep, info.n_experts, info.n_groups)
    check_keep(
        plan.keep,
        {"n_experts_used": info.n_experts_used, "n_groups": info.n_groups, "n_groups_used": info.n_groups_used},
    )
    for layer, kept in plan.layers.items():
        _check_kept(layer, kept, plan.keep, info)
    return mismatch


def check_profile(info: Prunable, profile: Profile, *, allow_mismatch: bool = False, advice: str = ALLOW) -> str | None:
    """Raise unless a profile is of the model that `info` describes, in the words of those who gave a profile.

    What is made of it is still for `check_plan`. Returns what makes it the profile of another model, where
    `allow_mismatch` lets that pass. Raises MismatchError, and UnsupportedModelError for a model that cannot be pruned.
    """
    require_moe(info)
    if info.refusals:
        raise UnsupportedModelError(info.refusals[0])
    named = f" ({profile.model['name']})" if profile.model.get("name") else ""
    what = f"the profile is of a model{named} other than {info.path}"
    verdict = _compare(info, profile.model, "the profile")
    mismatch = require_same(verdict, what, allow_mismatch=allow_mismatch, advice=advice)
    if profile.n_experts != info.n_experts:
        raise MismatchError(
            f"the profile is of a model with {profile.n_experts} experts, but {info.path} has {info.n_experts}"
        )
    return mismatch


def recorded_mismatch(info: Prunable, plan: PrunePlan) -> str | None:
    """For what is written: how the model that was measured differs from this one, and what was allowed before."""
    found = [plan.model.get("mismatch"), _compare(info, plan.model).text]
    return "; ".join(dict.fromkeys(filter(None, found))) or None


def _compare(info: Prunable, model: Record, name: str = "the plan") -> Verdict:
    record = info.record()
    fingerprint = model.get("fingerprint")
    is_older = fingerprint is not None and not model.get("identity") and not crosses_over(model, record)
    older = info.older_fingerprints if is_older and fingerprint != info.fingerprint else ()
    return compare_records(model, record, (name, info.path.name), older)


def plan_warnings(info: Prunable, plan: PrunePlan) -> Iterator[str]:
    """What does not stop a plan that `check_plan` let pass, but should be known."""
    verdict = _compare(info, plan.model)
    if verdict.differences:
        yield f"the plan is of a model other than {info.path}: {verdict.text}"
    if plan.model.get("mismatch"):
        yield f"the plan was made of profiles of different models: {plan.model['mismatch']}"
    if plan.fingerprint is None:
        yield "the plan does not say which model it was made for; only layers and expert counts were compared"
    else:
        yield from verdict.notes
    if crosses_over(plan.model, info.record()):
        yield (
            f"the plan was made of {form_of(plan.fingerprint)}; experts, groups, widths and, where both have a sketch"
            " of them, routers were compared"
        )
    elif _differ_in_bytes(info, plan):
        yield (
            "the routers' bytes differ from those of the model that was profiled (expected where the quantisation"
            " differs)"
        )
    if plan.options.get("trusted") is False:
        yield "the plan was made of a file of llama-expert-profile, whose scores are not to be trusted"


def _differ_in_bytes(info: Prunable, plan: PrunePlan) -> bool:
    """Whether the routers' bytes differ, where their numbers could not be compared."""
    ours, theirs = plan.model.get("router_fingerprint"), info.record().get("router_fingerprint")
    return bool(ours and theirs and ours != theirs and plan.fingerprint and not plan.model.get("routers"))


def _check_layers(info: Prunable, plan: PrunePlan) -> None:
    missing = [layer for layer in info.moe_layers if layer not in plan.layers]
    if missing and missing[0] >= info.n_layers - info.n_prediction_layers:
        raise MismatchError(
            f"the plan says nothing about the prediction (MTP) layers {missing} of {info.path}, which have experts too;"
            " every MoE layer must lose as many, so profile the model again with a version of reap that measures them,"
            ' or add the ids that they keep to the "layers" of the plan by hand'
        )
    if missing:
        raise MismatchError(
            f"the plan says nothing about MoE layers {missing} of {info.path}; every one must lose as many experts"
        )
    unknown = sorted(set(plan.layers) - set(info.moe_layers))
    if unknown:
        raise MismatchError(f"the plan names layers {unknown}, which are not MoE layers of {info.path}")


def _check_kept(layer: int, kept: tuple[int, ...], keep: int, info: Prunable) -> None:
    if len(kept) != keep:
        raise UsageError(
            f"the plan keeps {len(kept)} experts in layer {layer}, but {keep} elsewhere; llama.cpp knows one number"
            " for all"
        )
    if any(before >= after for before, after in pairwise(kept)) or kept[0] < 0 or kept[-1] >= info.n_experts:
        raise UsageError(
            f"the plan's experts of layer {layer} are not ascending ids from 0 to {info.n_experts - 1}: {list(kept)}"
        )
    group_size = info.n_experts // info.n_groups
    per_group = [sum(expert // group_size == group for expert in kept) for group in range(info.n_groups)]
    if len(set(per_group)) > 1:
        raise UsageError(
            f"the plan keeps {per_group} experts in the router's groups of layer {layer}; every group must keep as many"
        )
