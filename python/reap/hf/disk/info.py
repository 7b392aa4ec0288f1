"""What a checkpoint is, in the terms of `reap.inspect`, and the fingerprint that ties profiles and plans to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from reap.errors import FormatError
from reap.files.strict_json import EXPERT_LIMIT, read_json
from reap.gguf.router_sketch import Router, RouterSketch, sketch_router, to_record
from reap.hf.disk.checkpoint_files import PROVENANCE, Checkpoint, Trust
from reap.hf.disk.config import first_count
from reap.hf.disk.layout import CheckpointLayout, read_checkpoint_layout
from reap.hf.disk.safetensors_file import StoredTensor

#: Not "sha256:", which a GGUF file's fingerprint begins with: the two are never equal and must not be compared.
FINGERPRINT_KIND = "hf-sha256"
PROVENANCE_FORMAT = "reap.provenance"
TOKENIZER = "tokenizer.json"
_MAX_PROVENANCE_BYTES = 16 << 20
_MAX_TOKENIZER_BYTES = 64 << 20
#: Where a configuration of several models keeps that of the text.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is. Names as in ModelInfo; layers are numbered as in the GGUF file that it becomes."""

    path: Path
    """The directory."""
    architecture: str
    """model_type of config.json."""
    identity: Mapping[str, str]
    """What makes it this model, part by part; equal for a checkpoint loaded into memory."""
    fingerprint: str
    """One hash of `identity`."""
    n_layers: int
    """Blocks, prediction (MTP) layers with experts included."""
    n_prediction_layers: int
    """How many of them, the last ones, are prediction layers."""
    moe_layers: tuple[int, ...]
    """The layers with experts, ascending."""
    n_experts: int
    """Routed experts in every MoE layer."""
    n_experts_used: int
    """Experts of each token."""
    n_groups: int
    """Groups of the router; 1 where it has none."""
    n_groups_used: int
    """Groups that a token may use."""
    n_embd: int
    """Width of the hidden states; 0 where config.json does not say."""
    vocab_size: int
    """Number of tokens in the vocabulary; 0 where config.json does not say."""
    n_bytes: int
    """Size of the weights' files."""
    provenance: dict[str, Any] | None
    """reap.json of a pruned checkpoint; None for one that was not pruned."""
    refusals: tuple[str, ...]
    """Why it cannot be pruned, one sentence each; empty if it can."""
    trust: Trust | None = "named"
    """What `Checkpoint.open` was given."""
    drop_prediction: bool = False
    """Whether prediction layers were not looked at."""

    @cached_property
    def routers(self) -> RouterSketch:
        """A sketch of the routers' numbers (`reap.gguf.router_sketch`), read from the files when it is asked for."""
        return sketch_folder(self.path, self.trust, drop_prediction=self.drop_prediction)

    @property
    def older_fingerprints(self) -> tuple[str, ...]:
        """What older releases of reap gave as its fingerprint."""
        n_ordinary = self.n_layers - self.n_prediction_layers
        layers = [layer for layer in self.moe_layers if layer < n_ordinary]
        numbers = (self.n_experts, self.n_experts_used, self.n_groups, self.n_groups_used, self.n_embd, self.vocab_size)
        return (first_structure_fingerprint(Structure(n_ordinary, layers, *numbers)),)

    def record(self) -> dict[str, Any]:
        """What a profile says of it under "model"."""
        return {
            "name": self.path.resolve().name,
            "architecture": self.architecture,
            "fingerprint": self.fingerprint,
            "n_layers": self.n_layers - self.n_prediction_layers,
            "n_embd": self.n_embd,
            "n_experts": self.n_experts,
            "n_experts_used": self.n_experts_used,
            "n_groups": self.n_groups,
            "n_groups_used": self.n_groups_used,
            "identity": dict(self.identity),
            "routers": to_record(self.routers),
        }

    @property
    def is_moe(self) -> bool:
        """Always: a dense checkpoint is refused before."""
        return bool(self.moe_layers)


def describe_checkpoint(checkpoint: Checkpoint, layout: CheckpointLayout) -> CheckpointInfo:
    """The checkpoint in the terms of `reap.inspect`. Raises FormatError for a damaged reap.json."""
    counts = layout.counts
    n_embd = first_count(checkpoint.config, ("hidden_size", "n_embd", "d_model"))
    vocab_size = first_count(checkpoint.config, ("vocab_size",))
    structure = Structure(
        layout.n_layers,
        [layer for layer in layout.moe_layers if layer not in layout.prediction_layers],
        layout.n_experts,
        counts.n_used,
        counts.n_groups,
        counts.n_groups_used,
        n_embd,
        vocab_size,
    )
    identity = identity_parts(model_type_of(checkpoint.config), structure, read_vocabulary(checkpoint.directory))
    return CheckpointInfo(
        path=checkpoint.directory,
        architecture=str(checkpoint.config.get("model_type") or "unknown"),
        identity=identity,
        fingerprint=structure_fingerprint(identity),
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
        trust=checkpoint.trust,
        drop_prediction=bool(layout.dropped),
    )


class Structure(NamedTuple):
    """The numbers of a checkpoint, the same whether it lies on disk or in memory."""

    n_layers: int
    """Without prediction (MTP) layers, which transformers does not load."""
    moe_layers: Sequence[int]
    """Without them, too."""
    n_experts: int
    """Routed experts in every MoE layer."""
    n_experts_used: int
    """Experts of each token; 0 where that is not known."""
    n_groups: int
    """1 without a grouped router."""
    n_groups_used: int
    """Groups that a token may use."""
    n_embd: int
    """hidden_size of the text configuration, 0 where it has none."""
    vocab_size: int
    """Of the text configuration, 0 where it has none."""

    @property
    def groups(self) -> tuple[int, int]:
        return (self.n_groups, self.n_groups_used) if self.n_groups > 1 else (1, 1)


