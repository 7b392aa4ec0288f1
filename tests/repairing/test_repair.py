"""repair(): from two models and a calibration to an adapter that the engine adds to the pruned one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reap
from helpers.gguf_builder import build_moe
from helpers.llama_tools import require_tool
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import CalibrationError, FormatError, MismatchError, UsageError
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.gguf.adapter import new_adapter, read_adapter, read_factors
from reap.scores.plan import PrunePlan

EXACT = {"ctx_size": 64, "type_k": "f32", "type_v": "f32", "flash_attn": "off", "threads": 1}
FLAGS = ["-c", "64", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "1"]
KEPT = {layer: (0, 2, 5, 7) for layer in range(3)}
PLAN = PrunePlan({"n_experts": 8}, "reap", 4, KEPT)
DATA = Path(reap.__file__).parent / "data"
TOKENS = (np.arange(60, dtype=np.int32) * 7) % 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the pruned one, a calibration, a repair, and a held-out text."""
    where = tmp_path_factory.mktemp("repair")
    build_moe(where / "whole.gguf", n_layers=3, n_experts=8, n_used=3)
    reap.prune(where / "whole.gguf", where / "small.gguf", PLAN)
    rng = np.random.default_rng(0)
    lines = [json.dumps({"tokens": rng.integers(0, 64, 64).tolist()}) for _ in range(80)]
    (where / "calibration.jsonl").write_text("\n".join(lines))
    (where / "heldout.jsonl").write_text(
        "\n".join(json.dumps({"tokens": rng.integers(0, 64, 64).tolist()}) for _ in range(40))
    )
    return where


@pytest.fixture(scope="module")
def report(folder: Path) -> reap.RepairReport:
    return reap.repair(
        folder / "small.gguf",
        source=folder / "whole.gguf",
        calibration=folder / "calibration.jsonl",
        output=folder / "repair.gguf",
        rank=8,
        type="F32",
        **EXACT,
    )


def test_it_brings_the_model_nearer_to_the_whole_one(folder: Path, report: reap.RepairReport) -> None:
    assert report.helps
    assert report.output == folder / "repair.gguf"
    assert report.kl_before - report.kl_after > 2 * report.kl_stderr > 0
    assert set(report.layers) == {0, 1, 2}
    assert all(0 < it.left < 1 for it in report.layers.values())
    assert report.n_bytes == (folder / "repair.gguf").stat().st_size
    assert json.loads(json.dumps(report.to_dict()))["helps"] is True


def test_held_out_text_says_so_too(folder: Path, report: reap.RepairReport) -> None:
    def divergence(**more: object) -> float:
        found = reap.evaluate(
            folder / "small.gguf",
            folder / "heldout.jsonl",
            reference=folder / "whole.gguf",
            **EXACT,
            **more,  # type: ignore[arg-type]
        ).kl_mean
        assert found is not None
        return found

    assert divergence(lora=report.output) < 0.95 * divergence()


def test_the_corrections_reach_the_hidden_states_as_they_are(report: reap.RepairReport) -> None:
    assert all(it.scale == pytest.approx(1, abs=1e-4) for it in report.layers.values() if it.ridge)


def merged(folder: Path) -> Path:
    """The pruned model with the adapter in its weights: the slow way to the same model."""
    from gguf import GGUFReader

    target = folder / "merged.gguf"
    target.write_bytes((folder / "small.gguf").read_bytes())
    reader = GGUFReader(target, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith("ffn_down_exps.weight"):
            a, b = read_factors(folder / "repair.gguf", tensor.name)
            tensor.data[:] += (b @ a).reshape(tensor.data.shape)
    reader.data.flush()
    return target


def test_adapter_merged_file_and_plan_agree(folder: Path, report: reap.RepairReport) -> None:
    options = EngineOptions(**EXACT)
    adapted = open_session(folder / "small.gguf", EngineOptions(**EXACT, lora=report.output)).logits(TOKENS, 0)
    plain = open_session(folder / "small.gguf", options).logits(TOKENS, 0)
    by_hand = open_session(merged(folder), options).logits(TOKENS, 0)
    np.testing.assert_allclose(adapted, by_hand, atol=1e-5)
    assert np.abs(adapted - plain).max() > 1e-3
    text = folder / "heldout.jsonl"
    virtual = PlanEvaluator(folder / "whole.gguf", text, EngineOptions(**EXACT, lora=report.output))
    physical = PlanEvaluator(folder / "small.gguf", text, EngineOptions(**EXACT, lora=report.output))
    reference = virtual.reference()
    ours, theirs = virtual.score(PLAN, reference=reference), physical.score(None, reference=reference)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-5)
    assert ours.kl_mean == pytest.approx(theirs.kl_mean, abs=1e-5)
    unrepaired = PlanEvaluator(folder / "whole.gguf", text, options)
    assert np.array_equal(unrepaired.reference().windows[0].next, reference.windows[0].next)  # without the adapter


