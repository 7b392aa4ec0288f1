"""The numbers of a config.json that have to do with experts, under the names that models give them, nested ones
included."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap.errors import FormatError, UnsupportedModelError
from reap.hf.disk.checkpoint_files import Checkpoint
from reap.hf.disk.config_text import Path, replace_values
from reap.hf.disk.discovery import CONFIG

#: How many experts a layer has.
EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "num_moe_experts",
    "n_experts",
    "moe_num_primary_experts",
)
#: How many of them a token uses.
USED_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_activated_experts",
    "moe_num_active_primary_experts",
)
_GROUP_KEYS = ("n_group", "num_expert_group", "num_expert_groups")
_GROUP_USED_KEYS = ("topk_group", "num_limited_groups")
#: Parts of a configuration that speak of something else.
_ELSEWHERE = frozenset(
    {
        "vision_config",
        "audio_config",
        "talker_config",
        "code2wav_config",
        "speech_config",
        "quantization_config",
        "rope_parameters",
        "rope_scaling",
    }
)
_MOST_NESTED = 8
_EXPERT_NAME = re.compile(r"(?P<before>(?:.*\.)?experts\.)(?P<expert>0|[1-9]\d{0,6})(?P<after>(?:\..*)?)", re.DOTALL)


@dataclass(frozen=True)
class ConfigCounts:
    """What config.json says of the experts."""

    expert_paths: tuple[Path, ...]
    """Where it states their number."""
    n_used: int
    """Experts of each token; 0 where it does not say."""
    n_groups: int
    """Groups of the router; 1 where it has none."""
    n_groups_used: int
    """Groups that a token may use."""


def read_counts(checkpoint: Checkpoint, n_experts: int) -> ConfigCounts:
    """Find the numbers of experts, and check that they agree with the tensors.

    Raises UnsupportedModelError where config.json states no number of experts under a known name, FormatError where it
    states another.
    """
    where = checkpoint.directory / CONFIG
    paths: list[Path] = []
    others: list[Path] = []
    for path, value in _numbers(checkpoint.config, EXPERT_KEYS):
        (paths if value == n_experts else others).append(path)
    if not paths and others:
        name = ".".join(map(str, others[0]))
        raise FormatError(f"{where}: {name} is not {n_experts}, the number of experts that the tensors hold")
    if not paths:
        raise UnsupportedModelError(
            f"{where}: states the number of experts ({n_experts}) under no name that reap knows"
        )
    used = [value for _, value in _numbers(checkpoint.config, USED_KEYS)]
    if max(used, default=0) > n_experts:
        raise FormatError(f"{where}: a token uses {max(used)} of {n_experts} experts, which cannot be")
    n_groups = first_count(checkpoint.config, _GROUP_KEYS) or 1
    n_groups_used = first_count(checkpoint.config, _GROUP_USED_KEYS) or n_groups
    if n_groups > 1 and (n_experts % n_groups or n_groups_used > n_groups):
        raise FormatError(
            f"{where}: routes to {n_groups_used} of {n_groups} groups of {n_experts} experts, which cannot be"
        )
    return ConfigCounts(tuple(paths), max(used, default=0), n_groups, n_groups_used if n_groups > 1 else 1)


def first_count(config: Mapping[str, Any], keys: Sequence[str]) -> int:
    """The first of `keys` that holds a number of at least one, outermost first; 0 where none does."""
    return next((value for _, value in _numbers(config, keys)), 0)


def _numbers(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[tuple[Path, int]]:
    """(path, value) of every positive number under one of `keys`, one for each entry of a list."""
    level: list[tuple[Path, Mapping[str, Any]]] = [((), config)]
    for _ in range(_MOST_NESTED):
        for path, part in level:
            for key in keys:
                value = part.get(key)
                entries = (
                    [((*path, key), value)]
                    if not isinstance(value, list)
                    else [((*path, key, i), v) for i, v in enumerate(value)]
                )
                yield from ((place, number) for place, number in entries if type(number) is int and number > 0)
        level = [
            ((*path, key), value)
            for path, part in level
            for key, value in part.items()
            if isinstance(value, dict) and key not in _ELSEWHERE
        ]


def patch_config(
    text: str,
    config: Mapping[str, Any],
    counts: ConfigCounts,
    kept: Mapping[str, Sequence[int]],
    zeros: Sequence[str] = (),
) -> str:
    """config.json with the new number of experts; every other byte stays, except for experts that `quantization_config`
    names one by one.

    kept: name of each MoE block -> ids that stay. zeros: keys of numbers that become 0.
    """
    n_kept = len(next(iter(kept.values())))
    changes: dict[Path, Any] = dict.fromkeys(counts.expert_paths, n_kept)
    changes |= {path: 0 for path, _ in _numbers(config, zeros)}
    changes |= _renamed_lists(config.get("quantization_config"), ("quantization_config",), kept)
    return replace_values(text, changes)


def patch_names(text: str, kept: Mapping[str, Sequence[int]]) -> str:
    """A JSON text with the experts that it names one by one, as keys or in lists, called what they are called from now
    on."""
    return replace_values(text, _renamed_lists(json.loads(text), (), kept))


def _renamed_lists(value: Any, path: Path, kept: Mapping[str, Sequence[int]]) -> dict[Path, Any]:
    """Path of each list, and of each object with such keys, that changes -> what it becomes."""
    names = value if isinstance(value, list | dict) else ()
    new_names = [_rename(name, kept) for name in names]
    if new_names != list(names):
        if isinstance(value, list):
            return {path: [new for new in new_names if new is not None]}
        return {path: {new: value[name] for name, new in zip(names, new_names, strict=True) if new is not None}}
    items = value.items() if isinstance(value, dict) else enumerate(names)
    return {place: new for key, item in items for place, new in _renamed_lists(item, (*path, key), kept).items()}


def _rename(name: Any, kept: Mapping[str, Sequence[int]]) -> Any:
    """What a list of modules calls an expert from now on; None for one that is gone. Anything else stays."""
    match = _EXPERT_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return name
    block, expert = match["before"].removesuffix("experts.").removesuffix("."), int(match["expert"])
    if block not in kept:
        return name
    ids = list(kept[block])
    return f"{match['before']}{ids.index(expert)}{match['after']}" if expert in ids else None
