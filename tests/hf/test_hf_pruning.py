"""Experts removed from models in memory: the logits of the whole model with those experts masked, wherever the weights
are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_hf_profile import FAMILIES, lines, needs, samples  # noqa: F401  (a fixture)

import reap
from reap import hf
from reap.errors import MismatchError, UnsupportedModelError, UsageError
from reap.scores.plan import PrunePlan

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn about themselves


def build(name: str) -> Any:
    from helpers import checkpoint_models

    return checkpoint_models.build(name)


def choose(layers: Sequence[int], n_experts: int, n_groups: int = 1) -> dict[int, tuple[int, ...]]:
    """Half of each group, others in each layer."""
    size = n_experts // n_groups
    kept = {}
    for layer in layers:
        order = np.random.default_rng(layer).permuted(np.arange(n_experts).reshape(n_groups, size), axis=1)
        kept[layer] = tuple(sorted(order[:, : size // 2].ravel().tolist()))
    return kept


@cache
def masked_logits(name: str) -> tuple[dict[int, tuple[int, ...]], list[Any], list[Any]]:
    """What is kept, the logits of the whole model, and those of the model with the rest masked."""
    from helpers import checkpoint_models, oracle

    model = build(name)
    found = hf.find_moe_layers(model)
    first = next(iter(found.values()))
    kept = choose([layer.index for layer in found.values()], first.n_experts, first.n_group)
    whole = [oracle.logits(model, tokens) for tokens in samples()]
    with checkpoint_models.masked_experts(model, kept):
        return kept, whole, [oracle.logits(model, tokens) for tokens in samples()]


def compare(name: str, model: Any) -> None:
    from helpers import oracle

    _, whole, expected = masked_logits(name)
    measured = [oracle.logits(model, tokens) for tokens in samples()]
    worst = max(float(np.abs(a - b).max()) for a, b in zip(measured, expected, strict=True))
    moved = max(float(np.abs(a - b).max()) for a, b in zip(whole, expected, strict=True))
    print(
        f"{name}: logits differ by {worst:.1e} from the masked model's, which differ by {moved:.1e} from the whole"
        " one's"
    )
    assert worst < 1e-5 * max(float(np.std(expected[1])), 1)
    assert moved > 1e-2  # what was removed mattered


def counts_in(config: Any) -> set[int]:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return {getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)}


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_model_is_the_masked_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    kept = masked_logits(name)[0]
    n_experts = next(iter(hf.find_moe_layers(model).values())).n_experts
    plan = PrunePlan({"n_experts": n_experts}, "reap", n_experts // 2, kept)
    assert hf.prune_model(model, plan) is model
    compare(name, model)
    assert counts_in(model.config.get_text_config()) == {n_experts // 2}

    # what is saved is a checkpoint of that size
    model.save_pretrained(tmp_path / "hf")
    loaded, report = type(model).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not {what: found for what, found in report.items() if found}
    loaded.set_attn_implementation("eager")
    compare(name, loaded.eval())


def test_a_correction_bias_with_an_axis_in_front() -> None:
    """Ernie's [1, n_experts]."""
    import torch
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    torch.manual_seed(3)
    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
    }
    config = Ernie4_5_MoeConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, moe_num_experts=8, moe_k=2, moe_layer_start_index=0
    )
    model = Ernie4_5_MoeForCausalLM(config).eval()
    blocks = [layer.block for layer in hf.find_moe_layers(model).values()]
    for block in blocks:
        block.gate.moe_statics.e_score_correction_bias.data.normal_()
    before = blocks[0].gate.moe_statics.e_score_correction_bias.clone()
    hf.prune_model(model, {layer.index: [7, 5, 2] for layer in hf.find_moe_layers(model).values()})
    assert torch.equal(blocks[0].gate.moe_statics.e_score_correction_bias, before[:, [7, 5, 2]])
    assert hf.profile(model, lines(), ctx_size=128).n_experts == model.config.moe_num_experts == 3


def test_profile_plan_prune() -> None:
    """The whole road in memory; the pruned model can be profiled."""
    model = build("deepseek_v3")
    profile = hf.profile(model, lines(), ctx_size=128)
    plan = reap.plan(profile, keep=0.5)
    hf.prune_model(model, plan)
    again = hf.profile(model, lines(), ctx_size=128)
    assert (again.n_experts, again.model["n_groups"]) == (8, 4)
    assert [layer.n_experts for layer in hf.find_moe_layers(model).values()] == [8, 8]


def test_one_layer() -> None:
    import torch

    model = build("mixtral")
    before = model.model.layers[0].mlp.experts.down_proj.clone()
    with torch.no_grad():
        expected = model(torch.tensor([samples()[1]])).logits
    # all of them in another order: the same model
    assert hf.prune_moe_layer(model, "model.layers.0.mlp", torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])) == [
        7,
        6,
        5,
        4,
        3,
        2,
        1,
        0,
    ]
    with torch.no_grad():
        assert float((model(torch.tensor([samples()[1]])).logits - expected).abs().max()) < 1e-4
    assert hf.prune_moe_layer(model, "model.layers.0.mlp", [5, 2, 4]) == [5, 2, 4]
    block = model.model.layers[0].mlp
    assert torch.equal(block.experts.down_proj, before[[2, 5, 3]])
    assert (block.experts.num_experts, block.gate.num_experts, len(block.gate.weight)) == (3, 3, 3)
    assert len(model.model.layers[1].mlp.gate.weight) == 8
    with pytest.raises(UnsupportedModelError, match=r"the layers have 3 \(model\.layers\.0\.mlp\) and 8 .* experts"):
        hf.profile(model, lines(), ctx_size=128)
    hf.prune_moe_layer(model, "model.layers.1.mlp", [0, 1, 2])  # layer by layer
    assert hf.profile(model, lines(), ctx_size=128).n_experts == 3