def test_llama_perplexity_gives_our_figure(tmp_path: Path) -> None:
    model, small, adapter = next(DATA.glob("reap-demo-*.gguf")), tmp_path / "small.gguf", tmp_path / "lora.gguf"
    reap.prune(model, small, PrunePlan({"n_experts": 32}, "reap", 8, {layer: tuple(range(8)) for layer in range(4)}))
    rng = np.random.default_rng(1)
    a, b = 0.2 * rng.normal(size=(8, 4, 64)), 0.2 * rng.normal(size=(8, 128, 4))
    file = new_adapter("qwen3moe", {f"blk.{layer}.ffn_down_exps.weight": (a, b) for layer in range(4)})
    adapter.write_bytes(b"".join(bytes(piece) for piece in file.pieces()))  # type: ignore[arg-type]
    text = tmp_path / "text.txt"
    text.write_text((DATA / "heldout" / "python.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    flags = ["-c", "256", "-b", "256", "-ub", "256", "-fa", "off", "-t", "1"]
    command = map(str, [require_tool("llama-perplexity"), "-m", small, "--lora", adapter, "-f", text, *flags])
    said = subprocess.run([*command], capture_output=True, text=True, check=True)
    (theirs,) = re.findall(r"PPL = ([\d.]+)", said.stdout + said.stderr)
    found = [
        reap.evaluate(small, text, ctx_size=256, flash_attn="off", threads=1, **more).perplexity  # type: ignore[arg-type]
        for more in ({"lora": adapter}, {})
    ]
    assert f"{found[0]:.4f}" == theirs
    assert abs(found[1] - found[0]) > 0.01


def test_the_same_call_gives_the_same_file(folder: Path, report: reap.RepairReport) -> None:
    """And with little memory, where layers are captured one by one, nothing changes but the number of passes."""
    again = reap.repair(
        folder / "small.gguf",
        source=folder / "whole.gguf",
        calibration=folder / "calibration.jsonl",
        output=folder / "again.gguf",
        rank=8,
        type="F32",
        memory=80 * 64 * 4 * (3 * 32 + 3 * 3 * 32),
        **EXACT,
    )
    assert not again.warnings
    assert (folder / "again.gguf").read_bytes() == (folder / "repair.gguf").read_bytes()


def test_the_adapter_says_what_it_belongs_to(folder: Path, report: reap.RepairReport) -> None:
    adapter = read_adapter(folder / "repair.gguf")
    info = reap.inspect(folder / "small.gguf")
    assert adapter.model is not None
    assert adapter.model["fingerprint"] == info.fingerprint
    assert json.loads(adapter.metadata["reap.repair.kept"]) == {str(layer): list(ids) for layer, ids in KEPT.items()}


def test_a_foreign_pair_is_refused(folder: Path, report: reap.RepairReport, tmp_path: Path) -> None:
    build_moe(tmp_path / "other.gguf", n_layers=3, n_experts=4, n_used=3, seed=5)
    text = folder / "heldout.jsonl"
    with pytest.raises(MismatchError, match="is a repair of a model other than"):
        reap.evaluate(tmp_path / "other.gguf", text, lora=report.output, **EXACT)
    with pytest.raises(MismatchError, match=r"is of a model with 4 experts, but .* has 8"):
        reap.evaluate(folder / "whole.gguf", text, lora=report.output, **EXACT)
    another = PrunePlan({"n_experts": 8}, "reap", 4, {layer: (0, 1, 2, 3) for layer in KEPT})
    with pytest.raises(MismatchError, match="was fitted to other experts than the plan keeps"):
        reap.evaluate(folder / "whole.gguf", text, plan=another, lora=report.output, **EXACT)
    with pytest.raises(MismatchError, match="of a model with 4 experts, not 8"):
        open_session(folder / "whole.gguf", EngineOptions(**EXACT, lora=report.output))


def test_what_is_no_adapter_is_refused(folder: Path) -> None:
    with pytest.raises(FormatError, match="is a GGUF model, expected a LoRA adapter"):
        open_session(folder / "small.gguf", EngineOptions(**EXACT, lora=folder / "whole.gguf"))
    with pytest.raises(UsageError, match=r"nowhere\.gguf"):
        open_session(folder / "small.gguf", EngineOptions(**EXACT, lora=folder / "nowhere.gguf"))


@pytest.mark.parametrize("change", ["half", "shape", "name", "experts", "architecture"])
@pytest.mark.usefixtures("report")
def test_an_adapter_that_the_engine_could_not_add_is_refused(folder: Path, tmp_path: Path, change: str) -> None:
    info = reap.inspect(folder / "small.gguf")
    name = "blk.0.ffn_down_exps.weight"
    n_ff = read_factors(folder / "repair.gguf", name)[0].shape[2]
    a, b = np.zeros((4, 2, n_ff), np.float32), np.zeros((4, info.n_embd, 2), np.float32)
    with_shape = {"experts": (a[:3], b[:3]), "shape": (a[..., 1:], b)}.get(change, (a, b))
    where = {"name": "blk.9.ffn_down_exps.weight"}.get(change, name)
    file = new_adapter("olmoe" if change == "architecture" else info.architecture, {where: with_shape})
    data = b"".join(bytes(piece) for piece in file.pieces())  # type: ignore[arg-type]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data.replace(b"lora_b", b"lora_a") if change == "half" else data)
    with pytest.raises((MismatchError, FormatError)):
        open_session(folder / "small.gguf", EngineOptions(**EXACT, lora=path))


def repair_with(folder: Path, tmp_path: Path, **changes: object) -> reap.RepairReport:
    arguments = {
        "source": folder / "whole.gguf",
        "calibration": folder / "calibration.jsonl",
        "output": tmp_path / "out.gguf",
        **EXACT,
        **changes,
    }
    return reap.repair(folder / "small.gguf", **arguments)  # type: ignore[arg-type]


def test_what_cannot_work_is_said_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    build_moe(tmp_path / "other.gguf", n_layers=3, n_experts=8, n_used=3, seed=9, n_vocab=96)
    few = [{"tokens": [1, 2, 3]}] * 5
    for error, words, changes in (
        (UsageError, "rank is 0", {"rank": 0}),
        (UsageError, "type is 'Q8_0'", {"type": "Q8_0"}),
        (UsageError, "output", {"output": folder / "small.gguf"}),
        (CalibrationError, "has 5 windows", {"calibration": few}),
        (MismatchError, "differ in vocab_size", {"source": tmp_path / "other.gguf"}),
        (MismatchError, "does not say what it was pruned from|was pruned from", {"source": folder / "small.gguf"}),
        (UsageError, "one layer of 20 windows needs more", {"memory": 1000}),
    ):
        with pytest.raises(error, match=words):
            repair_with(folder, tmp_path, **changes)
    assert not (tmp_path / "out.gguf").exists()


def test_nothing_is_written_where_it_does_not_help(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reap.repairing import run, solve

    def spoilt(*arguments: object, **options: object) -> solve.LayerFit:
        found = solve.fit_layer(*arguments, **options)  # type: ignore[arg-type]
        assert found.correction is not None
        return solve.LayerFit(solve.Correction(found.correction.a, -5 * found.correction.b), found.ridge, found.left)

    monkeypatch.setattr(run, "fit_layer", spoilt)
    found = repair_with(folder, tmp_path)
    assert not found.helps
    assert found.output is None
    assert not (tmp_path / "out.gguf").exists()


def test_as_a_command(folder: Path, report: reap.RepairReport, tmp_path: Path) -> None:
    words = ["repair", folder / "small.gguf", "--source", folder / "whole.gguf", "-o", tmp_path / "r.gguf", *FLAGS]
    words += ["--calibration", folder / "calibration.jsonl", "--rank", "8", "--type", "F32"]
    command = [sys.executable, "-m", "reap", *map(str, words)]
    environment = {**os.environ, "COLUMNS": "200"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "r.gguf").read_bytes() == (folder / "repair.gguf").read_bytes()
    assert "KL divergence" in ran.stdout
    assert "--lora" in ran.stdout
