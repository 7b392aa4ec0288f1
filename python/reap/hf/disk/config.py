"""The numbers of a config.json that have to do with experts, under the names that models give them, nested ones
included."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reap.errors import FormatError, UnsupportedModelError
from reap.hf.disk.checkpoint_files import Checkpoint
from reap.hf.disk.config_text import Path, changed_values, replace_values
from reap.hf.disk.discovery import CONFIG

if TYPE_CHECKING:
    from reap.hf.disk.expert_names import ExpertNames

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
ELSEWHERE = frozenset(
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
_CONTEXT = (
    "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "max_seq_length", "seq_length",
    "n_ctx",
)  # fmt: skip
_MOST_NESTED = 8


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


def trained_context(config: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence that the model was trained for, what scales its positions included; 0 where its
    configuration does not say."""
    return first_count(config, _CONTEXT)


def _numbers(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[tuple[Path, int]]:
    """(path, value) of every positive number under one of `keys`, one for each entry of a list, outermost first; lists
    of objects are gone through as well."""
    level: list[tuple[Path, Any]] = [((), config)]
    for _ in range(_MOST_NESTED):
        for path, part in level:
            for key in keys if isinstance(part, dict) else ():
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
            for key, value in (part.items() if isinstance(part, dict) else enumerate(part))
            if isinstance(value, dict | list) and key not in ELSEWHERE
        ]


def patch_config(
    text: str,
    config: Mapping[str, Any],
    counts: ConfigCounts,
    n_kept: int,
    names: ExpertNames,
    zeros: Sequence[str] = (),
) -> str:
    """config.json with the new number of experts; every other byte stays, except for experts that it names one by one.

    zeros: keys of numbers that become 0.
    """
    changes = dict.fromkeys(counts.expert_paths, n_kept)
    changes |= {path: 0 for path, _ in _numbers(config, zeros)}
    counted = json.loads(replace_values(text, changes))
    return replace_values(text, changed_values(json.loads(text), names.renamed(counted)))


def patch_names(text: str, names: ExpertNames) -> str:
    """A JSON text with the experts that it names one by one called what they are called from now on."""
    document = json.loads(text)
    return replace_values(text, changed_values(document, names.renamed(document)))
