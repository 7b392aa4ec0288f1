"""From checkpoint to GGUF file and back: pruning commutes with converting, and a profile of one form prunes the other.

The converter is llama.cpp's own; files are compared by the `gguf` package.
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
import test_hf_prune_families as families

import reap
from helpers.torch_needs import needs as needs
from reap import hf
from reap.cli import main
from reap.errors import MismatchError
from reap.scores.plan import PrunePlan

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # torch and transformers warn about themselves

#: What the converter needs beyond what transformers writes: entries of published configurations.
PUBLISHED: dict[str, dict[str, Any]] = {"minimax_m2": {"rotary_dim": 32}}
#: The converter computes name and size of a folder; a file that is pruned says what is left of its own.
PROVENANCE = ("reap.", "general.name", "general.size_label", "GGUF.")
EXACT: dict[str, Any] = {
    "ctx_size": 128,
    "ubatch_size": 64,
    "type_k": "f32",
    "type_v": "f32",
    "flash_attn": "off",
    "threads": 1,
}


@dataclass(frozen=True)
class Pair:
    """One model in both forms."""

    name: str
    model: Any
    checkpoint: Path
    gguf: Path
    plan: PrunePlan


@pytest.fixture(scope="session")
def pairs(needs: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    return functools.cache(lambda name: make_pair(name, tmp_path_factory.mktemp(name)))


def make_pair(name: str, directory: Path, outtype: str = "f32") -> Pair:
    from helpers import checkpoint_models, torch_models

    model = checkpoint_models.build(name)
    checkpoint = checkpoint_models.save(model, directory / "hf")
    config = json.loads((checkpoint / "config.json").read_text()) | PUBLISHED.get(name, {})
    (checkpoint / "config.json").write_text(json.dumps(config, indent=2))
    gguf = hf.convert_checkpoint(checkpoint, directory / "model.gguf", outtype=outtype, pre=torch_models.PRE)
    return Pair(name, model, checkpoint, gguf, families.make_plan(checkpoint, 4 if name == "deepseek_v3" else 1))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata without provenance, tensors) of a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    metadata = {
        key: (field.types, field.contents()) for key, field in reader.fields.items() if not key.startswith(PROVENANCE)
    }
    return metadata, {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_pruning_commutes_with_converting(pairs: Callable[[str], Pair], tmp_path: Path, family: str) -> None:
    from helpers import torch_models

    pair = pairs(family)
    reap.prune(pair.gguf, tmp_path / "converted-pruned.gguf", pair.plan)
    hf.prune(
        pair.checkpoint, tmp_path / "hf", pair.plan
    )  # of the same name as the source: the converter puts it into the file
    hf.convert_checkpoint(tmp_path / "hf", tmp_path / "pruned-converted.gguf", outtype="f32", pre=torch_models.PRE)
    first, second = read(tmp_path / "converted-pruned.gguf"), read(tmp_path / "pruned-converted.gguf")
    assert first[0] == second[0]
    assert list(first[1]) == list(second[1])
    assert first[1] == second[1]
    records = [reap.inspect(tmp_path / name).provenance for name in ("converted-pruned.gguf", "pruned-converted.gguf")]
    kept = [{key: value for key, value in (record or {}).items() if "fingerprint" not in key} for record in records]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 3 + len(pair.plan.layers)
    key = next(key for key in first[0] if key.endswith(".expert_count"))
    assert first[0][key][1] == pair.plan.keep


@pytest.mark.parametrize("family", families.FAMILIES)
def test_file_and_checkpoint_are_the_same_model(pairs: Callable[[str], Pair], family: str) -> None:
    pair = pairs(family)
    match = hf.compare_with_gguf(pair.checkpoint, pair.gguf)
    assert match.layers == match.routers == reap.inspect(pair.gguf).moe_layers == tuple(pair.plan.layers)
    assert match.router_difference == 0


def test_sixteen_bits_are_the_same_model_and_another_order_is_not(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    pair = pairs("qwen3moe")
    tensors = load_file(pair.checkpoint / "model.safetensors")
    half = copied(pair.checkpoint, tmp_path / "half")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, half / "model.safetensors", {"format": "pt"}
    )
    match = hf.compare_with_gguf(half, pair.gguf)
    assert 0 < match.router_difference < 0.01
    name = "model.layers.1.mlp.gate.weight"
    turned = copied(pair.checkpoint, tmp_path / "turned")
    save_file({**tensors, name: tensors[name].roll(1, 0).contiguous()}, turned / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match="routers of layer 1 differ"):
        hf.compare_with_gguf(turned, pair.gguf)


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_models_that_are_not_the_same(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    qwen = pairs("qwen3moe")
    for family, message in (
        ("olmoe", "n_experts_used is 3 in the file and 2"),
        ("deepseek_v3", "n_experts is 16"),
        ("glm4_moe", r"layers with experts are \[1, 2\] in the file and \[0, 1\]"),
    ):
        with pytest.raises(MismatchError, match=message):
            hf.compare_with_gguf(qwen.checkpoint, pairs(family).gguf)
    with pytest.raises(MismatchError, match="experts of layer 0 have"):
        hf.compare_with_gguf(wider(qwen, tmp_path / "wide"), qwen.gguf)


def wider(pair: Pair, target: Path) -> Path:
    """The same checkpoint with experts of twice the width."""
    import torch
    from safetensors.torch import load_file, save_file

    directory = copied(pair.checkpoint, target)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = torch.cat([tensor, tensor], dim=1 if "down" in name else 0)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_a_profile_of_the_file_prunes_the_checkpoint(
    pairs: Callable[[str], Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole road, by commands: profile the GGUF file, prune the checkpoint, convert, quantise; and the logits of
    it."""
    from helpers import oracle, torch_models
    from reap.engine.options import EngineOptions
    from reap.engine.session import open_session

    pair = pairs("nemotronh")
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in torch_models.samples()))
    profile, small = str(tmp_path / "model.reap.json"), str(tmp_path / "small")
    names = {
        "model": str(pair.gguf),
        "hf": str(pair.checkpoint),
        "f32": str(tmp_path / "small.gguf"),
        "q8": str(tmp_path / "q8.gguf"),
    }
    for call in (
        ["profile", names["model"], str(calibration), "-o", profile, "-ngl", "0", "-c", "128"],
        ["hf", "prune", names["hf"], "--profile", profile, "--keep", "0.5", "--gguf", names["model"], "-o", small],
        ["convert", small, names["f32"], "--outtype", "f32", "--pre", torch_models.PRE],
        ["quantize", names["f32"], names["q8"], "Q8_0"],
        ["inspect", names["q8"]],
    ):
        assert main(call) == 0, call
    said = capsys.readouterr().out
    assert "made of a GGUF file" in said
    plan = reap.plan(profile, keep=0.5)
    session = open_session(tmp_path / "small.gguf", EngineOptions(**EXACT))
    sliced = oracle.keep_experts(pair.model, plan.layers)
    for tokens in torch_models.samples():
        expected = oracle.logits(sliced, tokens)
        measured = session.logits(np.array(tokens, dtype=np.int32), 0)
        assert np.abs(measured - expected).max() < 1e-4 * expected.std()
    record = json.loads((tmp_path / "small" / "reap.json").read_text())
    assert record["kept"] == {str(layer): list(kept) for layer, kept in plan.layers.items()}