def test_a_list_of_modules_with_a_linear_router() -> None:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 6)
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])
            self.num_experts, self.top_k = 6, 2

    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"mlp": Block()}) for _ in range(3)])
    found = hf.find_moe_layers(model)
    assert list(found) == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
    assert [(layer.index, layer.n_experts, layer.n_experts_used, layer.is_list) for layer in found.values()][2] == (
        2,
        6,
        2,
        True,
    )
    block = model.layers[1]["mlp"]
    experts, weight, bias = list(block.experts), block.gate.weight.clone(), block.gate.bias.clone()
    hf.prune_moe_layer(model, "layers.1.mlp", [1, 4, 5])
    assert [a is b for a, b in zip(block.experts, (experts[1], experts[4], experts[5]), strict=True)] == [True] * 3
    assert torch.equal(block.gate.weight, weight[[1, 4, 5]])
    assert torch.equal(block.gate.bias, bias[[1, 4, 5]])
    assert (block.gate.out_features, block.num_experts) == (3, 3)


@pytest.mark.parametrize("name", ["nemotronh", "minimax_m2", "gpt_oss"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_under_offloading(name: str, where: str, tmp_path: Path) -> None:
    """Weights that accelerate keeps on the host, or on disk, and fetches for each call."""
    import accelerate

    from helpers import checkpoint_models

    model = build(name)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        checkpoint_models.save(model, tmp_path / "hf")
        config = model.config.__class__.from_pretrained(tmp_path / "hf")
        tops = {path for path, _ in model.named_children()} | {
            f"model.{path}" for path, _ in model.model.named_children()
        } - {"model"}
        device_map = {path: "disk" if path == "model.layers" else "cpu" for path in sorted(tops - {"model"})}
        model = type(model).from_pretrained(
            tmp_path / "hf",
            config=config,
            device_map=device_map,
            offload_folder=tmp_path / "offload",
            attn_implementation="eager",
        )
    layers = hf.find_moe_layers(model)
    assert all(layer.experts.down_proj.device.type == "meta" for layer in layers.values())
    profile = hf.profile(model, lines(), ctx_size=128)
    kept = masked_logits(name)[0]
    hf.prune_model(model, kept)
    assert all(layer.experts.down_proj.device.type == "meta" for layer in hf.find_moe_layers(model).values())
    compare(name, model)
    np.testing.assert_array_equal(profile.counts, hf.profile(build(name), lines(), ctx_size=128).counts)


def test_a_model_without_weights_is_refused() -> None:
    import accelerate

    from helpers import checkpoint_models

    with accelerate.init_empty_weights():
        model = checkpoint_models._OWN["minimax_m2"]()
    with pytest.raises(UnsupportedModelError, match="has no values: its weights were not loaded"):
        hf.prune_moe_layer(model, "model.layers.0.mlp", [0, 1, 2])


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        ({1: range(8)}, MismatchError, r"the plan has the layers \[1\], but the MoE layers .* are \[1, 2\]"),
        ({1: range(8), 2: range(12)}, UsageError, "more experts in some layers than in others"),
        ({1: [0, 1, 4, 5, 8, 9, 12, 12], 2: range(8)}, UsageError, "should be different ones"),
        ({1: [0, 1, 4, 5, 8, 9, 12, 16], 2: range(8)}, UsageError, "there is no expert 16, the layer has 0 to 15"),
        ({1: [0, 4], 2: [0, 4]}, UsageError, "keep 2 is fewer than the 3 experts"),
        (
            {1: [0, 4, 8, 12], 2: [0, 4, 8, 12]},
            UsageError,
            "the 2 groups that a token may use then hold 2, fewer than the 3",
        ),
        ({1: range(8), 2: range(8)}, UsageError, "4 groups, which have to keep equally many"),
        ({1: ["a"], 2: range(8)}, UsageError, "'a' is not the number of an expert"),
        (
            PrunePlan({"n_experts": 8}, "reap", 4, {1: (0,), 2: (0,)}),
            MismatchError,
            "a model with 8 experts a layer, but this .* has 16",
        ),
        (7, UsageError, "plan should be a PrunePlan"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(kept: Any, error: type[Exception], message: str) -> None:
    import torch

    model = build("deepseek_v3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        hf.prune_model(model, kept)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert model.config.n_routed_experts == 16


def test_a_name_that_is_no_block() -> None:
    with pytest.raises(
        UsageError,
        match=r"'model\.layers\.0' is not a block with experts of this MixtralForCausalLM; it has model\.layers\.0",
    ):
        hf.prune_moe_layer(build("mixtral"), "model.layers.0", [0, 1])
