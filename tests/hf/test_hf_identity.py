"""Checkpoints of one shape are told apart, on disk and in memory, and one model is known in all its forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from transformers import PreTrainedModel

import reap
from helpers.torch_models import build, make_tokenizer, save
from reap import hf
from reap.errors import MismatchError, ReapWarning
from reap.gguf.router_sketch import measure_distances
from reap.hf.disk.checkpoint_files import Checkpoint
from reap.hf.disk.info import CheckpointInfo, describe_checkpoint, read_vocabulary
from reap.hf.disk.layout import read_checkpoint_layout
from reap.scores.identity import compare_records

LINES = [{"tokens": list(range(10, 60))}, {"tokens": list(range(70, 130))}]


def info_of(path: Path) -> CheckpointInfo:
    with Checkpoint.open(path) as checkpoint:
        return describe_checkpoint(checkpoint, read_checkpoint_layout(checkpoint))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("qwen3moe")


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("identity") / "model")


def differences(first: dict[str, Any], second: dict[str, Any]) -> tuple[str, ...]:
    return compare_records(first, second, ("one", "other")).differences


def test_a_checkpoint_and_the_model_in_memory_are_one(model: PreTrainedModel, folder: Path) -> None:
    on_disk = info_of(folder)
    from_folder = hf.profile(folder, LINES, ctx_size=64).model
    in_memory = hf.profile(model, LINES, tokenizer=make_tokenizer(), ctx_size=64).model
    assert "tokenizer" in on_disk.identity
    for record in (from_folder, in_memory):
        assert record["fingerprint"] == on_disk.fingerprint
        assert record["identity"] == dict(on_disk.identity)
        assert not differences(record, on_disk.record())
    assert from_folder["routers"] == on_disk.record()["routers"] == in_memory["routers"]


def test_a_checkpoint_in_bf16_is_the_same_model(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    half = save(build("qwen3moe").to(torch.bfloat16), tmp_path / "half")
    found = measure_distances(info_of(folder).routers, info_of(half).routers)
    assert {distance.types for distance in found} == {("F32", "BF16")}
    assert not any(distance.differs for distance in found)
    assert not differences(info_of(folder).record(), info_of(half).record())


def test_the_gguf_file_has_the_same_sketch(folder: Path, tmp_path: Path) -> None:
    converted = tmp_path / "model.gguf"
    reap.convert(folder, converted, outtype="f32", pre="qwen2")
    checkpoint, file = info_of(folder), reap.inspect(converted)
    distances = measure_distances(checkpoint.routers, file.routers)
    assert [distance.layer for distance in distances] == list(checkpoint.moe_layers)
    assert max(distance.distance for distance in distances) < 1e-7
    made = reap.plan(hf.profile(folder, LINES, ctx_size=64), keep=0.5)
    reap.prune(converted, tmp_path / "small.gguf", made)
    sibling = save(build("qwen3moe", seed=77), tmp_path / "sibling")
    other = reap.plan(hf.profile(sibling, LINES, ctx_size=64), keep=0.5)
    with pytest.raises(MismatchError, match="the routers of"):
        reap.prune(converted, tmp_path / "no.gguf", other)


def test_a_sibling_is_refused_on_disk_and_in_memory(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    made = reap.plan(hf.profile(folder, LINES, ctx_size=64), keep=0.5)
    sibling = save(build("qwen3moe", seed=77), tmp_path / "sibling")
    with pytest.raises(MismatchError, match=r"the routers of \d of \d layers differ"):
        hf.prune(sibling, tmp_path / "small", made, force=True)
    report = hf.prune(sibling, tmp_path / "small", made, allow_mismatch=True)
    assert any("the routers of" in warning for warning in report.warnings)
    assert "the routers of" in json.loads((tmp_path / "small" / "reap.json").read_text())["mismatch"]
    with pytest.raises(MismatchError, match="the routers of"):
        hf.prune_model(build("qwen3moe", seed=77), made)
    with pytest.warns(ReapWarning, match="the routers of"):
        hf.prune_model(build("qwen3moe", seed=77), made, allow_mismatch=True)
    hf.prune_model(build("qwen3moe"), made)


def test_one_step_of_an_optimiser_makes_another_model(folder: Path, tmp_path: Path) -> None:
    tuned = build("qwen3moe")
    step = torch.optim.Adam(tuned.parameters(), lr=1e-5)
    ids = torch.tensor([list(range(10, 74))])
    tuned(input_ids=ids, labels=ids).loss.backward()
    step.step()
    found = differences(info_of(folder).record(), info_of(save(tuned, tmp_path / "tuned")).record())
    assert len(found) == 1
    assert "the routers of" in found[0]


def test_families_of_one_shape_have_their_own_fingerprint(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "olmoe"}))
    assert info_of(tmp_path / "other").fingerprint != info_of(folder).fingerprint
    made = reap.plan(hf.profile(folder, LINES, ctx_size=64), keep=0.5)
    with pytest.raises(MismatchError, match="model_type is qwen3_moe in the plan and olmoe in other"):
        hf.prune(tmp_path / "other", tmp_path / "small", made)


def test_another_tokenizer_is_another_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(document))
    made = reap.plan(hf.profile(folder, LINES, ctx_size=64), keep=0.5)
    with pytest.raises(MismatchError, match="tokenizer differs"):
        hf.prune(tmp_path / "other", tmp_path / "small", made)
    path.unlink()
    assert read_vocabulary(tmp_path / "other") is None
    hf.prune(tmp_path / "other", tmp_path / "small", made)


def test_what_older_releases_wrote_still_serves(folder: Path, tmp_path: Path) -> None:
    (older,) = info_of(folder).older_fingerprints
    profile = hf.profile(folder, LINES, ctx_size=64)
    record = {key: value for key, value in profile.model.items() if key not in ("identity", "routers")}
    made = reap.plan(profile, keep=0.5)
    plan = reap.PrunePlan({**record, "fingerprint": older}, "reap", made.keep, made.layers)
    report = hf.prune(folder, tmp_path / "small", plan)
    assert any("no sketch of the routers" in warning for warning in report.warnings)
