"""Families that llama.cpp's own test program cannot write, made with transformers and converted: what
`test_torch_oracle.py` asks.

Left: transformers, and `torch_more_oracle.py`, which knows nothing of reap. Right: the GGUF file, `reap.profile`,
`reap.prune` and the logits of the native session. Every comparison prints the largest difference it saw (`pytest -rP`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_torch_oracle as first

import reap
from helpers.sums import SUMS

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn about themselves

FAMILIES = {  # the name of the test's model: llama.cpp's name of the architecture, blocks with experts, experts a token
    "gemma4": ("gemma4", [0, 1], 2),
    "step35": ("step35", [1, 2], 3),
    "granite_swa": ("granite_swa", [0, 1], 3),
    "granite_hybrid": ("granitehybrid", [0, 1], 3),
    "jamba": ("jamba", [1, 3], 2),
    "deepseek_ocr": ("deepseek2-ocr", [1, 2], 3),
}
needs = first.needs  # the same may be missing here as there


@pytest.fixture(scope="session")
def cases(needs: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], first.Case]:
    return functools.cache(lambda name: make_case(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, cases: Callable[[str], first.Case]) -> first.Case:
    return cases(request.param)


def make_case(name: str, directory: Path) -> first.Case:
    from helpers import oracle, torch_models, torch_more_models, torch_more_oracle
    from reap.hf import convert_checkpoint

    model = torch_more_models.build(name)
    samples = torch_models.samples()
    checkpoint = torch_more_models.save(name, model, directory / "hf")
    gguf = convert_checkpoint(checkpoint, directory / f"{name}.gguf", outtype="f32", pre=torch_models.PRE)
    calibration = directory / "calibration.jsonl"
    calibration.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in samples))
    sums = torch_more_oracle.measure(model, samples)
    return first.Case(name, model, samples, checkpoint, gguf, calibration, sums, oracle.best_half(sums))


def test_the_list_of_families_is_whole(needs: None) -> None:
    from helpers import torch_more_models

    assert tuple(torch_more_models.FAMILIES) == (*FAMILIES, "gemma4_gelu")


def test_the_oracle_agrees_with_transformers(case: first.Case) -> None:
    _, layers, n_used = FAMILIES[case.name]
    assert sorted(case.sums) == layers
    for layer, sums in case.sums.items():
        print(
            f"{case.name} layer {layer}: router {sums.router_error:.1e}, block {sums.block_error:.1e}, gap"
            f" {sums.min_gap:.1e}"
        )
        assert sums.router_error < 2e-6
        assert sums.block_error < 2e-6
        # floats differ by 1e-6 between engines: a choice closer than this would be decided by rounding
        assert sums.min_gap > 2e-4
        assert sums.counts.sum() == sums.total_tokens * n_used


def test_the_file_is_of_the_architecture_and_holds_the_models_experts(case: first.Case) -> None:
    from gguf import GGUFReader
    from helpers import torch_more_oracle

    architecture, layers, n_used = FAMILIES[case.name]
    info = reap.inspect(case.gguf)
    assert (info.architecture, list(info.moe_layers), info.n_experts, info.n_experts_used) == (
        architecture,
        layers,
        8,
        n_used,
    )
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(case.gguf).tensors}
    router = "proj.weight" if case.name == "gemma4" else "weight"
    for name, in_file in (("down_proj", "ffn_down_exps.weight"), (router, "ffn_gate_inp.weight")):
        for layer, expected in torch_more_oracle.by_expert(case.model, name).items():
            np.testing.assert_array_equal(tensors[f"blk.{layer}.{in_file}"], expected)


def test_profile_is_the_oracles(case: first.Case) -> None:
    profile = case.profile(case.gguf)
    assert (profile.counts.sum(axis=1) == profile.total_tokens * FAMILIES[case.name][2]).all()
    first.compare_profile(case.name, profile, case.sums)


def test_pruned_file_is_the_sliced_model(case: first.Case, tmp_path: Path) -> None:
    from helpers import torch_more_oracle

    plan = reap.plan(case.profile(case.gguf), keep=0.5)
    assert {layer: list(kept) for layer, kept in plan.layers.items()} == case.kept
    reap.prune(case.gguf, tmp_path / "small.gguf", plan)
    sliced = torch_more_oracle.keep_experts(case.model, case.kept)

    whole_logits = first.compare_logits("whole", case, case.gguf, case.model)
    sliced_logits = first.compare_logits("half of the experts removed", case, tmp_path / "small.gguf", sliced)
    assert np.abs(whole_logits - sliced_logits).max() > 0.5  # what was removed mattered
    first.compare_virtual(case, tmp_path / "small.gguf")
    first.compare_profile(
        f"{case.name}, pruned", case.profile(tmp_path / "small.gguf"), torch_more_oracle.measure(sliced, case.samples)
    )


def test_gemma4_where_gelu_bends(cases: Callable[[str], first.Case]) -> None:
    """The engine's GELU is a table in half precision there, so sums differ by more; that experts and gates are the
    right ones, it shows."""
    case = cases("gemma4_gelu")
    profile = case.profile(case.gguf)
    np.testing.assert_array_equal(profile.counts, first.stacked(case.sums, "counts"))
    differences = {field: first.relative(getattr(profile, field), first.stacked(case.sums, field)) for field in SUMS}
    print("gemma4_gelu:", ", ".join(f"{k} {v:.1e}" for k, v in differences.items()))
    assert max(differences.values()) < 2e-3
