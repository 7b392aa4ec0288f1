"""Virtual pruning: a session that computes what the pruned file would compute, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.gguf_builder import build_moe
from reap.engine.generation import Prompt, continue_batch
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import UsageError
from reap.pruning.gguf import prune
from reap.scores.plan import PrunePlan

ENGINE = {"ctx_size": 128, "type_k": "f32", "type_v": "f32", "flash_attn": "off", "threads": 1}
EXACT = EngineOptions(**ENGINE)
TOKENS = (np.arange(60, dtype=np.int32) * 7) % 64
KEPT = {0: [0, 2, 5, 7], 1: [1, 2, 3, 4], 2: [3, 5, 6, 7]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_moe(tmp_path_factory.mktemp("virtual") / "m.gguf", n_layers=3, n_experts=8, n_used=3)


@pytest.fixture(scope="module")
def pruned(model: Path) -> Path:
    plan = PrunePlan({"n_experts": 8}, "reap", 4, {layer: tuple(ids) for layer, ids in KEPT.items()})
    prune(model, model.with_name("small.gguf"), plan)
    return model.with_name("small.gguf")


@pytest.mark.parametrize("ubatch", [128, 7, 2])
def test_the_same_logits_as_the_pruned_file(model: Path, pruned: Path, ubatch: int) -> None:
    options = EngineOptions(**ENGINE, ubatch_size=ubatch)
    session = open_session(model, options)
    whole = session.logits(TOKENS, 0)
    session.set_kept(KEPT)
    virtual = session.logits(TOKENS, 0)
    np.testing.assert_allclose(virtual, open_session(pruned, options).logits(TOKENS, 0), atol=1e-5)
    assert np.abs(virtual - whole).max() > 0.1
    session.set_kept(None)
    assert np.array_equal(session.logits(TOKENS, 0), whole)


def test_another_plan_replaces_the_first(model: Path, pruned: Path) -> None:
    session = open_session(model, EXACT)
    session.set_kept({layer: [0, 1, 2] for layer in KEPT})
    session.logits(TOKENS, 0)
    session.set_kept(KEPT)
    np.testing.assert_allclose(session.logits(TOKENS, 0), open_session(pruned, EXACT).logits(TOKENS, 0), atol=1e-5)


def test_everything_that_runs_the_model_is_masked(model: Path, pruned: Path) -> None:
    session, small = open_session(model, EXACT), open_session(pruned, EXACT)
    session.set_kept(KEPT)
    np.testing.assert_allclose(session.log_probs(TOKENS, 10), small.log_probs(TOKENS, 10), atol=1e-5)
    ours, theirs = session.predict_top(TOKENS, 10, 64), small.predict_top(TOKENS, 10, 64)
    np.testing.assert_allclose(ours["log_probs"], theirs["log_probs"], atol=1e-5)
    prompts = [Prompt(tuple(TOKENS[:20].tolist()), 30)]
    assert continue_batch(session, prompts) == continue_batch(small, prompts)
    session.forward(TOKENS, False)
    session.forward(TOKENS, True)


def test_a_profile_of_the_virtually_pruned_model_is_that_of_the_file(model: Path, pruned: Path) -> None:
    positions, zeros = np.arange(60, dtype=np.int32), np.zeros(60, np.int32)
    sums = []
    for path, n_experts in ((model, 8), (pruned, 4)):
        session = open_session(path, EXACT)
        if n_experts == 8:
            session.set_kept(KEPT)
        session.start_profile([0, 1, 2], n_experts)
        session.profile_batch(TOKENS, positions, zeros, zeros)
        session.commit(1)
        sums.append(session.sums(0))
    rows = np.arange(3)[:, None], np.array(list(KEPT.values()))
    assert np.array_equal(sums[0]["counts"][rows], sums[1]["counts"])
    assert sums[0]["counts"].sum() == sums[1]["counts"].sum()
    np.testing.assert_allclose(sums[0]["gated_norm_sum"][rows], sums[1]["gated_norm_sum"], rtol=1e-5)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({0: [0, 1, 2], 1: [0, 1, 2]}, "layer 2: nothing is said about its experts"),
        ({**KEPT, 9: [0, 1, 2]}, "layer 9: the engine runs no experts there"),
        ({**KEPT, 1: [0, 1]}, "layer 1: keeps 2 experts, but each token goes to 3"),
        ({**KEPT, 1: [0, 1, 8]}, "layer 1: there is no expert 8 to keep among 8"),
        ({**KEPT, 1: [0, 1, -1]}, "layer 1: there is no expert -1"),
    ],
)
def test_what_cannot_be_kept(model: Path, kept: dict[int, list[int]], message: str) -> None:
    session = open_session(model, EXACT)
    whole = session.logits(TOKENS, 0)
    with pytest.raises(UsageError, match=message):
        session.set_kept(kept)
    assert np.array_equal(session.logits(TOKENS, 0), whole)