def identity_parts(model_type: str, structure: Structure, tokenizer: str | None = None) -> dict[str, str]:
    """What makes a checkpoint this model, part by part: name of the part -> its value.

    model_type: `model_type_of` the configuration. tokenizer: `vocabulary_hash`, None where it is not known.
    """
    n_groups, n_groups_used = structure.groups
    parts = {
        "model_type": model_type,
        "num_hidden_layers": structure.n_layers,
        "layers with experts": ",".join(map(str, structure.moe_layers)),
        "n_experts": structure.n_experts,
        "n_experts_used": structure.n_experts_used,
        "n_groups": n_groups,
        "n_groups_used": n_groups_used,
        "hidden_size": structure.n_embd,
        "vocab_size": structure.vocab_size,
    }
    return {key: str(value) for key, value in parts.items()} | ({} if tokenizer is None else {"tokenizer": tokenizer})


def structure_fingerprint(parts: Mapping[str, str]) -> str:
    """One hash of the parts, equal for quantisations of one checkpoint; the tokenizer, whose files need not be there,
    does not enter."""
    text = repr(sorted((key, value) for key, value in parts.items() if key != "tokenizer"))
    return f"{FINGERPRINT_KIND}:{hashlib.sha256(f'reap.fingerprint.hf.2 {text}'.encode()).hexdigest()}"


def first_structure_fingerprint(structure: Structure) -> str:
    """The fingerprint of releases whose files have no parts: the numbers alone."""
    numbers = [
        structure.n_layers,
        structure.n_experts,
        structure.n_experts_used,
        *structure.groups,
        structure.n_embd,
        structure.vocab_size,
        *structure.moe_layers,
    ]
    text = ",".join(str(int(number)) for number in numbers)
    return f"{FINGERPRINT_KIND}:{hashlib.sha256(f'reap.fingerprint.hf.1 {text}'.encode()).hexdigest()}"


def model_type_of(config: Mapping[str, Any]) -> str:
    """model_type of the text model that a configuration is of or holds; that of Qwen3-VL's is Qwen3-VL's own."""
    inner = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), Mapping)), None)
    found = (inner or {}).get("model_type") or config.get("model_type") or "unknown"
    return str(found).removesuffix("_text")


def vocabulary_hash(vocabulary: Mapping[str, int], added: Collection[str]) -> str:
    """The beginning of a hash of the ids of all tokens, except those that were added to a tokenizer, padding among
    them."""
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        if token not in added:
            digest.update(f"{index} ".encode() + token.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def read_vocabulary(directory: Path) -> str | None:
    """`vocabulary_hash` of the tokenizer.json in a checkpoint; None where there is none that reap understands."""
    path = directory / TOKENIZER
    try:
        if not path.is_file() or path.stat().st_size > _MAX_TOKENIZER_BYTES:
            return None
        document = json.loads(path.read_bytes())
        found = document["model"]["vocab"]
        # a list of [token, score] has the ids as places
        vocabulary = found if isinstance(found, dict) else {str(entry[0]): index for index, entry in enumerate(found)}
        added = {entry["content"] for entry in document.get("added_tokens") or ()}
        return vocabulary_hash({str(token): int(index) for token, index in vocabulary.items()}, added)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None  # it is not the weights; what reads it is transformers


def sketch_folder(directory: Path, trust: Trust | None = "named", *, drop_prediction: bool = False) -> RouterSketch:
    """The sketch of a checkpoint's routers, whose rows are those of the GGUF file that it becomes."""
    with Checkpoint.open(directory, trust) as checkpoint:
        layout = read_checkpoint_layout(checkpoint, drop_prediction=drop_prediction)
        names = {layer: layout.router_weight(layer) for layer in layout.moe_layers}
        return {
            layer: sketch_router(_router(checkpoint, checkpoint.tensor(name)))
            for layer, name in names.items()
            if name is not None
        }


def _router(checkpoint: Checkpoint, tensor: StoredTensor) -> Router:
    file = checkpoint.shards[checkpoint.shard_of[tensor.name]]
    n_rows, *rest = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
    row_bytes = tensor.n_bytes // max(1, n_rows)

    def read(first: int, n: int) -> bytes:
        return file.read_range(tensor.offset_bytes + first * row_bytes, n * row_bytes)

    return Router(tensor.dtype, n_rows, prod(rest), read)


@dataclass(frozen=True)
class Origin:
    """The checkpoint at the start of a chain of prunings."""

    fingerprint: str
    """Its fingerprint."""
    n_experts: int
    """Experts in each of its MoE layers."""
    kept: dict[int, tuple[int, ...]]
    """Layer -> ids there of the experts that this checkpoint still has, ascending."""


def origin(info: CheckpointInfo) -> Origin:
    """Where the experts of a checkpoint come from: itself, unless it was pruned before."""
    if info.provenance is None:
        return Origin(info.fingerprint, info.n_experts, dict.fromkeys(info.moe_layers, tuple(range(info.n_experts))))
    source = info.provenance["source"]
    kept = {int(layer): tuple(ids) for layer, ids in info.provenance["kept"].items()}
    return Origin(source["fingerprint"], source["n_experts"], kept)


def provenance_keys(checkpoint: Checkpoint) -> dict[str, str | int | list[int]]:
    """What reap.json says, as keys of a GGUF file (`reap.prune` writes the same); nothing for a checkpoint that was
    never pruned.

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
    if isinstance(record.get("mismatch"), str):
        keys["reap.mismatch"] = record["mismatch"]
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
