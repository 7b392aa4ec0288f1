"""inspect(): what a model is, where its experts are and what they weigh."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reap.errors import FormatError, UnsupportedModelError
from reap.files.paths import PathLike
from reap.gguf.expert_tensors import MAX_EXPERTS, UNSUPPORTED, ExpertLayout, read_count, read_layout, read_text
from reap.gguf.fingerprint import fingerprint_of, first_fingerprint, hash_tensors, identity_parts
from reap.gguf.foreign_types import which_engine
from reap.gguf.missing_keys import find_missing_keys
from reap.gguf.reader import GGUFModel, TensorInfo
from reap.gguf.tensor_types import TENSOR_TYPES

if TYPE_CHECKING:
    from reap.gguf.router_sketch import RouterSketch

PROVENANCE_PREFIX = "reap."
_MAX_PROVENANCE_BYTES = 4 << 20
#: Far above llama.cpp's 512, so that a forged count costs no memory.
MAX_LAYERS = 65_536


@dataclass(frozen=True)
class ModelInfo:
    """What a GGUF file is."""

    path: Path
    """The file; of a split model, the first."""
    name: str | None
    """general.name; None where the header has none."""
    architecture: str
    """general.architecture, such as `qwen3moe`."""
    n_layers: int
    """Blocks, dense and multi-token-prediction ones included."""
    n_prediction_layers: int
    """How many of them, the last ones, are for multi-token prediction."""
    moe_layers: tuple[int, ...]
    """GGUF block indices of the layers with experts, ascending; empty for a dense model."""
    n_experts: int
    """Routed experts in every MoE layer; 0 for a dense model."""
    n_experts_used: int
    """The most experts that any MoE layer routes a token to."""
    n_experts_used_per_layer: tuple[int, ...]
    """Experts that a layer routes a token to, aligned with moe_layers."""
    n_groups: int
    """Groups of the router; 1 where it has none."""
    n_groups_used: int
    """Groups that a token may use."""
    n_embd: int
    """Width of the hidden states; 0 where the header does not say."""
    vocab_size: int
    """Number of tokens in the vocabulary; 0 where the file does not say."""
    context_length: int
    """Tokens of the context that the model was trained with; 0 where the header does not say."""
    file_type: int | None
    """general.file_type, llama.cpp's number for a quantisation; None where the header has none."""
    tensor_types: Mapping[str, int]
    """ggml type name -> number of tensors."""
    n_parameters: int
    """Numbers in all tensors."""
    n_files: int
    """1, or the number of shards."""
    n_bytes: int
    """Size of the file, or of all shards."""
    expert_bytes: int
    """Bytes of all experts' tensors, routers not included."""
    other_bytes: int
    """Bytes of all other tensors."""
    bytes_per_expert: int
    """Bytes that removing one expert from every MoE layer saves, router rows included."""
    has_tokenizer: bool
    """Whether the file holds a tokenizer."""
    has_chat_template: bool
    """Whether the file holds a chat template."""
    identity: Mapping[str, str]
    """What makes it this model, part by part (`reap.gguf.fingerprint`); equal for two quantisations of one model."""
    fingerprint: str
    """One hash of `identity`."""
    router_fingerprint: str
    """Hash of the routers' bytes; of a router that is larger than 64 KiB, of 16 blocks of it."""
    provenance: dict[str, Any] | None
    """The reap.* keys of a pruned file; None for a file that was not pruned."""
    refusals: tuple[str, ...]
    """Why the model cannot be pruned, one sentence each; empty if it can."""
    hash_layers: tuple[int, ...] = ()
    """GGUF block indices of the layers whose experts are chosen by token id, ascending."""
    engine_refusal: str | None = None
    """Why the engine that reap is built with cannot run it; None where it knows all types."""
    missing_keys: Mapping[str, str] = field(default_factory=dict)
    """Keys that its architecture needs and the header lacks -> what the engine does without one, and what to give."""

    @property
    def is_moe(self) -> bool:
        """Whether it has layers with experts."""
        return bool(self.moe_layers)

    @cached_property
    def routers(self) -> RouterSketch:
        """A sketch of the routers' numbers (`reap.gguf.router_sketch`), read from the file when it is asked for."""
        return sketch_routers(self.path)

    @cached_property
    def older_fingerprints(self) -> tuple[str, ...]:
        """What older releases of reap gave as its fingerprint; read from the file when asked for."""
        with GGUFModel.open(self.path) as model:
            layout = read_layout(model)
            return (first_fingerprint(model, layout, self.n_layers, self.n_experts_used_per_layer),)

    def record(self) -> dict[str, Any]:
        """What a profile says of it under "model"."""
        from reap.gguf.router_sketch import to_record

        return {
            "name": self.name or self.path.stem,
            "architecture": self.architecture,
            "fingerprint": self.fingerprint,
            "router_fingerprint": self.router_fingerprint,
            "n_layers": self.n_layers,
            "n_embd": self.n_embd,
            "n_experts": self.n_experts,
            "n_experts_used": self.n_experts_used,
            "n_groups": self.n_groups,
            "n_groups_used": self.n_groups_used,
            "identity": dict(self.identity),
            "routers": to_record(self.routers),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types, except the sketch of the routers."""
        return {**asdict(self), "path": str(self.path), "is_moe": self.is_moe}


def inspect(path: PathLike) -> ModelInfo:
    """Describe a model from its header (and its routers' bytes).

    Raises UsageError if `path` is not a readable file, FormatError if it is not a sound GGUF model.
    """
    with GGUFModel.open(path) as model:
        return describe(model)


def sketch_routers(path: PathLike) -> RouterSketch:
    """The sketch of a file's routers; kept for as long as the file stays the same."""
    with GGUFModel.open(path) as model:
        stamps = [os.stat(file.path) for file in model.files]
    return _sketch_routers(os.fspath(path), tuple((stamp.st_ino, stamp.st_size, stamp.st_mtime_ns) for stamp in stamps))


@lru_cache(maxsize=4)
def _sketch_routers(path: str, _stamps: object) -> RouterSketch:
    from reap.gguf.router_sketch import Router, sketch_router

    with GGUFModel.open(path) as model:
        tensors = {
            layer: next(tensor for tensor in tensors if tensor.name.endswith(".ffn_gate_inp.weight"))
            for layer, tensors in read_layout(model).layers.items()
        }
        return {
            layer: sketch_router(Router(tensor.type_name, tensor.shape[1], tensor.shape[0], _reader(model, tensor)))
            for layer, tensor in tensors.items()
        }


def _reader(model: GGUFModel, tensor: TensorInfo) -> Callable[[int, int], bytes]:
    row_bytes = tensor.n_bytes // tensor.shape[1]

    def read(first: int, n_rows: int) -> bytes:
        return model.files[tensor.shard].read_range(tensor.offset_bytes + first * row_bytes, n_rows * row_bytes)

    return read


class _Described(Protocol):
    @property
    def path(self) -> Path: ...
    @property
    def architecture(self) -> str: ...
    @property
    def is_moe(self) -> bool: ...
    @property
    def refusals(self) -> tuple[str, ...]: ...


def require_moe(info: _Described) -> None:
    """Raise UnsupportedModelError for a dense model, for one whose experts are in no layout reap knows, or run in no
    way it knows."""
    if info.refusals and (not info.is_moe or info.architecture in UNSUPPORTED):
        raise UnsupportedModelError(info.refusals[0])
    if not info.is_moe:
        raise UnsupportedModelError(f"{info.path}: {info.architecture} here is a dense model, it has no experts")


def describe(model: GGUFModel) -> ModelInfo:
    """The same as `inspect`, of a model that is open already. Raises FormatError."""
    layout = read_layout(model)
    architecture = layout.architecture
    n_layers = read_count(model, f"{architecture}.block_count")
    if n_layers > MAX_LAYERS:
        raise FormatError(f"{model.path}: {architecture}.block_count is {n_layers:,}, expected at most {MAX_LAYERS:,}")
    used = _used_per_layer(model, layout, n_layers)
    n_groups, n_groups_used = _groups(model, layout)
    cut_bytes = sum(tensor.n_bytes for tensors in layout.layers.values() for tensor in tensors)
    expert_bytes = sum(tensor.n_bytes for tensor in layout.experts)
    is_moe = bool(layout.layers)
    identity = identity_parts(model, layout, n_layers, used, (n_groups, n_groups_used))
    vocab_size = _vocab_size(model, architecture)
    return ModelInfo(
        path=model.path,
        name=read_text(model, "general.name"),
        architecture=architecture,
        n_layers=n_layers,
        n_prediction_layers=read_count(model, f"{architecture}.nextn_predict_layers"),
        moe_layers=layout.moe_layers,
        n_experts=layout.n_experts if is_moe else 0,
        n_experts_used=max(used, default=0),
        n_experts_used_per_layer=used,
        n_groups=n_groups,
        n_groups_used=n_groups_used,
        n_embd=read_count(model, f"{architecture}.embedding_length"),
        vocab_size=vocab_size,
        context_length=read_count(model, f"{architecture}.context_length"),
        file_type=read_count(model, "general.file_type") if "general.file_type" in model.metadata else None,
        tensor_types=dict(Counter(tensor.type_name for tensor in model.tensors.values()).most_common()),
        n_parameters=sum(tensor.n_elements for tensor in model.tensors.values()),
        n_files=len(model.files),
        n_bytes=model.size,
        expert_bytes=expert_bytes,
        other_bytes=model.size - expert_bytes,
        bytes_per_expert=cut_bytes // layout.n_experts if is_moe else 0,
        has_tokenizer=read_text(model, "tokenizer.ggml.model") not in (None, "none"),
        has_chat_template="tokenizer.chat_template" in model.metadata,
        identity=identity,
        fingerprint=fingerprint_of(identity),
        router_fingerprint=hash_tensors(model, layout.routers),
        provenance=_provenance(model),
        refusals=layout.refusals,
        hash_layers=tuple(sorted(set(layout.id_tables.values()))),
        engine_refusal=engine_refusal(model),
        missing_keys=find_missing_keys(model, layout, n_layers=n_layers, vocab_size=vocab_size),
    )


def engine_refusal(model: GGUFModel) -> str | None:
    """Why the engine that reap is built with cannot run a model: the first of its tensors that has a type of another
    engine; None where all types are known."""
    foreign = [tensor for tensor in model.tensors.values() if tensor.type not in TENSOR_TYPES]
    if not foreign:
        return None
    first, more = foreign[0], f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
    return (
        f"{model.path}: the llama.cpp that reap is built with cannot run it: {first.name}{more} are stored as"
        f" {first.type_name}, {which_engine(first.type)}; inspect, plan and prune work, and a profile of another"
        " quantisation of the same model serves this file"
    )


def _groups(model: GGUFModel, layout: ExpertLayout) -> tuple[int, int]:
    """(groups of the router, groups that a token may use); (1, 1) for a router without groups."""
    n_groups = max(1, read_count(model, f"{layout.architecture}.expert_group_count"))
    n_groups_used = read_count(model, f"{layout.architecture}.expert_group_used_count", n_groups)
    if n_groups == 1 or not layout.layers:
        return 1, 1
    if layout.n_experts % n_groups or not 0 < n_groups_used <= n_groups:
        raise FormatError(
            f"{model.path}: {layout.architecture} routes to {n_groups_used} of {n_groups} groups of {layout.n_experts}"
            " experts, which cannot be"
        )
    return n_groups, n_groups_used


def _used_per_layer(model: GGUFModel, layout: ExpertLayout, n_layers: int) -> tuple[int, ...]:
    """Experts per token of each MoE layer; the key holds one number or one for each block."""
    if not layout.layers:
        return ()
    key = f"{layout.architecture}.expert_used_count"
    found = model.metadata.get(key)
    if found is None:
        raise FormatError(f"{model.path}: has {layout.n_experts} experts, but no {key}")
    if found.array_type is None:
        used = [read_count(model, key)] * len(layout.layers)
    else:
        if found.length != n_layers or layout.moe_layers[-1] >= n_layers:
            raise FormatError(f"{model.path}: {key} has {found.length} entries for {n_layers} blocks")
        values = found.value
        used = [values[layer] for layer in layout.layers]
    for layer, count in zip(layout.layers, used, strict=True):
        if type(count) is not int or not 0 < count <= layout.n_experts:
            raise FormatError(f"{model.path}: {key} is {count} in blk.{layer}, expected 1 to {layout.n_experts}")
    return tuple(used)


def _vocab_size(model: GGUFModel, architecture: str) -> int:
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and tokens.array_type is not None:
        return tokens.length
    embedding = model.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        return embedding.shape[1]
    return read_count(model, f"{architecture}.vocab_size")


def _provenance(model: GGUFModel) -> dict[str, Any] | None:
    found = {key: pair for key, pair in model.metadata.items() if key.startswith(PROVENANCE_PREFIX)}
    if sum(pair.n_bytes for pair in found.values()) > _MAX_PROVENANCE_BYTES:
        raise FormatError(
            f"{model.path}: its {PROVENANCE_PREFIX}* keys take more than {_MAX_PROVENANCE_BYTES >> 20} MiB"
        )
    for key, pair in found.items():
        if pair.length > MAX_EXPERTS:
            raise FormatError(f"{model.path}: {key} holds {pair.length:,} values, expected at most {MAX_EXPERTS:,}")
    return {key: pair.value for key, pair in found.items()} or None
