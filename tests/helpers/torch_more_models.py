"""Tiny random models of Mixture-of-Experts families that llama.cpp's own test program cannot write (needs PyTorch).

Drawn like those of `torch_models.py`, with what these families add: a router with a norm and a scale of its own and a
scale for each expert's output (Gemma-4), experts whose two halves are clamped (Step-3.5), state spaces of the first
Mamba (Jamba).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    GraniteMoeSWAConfig,
    GraniteMoeSWAForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextPreTrainedModel,
)

from helpers import torch_models
from helpers.torch_models import NEVER_SELECTED, VOCAB

_SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1}
_GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0}


def gemma4() -> PreTrainedModel:
    """A dense feed-forward beside the experts, keys that are also the values on layers without a window."""
    config = Gemma4TextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        head_dim=32,
        global_head_dim=64,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        final_logit_softcapping=30.0,
        max_position_embeddings=256,
        **{**_ATTENTION, "num_key_value_heads": 2, **_SPECIAL_IDS},
    )
    return Gemma4ForCausalLM(config)


def granite_swa() -> PreTrainedModel:
    """Sliding windows with sinks, a shared expert, a gate that is the softmax of the selected logits."""
    config = GraniteMoeSWAConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=32,
        shared_intermediate_size=48,
        num_hidden_layers=2,
        num_local_experts=8,
        num_experts_per_tok=3,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=16,
        max_position_embeddings=256,
        **_ATTENTION,
        **_SPECIAL_IDS,
        **_GRANITE,
    )
    return GraniteMoeSWAForCausalLM(config)


def granite_hybrid() -> PreTrainedModel:
    """A state-space layer and an attention layer without positions, each with experts and a shared expert."""
    config = GraniteMoeHybridConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=32,
        shared_intermediate_size=48,
        num_hidden_layers=2,
        num_local_experts=8,
        num_experts_per_tok=3,
        layer_types=["linear_attention", "full_attention"],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_chunk_size=16,
        max_position_embeddings=256,
        **_ATTENTION,
        **_SPECIAL_IDS,
        **_GRANITE,
    )
    return GraniteMoeHybridForCausalLM(config)


def jamba() -> PreTrainedModel:
    """State-space and attention layers, experts on every second one; a softmax that is not renormalised."""
    config = JambaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=4,
        num_experts=8,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=3,
        attn_layer_offset=1,
        mamba_d_state=16,
        max_position_embeddings=256,
        **_ATTENTION,
        **_SPECIAL_IDS,
    )
    return JambaForCausalLM(config)


_STEP_TEXT: dict[str, Any] = {  # as published configurations are written, which the converter reads
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "share_expert_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_attention_groups": 1,
    "head_dim": 32,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 1},
    "sliding_window": 16,
    "rope_theta": [50000.0, 10000.0, 50000.0],
    "partial_rotary_factors": [0.5, 1.0, 0.5],
    "moe_layers_enum": "1,2",
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_router_scaling_factor": 2.5,
    "norm_expert_weight": True,
    "swiglu_limits": [0.0, 0.0, 0.75],
    "swiglu_limits_shared": [0.0, 0.75, 0.0],
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


def step35() -> PreTrainedModel:
    """A sigmoid router with a correction bias, a scaled gate, a shared expert, clamped experts, a dense first layer."""
    vision = {"width": 16, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14, "mlp_ratio": 2.0}
    config = Step3p7Config(text_config={**_STEP_TEXT, **_SPECIAL_IDS}, vision_config=vision)
    return Step3p7ForConditionalGeneration(config)


class DeepseekOcrText(DeepseekOcr2TextPreTrainedModel):
    """transformers has an output head only for text and pictures together; this is one for the text half."""

    def __init__(self, config: DeepseekOcr2TextConfig) -> None:
        super().__init__(config)
        self.model = DeepseekOcr2TextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids=input_ids).last_hidden_state))


def deepseek_ocr() -> PreTrainedModel:
    """A scaled softmax that is not renormalised, two shared experts, a dense first layer."""
    config = DeepseekOcr2TextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        n_shared_experts=2,
        n_routed_experts=8,
        num_experts_per_tok=3,
        routed_scaling_factor=1.5,
        mlp_layer_types=["dense", "sparse", "sparse"],
        max_position_embeddings=256,
        **_SPECIAL_IDS,
    )
    return DeepseekOcrText(config)


@dataclass(frozen=True)
class Family:
    """How to build one model: the function, a seed whose routers leave no near-ties on `samples`, and what else it
    needs."""

    build: Callable[[], PreTrainedModel]
    seed: int
    byte_fallback: bool = False  # the kind of tokenizer the converter expects
    steep: float = (
        1.0  # the first halves of the experts are this many times larger, their output matrices as much smaller
    )


FAMILIES: dict[str, Family] = {
    # The CPU backend takes GELU between -10 and 10 from a table in half precision (ggml-cpu/vec.h, ggml_vec_geglu_f32),
    # an error of 5e-4. Outside it is exact, and with steep experts next to nothing is inside.
    "gemma4": Family(gemma4, 1, byte_fallback=True, steep=1e4),
    "step35": Family(step35, 3),
    "granite_swa": Family(granite_swa, 2),
    "granite_hybrid": Family(granite_hybrid, 1),
    "jamba": Family(jamba, 1, byte_fallback=True),
    "deepseek_ocr": Family(deepseek_ocr, 1),
    "gemma4_gelu": Family(gemma4, 1, byte_fallback=True),
}


def build(name: str, seed: int | None = None) -> PreTrainedModel:
    """The model of that name in float32, in evaluation mode, on plain (eager) attention and experts."""
    family = FAMILIES[name]
    model = family.build()
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    model.config.get_text_config()._experts_implementation = "eager"
    randomise(model, family.seed if seed is None else seed)
    make_steep(model, family.steep)
    return model.eval()


def save(name: str, model: PreTrainedModel, directory: Path) -> Path:
    """Write the model and a tokenizer as a Hugging Face checkpoint of the kind the converter reads."""
    model.save_pretrained(directory, state_dict=_published_names(model) if name == "deepseek_ocr" else None)
    tokenizer = byte_fallback_tokenizer() if FAMILIES[name].byte_fallback else torch_models.make_tokenizer()
    tokenizer.save_pretrained(directory)
    if name in _PUBLISHED:
        _PUBLISHED[name](directory / "config.json")
    return directory


def _publish_step35(path: Path) -> None:
    """transformers writes the settings under names of its own; the converter knows the published ones.

    The model's type stays out: with it, the converter has transformers read the file, and gets the other names again.
    """
    path.write_text(json.dumps({"architectures": ["Step3p5ForCausalLM"], **_STEP_TEXT, **_SPECIAL_IDS}))


def _publish_granite_hybrid(path: Path) -> None:
    """transformers reads the published names of the kinds of layers, but writes others, which the converter does not
    know."""
    kinds = {"linear_attention": "mamba", "full_attention": "attention"}
    config = json.loads(path.read_text())
    config["layer_types"] = [kinds[kind] for kind in config["layer_types"]]
    path.write_text(json.dumps(config))


def _published_names(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights as published, with a matrix for each expert."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor):
                tensors[f"{prefix}{expert}.gate_proj.weight"] = gate.clone()
                tensors[f"{prefix}{expert}.up_proj.weight"] = up.clone()
        elif name.endswith("experts.down_proj"):
            tensors.update(
                {
                    f"{name.removesuffix('down_proj')}{expert}.down_proj.weight": m.clone()
                    for expert, m in enumerate(tensor)
                }
            )
        else:
            tensors[name] = tensor
    return tensors


def _publish_deepseek_ocr(path: Path) -> None:
    config = json.loads(path.read_text())
    del config["model_type"], config["head_dim"], config["mlp_layer_types"]
    config |= {
        "architectures": ["DeepseekOCRForCausalLM"],
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "qk_rope_head_dim": 0,
    }
    path.write_text(json.dumps(config))


_PUBLISHED = {
    "step35": _publish_step35,
    "granite_hybrid": _publish_granite_hybrid,
    "deepseek_ocr": _publish_deepseek_ocr,
}


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of `VOCAB` tokens in the manner of SentencePiece: 256 tokens for bytes, a few letters, three
    merges."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRST.,:"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("e", "r")]
    words = [*torch_models.SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(a + b for a, b in merges)]
    words += [f"<unused{i}>" for i in range(VOCAB - len(words))]
    vocabulary = {word: index for index, word in enumerate(words)}
    assert len(vocabulary) == VOCAB
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<|endoftext|>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(torch_models.SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter, correction bias and layer scale anew; the same numbers for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    first_moe_layer = min(torch_models._layer(name) for name, _ in _weights(model) if ".experts." in name)
    with torch.no_grad():
        for name, tensor in _weights(model):
            tensor.copy_(_draw(model, name, tensor, generator))
            if torch_models._layer(name) == first_moe_layer and name.endswith("e_score_correction_bias"):
                tensor[2] = NEVER_SELECTED


def make_steep(model: PreTrainedModel, factor: float) -> None:
    """Larger numbers into the activation and smaller ones out of it, in every feed-forward; what leaves it stays of the
    same size."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                tensor[:, : tensor.shape[1] // 2] *= factor
            elif name.endswith("mlp.gate_proj.weight"):
                tensor *= factor
            elif name.endswith(("experts.down_proj", "mlp.down_proj.weight")):
                tensor /= factor


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    buffers = re.compile(r"(e_score_correction_bias|layer_scalar)$")
    yield from ((name, buffer) for name, buffer in model.named_buffers() if buffers.search(name))


def _draw(model: PreTrainedModel, name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log" and tensor.dim() == 2:  # [n_inner, n_state]
        return torch.log(1 + torch.arange(tensor.shape[1]) + 0.2 * torch.rand(tensor.shape, generator=generator))
    if name.endswith("dt_proj.bias"):
        return torch.randn(tensor.shape, generator=generator) - 2
    if leaf in ("scale", "per_expert_scale", "layer_scalar"):
        return 0.5 + torch.rand(tensor.shape, generator=generator)
    if name.endswith("router.proj.weight"):  # what enters has a length of one, not one for each number
        return 2 * torch.randn(tensor.shape, generator=generator)
    if "norm" in name and model.config.model_type == "step3p7":  # which adds the one itself
        return 0.2 * torch.randn(tensor.shape, generator=generator)
    return torch_models._draw(name, tensor, generator, input_axis=2)
