"""Tiny random checkpoints of more families, in the forms in which they are published (needs PyTorch)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    PreTrainedModel,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from helpers import torch_models
from helpers.torch_models import _SPECIAL_IDS, VOCAB

N_EXPERTS = 8
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_QWEN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": N_EXPERTS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    **_HEADS,
    **_LINEAR,
    **_SPECIAL_IDS,
}


def qwen3_next() -> PreTrainedModel:
    """Gated delta-net and attention layers, a shared expert with a gate of its own."""
    return Qwen3NextForCausalLM(Qwen3NextConfig(intermediate_size=96, **_QWEN))


def qwen3_5_moe() -> PreTrainedModel:
    """The language model is nested in a model of text and pictures."""
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    return Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=_QWEN, vision_config=vision))


def granite_moe() -> PreTrainedModel:
    """Experts stacked in matrices that do not say so in their names."""
    config = GraniteMoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=N_EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        **_SPECIAL_IDS,
    )
    return GraniteMoeForCausalLM(config)


def lfm2_moe() -> PreTrainedModel:
    """Short convolutions, a dense first layer, a bias in the selection."""
    config = Lfm2MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_dense_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=N_EXPERTS,
        num_experts_per_tok=2,
        layer_types=["conv", "full_attention", "conv"],
        max_position_embeddings=256,
        **_SPECIAL_IDS,
    )
    return Lfm2MoeForCausalLM(config)


def minimax_m2() -> PreTrainedModel:
    config = MiniMaxM2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_local_experts=N_EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        **_HEADS,
        **_SPECIAL_IDS,
    )
    return MiniMaxM2ForCausalLM(config)


_OWN: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_next": qwen3_next,
    "qwen3_5_moe": qwen3_5_moe,
    "granite_moe": granite_moe,
    "lfm2_moe": lfm2_moe,
    "minimax_m2": minimax_m2,
}
FAMILIES = (
    "nemotronh",
    "nemotronh_latent",
    "qwen3moe",
    "deepseek_v3",
    "glm4_moe",
    "mixtral",
    "gpt_oss",
    "olmoe",
    *_OWN,
)


def build(name: str) -> PreTrainedModel:
    """The model of that name in float32, in evaluation mode, with weights that show a mistake."""
    if name not in _OWN:
        return torch_models.build(name)
    torch.manual_seed(5)
    model = _OWN[name]()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if re.search(r"(e_score_correction_bias|expert_bias)$", key):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif _is_router(key, tensor) or ".experts." in key or "linear.weight" in key:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return model.eval()


def save(model: PreTrainedModel, directory: Path, max_shard_size: str = "5GB") -> Path:
    """A checkpoint with a tokenizer, as transformers writes it: an expert is a tensor of its own where it is so when
    published."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    torch_models.make_tokenizer().save_pretrained(directory)
    return directory


