"""Fewer experts of each token: what a sweep may try besides removing experts, through the engine's own override."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypedDict

from reap.engine.options import EngineOptions
from reap.errors import UsageError
from reap.evaluation.plan_options import ChoiceArguments
from reap.gguf.model_info import ModelInfo


class UsedArguments(TypedDict, total=False):
    """A keyword argument that a function hands on to `check_experts_used`."""

    experts_used: int | Sequence[int]


class SweepArguments(ChoiceArguments, UsedArguments, total=False):
    """Those of a sweep's candidates, and the numbers of experts of each token."""


def check_experts_used(
    info: ModelInfo, keeps: Iterable[int], *, experts_used: int | Sequence[int] = ()
) -> tuple[int, ...]:
    """The numbers, each once, the largest first. UsageError where one is not fewer than the model's own, or the model's
    own is not one number.

    Args:
        info: the model.
        keeps: experts of each layer that the candidates keep.
        experts_used: experts of each token.
    """
    listed = [experts_used] if isinstance(experts_used, int) else list(experts_used)
    if listed and len(set(info.n_experts_used_per_layer)) > 1:
        raise UsageError(
            f"experts_used: {info.path.name} has a number of experts of each token for every layer, which the engine's"
            " override cannot change"
        )
    least = min([info.n_experts, *keeps])
    for used in listed:
        if isinstance(used, bool) or not isinstance(used, int) or used < 1:
            raise UsageError(f"experts_used should be numbers of experts from 1 on, found {used!r}")
        if used >= info.n_experts_used:
            own = f"the model uses {info.n_experts_used} experts for each token itself"
            raise UsageError(f"experts_used {used}: {own}; what can be tried is fewer")
        if used > least:
            raise UsageError(f"experts_used {used} is more than the {least} experts that a candidate keeps")
    return tuple(sorted(set(listed), reverse=True))


def with_experts_used(options: EngineOptions, architecture: str, used: int) -> EngineOptions:
    """The same options, with which the engine gives each token `used` experts."""
    override = (f"{architecture}.expert_used_count", "int", str(used))
    return replace(options, override_kv=(*options.override_kv, override))


def active_bytes(info: ModelInfo, used: int | None) -> int:
    """Bytes of weights that a token is multiplied with: all but the experts that it does not use."""
    share = (info.n_experts_used if used is None else used) / max(info.n_experts, 1)
    return round(info.n_bytes - info.expert_bytes * (1 - share))
