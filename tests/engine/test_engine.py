"""The native session against slow, obvious computations; quantised kernels (AMX among them) against floats."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gguf import GGMLQuantizationType
from helpers.gguf_builder import build_moe
from helpers.quantised import write_twins
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import EngineError, UnsupportedModelError, UsageError

EXACT = EngineOptions(ctx_size=128, type_k="f32", type_v="f32", flash_attn="off", threads=2)
TOKENS = (np.arange(60, dtype=np.int32) * 7) % 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_moe(tmp_path_factory.mktemp("engine") / "tiny.gguf", n_layers=3, n_experts=8, n_used=3)


def profile_batch(session, tokens, start=0, group=0):
    n = len(tokens)
    session.profile_batch(
        tokens, np.arange(start, start + n, dtype=np.int32), np.zeros(n, np.int32), np.full(n, group, np.int32)
    )


def test_every_layer_sees_every_token(model: Path) -> None:
    session = open_session(model, EXACT)
    session.start_profile([0, 1, 2], 8)
    profile_batch(session, TOKENS)
    session.commit(1)
    sums = session.sums(0)
    assert sums["total_tokens"].tolist() == [60, 60, 60]
    assert sums["counts"].sum(axis=1).tolist() == [180, 180, 180]
    # equal counts everywhere are what a strided view read as contiguous looks like (trap 1)
    assert sums["counts"].std() > 0
    np.testing.assert_allclose(sums["gate_sum"].sum(axis=1), 60, rtol=1e-5)  # this router's gates add up to one
    assert session.collector_stats()["stops"] == 3


@pytest.mark.parametrize(("batch", "ubatch"), [(60, 60), (16, 16), (60, 16), (32, 7)])
def test_ubatches_do_not_change_the_sums(model: Path, batch: int, ubatch: int) -> None:
    def sums_of(batch: int, ubatch: int):
        options = EngineOptions(**{**EXACT.record(), "batch_size": batch, "ubatch_size": ubatch, "devices": None})
        session = open_session(model, options)
        session.start_profile([0, 1, 2], 8)
        for start in range(0, 60, batch):
            profile_batch(session, TOKENS[start : start + batch], start)
        session.commit(1)
        return session.sums(0)

    whole, parts = sums_of(64, 64), sums_of(batch, ubatch)
    assert (whole["counts"] == parts["counts"]).all()
    np.testing.assert_allclose(parts["gated_norm_sum"], whole["gated_norm_sum"], rtol=1e-5)


def test_groups_and_tokens_not_counted(model: Path) -> None:
    session = open_session(model, EXACT)
    session.start_profile([0, 1, 2], 8)
    groups = np.where(np.arange(60) < 20, 0, np.where(np.arange(60) < 50, 2, -1)).astype(np.int32)
    positions = np.arange(60, dtype=np.int32)
    session.profile_batch(TOKENS, positions, np.zeros(60, np.int32), groups)
    session.commit(1)
    assert session.n_groups == 3
    assert [int(session.sums(group)["total_tokens"][0]) for group in range(3)] == [20, 0, 30]


def test_a_discarded_sample_leaves_nothing(model: Path) -> None:
    session = open_session(model, EXACT)
    session.start_profile([0, 1, 2], 8)
    profile_batch(session, TOKENS[:20])
    session.commit(1)
    before = session.sums(0)
    profile_batch(session, TOKENS[20:40])
    session.discard()
    session.commit(1)
    after = session.sums(0)
    assert all((before[name] == after[name]).all() for name in before)
    with pytest.raises(UsageError, match="token id 64 is outside the vocabulary of 64"):
        profile_batch(session, np.array([1, 64], dtype=np.int32))


def test_log_probs_are_those_of_the_logits(model: Path) -> None:
    session = open_session(model, EXACT)
    logits = session.logits(TOKENS, 10).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = expected[np.arange(len(logits) - 1), TOKENS[11:]]
    np.testing.assert_allclose(session.log_probs(TOKENS, 10), expected, atol=1e-5)


def test_layers_that_the_graph_does_not_have_are_an_error(model: Path) -> None:
    session = open_session(model, EXACT)
    with pytest.raises(
        UnsupportedModelError, match="layer 7: the model's file has experts, but the engine's graph never runs them"
    ):
        session.start_profile([0, 1, 2, 7], 8)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 2: the engine runs experts .* that the model's file does not show"
    ):
        session.start_profile([0, 1], 8)


def test_a_routing_outside_the_experts_is_an_error(model: Path) -> None:
    session = open_session(model, EXACT)
    session.start_profile([0, 1, 2], 4)
    with pytest.raises(EngineError, match=r"layer 0: a token was routed to expert [4-7] of 4"):
        profile_batch(session, TOKENS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type_k": "f17"}, "type_k is 'f17', expected one of f32, f16"),
        ({"devices": ["CUDA7"]}, "no device 'CUDA7'"),
        ({"override_tensors": [("exps", "Nowhere")]}, "no buffer type 'Nowhere'"),
    ],
)
def test_options_the_engine_does_not_know(model: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_session(model, EngineOptions(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": 0},
        {"ctx_size": -1},
        {"ubatch_size": 0},
        {"flash_attn": "maybe"},
        {"batch_size": 8, "ubatch_size": 16},
    ],
)
def test_options_that_cannot_be(changes: dict) -> None:
    with pytest.raises(UsageError):
        EngineOptions(**changes)


def test_a_model_the_engine_refuses_quotes_its_log(tmp_path: Path) -> None:
    path = build_moe(tmp_path / "odd.gguf", dense_layers=(0,))  # Qwen3-MoE has no dense layers
    with pytest.raises(
        EngineError, match=r"odd\.gguf: the engine cannot load this model: .*blk\.0\.ffn_gate_inp\.weight"
    ):
        open_session(path, EXACT)


@pytest.mark.parametrize(
    "kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_K], ids=lambda k: k.name
)
def test_quantised_kernels_agree_with_floats(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """Wrong AMX tiles give noise, or no process to ask; the kernels' own rounding of activations gives a percent."""
    source = build_moe(
        tmp_path / "f32.gguf", n_embd=256, n_ff=256, n_heads=4, n_heads_kv=4, n_head_dim=64, n_vocab=256, n_experts=4
    )
    write_twins(source, tmp_path / "blocks.gguf", tmp_path / "floats.gguf", kind)
    tokens = (np.arange(100, dtype=np.int32) * 37) % 256
    expected = open_session(tmp_path / "floats.gguf", EXACT).logits(tokens, 0)
    found = open_session(tmp_path / "blocks.gguf", EXACT).logits(tokens, 0)
    difference = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    # a token whose routing is nearly a tie may go elsewhere, so the middle one speaks for the kernels
    assert np.median(difference) < 0.03


CHILD = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
session = open_session(sys.argv[1], EngineOptions(ctx_size=4096, ubatch_size=4096, batch_size=4096, threads=1))
session.start_profile([0, 1, 2, 3, 4, 5, 6, 7], 64)
tokens = np.zeros(4096, np.int32)
print("ready", flush=True)
for _ in range(1000):
    session.profile_batch(tokens, np.arange(4096, dtype=np.int32), tokens, tokens)
"""


def test_ctrl_c_is_answered_within_a_batch(tmp_path: Path) -> None:
    path = build_moe(tmp_path / "slow.gguf", n_layers=8, n_experts=64, n_used=8, n_embd=256, n_ff=256, n_ctx=4096)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stopper = threading.Timer(120, child.kill)
    stopper.start()
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.5)
        os.kill(child.pid, signal.SIGINT)
        _, errors = child.communicate()
    finally:
        stopper.cancel()
    assert "KeyboardInterrupt" in errors
    assert child.returncode not in (0, -signal.SIGKILL)
