"""What makes two GGUF files the same model, whatever their quantisation: parts that are compared one by one, and one
hash of them.

What a score can depend on enters: the architecture, the counts of layers and experts, the shapes of all tensors, and
how text becomes token ids. Types, names, templates, the id of padding and what only ends a generation do not. The
tokenizer's flags enter as llama.cpp takes them, so that a flag written out and a default are equal: its
src/llama-vocab.cpp, `llama_vocab::impl::load`. The routers' numbers are compared besides, by `router_sketch`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from reap.gguf.expert_tensors import ExpertLayout, read_text
from reap.gguf.parser import MetadataValue, TensorInfo
from reap.gguf.reader import GGUFModel
from reap.gguf.tensor_types import INTEGER_TYPES, ValueType

# of a router that is larger, so many blocks, spread evenly, stand for the whole: the routers of a large model are half
# a gigabyte
_HASH_WHOLE_BYTES = 64 << 10
_HASH_BLOCK_BYTES = 4 << 10
# what quantising may add to a file: one scale for a tensor or an expert (NVFP4). A quantisation is the same model
_SCALES = (".scale", ".input_scale")
_TOKENIZER = "tokenizer.ggml."
#: Tokenizer models that are byte-pair encodings: they have merges and a pre-tokenizer, no scores.
_BYTE_PAIR = frozenset({"gpt2", "gemma4", "hybriddna", "whitespace"})
#: Pre-tokenizers that add a beginning (and one of classification a separator) where the file does not say.
_ADD_BOS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken"}
    | {"chameleon"}
)
_ADD_SEP = frozenset({"jina-v1-en", "jina-v2-code", "roberta-bpe"})
#: Tokenizer model -> flags and ids that hold where the file does not say; absent: false, or no token.
_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {"add_bos_token": 1, "add_space_prefix": 1, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "bert": {
        "add_bos_token": 1,
        "add_sep_token": 1,
        "bos_token_id": 101,
        "unknown_token_id": 100,
        "seperator_token_id": 102,
    },
    "t5": {"add_eos_token": 1},
    "plamo2": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "gpt2": {"bos_token_id": 11, "eos_token_id": 11},
}
_FLAGS = ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces")
_IDS = ("bos_token_id", "eos_token_id", "unknown_token_id", "seperator_token_id")
_ARRAYS = ("tokens", "token_type")


def identity_parts(
    model: GGUFModel, layout: ExpertLayout, n_layers: int, used: tuple[int, ...], groups: tuple[int, int]
) -> dict[str, str]:
    """Name of a part (a metadata key, mostly) -> its value, or the beginning of its hash where it is long."""
    architecture = layout.architecture
    parts = {
        "general.architecture": architecture,
        f"{architecture}.block_count": str(n_layers),
        f"{architecture}.expert_count": str(layout.n_experts),
        f"{architecture}.expert_used_count": ",".join(map(str, used[:1] if len(set(used)) == 1 else used)),
        f"{architecture}.expert_group_count": str(groups[0]),
        f"{architecture}.expert_group_used_count": str(groups[1]),
        "shapes of tensors": _hash_shapes(model.tensors.values()),
    }
    return parts | _tokenizer_parts(model)


def fingerprint_of(parts: Mapping[str, str]) -> str:
    """One hash of all parts."""
    digest = hashlib.sha256(b"reap.fingerprint.2\n")
    for key in sorted(parts):
        digest.update(repr((key, parts[key])).encode())
    return f"sha256:{digest.hexdigest()}"


def _hash_shapes(tensors: Iterable[TensorInfo]) -> str:
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        if not tensor.name.endswith(_SCALES):
            digest.update(repr((tensor.name, tensor.shape)).encode())
    return digest.hexdigest()[:16]


def _tokenizer_parts(model: GGUFModel) -> dict[str, str]:
    kind = read_text(model, f"{_TOKENIZER}model") or "none"
    parts = {f"{_TOKENIZER}model": kind}
    arrays: tuple[str, ...] = (*_ARRAYS, "scores", "precompiled_charsmap")
    pre = ""
    if kind in _BYTE_PAIR:
        arrays = (*_ARRAYS, "merges")
        pre = parts[f"{_TOKENIZER}pre"] = read_text(model, f"{_TOKENIZER}pre") or "default"
    for name in arrays:
        if found := model.metadata.get(f"{_TOKENIZER}{name}"):
            parts[f"{_TOKENIZER}{name}"] = _hash_value(found)
    defaults: dict[str, int] = {"add_bos_token": pre in _ADD_BOS, "add_sep_token": pre in _ADD_SEP}
    defaults |= _DEFAULTS.get(kind, {})
    for name in _FLAGS:
        value = _number(model, name, defaults.get(name, 0))
        if name == "add_bos_token" and pre == "gemma4":
            value = 1  # whatever the file says
        parts[f"{_TOKENIZER}{name}"] = "true" if value else "false"
    for name in _IDS:
        parts[f"{_TOKENIZER}{name}"] = str(_number(model, name, defaults.get(name, "none")))
    return parts


def _number(model: GGUFModel, name: str, default: Any) -> Any:
    found = model.metadata.get(f"{_TOKENIZER}{name}")
    is_number = found is not None and (found.type in INTEGER_TYPES or found.type == ValueType.BOOL)
    return int(found.value) if found is not None and is_number else default


def _hash_value(found: MetadataValue) -> str:
    """Of an array its elements, whatever integer type they are said to have."""
    raw = found.raw if found.array_type is None else found.raw[12:]
    digest = hashlib.sha256(str(found.length).encode())
    digest.update(raw)
    return digest.hexdigest()[:16]


# ---- the routers' bytes


def hash_tensors(model: GGUFModel, tensors: tuple[TensorInfo, ...]) -> str:
    """Of the bytes of some tensors; of each that is larger than 64 KiB, of 16 blocks of it."""
    digest = hashlib.sha256()
    for tensor in tensors:
        file = model.files[tensor.shard]
        if tensor.n_bytes <= _HASH_WHOLE_BYTES:
            digest.update(file.read_range(tensor.offset_bytes, tensor.n_bytes))
            continue
        n_blocks = _HASH_WHOLE_BYTES // _HASH_BLOCK_BYTES
        digest.update(repr((tensor.type, tensor.n_bytes)).encode())
        for index in range(n_blocks):
            start = (tensor.n_bytes - _HASH_BLOCK_BYTES) * index // (n_blocks - 1)
            digest.update(file.read_range(tensor.offset_bytes + start, _HASH_BLOCK_BYTES))
    return f"sha256:{digest.hexdigest()}"


# ---- what an older release of reap wrote


def first_fingerprint(model: GGUFModel, layout: ExpertLayout, n_layers: int, used: tuple[int, ...]) -> str:
    """The fingerprint of releases whose files have no parts: every key of the tokenizer entered, as it is stored."""
    digest = hashlib.sha256(b"reap.fingerprint.1\n")
    counts = (layout.architecture, n_layers, layout.n_experts, used)
    digest.update(repr(counts).encode())
    for tensor in sorted(model.tensors.values(), key=lambda tensor: tensor.name):
        if not tensor.name.endswith(_SCALES):
            digest.update(repr((tensor.name, tensor.shape)).encode())
    for key in sorted(model.metadata):
        # the chat template is left out: it gets corrected in files whose weights and token ids stay the same
        if key.startswith(_TOKENIZER):
            value = model.metadata[key]
            digest.update(repr((key, value.type, len(value.raw))).encode())
            digest.update(value.raw)
    return f"sha256:{digest.hexdigest()}"
