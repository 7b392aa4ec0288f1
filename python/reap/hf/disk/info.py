"""What a checkpoint is, in the terms of `reap.inspect`, and the fingerprint that ties profiles and plans to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap.errors import FormatError
from reap.files.strict_json import EXPERT_LIMIT, read_json
from reap.hf.disk.checkpoint_files import PROVENANCE, Checkpoint
from reap.hf.disk.config import first_count
from reap.hf.disk.layout import CheckpointLayout, read_checkpoint_layout

#: Not "sha256:", which a GGUF file's fingerprint begins with: the two are never equal, and nobody should compare them.
FINGERPRINT_KIND = "hf-sha256"
PROVENANCE_FORMAT = "reap.provenance"
_MAX_PROVENANCE_BYTES = 16 << 20


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is. Names as in ModelInfo; layers are numbered as in the GGUF file that it becomes.

    path: the directory. architecture: model_type of config.json, for the reader. n_layers: prediction (MTP) layers with
    experts included. n_embd, vocab_size: 0 where config.json does not say. n_bytes: of the weights' files. provenance:
    reap.json of a pruned one.
    """

    path: Path
    architecture: str
    fingerprint: str
    n_layers: int
    n_prediction_layers: int
    moe_layers: tuple[int, ...]
    n_experts: int
    n_experts_used: int
    n_groups: int
    n_groups_used: int
    n_embd: int
    vocab_size: int
    n_bytes: int
    provenance: dict[str, Any] | None
    refusals: tuple[str, ...]

    @property
    def is_moe(self) -> bool:
        """Always: a dense checkpoint is refused before."""
        return bool(self.moe_layers)


def describe_checkpoint(checkpoint: Checkpoint, layout: CheckpointLayout) -> CheckpointInfo:
    """The checkpoint in the terms of `reap.inspect`. Raises FormatError for a damaged reap.json."""
    counts = layout.counts
    n_embd = first_count(checkpoint.config, ("hidden_size", "n_embd", "d_model"))
    vocab_size = first_count(checkpoint.config, ("vocab_size",))
    return CheckpointInfo(
        path=checkpoint.directory,
        architecture=str(checkpoint.config.get("model_type") or "unknown"),
        fingerprint=structure_fingerprint(
            n_layers=layout.n_layers,
            moe_layers=[layer for layer in layout.moe_layers if layer not in layout.prediction_layers],
            n_experts=layout.n_experts,
            n_experts_used=counts.n_used,
            n_groups=counts.n_groups,
            n_groups_used=counts.n_groups_used,
            n_embd=n_embd,
            vocab_size=vocab_size,
        ),
        n_layers=max(layout.n_layers, layout.moe_layers[-1] + 1),
        n_prediction_layers=max(0, layout.moe_layers[-1] + 1 - layout.n_layers),
        moe_layers=layout.moe_layers,
        n_experts=layout.n_experts,
        n_experts_used=counts.n_used,
        n_groups=counts.n_groups,
        n_groups_used=counts.n_groups_used,
        n_embd=n_embd,
        vocab_size=vocab_size,
        n_bytes=checkpoint.n_bytes,
        provenance=_read_provenance(checkpoint, layout),
        refusals=layout.refusals,
    )


def structure_fingerprint(
    *,
    n_layers: int,
    moe_layers: Sequence[int],
    n_experts: int,
    n_experts_used: int,
    n_groups: int,
    n_groups_used: int,
    n_embd: int,
    vocab_size: int,
) -> str:
    """The fingerprint of a checkpoint, equal for its quantisations, and the same whether it lies on disk or in memory.

    n_layers, moe_layers: without prediction (MTP) layers, which transformers does not load. n_groups, n_groups_used: 1
    without a grouped router. n_embd, vocab_size: hidden_size and vocab_size of the text configuration, 0 where it has
    none.
    """
    groups = (n_groups, n_groups_used) if n_groups > 1 else (1, 1)
    numbers = [n_layers, n_experts, n_experts_used, *groups, n_embd, vocab_size, *moe_layers]
    text = ",".join(str(int(number)) for number in numbers)
    return f"{FINGERPRINT_KIND}:{hashlib.sha256(f'reap.fingerprint.hf.1 {text}'.encode()).hexdigest()}"


@dataclass(frozen=True)
class Origin:
    """The checkpoint at the start of a chain of prunings. kept: layer -> ids there of this checkpoint's experts."""

    fingerprint: str
    n_experts: int
    kept: dict[int, tuple[int, ...]]


def origin(info: CheckpointInfo) -> Origin:
    """Where the experts of a checkpoint come from: itself, unless it was pruned before."""
    if info.provenance is None:
        return Origin(info.fingerprint, info.n_experts, dict.fromkeys(info.moe_layers, tuple(range(info.n_experts))))
    source = info.provenance["source"]
    kept = {int(layer): tuple(ids) for layer, ids in info.provenance["kept"].items()}
    return Origin(source["fingerprint"], source["n_experts"], kept)


def provenance_keys(checkpoint: Checkpoint) -> dict[str, str | int | list[int]]:
    """What reap.json says, as keys of a GGUF file (`pruner.prune` writes the same); nothing for a checkpoint that
    nobody pruned.

    Raises FormatError for a damaged reap.json.
    """
    if not (checkpoint.directory / PROVENANCE).is_file():
        return {}
    record = _read_provenance(checkpoint, read_checkpoint_layout(checkpoint)) or {}
    keys: dict[str, str | int | list[int]] = {
        "reap.version": str(record.get("reap", "")),
        "reap.metric": str(record.get("metric", "")),
        "reap.source.fingerprint": record["source"]["fingerprint"],
        "reap.source.expert_count": record["source"]["n_experts"],
    }
    hashes = (record.get("calibration") or {}).get("sha256") or []
    if hashes:
        keys["reap.calibration.sha256"] = ",".join(map(str, hashes))
    return keys | {f"reap.kept.{int(layer)}": ids for layer, ids in record["kept"].items()}


def _read_provenance(checkpoint: Checkpoint, layout: CheckpointLayout) -> dict[str, Any] | None:
    path = checkpoint.directory / PROVENANCE
    if not path.is_file():
        return None
    root = read_json(path, what="provenance", max_bytes=_MAX_PROVENANCE_BYTES)
    if root["format"].value != PROVENANCE_FORMAT:
        root["format"].fail(f"should be {PROVENANCE_FORMAT!r}")
    n_experts = root["source"]["n_experts"].integer(1, EXPERT_LIMIT)
    root["source"]["fingerprint"].string()
    for layer in layout.moe_layers:
        node = root["kept"][str(layer)]
        ids = node.integers(layout.n_experts).tolist()
        if ids != sorted(set(ids)) or ids[-1] >= n_experts:
            raise FormatError(f"{node.where} does not name {layout.n_experts} of {n_experts} experts in order")
    return root.members()
