"""What the engine measured and what the pruner wrote, against PyTorch: tiny models of seven families, converted on the
spot.

Left: transformers, and `oracle.py`, which knows nothing of reap. Right: the GGUF file, `reap.profile`, `reap.prune` and
the logits of the native session. Every comparison prints the largest difference it saw (`pytest -rP`).
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

import reap
from helpers.sums import SUMS
from helpers.torch_needs import needs as needs
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import EngineError

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn about themselves

FAMILIES = (
    "qwen3moe",
    "nemotronh",
    "nemotronh_latent",
    "qwen3moe_wide",
    "deepseek_v3",
    "mixtral",
    "gpt_oss",
    "olmoe",
    "glm4_moe",
)
EXACT: dict[str, Any] = {
    "ctx_size": 128,
    "ubatch_size": 64,
    "type_k": "f32",
    "type_v": "f32",
    "flash_attn": "off",
    "threads": 1,
}


@dataclass(frozen=True)
class Case:
    name: str
    model: Any  # transformers'
    samples: list[list[int]]
    checkpoint: Path
    gguf: Path
    calibration: Path
    sums: dict[int, Any]  # the oracle's, by block index
    kept: dict[int, list[int]]  # the oracle's choice of the best half

    def options(self) -> EngineOptions:
        return EngineOptions(**EXACT)

    def profile(self, gguf: Path) -> reap.Profile:
        return reap.profile(gguf, self.calibration, **EXACT)


@pytest.fixture(scope="session")
def cases(needs: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return functools.cache(lambda name: make_case(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture
def qwen(cases: Callable[[str], Case]) -> Case:
    return cases("qwen3moe")


def make_case(name: str, directory: Path) -> Case:
    from helpers import oracle, torch_models
    from reap.hf import convert_checkpoint

    model = torch_models.build(name)
    samples = torch_models.samples()
    checkpoint = torch_models.save(model, directory / "hf")
    gguf = convert_checkpoint(checkpoint, directory / f"{name}.gguf", outtype="f32", pre=torch_models.PRE)
    calibration = directory / "calibration.jsonl"
    calibration.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in samples))
    sums = oracle.measure(model, samples)
    kept = oracle.best_half(sums, torch_models.FAMILIES[name].n_groups)
    return Case(name, model, samples, checkpoint, gguf, calibration, sums, kept)


def stacked(sums: dict[int, Any], field: str) -> np.ndarray:
    return np.stack([getattr(sums[layer], field) for layer in sorted(sums)])


def relative(measured: np.ndarray, true: np.ndarray) -> float:
    """Largest relative difference; zeros must be zeros."""
    assert ((measured == 0) == (true == 0)).all()
    return float(np.abs(measured / np.where(true == 0, 1, true) - (true != 0)).max())


def compare_profile(name: str, profile: reap.Profile, sums: dict[int, Any]) -> None:
    assert profile.layers.tolist() == sorted(sums)
    np.testing.assert_array_equal(profile.counts, stacked(sums, "counts"))
    assert profile.total_tokens.tolist() == [sums[layer].total_tokens for layer in sorted(sums)]
    differences = {field: relative(getattr(profile, field), stacked(sums, field)) for field in SUMS}
    print(f"{name}: {profile.counts.sum()} routings equal;", ", ".join(f"{k} {v:.1e}" for k, v in differences.items()))
    assert max(differences.values()) < 1e-5
    np.testing.assert_allclose(profile.score("reap"), stacked(sums, "reap"), rtol=1e-5)  # NaN at the same places


def compare_logits(what: str, case: Case, gguf: Path, model: Any) -> np.ndarray:
    """The engine's logits of every sample against PyTorch's; returns PyTorch's of the longest sample."""
    from helpers import oracle

    session = open_session(gguf, case.options())
    worst, scale, longest = 0.0, 0.0, np.empty(0)
    for tokens in case.samples:
        expected = oracle.logits(model, tokens)
        measured = session.logits(np.array(tokens, dtype=np.int32), 0)
        worst = max(worst, float(np.abs(measured - expected).max()))
        scale = max(scale, float(expected.std()))
        longest = expected if len(tokens) == max(map(len, case.samples)) else longest
    print(f"{case.name}, {what}: logits differ by {worst:.1e} where their spread is {scale:.1f}")
    assert worst < 1e-4 * scale
    return longest


def compare_virtual(case: Case, small: Path) -> None:
    """The pruned file's logits against those of the whole file in a session told to keep the same experts."""
    physical, session = open_session(small, case.options()), open_session(case.gguf, case.options())
    whole = session.logits(np.array(case.samples[0], dtype=np.int32), 0)
    session.set_kept(case.kept)
    worst = 0.0
    for tokens in case.samples:
        expected = physical.logits(np.array(tokens, dtype=np.int32), 0)
        found = session.logits(np.array(tokens, dtype=np.int32), 0)
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    print(f"{case.name}, virtually pruned: logits differ by {worst:.1e} of the largest")
    assert worst < 1e-5
    session.set_kept(None)
    assert np.array_equal(session.logits(np.array(case.samples[0], dtype=np.int32), 0), whole)


