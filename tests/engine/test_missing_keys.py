"""Keys that an architecture needs and a file lacks: said by inspect and by what runs it, given by override_kv, and
recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import reap
from gguf import GGUFReader
from helpers.architectures import write_model
from helpers.gguf_builder import build_moe
from helpers.llama_tools import require_tool
from helpers.rewrite import rewrite
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import EngineError, ReapWarning, UnsupportedModelError
from reap.gguf.model_info import inspect

KEY = "deepseek2.expert_gating_func"
TEXT = [{"tokens": list(range(16))}, {"tokens": list(range(30, 46))}]
EXACT = {"type_k": "f32", "type_v": "f32", "flash_attn": "off", "threads": 1, "ctx_size": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that routes by a sigmoid, with the key that says so and without it."""
    folder = tmp_path_factory.mktemp("models")
    plain = write_model(require_tool("test-llama-archs"), "deepseek2", folder)
    whole = rewrite(plain, folder / "whole.gguf", keys={KEY: 2, "deepseek2.expert_weights_norm": True})
    return whole, rewrite(whole, folder / "lacking.gguf", keys={KEY: None})


def test_a_router_that_would_run_as_a_softmax_is_said(models: tuple[Path, Path]) -> None:
    whole, lacking = models
    assert not inspect(whole).missing_keys
    sentence = inspect(lacking).missing_keys[KEY]
    assert "llama.cpp routes by a softmax" in sentence
    assert f"--override-kv {KEY}=int:2" in sentence
    with pytest.warns(ReapWarning, match="routes by a softmax"):
        wrong = reap.profile(lacking, TEXT, **EXACT)
    assert sentence in wrong.engine["warnings"]


def test_the_key_given_is_the_model_as_it_was_trained(models: tuple[Path, Path]) -> None:
    whole, lacking = models
    expected = reap.profile(whole, TEXT, **EXACT)
    found = reap.profile(lacking, TEXT, **EXACT, override_kv=f"{KEY}=int:2")
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_array_equal(found.gated_norm_sum, expected.gated_norm_sum)
    assert "warnings" not in found.engine
    assert found.engine["options"]["override_kv"] == [[KEY, "int", "2"]]
    with pytest.warns(ReapWarning):
        wrong = reap.profile(lacking, TEXT, **EXACT)
    assert not np.array_equal(wrong.gate_sum, expected.gate_sum)


def test_a_key_that_nothing_runs_without_is_named_with_the_way_to_give_it(models: tuple[Path, Path]) -> None:
    whole, _ = models
    key = "deepseek2.expert_shared_count"
    lacking = rewrite(whole, whole.parent / "headless.gguf", keys={key: None})
    with pytest.raises(EngineError, match=rf"--override-kv {key}=TYPE:VALUE"):
        open_session(lacking, EngineOptions(**EXACT))
    n_shared = GGUFReader(whole).fields[key].contents()
    given = open_session(lacking, EngineOptions(**EXACT, override_kv=f"{key}=int:{n_shared}"))
    tokens = np.arange(8, dtype=np.int32)
    expected = open_session(whole, EngineOptions(**EXACT)).logits(tokens, 0)
    assert (given.logits(tokens, 0) == expected).all()


def test_an_architecture_that_takes_nothing_for_it(tmp_path: Path) -> None:
    plain = write_model(require_tool("test-llama-archs"), "minimax-m2", tmp_path)
    lacking = rewrite(plain, tmp_path / "lacking.gguf", keys={"minimax-m2.expert_gating_func": None})
    assert "cannot run minimax-m2" in inspect(lacking).missing_keys["minimax-m2.expert_gating_func"]
    session = open_session(lacking, EngineOptions(**EXACT, override_kv="minimax-m2.expert_gating_func=int:2"))
    assert np.isfinite(session.logits(np.arange(8, dtype=np.int32), 0)).all()


def test_an_architecture_that_the_engine_does_not_know(tmp_path: Path) -> None:
    model = build_moe(tmp_path / "m.gguf", architecture="flexolmo")
    assert inspect(model).is_moe
    assert not inspect(model).refusals
    with pytest.raises(EngineError, match="does not know flexolmo, a newer one may"):
        open_session(model, EngineOptions(**EXACT))


def test_a_router_with_zero_experts_is_named_and_not_called_damaged(tmp_path: Path) -> None:
    router = np.zeros((12, 32), dtype=np.float32)
    model = build_moe(
        tmp_path / "m.gguf",
        architecture="longcat-flash",
        extra={f"blk.{layer}.ffn_gate_inp.weight": router for layer in range(2)},
    )
    info = inspect(model)
    assert len(info.refusals) == 1
    assert "choose among 12 experts, of which the file holds 8: the others are zero experts" in info.refusals[0]
    with pytest.raises(UnsupportedModelError, match="zero experts"):
        reap.profile(model, TEXT)
