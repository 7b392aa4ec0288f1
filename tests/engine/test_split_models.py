"""Every command takes any file of a split model; the engine itself opens only the first."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import reap
from helpers.gguf_builder import build_moe
from helpers.paths import ROOT
from reap.cli import main
from reap.errors import FormatError
from reap.gguf.reader import first_file
from reap.gguf.shards import model_paths
from reap.scores.plan import PrunePlan

GOLDEN = ROOT / "tests" / "golden" / "qwen3moe.gguf"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("split")
    info = reap.inspect(GOLDEN)
    kept = tuple(range(info.n_experts - 1))
    model = {"n_experts": info.n_experts, "fingerprint": info.fingerprint}
    plan = PrunePlan(model, "reap", len(kept), dict.fromkeys(info.moe_layers, kept))
    report = reap.prune(GOLDEN, folder / "m.gguf", plan, split_max_size="150K")
    assert len(report.files) > 2
    return sorted(report.files)


def test_any_file_is_profiled_and_evaluated_as_the_first_is(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "several words of a text"}\n' * 3)
    (tmp_path / "t.txt").write_text("several words of a text, " * 40)
    first = reap.profile(shards[0], tmp_path / "c.jsonl", ctx_size=64)
    loss = reap.evaluate(shards[0], tmp_path / "t.txt", ctx_size=64).perplexity
    samples = [{"tokens": [1, 2, 3]}]
    seen = reap.preview(shards[0], samples).to_dict()
    for shard in (shards[1], shards[-1]):
        assert reap.preview(shard, samples).to_dict() == seen
        again = reap.profile(shard, tmp_path / "c.jsonl", ctx_size=64)
        np.testing.assert_array_equal(again.gated_norm_sum, first.gated_norm_sum)
        assert again.model == first.model
        assert reap.evaluate(shard, tmp_path / "t.txt", ctx_size=64).perplexity == loss


def test_names_of_a_model_s_files(shards: list[Path], tmp_path: Path) -> None:
    for shard in shards:
        assert first_file(shard) == shards[0]
        assert model_paths(shard) == shards
    assert first_file(GOLDEN) == GOLDEN
    assert model_paths(GOLDEN) == [GOLDEN]
    alone = build_moe(tmp_path / "m-00002-of-00003.gguf")  # a name is all that it has of a shard
    assert first_file(alone) == alone
    assert model_paths(tmp_path / "m-00001-of-99999.gguf") == [tmp_path / "m-00001-of-99999.gguf"]


def test_a_later_file_whose_first_is_missing(shards: list[Path], tmp_path: Path) -> None:
    os.link(shards[1], tmp_path / shards[1].name)
    with pytest.raises(FormatError, match="is missing, but"):
        first_file(tmp_path / shards[1].name)


def test_no_output_is_another_file_of_the_model(shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = shards[1].read_bytes()
    assert main(["profile", str(shards[0]), "c.jsonl", "-o", str(shards[1]), "--force"]) == 2
    assert "is the input" in capsys.readouterr().err
    assert shards[1].read_bytes() == before