def test_a_profile_of_the_checkpoint_prunes_both(
    pairs: Callable[[str], Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured by transformers: the checkpoint pruned and converted is the file pruned, where prediction layers are
    left out."""
    from helpers import torch_models

    pair = pairs("nemotronh")
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in torch_models.samples()))
    profile, small = str(tmp_path / "hf.reap.json"), str(tmp_path / "hf")
    converted, pruned = str(tmp_path / "converted.gguf"), str(tmp_path / "pruned.gguf")
    for call in (
        ["hf", "profile", str(pair.checkpoint), str(calibration), "-o", profile, "--device", "cpu"],
        ["hf", "prune", str(pair.checkpoint), "--profile", profile, "--keep", "0.5", "--drop-mtp", "-o", small],
        ["convert", small, converted, "--outtype", "f32", "--pre", torch_models.PRE],
        ["prune", str(pair.gguf), "--profile", profile, "--keep", "0.5", "--hf", str(pair.checkpoint), "-o", pruned],
    ):
        assert main(call) == 0, capsys.readouterr().err
    assert "made of a Hugging Face checkpoint" in capsys.readouterr().out
    assert read(Path(converted)) == read(Path(pruned))
    measured, expected = reap.Profile.load(profile), reap.profile(pair.gguf, calibration, **EXACT)
    assert measured.layers.tolist() == expected.layers.tolist()
    np.testing.assert_array_equal(measured.counts, expected.counts)


def test_a_plan_of_the_checkpoint_prunes_the_file(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """A fingerprint of a checkpoint says nothing of a file; layers, experts, groups and widths are compared."""
    pair = pairs("deepseek_v3")
    hf.prune(pair.checkpoint, tmp_path / "small", pair.plan)
    source = json.loads((tmp_path / "small" / "reap.json").read_text())["source"]
    model = {
        **pair.plan.model,
        "fingerprint": source["fingerprint"],
        "n_embd": 64,
        "n_experts_used": 3,
        "n_groups_used": 2,
    }
    plan = PrunePlan(model, "reap", pair.plan.keep, pair.plan.layers)
    report = reap.prune(pair.gguf, tmp_path / "small.gguf", plan)
    assert any("made of a Hugging Face checkpoint" in warning for warning in report.warnings)
    assert hf.compare_with_gguf(tmp_path / "small", tmp_path / "small.gguf").router_difference == 0
    for key, value in (("n_embd", 128), ("n_experts_used", 2), ("n_groups_used", 4)):
        with pytest.raises(MismatchError, match=f"{key} is {value} in the plan and .* in"):
            reap.prune(
                pair.gguf, tmp_path / "no.gguf", PrunePlan({**model, key: value}, "reap", plan.keep, plan.layers)
            )