def fuse_experts(directory: Path) -> None:
    """Rewrite a checkpoint of one file in the form in which Qwen3.5-MoE is published: gate and up in one tensor for all
    experts."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for prefix in sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name}):
        experts = [
            {kind: tensors.pop(f"{prefix}.experts.{i}.{kind}_proj.weight") for kind in ("gate", "up", "down")}
            for i in range(N_EXPERTS)
        ]
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in experts])
        tensors[f"{prefix}.experts.down_proj"] = torch.stack([e["down"] for e in experts])
    save_file(tensors, path, metadata={"format": "pt"})


def to_mxfp4(directory: Path) -> None:
    """Rewrite gpt-oss's checkpoint in the form in which it is published: experts in blocks of 32 four-bit numbers with
    a scale (random)."""
    path = directory / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in load_file(path).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            n_experts, n_in, n_out = tensor.shape
            shape = (n_experts, n_out, n_in // 32)
            tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    document = json.loads((directory / "config.json").read_text())
    whole = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    document |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": whole}}
    (directory / "config.json").write_text(json.dumps(document, indent=2))


def to_fp8(directory: Path, block: int = 16) -> dict[str, torch.Tensor]:
    """Rewrite a checkpoint in FP8 with a scale for each block of `block` by `block` numbers, as DeepSeek-V3 is
    published; what the numbers stand for."""

    def quantise(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        n_rows, n_columns = tensor.shape
        blocks = tensor.float().reshape(n_rows // block, block, n_columns // block, block)
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        packed = (blocks / scales).to(torch.float8_e4m3fn)
        stored = {name: packed.reshape(tensor.shape), f"{name}_scale_inv": scales[:, 0, :, 0].contiguous()}
        return stored, (packed.float() * scales).reshape(tensor.shape)

    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [block, block]}
    return _quantise(directory, quantise, said)


def to_int4(directory: Path, group: int = 16) -> dict[str, torch.Tensor]:
    """Rewrite a checkpoint in four bits with a scale for each group, as compressed-tensors packs them; what the numbers
    stand for."""

    def quantise(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        n_rows, n_columns = tensor.shape
        groups = tensor.float().reshape(n_rows, n_columns // group, group)
        scales = groups.abs().amax(2, keepdim=True) / 7
        numbers = (groups / scales).round().clamp(-8, 7)
        nibbles = (numbers + 8).to(torch.int64).reshape(n_rows, n_columns // 8, 8)
        words = (nibbles << (4 * torch.arange(8))).sum(2)
        words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        shape = torch.tensor([n_rows, n_columns])
        stored = {f"{name}_packed": words, f"{name}_scale": scales[..., 0].contiguous(), f"{name}_shape": shape}
        return stored, (numbers * scales).reshape(tensor.shape)

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    said = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return _quantise(directory, quantise, said)


def _quantise(
    directory: Path,
    quantise: Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]],
    said: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    path = directory / "model.safetensors"
    stored, meant = {}, {}
    for name, tensor in load_file(path).items():
        if tensor.dim() == 2 and "_proj." in name:
            packed, meant[name] = quantise(name, tensor)
            stored |= packed
        else:
            stored[name] = meant[name] = tensor
    save_file(stored, path, metadata={"format": "pt"})
    document = json.loads((directory / "config.json").read_text())
    document |= {"quantization_config": dict(said), "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(document, indent=2))
    return meant


def add_tensors(directory: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> None:
    """Add tensors to a checkpoint of one file, and keys to its config.json."""
    path = directory / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**document, **config}, indent=2))


def _is_router(name: str, tensor: torch.Tensor) -> bool:
    return (
        tensor.dim() == 2
        and re.search(r"\.(mlp|mixer|block_sparse_moe|feed_forward)\.(gate|router|router\.layer)\.weight$", name)
        is not None
    )


@contextmanager
def masked_experts(model: PreTrainedModel, kept: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """While the block runs, the model's routers never choose an expert that is not in `kept` (layer -> ids).

    Their logits are minus infinity as the router's matrix is applied, and so is a bias that is added to the score
    afterwards.
    """
    dropped = {}
    biases = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) not in kept:
            continue
        gone = (
            [expert for expert in range(tensor.shape[0]) if expert not in kept[int(layer[1])]] if tensor.dim() else []
        )
        if _is_router(name, tensor):
            dropped[id(tensor)] = gone
        elif re.search(r"(e_score_correction_bias|expert_bias)$", name):
            biases.append((tensor, tensor.clone(), gone))
    assert len(dropped) == len(kept)
    plain = torch.nn.functional.linear

    def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result = plain(states, weight, bias)
        if id(weight) in dropped:
            result[..., dropped[id(weight)]] = -torch.inf
        return result

    torch.nn.functional.linear = linear
    try:
        with torch.no_grad():
            for tensor, _, gone in biases:
                tensor[gone] = -torch.inf
        yield
    finally:
        torch.nn.functional.linear = plain
        with torch.no_grad():
            for tensor, before, _ in biases:
                tensor.copy_(before)
