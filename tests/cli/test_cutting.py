"""reap plan and reap prune on the command line: every option reaches the library, and what is printed is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.gguf_builder import build_moe
from helpers.imatrices import sizes_of, write_gguf_imatrix
from helpers.profiles import from_scores, make_profile
from reap.cli import main
from reap.files.formatting import ranges_text
from reap.gguf.model_info import inspect
from reap.pruning.gguf import prune


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A model, a profile of it with a super expert (1:4), and an importance matrix."""
    model = build_moe(tmp_path / "m.gguf", n_experts=8)
    scores = np.random.default_rng(0).uniform(1, 2, (2, 8))
    scores[1, 4] = 1000
    profile = from_scores(scores.tolist(), fingerprint=inspect(model).fingerprint, n_experts_used=2)
    paths = {"model": model, "profile": profile.save(tmp_path / "p.json"), "plan": tmp_path / "plan.json"}
    return paths | {"matrix": write_gguf_imatrix(tmp_path / "i.gguf", sizes_of(model))}


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_plan_prints_sizes_super_experts_and_the_router_s_note(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = run(capsys, "plan", files["profile"], "--keep", "3", "--model", files["model"], "-o", files["plan"])
    output = files["model"].with_name("s.gguf")
    n_bytes = prune(files["model"], output, files["plan"]).n_bytes_after
    assert n_bytes == output.stat().st_size
    assert f"({n_bytes:,} bytes)" in text
    assert "1:4 (" in text
    assert "times the median norm" in text
    assert "3 experts run without the fused router" in text
    assert "2 or 4 would run with it" in text
    assert "keeps  " in text
    assert "none found" in run(capsys, "plan", make_profile().save(files["plan"].with_name("q.json")), "--keep", "4")


def test_plan_protects_super_experts_when_asked(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(20):
        common = ["plan", files["profile"], "--keep", "2", "--metric", "random", "--seed", seed, "--json"]
        free, guarded = (json.loads(run(capsys, *common, *more)) for more in ((), ("--super-experts",)))
        assert 4 in guarded["layers"]["1"]["kept"]
        assert free["options"]["super_experts"][0]["kept"] == (4 in free["layers"]["1"]["kept"])
        if 4 not in free["layers"]["1"]["kept"]:
            assert "REMOVED" in run(capsys, *common[:-1])
            return
    raise AssertionError("no seed removes it")


def test_plan_as_json_knows_the_size(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(run(capsys, "plan", files["profile"], "--keep", "0.5", "--model", files["model"], "--json"))
    assert document["n_bytes_before"] == files["model"].stat().st_size
    assert 0 < document["n_bytes_after"] < document["n_bytes_before"]


def test_a_dry_run_prints_every_file_to_the_byte(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "plan", files["profile"], "--keep", "4", "-o", files["plan"])
    output = files["model"].with_name("s.gguf")
    command = [
        "prune",
        files["model"],
        "--plan",
        files["plan"],
        "-o",
        output,
        "--imatrix",
        files["matrix"],
        "--split-max-size",
        "0.03M",
    ]
    before = sorted(output.parent.iterdir())
    dry, document = run(capsys, *command, "--dry-run"), json.loads(run(capsys, *command, "--dry-run", "--json"))
    assert sorted(output.parent.iterdir()) == before
    run(capsys, *command, "--verify", "full", "--name", "small")
    run(capsys, *command, "--verify", "none", "--force")
    written = sorted(set(output.parent.iterdir()) - set(before))
    assert [path.name for path in written][:2] == ["s-00001-of-00007.gguf", "s-00002-of-00007.gguf"]
    assert [path.name for path in written][-1] == "s.imatrix.gguf"
    assert len(written) == 8
    assert document["files"] == {str(path): path.stat().st_size for path in written}
    for path in written:
        assert f"{path.name} ({path.stat().st_size:,} bytes)" in dry
    assert document["kept"]["0"] != document["removed"]["0"]
    assert "4 of 8 in each of 2 layers" in dry
    for layer, kept in document["kept"].items():
        assert f"layer {layer}: keeps {ranges_text(kept)}; removes {ranges_text(document['removed'][layer])}" in dry


def test_ranges_text() -> None:
    assert ranges_text([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7, 8"
    assert ranges_text([]) == "none"


def test_imatrix_out_names_the_cut_matrix(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = files["model"].parent
    common = ["prune", files["model"], "--profile", files["profile"], "--keep", "4", "-o", folder / "s.gguf"]
    run(capsys, *common, "--imatrix", files["matrix"], "--imatrix-out", folder / "mine.gguf")
    assert (folder / "mine.gguf").exists()
    assert main([str(part) for part in (*common, "--force", "--imatrix-out", folder / "x.gguf")]) == 2
    assert "--imatrix-out needs --imatrix" in capsys.readouterr().err
    assert main([str(part) for part in (*common, "--force", "--split-max-size", "4X")]) == 2
    assert "should be a number of bytes" in capsys.readouterr().err


def test_inspect_of_a_pruned_file_says_where_it_came_from(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = files["model"].with_name("s.gguf")
    run(capsys, "prune", files["model"], "--profile", files["profile"], "--keep", "4", "-o", output)
    text = run(capsys, "inspect", output)
    assert inspect(files["model"]).fingerprint in text
    assert "reap.source.expert_count  8" in text
    kept = json.loads(run(capsys, "inspect", output, "--json"))["provenance"]["reap.kept.0"]
    assert len(kept) == 4
    assert np.all(np.diff(kept) > 0)
