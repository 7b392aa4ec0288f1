"""plan(): Profile -> PrunePlan, which experts each layer keeps. Pure and deterministic."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from reap.errors import UsageError
from reap.files.atomic import write_whole
from reap.files.paths import PathLike
from reap.files.strict_json import EXPERT_LIMIT, Node, json_bytes, read_json
from reap.scores.hash_routing import HASH_ROUTING, Substitutes, substitutes_of
from reap.scores.identity import IDENTITY_KEYS
from reap.scores.profile import Profile
from reap.scores.ranking import Keep as Keep
from reap.scores.ranking import check_keep, order_experts, select_experts, take
from reap.scores.ranking import resolve_keep as resolve_keep
from reap.scores.records import Floats, check_calibration, check_format, check_model, layer_nodes

FORMAT = "reap.plan"
VERSION = 1
BLENDS = ("sum", "maxmin")
# 100 layers of 1,024 experts are half a megabyte
_MAX_BYTES = 8 << 20

Protect = str | tuple[int, int]
_PROTECT_ENTRY = re.compile(r"([0-9]{1,6})(?::([0-9]{1,7}))?", re.ASCII)
#: Of a profile's "calibration": which files they were, and the sketch of their windows (`reap.text.overlap`).
CALIBRATION_KEYS = ("files", "sha256", "sketch")
_MODEL_KEYS = (
    "name",
    "architecture",
    HASH_ROUTING,
    *IDENTITY_KEYS,
    "mismatch",
    "n_layers",
    "n_embd",
    "n_experts",
    "n_experts_used",
    "n_groups",
    "n_groups_used",
)


@dataclass(frozen=True)
class PrunePlan:
    """Which experts each layer keeps.

    Make one with `reap.plan` or `PrunePlan.load`, which checks every field.
    """

    model: dict[str, Any]
    """Of the profile: n_experts, and what tells the model from others where known (`reap.scores.identity`)."""
    metric: str
    """What ranked the experts."""
    keep: int
    """Experts that every layer keeps."""
    layers: dict[int, tuple[int, ...]]
    """Block index of each MoE layer -> ids kept, ascending; the same number, `keep`, in every layer."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Names and "sha256" of the files that the profile saw, and the sketch of their text (`reap.text.overlap`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """How it was chosen: blend, seed, protected ids, and the super experts that the profile has, protected or not; for
    the reader only."""

    @property
    def n_experts(self) -> int:
        """Experts of each layer before pruning."""
        return int(self.model["n_experts"])

    @property
    def fingerprint(self) -> str | None:
        """Of the model that was profiled; None for a plan made of a reference profiler's file."""
        return self.model.get("fingerprint")

    @property
    def calibration_sha256(self) -> tuple[str, ...]:
        """Hex digests of the plan's calibration files."""
        return tuple(self.calibration.get("sha256") or ())

    @property
    def experts_sha256(self) -> str:
        """SHA-256 of the ids that it keeps: equal where two plans choose the same experts, however they were made."""
        return experts_digest(self.layers)

    @property
    def substitutes(self) -> Substitutes:
        """Of each layer whose experts are chosen by token id: removed expert -> the kept ones that take its place, best
        first (`reap.scores.hash_routing`). FormatError where the plan's ranking is damaged."""
        return substitutes_of(self.model, self.layers)

    def removed(self, layer: int) -> tuple[int, ...]:
        """Ids that block `layer` loses, ascending."""
        kept = set(self.layers[layer])
        return tuple(expert for expert in range(self.n_experts) if expert not in kept)

    def to_dict(self) -> dict[str, Any]:
        """The document that `save` writes."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "metric": self.metric,
            "keep": self.keep,
            "calibration": self.calibration,
            "options": self.options,
            "layers": {str(layer): {"kept": list(kept)} for layer, kept in self.layers.items()},
        }

    def save(self, path: PathLike, *, force: bool = True) -> Path:
        """Write the plan as JSON, one line a layer, whole or not at all; `force=False` refuses to replace a file.

        Raises OutputError where it cannot be written, UsageError where a file is there and may not be replaced.
        """
        return write_whole(path, json_bytes(self.to_dict()), force=force)

    @classmethod
    def of(cls, plan: PrunePlan | PathLike) -> PrunePlan:
        """The plan itself, or the one in a file. Raises what `load` raises."""
        return plan if isinstance(plan, PrunePlan) else cls.load(plan)

    @classmethod
    def load(cls, path: PathLike) -> PrunePlan:
        """Read a plan, which people edit. UsageError where the file cannot be read, FormatError where any field of it
        is wrong."""
        root = read_json(path, what="plan", max_bytes=_MAX_BYTES)
        check_format(root, FORMAT, VERSION)
        model = root["model"]
        n_experts = model["n_experts"].integer(1, EXPERT_LIMIT)
        check_model(model)
        keep = root["keep"].integer(1, n_experts)
        try:
            check_keep(keep, model.members())
        except UsageError as error:
            root["keep"].fail(f"cannot be: {error}")
        n_groups = int(model.members().get("n_groups") or 1)
        layers = {
            layer: _load_kept(node["kept"], n_experts, keep, n_groups)
            for layer, node in layer_nodes(root["layers"]).items()
        }
        calibration = root["calibration"] if "calibration" in root else Node({}, root.where)
        check_calibration(calibration)
        options = root["options"].members() if "options" in root else {}
        return cls(model.members(), root["metric"].string(), keep, layers, calibration.members(), options)


def experts_digest(layers: Mapping[int, Sequence[int]]) -> str:
    """SHA-256 of the ids that each layer keeps."""
    kept = {str(layer): [int(expert) for expert in ids] for layer, ids in sorted(layers.items())}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def _load_kept(node: Node, n_experts: int, keep: int, n_groups: int) -> tuple[int, ...]:
    kept = node.integers().tolist()
    for before, after in pairwise(kept):
        if after <= before:
            node.fail(f"should ascend without repeats, but {after} follows {before}")
    if kept and kept[-1] >= n_experts:
        node.fail(f"names expert {kept[-1]}, but the model's experts are 0 to {n_experts - 1}")
    if len(kept) != keep:
        node.fail(f'lists {len(kept)} experts where "keep" says {keep}; every layer keeps the same number')
    if n_groups > 1:
        per_group = np.bincount(np.array(kept) // (n_experts // n_groups), minlength=n_groups)
        if len(set(per_group.tolist())) > 1:
            node.fail(
                f"keeps {per_group.tolist()} experts in the router's {n_groups} groups; each group must keep the same"
                " number"
            )
    return tuple(kept)


def plan(
    profile: Profile | PathLike,
    *,
    keep: Keep,
    metric: str = "reap",
    protect: str | Iterable[Protect] = (),
    blend: str = "sum",
    seed: int = 0,
    protect_super_experts: bool = False,
) -> PrunePlan:
    """Choose the experts that every MoE layer keeps.

    Args:
        keep: a number of experts, or a fraction: `resolve_keep`
        metric: one of METRICS: `Profile.score`. The best `keep` stay; ties go to the higher count, then to the lower
            id, and an expert that was never routed to comes last. With a grouped router equally many stay in each
            group. Plans are nested: a smaller `keep` keeps a subset.
        protect: "LAYER:ID", "LAYER" (all of its experts), several joined by commas, or (layer, id): kept whatever their
            score
        blend: "sum": all tokens together. "maxmin": of the domains in the calibration, the one whose kept share of the
            metric is smallest chooses next, layer by layer, so that none is sacrificed for another; lines without a
            domain have no say
        seed: for metric "random"
        protect_super_experts: protect what `super_experts` finds

    Raises UsageError for a call that cannot work; the message names the numbers.
    """
    source = Profile.of(profile)
    if blend not in BLENDS:
        raise UsageError(f"unknown blend {blend!r}; known: {', '.join(BLENDS)}")
    number = resolve_keep(keep, source.n_experts, source.n_groups, source.model)
    check_keep(number, source.model)
    entries = list(parse_protect(protect))
    outstanding = super_experts(source) if source.trusted or protect_super_experts else ()
    if protect_super_experts:
        entries += [(found.layer, found.expert) for found in outstanding]
    protected = _protected_ids(source, entries)
    _check_protected(source, protected, number)
    choose = _choose_by_sum if blend == "sum" else _choose_maxmin
    layers = choose(source, number, metric, seed, protected)
    options: dict[str, Any] = {"blend": blend, "seed": seed}
    options["protected"] = {str(layer): sorted(ids) for layer, ids in sorted(protected.items())}
    options["super_experts"] = [asdict(found) | {"kept": found.expert in layers[found.layer]} for found in outstanding]
    if not source.trusted:
        options["trusted"] = False
    model = {"n_experts": source.n_experts} | {key: source.model[key] for key in _MODEL_KEYS if key in source.model}
    calibration = {key: deepcopy(source.calibration[key]) for key in CALIBRATION_KEYS if key in source.calibration}
    return PrunePlan(model, metric, number, layers, calibration, options)


def _choose_by_sum(
    profile: Profile, keep: int, metric: str, seed: int, protected: Mapping[int, set[int]]
) -> dict[int, tuple[int, ...]]:
    score = profile.score(metric, seed=seed)
    return {
        layer: select_experts(score[row], profile.counts[row], keep, profile.n_groups, protected.get(layer, ()))
        for row, layer in enumerate(profile.layers.tolist())
    }


# ---- fairness among domains


def _choose_maxmin(
    profile: Profile, keep: int, metric: str, seed: int, protected: Mapping[int, set[int]]
) -> dict[int, tuple[int, ...]]:
    if not profile.domains:
        raise UsageError('blend "maxmin" needs domains, but no line of the calibration carried one')
    parts = [profile.domain(name) for name in profile.domains]
    scores = [part.score(metric, seed=seed) for part in parts]
    layers = {}
    for row, layer in enumerate(profile.layers.tolist()):
        orders = [
            order_experts(score[row], part.counts[row]).tolist() for score, part in zip(scores, parts, strict=True)
        ]
        shares = [_shares(score[row]) for score in scores]
        order = _fair_order(orders, shares, profile.n_groups, sorted(protected.get(layer, ())))
        layers[layer] = take(order, keep, profile.n_groups)
    return layers


def _shares(score: Floats) -> Floats:
    """float64 [n_experts]: what part of the domain's total score each expert has; zeros where there is none."""
    known = np.nan_to_num(score)
    total = known.sum()
    return known / total if total else known


