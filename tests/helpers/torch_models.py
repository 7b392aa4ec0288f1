"""Tiny random models of the Mixture-of-Experts families, made with transformers for the tests (needs PyTorch).

Weights are drawn so that a mistake shows: routers are decisive, experts differ in size by a factor of ten, norms,
biases and correction biases are not what an initialiser would leave (ones and zeros hide errors), and where a family
has a bias in its selection one expert of its first MoE layer is never selected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny: threads cost more than they compute, and sums keep one order

VOCAB = 320
PRE = "qwen2"  # the name llama.cpp gives to the regular expression below
# letters with one leading mark, single digits, punctuation with line ends, white space: the published pattern of
# Qwen2's tokenizer
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<s>", "</s>", "[gMASK]", "<|user|>", "<|observation|>")
TRAINING_TEXT = (
    "The router sends each token to a few experts, and the gate says how much of each answer is used.",
    "An expert that is never asked has no score; an expert whose answers are small has a small one.",
    "def keep(experts, n):\n    return sorted(experts, key=lambda e: -e.score)[:n]\n",
    "Die Modelle werden kleiner, die Antworten bleiben hoffentlich dieselben. 1234567890",
    "¿Qué expertos se quedan? 誰が残りますか。 Les meilleurs, n'est-ce pas?",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
NEVER_SELECTED = -50.0  # added to the selection score of one expert

_SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB` tokens, the first six of them special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def _qwen3_moe(hidden: int, width: int, **changes: Any) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * width,
        moe_intermediate_size=width,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=8,
        norm_topk_prob=True,
        max_position_embeddings=256,
        **{"num_hidden_layers": 2, "num_experts_per_tok": 2, "tie_word_embeddings": True, **_SPECIAL_IDS, **changes},
    )
    return Qwen3MoeForCausalLM(config)


def qwen3moe() -> PreTrainedModel:
    return _qwen3_moe(64, 32)


def qwen3moe_wide() -> PreTrainedModel:
    """Rows of 256 numbers, so that K-quants fit."""
    return _qwen3_moe(256, 256, tie_word_embeddings=False)


def _nemotron_h(layers: str, **changes: Any) -> NemotronHForCausalLM:
    config = NemotronHConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        layers_block_type=[_NEMOTRON_BLOCKS[letter] for letter in layers],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=16,
        # transformers clamps the step of the state from below, llama.cpp does not: keep the clamp out of reach
        time_step_min=1e-6,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        intermediate_size=64,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        max_position_embeddings=256,
        **{"tie_word_embeddings": False, **_SPECIAL_IDS, **changes},
    )
    return NemotronHForCausalLM(config)


_NEMOTRON_BLOCKS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def nemotronh() -> PreTrainedModel:
    return _nemotron_h("ME*E")


def nemotronh_latent() -> PreTrainedModel:
    """Experts that work in a space of their own, smaller than the model's."""
    return _nemotron_h("ME*ME", moe_latent_size=32)


def deepseek_v3() -> PreTrainedModel:
    """Two of four groups of experts a token, shared experts, a dense first layer."""
    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=3,
        scoring_func="sigmoid",  # as published configurations say, which the class itself has no field for
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        num_mtp_layers=0,
        max_position_embeddings=256,
        **_SPECIAL_IDS,
    )
    return DeepseekV3ForCausalLM(config)


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        **_SPECIAL_IDS,
    )
    return MixtralForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    """Biases in the router and the experts, a gate that is the softmax of the selected logits, sliding windows."""
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=256,
        **_SPECIAL_IDS,
    )
    return GptOssForCausalLM(config)


def olmoe() -> PreTrainedModel:
    """A softmax over all experts that is not renormalised over the selected ones."""
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        max_position_embeddings=256,
        **_SPECIAL_IDS,
    )
    return OlmoeForCausalLM(config)


def glm4_moe() -> PreTrainedModel:
    """A sigmoid router with a correction bias, a shared expert, a dense first layer, rotary positions on half of each
    head."""
    config = Glm4MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        norm_topk_prob=True,
        use_qk_norm=True,
        num_mtp_layers=0,
        max_position_embeddings=256,
        **_SPECIAL_IDS,
    )
    return Glm4MoeForCausalLM(config)


@dataclass(frozen=True)
class Family:
    """How to build one model: the function, and a seed whose routers leave no near-ties on `samples`."""

    build: Callable[[], PreTrainedModel]
    seed: int
    n_groups: int = 1


FAMILIES: dict[str, Family] = {
    "qwen3moe": Family(qwen3moe, 1),
    "nemotronh": Family(nemotronh, 7),
    "nemotronh_latent": Family(nemotronh_latent, 11),
    "qwen3moe_wide": Family(qwen3moe_wide, 3),
    "deepseek_v3": Family(deepseek_v3, 12, n_groups=4),
    "mixtral": Family(mixtral, 2),
    "gpt_oss": Family(gpt_oss, 1),
    "olmoe": Family(olmoe, 4),
    "glm4_moe": Family(glm4_moe, 4),
}


def build(name: str, seed: int | None = None) -> PreTrainedModel:
    """The model of that name in float32, in evaluation mode, on plain (eager) attention and experts."""
    family = FAMILIES[name]
    model = family.build()
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    randomise(model, family.seed if seed is None else seed)
    return model.eval()


def samples(seed: int = 7) -> list[list[int]]:
    """Token lists of several lengths, no special tokens among them; one is longer than a batch of 64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(len(SPECIAL), VOCAB, (length,), generator=generator).tolist() for length in (5, 48, 17, 90, 1, 32)
    ]


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Write the model and the tokenizer as a Hugging Face checkpoint."""
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter and correction bias anew; the same numbers for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    # gpt-oss keeps its experts' matrices as [expert, input, output], everybody else as [expert, output, input]
    input_axis = 1 if model.config.model_type == "gpt_oss" else 2
    first_moe_layer = min(_layer(name) for name, _ in _weights(model) if ".experts." in name)
    with torch.no_grad():
        for name, tensor in _weights(model):
            tensor.copy_(_draw(name, tensor, generator, input_axis))
            if _layer(name) == first_moe_layer and name.endswith(("e_score_correction_bias", "router.bias")):
                tensor[2] = NEVER_SELECTED


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))


def _layer(name: str) -> int:
    """The layer's index in a parameter's name; -1 outside the layers."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


def _draw(name: str, tensor: torch.Tensor, generator: torch.Generator, input_axis: int) -> torch.Tensor:
    """Random numbers for one tensor, of a size that keeps activations near one."""
    normal = torch.randn(tensor.shape, generator=generator)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        return torch.log(1 + torch.arange(tensor.numel()) % 8 + 0.2 * normal.abs())
    if leaf == "dt_bias":
        return normal - 2
    if "norm" in name or leaf == "D":
        return 1 + 0.2 * normal
    if leaf.endswith("bias"):
        return 0.3 * normal
    if "embed" in name or leaf == "sinks":
        return 0.5 * normal
    if name.endswith((".gate.weight", ".router.weight")):
        return normal * 2 / math.sqrt(tensor.shape[-1])
    n_inputs = tensor.shape[input_axis] if ".experts." in name else tensor.shape[-1]
    return normal * _factors(name, tensor, generator) / math.sqrt(n_inputs)


def _factors(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The size of a matrix; the largest expert's output matrix is ten times the smallest's."""
    if name.endswith("experts.down_proj"):
        order = torch.randperm(tensor.shape[0], generator=generator)
        return torch.logspace(-0.5, 0.5, tensor.shape[0])[order].reshape(-1, 1, 1)
    return torch.tensor(2.0 if name.startswith("lm_head") else 1.0)
