"""Bytes by kind of tensor, against the files themselves."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import reap
from helpers.gguf_builder import build_moe
from helpers.paths import GOLDEN
from reap.pruning.sizing import EXPERTS, ROUTERS, measure_size
from reap.scores.plan import PrunePlan

FILES = sorted(GOLDEN.glob("*.gguf"))


def plan_of(path: Path, keep: int) -> PrunePlan:
    info = reap.inspect(path)
    rng = np.random.default_rng(1)
    size = info.n_experts // info.n_groups
    kept = {
        layer: tuple(sorted(
            int(expert) for group in range(info.n_groups)
            for expert in rng.choice(size, keep // info.n_groups, replace=False) + group * size
        ))
        for layer in info.moe_layers
    }  # fmt: skip
    return PrunePlan({"n_experts": info.n_experts, "fingerprint": info.fingerprint}, "reap", keep, kept)


@pytest.mark.parametrize(
    "model", [*FILES, *Path(str(files("reap") / "data")).glob("*.gguf")], ids=lambda path: path.stem
)
def test_before_and_after_are_the_files_sizes(model: Path, tmp_path: Path) -> None:
    info = reap.inspect(model)
    plan = plan_of(model, info.n_experts // 2)
    size = measure_size(model, plan)
    pruned = tmp_path / "pruned.gguf"
    reap.prune(model, pruned, plan)
    assert size.n_bytes_before == model.stat().st_size == sum(item.n_bytes_before for item in size.classes)
    assert size.n_bytes_after == pruned.stat().st_size == sum(item.n_bytes_after for item in size.classes)
    measured = {item.name: item for item in measure_size(pruned).classes}
    for item in size.classes:
        assert (measured[item.name].n_bytes_before, measured[item.name].n_tensors) == (
            item.n_bytes_after,
            item.n_tensors,
        ), item.name
    by_name = {item.name: item for item in size.classes}
    assert by_name[EXPERTS].n_bytes_before == info.expert_bytes
    assert by_name[EXPERTS].n_bytes_after * info.n_experts == info.expert_bytes * plan.keep
    assert by_name[ROUTERS].n_bytes_after < by_name[ROUTERS].n_bytes_before
    unchanged = set(by_name) - {EXPERTS, ROUTERS, "header and padding"}
    assert all(by_name[name].n_bytes_after == by_name[name].n_bytes_before for name in unchanged)
    assert {"attention", "embeddings and output"} <= unchanged


def test_a_model_without_a_plan_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    build_moe(path)
    size = measure_size(path)
    assert size.n_bytes_before == size.n_bytes_after == path.stat().st_size
