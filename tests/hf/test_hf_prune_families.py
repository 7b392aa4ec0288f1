"""Pruned checkpoints in transformers: every family loads without a missing or unexpected key and computes what the
original does with the same experts masked in its routers.

Masking is done here, in PyTorch, without any of reap's code.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.torch_needs import absent
from reap.hf import prune
from reap.scores.plan import PrunePlan

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn about themselves

FAMILIES = (
    "nemotronh",
    "nemotronh_latent",
    "qwen3moe",
    "deepseek_v3",
    "glm4_moe",
    "mixtral",
    "gpt_oss",
    "olmoe",
    "qwen3_next",
    "qwen3_5_moe",
    "granite_moe",
    "lfm2_moe",
    "minimax_m2",
)


@pytest.fixture(scope="session")
def needs() -> None:
    for module in ("torch", "transformers", "safetensors"):
        try:
            __import__(module)
        except ImportError:
            absent(f"{module} is not installed: pip install 'reap-moe[hf]'")


@dataclass(frozen=True)
class Case:
    name: str
    model: Any
    directory: Path
    plan: PrunePlan


@pytest.fixture(scope="session")
def cases(needs: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return functools.cache(lambda name: make_case(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def moe_layers(directory: Path) -> tuple[list[int], int]:
    """Layers with experts, and how many, from the names and shapes in the file, as the safetensors package reads
    them."""
    import re

    from safetensors import safe_open

    layers, n_experts = set(), 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                found = re.search(r"layers\.(\d+)\.\w+\.(gate|router|router\.layer)\.weight$", name)
                if found:
                    layers.add(int(found[1]))
                    n_experts = file.get_slice(name).get_shape()[0]
    return sorted(layers), n_experts


def make_plan(directory: Path, n_groups: int = 1) -> PrunePlan:
    """Half of each layer's experts, others in each."""
    layers, n_experts = moe_layers(directory)
    size = n_experts // n_groups
    kept = {}
    for layer in layers:
        order = np.random.default_rng(layer).permuted(np.arange(n_experts).reshape(n_groups, size), axis=1)
        kept[layer] = tuple(sorted(order[:, : size // 2].ravel().tolist()))
    return PrunePlan({"n_experts": n_experts, "n_groups": n_groups}, "reap", n_experts // 2, kept)


def make_case(name: str, directory: Path) -> Case:
    from helpers import checkpoint_models

    model = checkpoint_models.build(name)
    source = checkpoint_models.save(model, directory / "hf")
    return Case(name, model, source, make_plan(source, 4 if name == "deepseek_v3" else 1))


def load(directory: Path, kind: type[Any], **options: Any) -> Any:
    model, report = kind.from_pretrained(directory, output_loading_info=True, local_files_only=True, **options)
    faults = {what: found for what, found in report.items() if found}
    assert not faults
    model.set_attn_implementation("eager")
    return model.eval()


def compare_with_masked(case: Case, directory: Path) -> None:
    compare_models(case, load(directory, type(case.model)))


def compare_models(case: Case, small: Any) -> None:
    """Logits of the pruned model against those of `case.model` with its routers masked."""
    from helpers import checkpoint_models, oracle, torch_models

    worst, moved, scale = 0.0, 0.0, 0.0
    for tokens in torch_models.samples():
        whole = oracle.logits(case.model, tokens)
        with checkpoint_models.masked_experts(case.model, case.plan.layers):
            expected = oracle.logits(case.model, tokens)
        worst = max(worst, float(np.abs(oracle.logits(small, tokens) - expected).max()))
        moved = max(moved, float(np.abs(whole - expected).max()))
        scale = max(scale, float(expected.std()))
    print(
        f"{case.name}: logits differ by {worst:.1e} from the masked model's, which differ by {moved:.1e} from the whole"
        " one's"
    )
    assert np.isfinite(worst)
    assert worst < 1e-5 * max(scale, 1)
    assert moved > 1e-2  # what was removed mattered


def test_the_list_of_families_is_whole(needs: None) -> None:
    from helpers import checkpoint_models

    assert checkpoint_models.FAMILIES == FAMILIES


def test_pruned_checkpoint_is_the_masked_model(case: Case, tmp_path: Path) -> None:
    report = prune(case.directory, tmp_path / "small", case.plan, verify="full")
    assert report.n_bytes_after == (tmp_path / "small" / "model.safetensors").stat().st_size
    compare_with_masked(case, tmp_path / "small")


def test_pruned_shards_are_the_masked_model(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """Many files with an index; the safetensors package reads each of them."""
    from safetensors.torch import load_file

    from helpers import checkpoint_models

    case = cases("nemotronh")
    source = checkpoint_models.save(case.model, tmp_path / "hf", max_shard_size="60KB")
    assert len(list(source.glob("model-*.safetensors"))) > 5
    report = prune(source, tmp_path / "small", case.plan, verify="full")
    compare_with_masked(case, tmp_path / "small")
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    tensors = {
        name: tensor for path in (tmp_path / "small").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    small = load(tmp_path / "small", type(case.model))
    assert index["metadata"]["total_parameters"] == sum(parameter.numel() for parameter in small.parameters())
    assert report.files == {path: path.stat().st_size for path in (tmp_path / "small").iterdir()}


def test_fused_experts(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """Qwen3.5-MoE as it is published."""
    from helpers import checkpoint_models

    case = cases("qwen3_5_moe")
    source = checkpoint_models.save(case.model, tmp_path / "hf")
    checkpoint_models.fuse_experts(source)
    prune(source, tmp_path / "small", case.plan, verify="full")
    compare_with_masked(case, tmp_path / "small")


def test_experts_in_mxfp4(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """gpt-oss as it is published; transformers decodes both models and both compute in float32."""
    from transformers import Mxfp4Config

    from helpers import checkpoint_models

    case = cases("gpt_oss")
    source = checkpoint_models.save(case.model, tmp_path / "hf")
    checkpoint_models.to_mxfp4(source)
    prune(source, tmp_path / "small", case.plan, verify="full")
    options = {"quantization_config": Mxfp4Config(dequantize=True)}
    whole, small = (load(path, type(case.model), **options).float() for path in (source, tmp_path / "small"))
    compare_models(Case("gpt_oss, MXFP4", whole, source, case.plan), small)


def test_pruning_twice(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """The second output is that of one pruning; reap.json speaks of the first source."""
    case = cases("qwen3moe")
    prune(case.directory, tmp_path / "half", case.plan)
    again = PrunePlan({"n_experts": 4}, "reap", 2, dict.fromkeys(case.plan.layers, (1, 3)))
    prune(tmp_path / "half", tmp_path / "quarter", again)
    at_once = {layer: (kept[1], kept[3]) for layer, kept in case.plan.layers.items()}
    prune(case.directory, tmp_path / "once", PrunePlan({"n_experts": 8}, "reap", 2, at_once))
    for name in ("model.safetensors", "config.json", "reap.json"):
        assert (tmp_path / "quarter" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    kept = json.loads((tmp_path / "quarter" / "reap.json").read_text())["kept"]
    assert kept == {str(layer): list(ids) for layer, ids in at_once.items()}


def test_everything_removed_again_is_the_source(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """With all experts kept, every tensor and config.json are the source's."""
    from safetensors.torch import load_file

    case = cases("gpt_oss")
    plan = PrunePlan({"n_experts": 8}, "reap", 8, dict.fromkeys(case.plan.layers, tuple(range(8))))
    prune(case.directory, tmp_path / "same", plan)
    assert (tmp_path / "same" / "config.json").read_bytes() == (case.directory / "config.json").read_bytes()
    before, after = (load_file(path / "model.safetensors") for path in (case.directory, tmp_path / "same"))
    assert list(before) == list(after)
    assert all(before[name].equal(after[name]) for name in before)


def test_prediction_layers_of_deepseek_lose_as_many(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """Layer 3 of 3 predicts further tokens; transformers passes over it."""
    from safetensors.torch import load_file

    from helpers import checkpoint_models

    case = cases("deepseek_v3")
    source = checkpoint_models.save(case.model, tmp_path / "hf")
    whole = load_file(source / "model.safetensors")
    copied = {
        name.replace("layers.2.", "layers.3."): tensor + 1 for name, tensor in whole.items() if "layers.2." in name
    }
    checkpoint_models.add_tensors(source, copied, num_nextn_predict_layers=1)
    with pytest.raises(Exception, match=r"nothing about the prediction \(MTP\) layers \[3\]"):
        prune(source, tmp_path / "small", case.plan)
    kept = {**case.plan.layers, 3: case.plan.layers[1]}
    prune(source, tmp_path / "small", PrunePlan(case.plan.model, "reap", case.plan.keep, kept), verify="full")
    small = load_file(tmp_path / "small" / "model.safetensors")
    for row, expert in enumerate(kept[3]):
        name = "model.layers.3.mlp.experts.{}.down_proj.weight"
        assert small[name.format(row)].equal(copied[name.format(expert)])
    assert small["model.layers.3.mlp.gate.weight"].equal(copied["model.layers.3.mlp.gate.weight"][list(kept[3])])

    prune(source, tmp_path / "without", case.plan, drop_prediction=True, verify="full")
    assert not [name for name in load_file(tmp_path / "without" / "model.safetensors") if "layers.3." in name]
    assert json.loads((tmp_path / "without" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    compare_with_masked(case, tmp_path / "without")


@pytest.mark.parametrize("family", ["qwen3_next", "nemotronh"])
def test_prediction_blocks_with_a_name_of_their_own(cases: Callable[[str], Case], tmp_path: Path, family: str) -> None:
    """`mtp.layers.N` gets the number after the ordinary layers, as the converter gives it."""
    from safetensors.torch import load_file

    from helpers import checkpoint_models

    case = cases(family)
    source = checkpoint_models.save(case.model, tmp_path / "hf")
    whole = load_file(source / "model.safetensors")
    layer = max(case.plan.layers)
    part = f"layers.{layer}."
    copied = {"mtp.layers.0." + name.split(part)[1]: tensor + 1 for name, tensor in whole.items() if part in name}
    checkpoint_models.add_tensors(source, copied, num_nextn_predict_layers=1)
    n_layers = case.model.config.num_hidden_layers
    kept = {**case.plan.layers, n_layers: (0, 2, 5, 7)}
    prune(source, tmp_path / "small", PrunePlan(case.plan.model, "reap", case.plan.keep, kept), verify="full")
    small = load_file(tmp_path / "small" / "model.safetensors")
    (router,) = (name for name in copied if name.endswith(".gate.weight"))
    assert small[router].equal(copied[router][[0, 2, 5, 7]])
    compare_with_masked(case, tmp_path / "small")