def test_the_list_of_families_is_whole(needs: None) -> None:
    from helpers import torch_models

    assert tuple(torch_models.FAMILIES) == FAMILIES


def test_the_oracle_agrees_with_transformers(case: Case) -> None:
    for layer, sums in case.sums.items():
        print(
            f"{case.name} layer {layer}: router {sums.router_error:.1e}, block {sums.block_error:.1e}, gap"
            f" {sums.min_gap:.1e}"
        )
        assert sums.router_error < 2e-6
        assert sums.block_error < 2e-6
        # floats differ by 1e-6 between engines: a choice closer than this would be decided by rounding
        assert sums.min_gap > 2e-4
        assert sums.counts.sum() == sums.total_tokens * case.model.config.num_experts_per_tok


def test_the_file_holds_the_models_experts(case: Case) -> None:
    from gguf import GGUFReader
    from helpers import oracle

    tensors = {tensor.name: tensor.data for tensor in GGUFReader(case.gguf).tensors}
    for layer, block in oracle.moe_blocks(case.model).items():
        router = oracle.router_of(block)
        down = block.experts.down_proj.detach()
        down = down.transpose(1, 2) if case.name == "gpt_oss" else down
        np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_down_exps.weight"], down.numpy())
        np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_gate_inp.weight"], router.weight.detach().numpy())
        if hasattr(router, "e_score_correction_bias"):
            np.testing.assert_array_equal(
                tensors[f"blk.{layer}.exp_probs_b.bias"], router.e_score_correction_bias.numpy()
            )


def test_profile_is_the_oracles(case: Case) -> None:
    compare_profile(case.name, case.profile(case.gguf), case.sums)


def test_pruned_file_is_the_sliced_model(case: Case, tmp_path: Path) -> None:
    from helpers import oracle

    plan = reap.plan(case.profile(case.gguf), keep=0.5)
    assert {layer: list(kept) for layer, kept in plan.layers.items()} == case.kept
    reap.prune(case.gguf, tmp_path / "small.gguf", plan)
    sliced = oracle.keep_experts(case.model, case.kept)

    whole_logits = compare_logits("whole", case, case.gguf, case.model)
    sliced_logits = compare_logits("half of the experts removed", case, tmp_path / "small.gguf", sliced)
    assert np.abs(whole_logits - sliced_logits).max() > 1  # what was removed mattered
    compare_virtual(case, tmp_path / "small.gguf")
    compare_profile(f"{case.name}, pruned", case.profile(tmp_path / "small.gguf"), oracle.measure(sliced, case.samples))


def test_order_of_the_kept_experts_matters(qwen: Case) -> None:
    """The oracle's slicing itself: a router left in another order than its experts gives another model."""
    from helpers import oracle

    shuffled = {layer: [kept[-1], *kept[:-1]] for layer, kept in qwen.kept.items()}
    tokens = qwen.samples[1]
    ordered = oracle.logits(oracle.keep_experts(qwen.model, qwen.kept), tokens)
    np.testing.assert_allclose(oracle.logits(oracle.keep_experts(qwen.model, shuffled), tokens), ordered, atol=1e-4)
    broken = oracle.keep_experts(qwen.model, qwen.kept)
    for block in oracle.moe_blocks(broken).values():
        block.gate.weight.data = block.gate.weight.data.roll(1, 0)
    assert np.abs(oracle.logits(broken, tokens) - ordered).max() > 1


def test_text_becomes_the_same_tokens(qwen: Case) -> None:
    from helpers import torch_models

    session = open_session(qwen.gguf, qwen.options())
    tokenizer = torch_models.make_tokenizer()
    texts = (
        *torch_models.TRAINING_TEXT,
        "It's 12345\n\n  they'LL\tsee…\r\n",
        "naïve café — 東京 🚀",
        " leading and trailing ",
    )
    for text in texts:
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert session.tokenize(text.encode(), False, False).tolist() == expected, text


def test_a_tokenizer_the_converter_does_not_know(qwen: Case, tmp_path: Path) -> None:
    from reap.hf import convert_checkpoint

    with pytest.raises(
        EngineError, match=r"pre-tokenizer was not recognized.*\(give the name of its pre-tokenizer with pre="
    ):
        convert_checkpoint(qwen.checkpoint, tmp_path / "out.gguf", outtype="f32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trust", [False, True])
def test_code_in_the_checkpoint_runs_only_when_asked(
    needs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    """NemotronH's part of the converter asks for `trust_remote_code` on its own."""
    from helpers import torch_models
    from reap.hf import convert_checkpoint

    directory = torch_models.save(torch_models.build("nemotronh"), tmp_path / "hf")
    (directory / "own_code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["own_code.OwnTokenizer", "own_code.OwnTokenizer"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    convert_checkpoint(directory, tmp_path / "out.gguf", outtype="f32", pre=torch_models.PRE, trust_remote_code=trust)
    assert (tmp_path / "ran").exists() == trust
