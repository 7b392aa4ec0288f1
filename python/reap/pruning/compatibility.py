"""Does a plan fit a model?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from reap.errors import MismatchError, UnsupportedModelError, UsageError
from reap.gguf.model_info import ModelInfo, require_moe
from reap.scores.plan import PrunePlan
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


def check_plan(info: Prunable, plan: PrunePlan) -> None:
    """Raise unless `plan` can be carried out on the model that `info` describes.

    A plan made of the same model in the other form (GGUF file, Hugging Face checkpoint) has a fingerprint of another
    kind, which says nothing here; then layers, experts, groups and widths are compared.

    MismatchError where it was made for another model, UnsupportedModelError for a model that cannot be pruned,
    UsageError for a choice of experts that llama.cpp or the router could not live with.
    """
    require_moe(info)
    if info.refusals:
        raise UnsupportedModelError(info.refusals[0])
    if crosses_over(info, plan):
        _check_structure(info, plan)
    elif plan.fingerprint is not None and plan.fingerprint != info.fingerprint:
        raise MismatchError(
            f"the plan is of a model with fingerprint {plan.fingerprint}"
            f" ({plan.model.get('name') or 'unnamed'}), but {info.path} has {info.fingerprint}"
        )
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


def crosses_over(info: Prunable, plan: PrunePlan) -> bool:
    """Whether the plan was made of the other form of a model: of a checkpoint where `info` is of a GGUF file, or the
    other way round."""
    kinds = [fingerprint.partition(":")[0] for fingerprint in (plan.fingerprint, info.fingerprint) if fingerprint]
    return len(set(kinds)) > 1


def _check_structure(info: Prunable, plan: PrunePlan) -> None:
    for key in ("n_experts_used", "n_groups", "n_groups_used", "n_embd"):
        planned, found = plan.model.get(key), getattr(info, key)
        if planned and found and planned != found:
            name = plan.model.get("name") or "unnamed"
            raise MismatchError(
                f"the plan is of a model ({name}) where {key} is {planned}, but in {info.path} it is {found}"
            )


def plan_warnings(info: ModelInfo, plan: PrunePlan) -> Iterator[str]:
    """What does not stop a plan that `check_plan` let pass, but should be known."""
    if plan.fingerprint is None:
        yield "the plan does not say which model it was made for; only layers and expert counts were compared"
    crossed = crosses_over(info, plan)
    if crossed:
        yield "the plan was made of a Hugging Face checkpoint; layers, experts, groups and widths were compared"
    router = plan.model.get("router_fingerprint")
    if not crossed and plan.fingerprint is not None and router is not None and router != info.router_fingerprint:
        yield (
            "the routers' bytes differ from those of the model that was profiled (expected where the quantisation"
            " differs)"
        )
    if plan.options.get("trusted") is False:
        yield "the plan was made of a file of llama-expert-profile, whose scores are not to be trusted"


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
        raise MismatchError(f"the plan names layers {unknown}, which are no MoE layers of {info.path}")


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
