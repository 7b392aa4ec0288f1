"""Prediction (MTP) blocks that are left out: the rest is the model without them, loads and runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import reap
from gguf import GGUFReader
from helpers.architectures import PREDICTING, add_prediction_block, write_model
from helpers.llama_tools import require_tool
from helpers.rewrite import rewrite
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import EngineError, ReapWarning, UnsupportedModelError, UsageError
from reap.gguf.model_info import inspect

OPTIONS = {"type_k": "f32", "type_v": "f32", "flash_attn": "off", "threads": 1, "ctx_size": 64}
TOKENS = np.arange(20, 36, dtype=np.int32)
SAMPLES = [{"tokens": list(range(start, start + 24))} for start in (3, 40, 77)]


def keys_of(path: Path) -> dict[str, object]:
    skipped = ("reap.", "GGUF.")
    return {key: pair.contents() for key, pair in GGUFReader(path).fields.items() if not key.startswith(skipped)}


def tensors_of(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


def logits_of(path: Path) -> np.ndarray:
    return open_session(path, EngineOptions(**OPTIONS)).logits(TOKENS, 0)


@pytest.mark.parametrize("architecture", PREDICTING)
def test_what_is_left_is_the_model_without_the_block(architecture: str, tmp_path: Path) -> None:
    trunk = write_model(require_tool("test-llama-archs"), architecture, tmp_path)
    whole, output = tmp_path / "whole.gguf", tmp_path / "small.gguf"
    add_prediction_block(trunk, whole, PREDICTING[architecture])
    assert inspect(whole).n_prediction_layers == 1

    reap.prune(whole, output, None, drop_prediction_layers=True, verify="full")
    assert tensors_of(output) == tensors_of(trunk)
    expected = keys_of(trunk) | PREDICTING_KEYS(architecture)
    expected.pop(f"{architecture}.nextn_predict_layers", None)
    assert keys_of(output) == expected
    assert (logits_of(output) == logits_of(whole)).all()

    # and together with experts, by a plan of the whole model or of its trunk
    for prediction_layers in (True, False):
        profile = reap.profile(whole, SAMPLES, prediction_layers=prediction_layers, **OPTIONS)
        plan = reap.plan(profile, keep=6)
        reap.prune(whole, output, plan, drop_prediction_layers=True, verify="full", force=True)
        reap.prune(trunk, tmp_path / "expected.gguf", trunk_plan(plan, trunk), allow_mismatch=True, force=True)
        assert tensors_of(output) == tensors_of(tmp_path / "expected.gguf")
        assert np.isfinite(logits_of(output)).all()


def PREDICTING_KEYS(architecture: str) -> dict[str, object]:
    """What the block needed to be other than in the trunk."""
    return {f"{architecture}.{key}": value for key, value in PREDICTING[architecture].keys.items()}


def trunk_plan(plan: reap.PrunePlan, trunk: Path) -> reap.PrunePlan:
    layers = {layer: plan.layers[layer] for layer in inspect(trunk).moe_layers}
    return reap.PrunePlan({"n_experts": plan.n_experts}, plan.metric, plan.keep, layers)


@pytest.mark.parametrize("counted", [True, False])
def test_a_header_that_promises_a_block_that_is_not_there(counted: bool, tmp_path: Path) -> None:
    trunk = write_model(require_tool("test-llama-archs"), "glm4moe", tmp_path)
    n_layers = inspect(trunk).n_layers
    keys = {"glm4moe.nextn_predict_layers": 1, "glm4moe.block_count": n_layers + counted}
    keys["glm4moe.rope.dimension_sections"] = [0, 0, 0, 0]
    lacking = rewrite(trunk, tmp_path / "lacking.gguf", keys=keys)
    if counted:
        with pytest.warns(ReapWarning, match="the file has none"):
            profile = reap.profile(lacking, SAMPLES, **OPTIONS)  # of the trunk, which is all there is
        assert profile.layers.tolist() == list(inspect(trunk).moe_layers)
        assert (logits_of(lacking) == logits_of(trunk)).all()
    else:
        with pytest.raises(EngineError):
            logits_of(lacking)
    sentence = inspect(lacking).missing_keys["glm4moe.nextn_predict_layers"]
    assert "promises 1 prediction layer, but the file has none" in sentence
    output = tmp_path / "small.gguf"
    reap.prune(lacking, output, None, drop_prediction_layers=True)
    assert inspect(output).n_layers == n_layers
    assert not inspect(output).n_prediction_layers
    assert tensors_of(output) == tensors_of(trunk)
    assert np.isfinite(logits_of(output)).all()


def test_a_block_with_experts_of_its_own_number(tmp_path: Path) -> None:
    trunk = write_model(require_tool("test-llama-archs"), "qwen3next", tmp_path)
    whole = tmp_path / "whole.gguf"
    add_prediction_block(trunk, whole, PREDICTING["qwen3next"])
    block = f"blk.{inspect(trunk).n_layers}."
    fewer = {
        tensor.name: np.array(tensor.data)[:4]
        for tensor in GGUFReader(whole).tensors
        if tensor.name.startswith(block) and ("_exps." in tensor.name or "ffn_gate_inp.weight" in tensor.name)
    }
    other = rewrite(whole, tmp_path / "other.gguf", tensors=fewer)
    message = r"the prediction layer \d+ has 4 experts where the header says 8.*--drop-prediction-layers"
    assert "--drop-prediction-layers" in inspect(other).refusals[0]
    profile = reap.profile(trunk, SAMPLES, **OPTIONS)
    with pytest.raises(UnsupportedModelError, match=message):
        reap.prune(other, tmp_path / "small.gguf", reap.plan(profile, keep=4), allow_mismatch=True)
    output = tmp_path / "small.gguf"
    reap.prune(other, output, None, drop_prediction_layers=True)
    assert tensors_of(output) == tensors_of(trunk)
    assert (logits_of(output) == logits_of(trunk)).all()


def test_a_model_without_such_layers_says_so(tmp_path: Path) -> None:
    trunk = write_model(require_tool("test-llama-archs"), "olmoe", tmp_path)
    with pytest.raises(UsageError, match="has no prediction layers to drop"):
        reap.prune(trunk, tmp_path / "small.gguf", None, drop_prediction_layers=True)
    with pytest.raises(UsageError, match="a plan is missing"):
        reap.prune(trunk, tmp_path / "small.gguf", None)
