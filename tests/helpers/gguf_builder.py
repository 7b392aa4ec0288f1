"""Builds small GGUF models with the official `gguf` package, as random as they need to be; knows nothing of reap.

build_moe(path)                               a tiny Qwen3-MoE that llama.cpp loads: router, experts, attention, no
                                              tokenizer
build_moe(path, n_experts=8, dense_layers=(0,), biases=True, expert_type=GGMLQuantizationType.Q8_0, ...)
build_moe(path, architecture="deepseek2", keys={...}, extra={"blk.1.exp_probs_b.bias": array, ...})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES

import gguf
from gguf import GGMLQuantizationType, GGUFWriter

Array = np.ndarray[Any, Any]
F32 = GGMLQuantizationType.F32


@dataclass
class MoeShape:
    """Sizes of the model to build; shapes follow llama.cpp's src/models/qwen3moe.cpp."""

    architecture: str = "qwen3moe"
    n_layers: int = 2
    n_experts: int = 8
    n_used: int = 2
    n_embd: int = 32
    n_ff: int = 32
    n_heads: int = 4
    n_heads_kv: int = 2
    n_head_dim: int = 8
    n_vocab: int = 64
    n_ctx: int = 256
    dense_layers: Sequence[int] = ()
    expert_type: GGMLQuantizationType = F32
    router_type: GGMLQuantizationType = F32
    biases: bool = False  # of router and experts, as gpt-oss has
    scales: bool = False  # .scale and .input_scale, as NVFP4 has
    selection_bias: bool = False  # exp_probs_b.bias, as DeepSeek-V3 has
    fused: bool = False  # ffn_gate_up_exps in place of gate and up
    shared_expert: bool = False
    alignment: int | None = None
    used_per_layer: Sequence[int] | None = None
    n_groups: int = 0
    n_groups_used: int = 0
    seed: int = 0
    name: str = "tiny"
    tokenizer: str = (
        "none"  # "none", "words": tokens w0, w1, ..., or "bpe": bytes, and runs of one byte (n_vocab of 320)
    )
    pre_tokenizer: str | None = "gpt-2"  # of "bpe"; None: the file does not say
    keys: Mapping[str, tuple[gguf.GGUFValueType, Any]] = field(default_factory=dict)
    extra: Mapping[str, Array] = field(default_factory=dict)  # more tensors, or others in place of the model's
    typed: Mapping[str, tuple[Array, GGMLQuantizationType]] = field(
        default_factory=dict
    )  # the same, already in a ggml type


def random_tensor(
    rng: np.random.Generator, shape: Sequence[int], kind: GGMLQuantizationType = F32, scale: float = 0.1
) -> tuple[Array, GGMLQuantizationType]:
    """Values of a numpy shape (outermost axis first) in a ggml type: quantised where gguf can, else random bytes."""
    values = (rng.standard_normal(tuple(shape)) * scale).astype(np.float32)
    if kind == F32:
        return values, kind
    if kind == GGMLQuantizationType.F16:
        return values.astype(np.float16), kind
    try:
        return gguf.quants.quantize(values, kind), kind
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        n_bytes = shape[-1] // block * size
        return rng.integers(0, 256, (*shape[:-1], n_bytes), dtype=np.uint8), kind


def build_moe(path: str | Path, shape: MoeShape | None = None, **changes: Any) -> Path:
    """Write a model and return its path. `changes` are fields of `MoeShape`."""
    s = shape or MoeShape()
    s = MoeShape(**{**s.__dict__, **changes})
    writer = GGUFWriter(str(path), s.architecture)
    if s.alignment is not None:
        writer.add_custom_alignment(s.alignment)
    _add_keys(writer, s)
    rng = np.random.default_rng(s.seed)
    for name, (array, kind) in _tensors(s, rng).items():
        writer.add_tensor(name, array, raw_dtype=None if array.dtype in (np.float32, np.float16, np.int32) else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _add_keys(writer: GGUFWriter, s: MoeShape) -> None:
    writer.add_name(s.name)
    writer.add_block_count(s.n_layers)
    writer.add_context_length(s.n_ctx)
    writer.add_embedding_length(s.n_embd)
    writer.add_feed_forward_length(s.n_ff)
    writer.add_head_count(s.n_heads)
    writer.add_head_count_kv(s.n_heads_kv)
    writer.add_key_length(s.n_head_dim)
    writer.add_value_length(s.n_head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if s.n_experts:
        writer.add_expert_count(s.n_experts)
        if s.used_per_layer is None:
            writer.add_expert_used_count(s.n_used)
        else:
            writer.add_array(f"{s.architecture}.expert_used_count", list(s.used_per_layer))
        writer.add_expert_feed_forward_length(s.n_ff)
    if s.n_groups:
        writer.add_expert_group_count(s.n_groups)
        writer.add_expert_group_used_count(s.n_groups_used)
    _add_tokenizer(writer, s)
    for key, (kind, value) in s.keys.items():
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kind)


def _add_tokenizer(writer: GGUFWriter, s: MoeShape) -> None:
    if s.tokenizer == "none":
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(s.n_vocab)
        return
    if s.tokenizer == "bpe":
        _add_bpe(writer, s)
        return
    # a SentencePiece-like vocabulary: <unk>, <s>, </s>, the bytes llama.cpp insists on where they fit, then words
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *([6] * 256)]
    words = [f"\u2581w{index}" for index in range(max(0, s.n_vocab - len(tokens)))]
    tokens, kinds = (tokens + words)[: s.n_vocab], (kinds + [1] * len(words))[: s.n_vocab]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(s.n_vocab)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