def _fair_order(
    orders: Sequence[list[int]], shares: Sequence[Floats], n_groups: int, first: Sequence[int]
) -> list[int]:
    """All experts in the order in which the worst-served domain picks them, `first` ahead of all.

    Each round takes one expert of every group, so that the order does not depend on how many are kept in the end. A tie
    among domains goes to the first by name.
    """
    n_experts = len(orders[0])
    group_size = n_experts // n_groups
    chosen = list(first)
    taken = [0] * n_groups
    served = np.array([share[chosen].sum() for share in shares])
    for expert in chosen:
        taken[expert // group_size] += 1
    queues = [[expert for expert in order if expert not in first] for order in orders]
    while len(chosen) < n_experts:
        round_ = min(taken)
        queue = queues[int(np.argmin(served))]
        expert = next(expert for expert in queue if taken[expert // group_size] == round_)
        for other in queues:
            other.remove(expert)
        chosen.append(expert)
        taken[expert // group_size] += 1
        served += [share[expert] for share in shares]
    return chosen


# ---- protected experts


def parse_protect(protect: str | Iterable[Protect]) -> list[tuple[int, int | None]]:
    """Entries "LAYER:ID", "LAYER" or (layer, id), and strings of several joined by commas, as (layer, id or None for
    all)."""
    entries: list[tuple[int, int | None]] = []
    for item in [protect] if isinstance(protect, str) else protect:
        if isinstance(item, str):
            entries += [_parse_entry(text.strip()) for text in item.split(",") if text.strip()]
        elif isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, int | np.integer) for part in item):
            entries.append((int(item[0]), int(item[1])))
        else:
            raise UsageError(f"protect entry {item!r} is neither LAYER:ID, LAYER nor a pair (layer, id)")
    return entries


def _parse_entry(text: str) -> tuple[int, int | None]:
    match = _PROTECT_ENTRY.fullmatch(text)
    if match is None:
        raise UsageError(f"protect entry {text!r} is neither LAYER:ID nor LAYER")
    return int(match[1]), None if match[2] is None else int(match[2])


def _protected_ids(profile: Profile, entries: Iterable[tuple[int, int | None]]) -> dict[int, set[int]]:
    protected: dict[int, set[int]] = {}
    for layer, expert in entries:
        profile.row(layer)
        if expert is not None and not 0 <= expert < profile.n_experts:
            raise UsageError(f"protect: layer {layer} has experts 0 to {profile.n_experts - 1}, no {expert}")
        protected.setdefault(layer, set()).update(range(profile.n_experts) if expert is None else [expert])
    return protected


def _check_protected(profile: Profile, protected: Mapping[int, set[int]], keep: int) -> None:
    group_size = profile.n_experts // profile.n_groups
    room = keep // profile.n_groups
    for layer, experts in protected.items():
        if len(experts) > keep:
            raise UsageError(
                f"protect: layer {layer} has {len(experts)} protected experts, but every layer keeps {keep} "
                "(llama.cpp knows one number of experts for the whole model)"
            )
        most = max(np.bincount([expert // group_size for expert in sorted(experts)]))
        if most > room:
            raise UsageError(
                f"protect: layer {layer} has {most} protected experts in one group of the router, which keeps {room}"
            )


# ---- super experts


@dataclass(frozen=True)
class SuperExpert:
    """An expert whose output dwarfs the others': removing it tends to break a model, however rarely it is chosen."""

    layer: int
    """GGUF block index."""
    expert: int
    """Its id there."""
    norm_max: float
    """The largest ‖f‖₂ that calibration saw."""
    ratio: float
    """`norm_max` over the median of its layer."""


def super_experts(profile: Profile) -> tuple[SuperExpert, ...]:
    """Experts with an outlying output norm, largest first.

    After Su et al. 2025, "Unveiling Super Experts in Mixture-of-Experts Large Language Models": above the 99.5th
    percentile of all experts and above a tenth of the largest; and, so that an even model has none, at least ten times
    the median of its layer. UsageError for a file of the reference profiler, which holds no largest norms.
    """
    if not profile.trusted:
        raise UsageError("super experts are found by norm_max, which a file of llama-expert-profile does not hold")
    norms = profile.norm_max
    medians = np.array([np.median(row[row > 0]) if (row > 0).any() else np.inf for row in norms])
    ratios = norms / medians[:, None]
    outlying = (norms >= np.quantile(norms, 0.995)) & (norms > norms.max() / 10) & (ratios >= 10)
    found = [
        SuperExpert(int(profile.layers[row]), int(expert), float(norms[row, expert]), float(ratios[row, expert]))
        for row, expert in np.argwhere(outlying)
    ]
    return tuple(sorted(found, key=lambda item: (-item.norm_max, item.layer, item.expert)))


# ---- the router of a GPU


def fused_router_counts(n_experts: int) -> tuple[int, ...]:
    """Expert counts up to `n_experts` that the fused top-k router of llama.cpp's CUDA backend takes.

    Read in ggml/src/ggml-cuda/topk-moe.cu, ggml_cuda_should_use_topk_moe: powers of two up to 512, and 288 and 576.
    """
    return tuple(count for count in sorted([*(2**power for power in range(10)), 288, 576]) if count <= n_experts)


def router_warning(keep: int, n_experts: int) -> str | None:
    """One sentence where `keep` of `n_experts` experts leave the fused router that the source had, with the nearest
    that stay."""
    counts = fused_router_counts(n_experts)
    if keep in counts or n_experts not in counts:
        return None
    below = max((count for count in counts if count < keep), default=None)
    above = min((count for count in counts if count > keep), default=None)
    nearest = " or ".join(str(count) for count in (below, above) if count is not None)
    return (
        f"{keep} experts run without the fused router of the CUDA backend, which is slower there; {nearest} would run"
        " with it"
    )
