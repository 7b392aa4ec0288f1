"""Two models whose statistics and logits PyTorch computed once (`make_golden.py`): the engine must still say the
same."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap
from helpers.paths import GOLDEN
from helpers.sums import SUMS
from reap.engine import native
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import NativeModuleMissing

EXACT: dict[str, Any] = {
    "ctx_size": 128,
    "ubatch_size": 64,
    "type_k": "f32",
    "type_v": "f32",
    "flash_attn": "off",
    "threads": 2,
}


@dataclass(frozen=True)
class Golden:
    gguf: Path
    expected: dict[str, Any]

    @property
    def layers(self) -> list[int]:
        return sorted(int(layer) for layer in self.expected["layers"])

    def sums(self, field: str) -> np.ndarray:
        """[n_layers, n_experts]"""
        return np.array([self.expected["layers"][str(layer)][field] for layer in self.layers])

    def profile(self) -> reap.Profile:
        return reap.profile(self.gguf, [{"tokens": tokens} for tokens in self.expected["samples"]], **EXACT)

    def plan(self) -> reap.PrunePlan:
        """Made from PyTorch's sums, so that it needs no engine."""
        sums = {name: self.sums(name) for name in ("counts", *SUMS)}
        total = np.full(len(self.layers), self.expected["total_tokens"])
        info = reap.inspect(self.gguf)
        model = {"architecture": info.architecture, "fingerprint": info.fingerprint, "n_experts": info.n_experts}
        profile = reap.Profile.from_sums(
            layers=np.array(self.layers),
            total_tokens=total,
            model={**model, "n_experts_used": info.n_experts_used},
            **sums,
        )
        return reap.plan(profile, keep=0.5)


@pytest.fixture(scope="module", params=["qwen3moe", "nemotronh"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(GOLDEN / f"{request.param}.gguf", json.loads((GOLDEN / f"{request.param}.json").read_text()))


@pytest.fixture(scope="module")
def engine() -> None:
    try:
        native.load()
    except NativeModuleMissing as error:
        # what may be missing on a laptop must not be missing in CI
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))


def check_logits(golden: Golden, gguf: Path, key: str) -> None:
    tokens = np.array(golden.expected["samples"][golden.expected["logits_sample"]], dtype=np.int32)
    measured = open_session(gguf, EngineOptions(**EXACT)).logits(tokens, 0)[golden.expected["logits_positions"]]
    expected = np.array(golden.expected[key])
    worst = np.abs(measured - expected).max()
    print(f"{gguf.name}, {key}: differ by {worst:.1e} where their spread is {expected.std():.1f}")
    assert worst < 1e-4 * expected.std()


def test_files_belong_together(golden: Golden) -> None:
    assert hashlib.sha256(golden.gguf.read_bytes()).hexdigest() == golden.expected["gguf_sha256"]
    assert golden.gguf.stat().st_size < 600_000


def test_inspect(golden: Golden) -> None:
    info = reap.inspect(golden.gguf)
    assert list(info.moe_layers) == golden.layers
    assert info.n_experts == golden.sums("counts").shape[1]
    assert info.has_tokenizer
    assert info.has_chat_template


def test_kept_experts(golden: Golden) -> None:
    kept = {str(layer): list(ids) for layer, ids in golden.plan().layers.items()}
    assert kept == golden.expected["kept"]


def test_profile(golden: Golden, engine: None) -> None:
    profile = golden.profile()
    assert profile.layers.tolist() == golden.layers
    np.testing.assert_array_equal(profile.counts, golden.sums("counts"))
    for field in SUMS:
        np.testing.assert_allclose(getattr(profile, field), golden.sums(field), rtol=1e-5, err_msg=field)
    assert set(profile.total_tokens.tolist()) == {golden.expected["total_tokens"]}


def test_logits(golden: Golden, engine: None) -> None:
    check_logits(golden, golden.gguf, "logits")


def test_logits_of_the_pruned_file(golden: Golden, engine: None, tmp_path: Path) -> None:
    reap.prune(golden.gguf, tmp_path / "small.gguf", golden.plan())
    check_logits(golden, tmp_path / "small.gguf", "logits_pruned")


def test_golden_logits_can_tell_the_two_apart(golden: Golden) -> None:
    whole, pruned = np.array(golden.expected["logits"]), np.array(golden.expected["logits_pruned"])
    assert np.abs(whole - pruned).max(axis=1).min() > 1