RUNS = "aA0-Ġ"  # characters of which 2, 4 and 8 in a row are one token; Ġ is the space


def byte_characters() -> list[str]:
    """GPT-2's character for each byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def _add_bpe(writer: GGUFWriter, s: MoeShape) -> None:
    runs = [run * n for run in RUNS for n in (2, 4, 8)]
    tokens = [*byte_characters(), *runs, "<|end|>"]
    assert len(tokens) <= s.n_vocab
    kinds = [1] * (len(tokens) - 1) + [3] + [5] * (s.n_vocab - len(tokens))
    tokens += [f"[unused{index}]" for index in range(s.n_vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    if s.pre_tokenizer is not None:
        writer.add_tokenizer_pre(s.pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{run[: len(run) // 2]} {run[: len(run) // 2]}" for run in runs])
    writer.add_eos_token_id(tokens.index("<|end|>"))


def _tensors(s: MoeShape, rng: np.random.Generator) -> dict[str, tuple[Array, GGMLQuantizationType]]:
    tensors: dict[str, tuple[Array, GGMLQuantizationType]] = {}
    tensors["token_embd.weight"] = random_tensor(rng, (s.n_vocab, s.n_embd), scale=1.0)
    for layer in range(s.n_layers):
        block = _attention(s, rng)
        block.update(_dense(s, rng) if layer in s.dense_layers or not s.n_experts else _moe(s, rng))
        tensors.update({f"blk.{layer}.{name}": tensor for name, tensor in block.items()})
    tensors["output_norm.weight"] = _ones(s.n_embd)
    tensors["output.weight"] = random_tensor(rng, (s.n_vocab, s.n_embd))
    return {**tensors, **{name: (array, F32) for name, array in s.extra.items()}, **s.typed}


def _ones(length: int) -> tuple[Array, GGMLQuantizationType]:
    return np.ones(length, dtype=np.float32), F32


def _attention(s: MoeShape, rng: np.random.Generator) -> dict[str, tuple[Array, GGMLQuantizationType]]:
    q, kv = s.n_heads * s.n_head_dim, s.n_heads_kv * s.n_head_dim
    return {
        "attn_norm.weight": _ones(s.n_embd),
        "attn_q.weight": random_tensor(rng, (q, s.n_embd)),
        "attn_k.weight": random_tensor(rng, (kv, s.n_embd)),
        "attn_v.weight": random_tensor(rng, (kv, s.n_embd)),
        "attn_output.weight": random_tensor(rng, (s.n_embd, q)),
        "attn_q_norm.weight": _ones(s.n_head_dim),
        "attn_k_norm.weight": _ones(s.n_head_dim),
        "ffn_norm.weight": _ones(s.n_embd),
    }


def _dense(s: MoeShape, rng: np.random.Generator) -> dict[str, tuple[Array, GGMLQuantizationType]]:
    return {
        "ffn_gate.weight": random_tensor(rng, (s.n_ff, s.n_embd)),
        "ffn_down.weight": random_tensor(rng, (s.n_embd, s.n_ff)),
        "ffn_up.weight": random_tensor(rng, (s.n_ff, s.n_embd)),
    }


def _moe(s: MoeShape, rng: np.random.Generator) -> dict[str, tuple[Array, GGMLQuantizationType]]:
    sizes = {
        "ffn_gate_exps": (s.n_ff, s.n_embd),
        "ffn_down_exps": (s.n_embd, s.n_ff),
        "ffn_up_exps": (s.n_ff, s.n_embd),
    }
    if s.fused:
        sizes = {"ffn_gate_up_exps": (2 * s.n_ff, s.n_embd), "ffn_down_exps": (s.n_embd, s.n_ff)}
    block = {"ffn_gate_inp.weight": random_tensor(rng, (s.n_experts, s.n_embd), s.router_type, 1.0)}
    if s.biases:
        block["ffn_gate_inp.bias"] = random_tensor(rng, (s.n_experts,))
    if s.selection_bias:
        block["exp_probs_b.bias"] = random_tensor(rng, (s.n_experts,))
    for name, (rows, columns) in sizes.items():
        block[f"{name}.weight"] = random_tensor(rng, (s.n_experts, rows, columns), s.expert_type)
        if s.biases:
            block[f"{name}.bias"] = random_tensor(rng, (s.n_experts, rows))
        if s.scales:
            block[f"{name}.scale"] = random_tensor(rng, (s.n_experts,))
            block[f"{name}.input_scale"] = random_tensor(rng, (s.n_experts,))
    if s.shared_expert:
        for name in ("ffn_gate_shexp", "ffn_up_shexp"):
            block[f"{name}.weight"] = random_tensor(rng, (s.n_ff, s.n_embd))
        block["ffn_down_shexp.weight"] = random_tensor(rng, (s.n_embd, s.n_ff))
    return block
