"""Random models with the dimensions of real ones and few layers, written in seconds: every tensor is a slice of one
random buffer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES

import gguf
from gguf import GGMLQuantizationType as Type

Bytes = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Dimensions:
    """What of a real model is kept; `pattern` is one letter a layer (A attention and experts, M Mamba, E experts, *
    attention)."""

    name: str
    architecture: str
    n_embd: int
    n_experts: int
    n_used: int
    n_ff: int
    n_vocab: int
    n_heads: int
    n_heads_kv: int
    n_head_dim: int
    pattern: str
    full_depth: int  # layers with experts in the real model
    n_ff_shared: int = 0


QWEN3 = Dimensions("Qwen3-30B-A3B", "qwen3moe", 2048, 128, 8, 768, 151936, 32, 4, 128, "AAAA", 48)
NEMOTRON = Dimensions(
    "Nemotron-3-Nano-30B-A3B", "nemotron_h_moe", 2688, 128, 6, 1856, 131072, 32, 2, 128, "MEM*EMEM", 23, 3712
)


def write_model(path: Path, d: Dimensions, kind: Type) -> Path:
    """A GGUF without a tokenizer; matrices in `kind`, or in Q5_0 where a row is not a whole number of its blocks (as
    llama-quantize does)."""
    writer = gguf.GGUFWriter(str(path), d.architecture)
    _add_keys(writer, d)
    source = _Source(kind)
    source.add(writer, "token_embd.weight", d.n_vocab, d.n_embd)
    for layer, letter in enumerate(d.pattern):
        for name, shape in _block(d, letter).items():
            source.add(writer, f"blk.{layer}.{name}", *shape)
    source.add(writer, "output_norm.weight", d.n_embd)
    source.add(writer, "output.weight", d.n_vocab, d.n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_keys(writer: gguf.GGUFWriter, d: Dimensions) -> None:
    writer.add_name(f"random {d.name}")
    writer.add_block_count(len(d.pattern))
    writer.add_context_length(4096)
    writer.add_embedding_length(d.n_embd)
    writer.add_head_count(d.n_heads)
    writer.add_key_length(d.n_head_dim)
    writer.add_value_length(d.n_head_dim)
    writer.add_vocab_size(d.n_vocab)
    writer.add_tokenizer_model("none")
    writer.add_expert_count(d.n_experts)
    writer.add_expert_used_count(d.n_used)
    writer.add_expert_feed_forward_length(d.n_ff)
    writer.add_rope_freq_base(1e6)
    (writer.add_layer_norm_rms_eps if d.architecture == "qwen3moe" else writer.add_layer_norm_eps)(1e-6)
    if d.architecture == "qwen3moe":
        writer.add_feed_forward_length(d.n_ff)
        writer.add_head_count_kv(d.n_heads_kv)
        return
    writer.add_feed_forward_length([d.n_ff if letter == "E" else 0 for letter in d.pattern])
    writer.add_head_count_kv([d.n_heads_kv if letter == "*" else 0 for letter in d.pattern])
    writer.add_expert_shared_feed_forward_length(d.n_ff_shared)
    writer.add_expert_shared_count(1)
    writer.add_expert_group_count(1)
    writer.add_expert_group_used_count(1)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(2.5)
    writer.add_rope_dimension_count(d.n_head_dim)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(128)
    writer.add_ssm_group_count(8)
    writer.add_ssm_inner_size(4096)
    writer.add_ssm_time_step_rank(64)


def _block(d: Dimensions, letter: str) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer: numpy shapes, outermost axis first."""
    q, kv = d.n_heads * d.n_head_dim, d.n_heads_kv * d.n_head_dim
    attention = {
        "attn_norm.weight": (d.n_embd,),
        "attn_q.weight": (q, d.n_embd),
        "attn_k.weight": (kv, d.n_embd),
        "attn_v.weight": (kv, d.n_embd),
        "attn_output.weight": (d.n_embd, q),
    }
    experts = {
        "ffn_gate_inp.weight": (d.n_experts, d.n_embd),
        "ffn_up_exps.weight": (d.n_experts, d.n_ff, d.n_embd),
        "ffn_down_exps.weight": (d.n_experts, d.n_embd, d.n_ff),
    }
    if letter == "A":
        norms = {
            "attn_q_norm.weight": (d.n_head_dim,),
            "attn_k_norm.weight": (d.n_head_dim,),
            "ffn_norm.weight": (d.n_embd,),
        }
        return {**attention, **norms, **experts, "ffn_gate_exps.weight": (d.n_experts, d.n_ff, d.n_embd)}
    if letter == "E":
        shared = {"ffn_up_shexp.weight": (d.n_ff_shared, d.n_embd), "ffn_down_shexp.weight": (d.n_embd, d.n_ff_shared)}
        return {"attn_norm.weight": (d.n_embd,), **experts, "exp_probs_b.bias": (d.n_experts,), **shared}
    if letter == "*":
        return attention
    inner, states, heads = 4096, 128 * 8, 64
    return {
        "attn_norm.weight": (d.n_embd,),
        "ssm_in.weight": (2 * inner + 2 * states + heads, d.n_embd),
        "ssm_conv1d.weight": (inner + 2 * states, 4),
        "ssm_conv1d.bias": (inner + 2 * states,),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads, 1),
        "ssm_d": (heads, 1),
        "ssm_norm.weight": (8, inner // 8),
        "ssm_out.weight": (d.n_embd, inner),
    }


class _Source:
    """Slices of random blocks; all tensors share the memory."""

    def __init__(self, kind: Type) -> None:
        self._kind = kind
        self._blocks: dict[Type, Bytes] = {}
        self._rng = np.random.default_rng(0)

    def add(self, writer: gguf.GGUFWriter, name: str, *shape: int) -> None:
        if (
            len(shape) == 1
            or "ffn_gate_inp" in name
            or name.rpartition(".")[2] in ("ssm_a", "ssm_d")
            or "conv1d" in name
            or "norm" in name
        ):
            values = (
                np.ones(shape, np.float32)
                if "norm" in name
                else self._rng.standard_normal(shape).astype(np.float32) * 0.02
            )
            writer.add_tensor(name, -np.abs(values) if name.endswith("ssm_a") else values)
            return
        kind = self._kind if shape[-1] % GGML_QUANT_SIZES[self._kind][0] == 0 else Type.Q5_0
        block, size = GGML_QUANT_SIZES[kind]
        n_bytes = math.prod(shape) // block * size
        data = self._random_blocks(kind, n_bytes).reshape(*shape[:-1], shape[-1] // block * size)
        writer.add_tensor(name, data, raw_dtype=kind)

    def _random_blocks(self, kind: Type, n_bytes: int) -> Bytes:
        if len(self._blocks.get(kind, b"")) < n_bytes:
            size = GGML_QUANT_SIZES[kind][1]
            chunk = self._rng.integers(0, 256, (min(n_bytes // size, 1 << 18), size), dtype=np.uint8)
            scales = {Type.Q8_0: [0.0003], Type.Q5_0: [0.002], Type.Q4_K: [0.00013, 0.001]}[kind]
            chunk[:, : 2 * len(scales)] = np.array(scales, np.float16).view(np.uint8)
            repeats = -(-n_bytes // chunk.size)
            self._blocks[kind] = np.tile(chunk.reshape(-1), repeats)
        return self._blocks[kind][:n_bytes]
