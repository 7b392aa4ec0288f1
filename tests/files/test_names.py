"""Names and paths that are not UTF-8, which file systems allow: read, written, and printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import reap
from helpers.checkpoint_builder import KEPT, N_EXPERTS, build, config, qwen
from helpers.gguf_builder import build_moe
from helpers.imatrices import write_gguf_imatrix
from helpers.profiles import make_profile
from reap.errors import ReapError
from reap.files.atomic import check_outputs
from reap.gguf.imatrix import read_imatrix
from reap.hf import prune as prune_checkpoint
from reap.scores.plan import PrunePlan


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder whose name holds a byte that is not UTF-8."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    return folder


def named(folder: Path, name: bytes) -> Path:
    return folder / os.fsdecode(name)


def plan_for(model: Path) -> PrunePlan:
    info = reap.inspect(model)
    named = {"n_experts": info.n_experts, "fingerprint": info.fingerprint}
    return PrunePlan(named, "reap", 4, dict.fromkeys(info.moe_layers, (0, 1, 2, 3)))


def test_models_profiles_plans_and_pages(odd: Path) -> None:
    model = build_moe(odd / "m")
    model = model.rename(named(odd, b"m\xff.gguf"))
    assert reap.inspect(model).n_experts == 8
    plan = plan_for(model).save(named(odd, b"plan\xff.json"))
    pruned = reap.prune(model, named(odd, b"s\xff.gguf"), plan, verify="full").output
    assert reap.inspect(pruned).n_experts == 4
    files = reap.prune(model, named(odd, b"t\xff.gguf"), plan, split_max_size="100K").files
    assert len(files) > 1
    assert reap.inspect(max(files)).n_experts == 4
    profile = make_profile().save(named(odd, b"p\xff.json"))
    assert reap.Profile.load(profile).n_experts == 8
    assert reap.report(profile, named(odd, b"r\xff.html")).stat().st_size
    assert reap.model_card(pruned, named(odd, b"c\xff.md")).stat().st_size
    with read_imatrix(write_gguf_imatrix(odd / "i", {"blk.0.ffn_gate_exps.weight": (4, 4)})) as matrix:
        assert matrix.entries
    assert not [path for path in odd.iterdir() if path.name.endswith(".reap-tmp")]


def test_checkpoints_and_what_lies_beside_them(odd: Path) -> None:
    build(odd / "in", qwen(), config())
    named(odd / "in", b"lies\xe9.txt").write_text("beside")
    kept = len(next(iter(KEPT.values())))
    report = prune_checkpoint(odd / "in", odd / "out", PrunePlan({"n_experts": N_EXPERTS}, "reap", kept, KEPT))
    assert named(odd / "out", b"lies\xe9.txt").read_text() == "beside"
    json.dumps(report.to_dict())


def test_errors_name_the_file(odd: Path) -> None:
    """In one line that a terminal can show, whatever the file is."""
    broken = named(odd, b"x\xff.gguf")
    for content in (b"", b"GGUF" + bytes(100), b"{", b"text\n" * 100):
        broken.write_bytes(content)
        for read in (reap.inspect, reap.Profile.load, PrunePlan.load, read_imatrix):
            with pytest.raises(ReapError) as caught:
                read(broken)
            assert str(caught.value).startswith(str(broken))
    with pytest.raises(ReapError, match="exists already"):
        check_outputs([broken], force=False)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_the_command_line_prints_such_names(odd: Path, more: list[str]) -> None:
    model = build_moe(odd / "m").rename(named(odd, b"m\xff.gguf"))
    plan = plan_for(model).save(odd / "plan.json")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    for arguments, status in (
        (["inspect", model], 0),
        (["prune", model, "--plan", plan, "-o", named(odd, b"s\xff.gguf")], 0),
        (["prune", model, "--plan", plan, "-o", named(odd, b"s\xff.gguf")], 2),
        (["inspect", named(odd, b"absent\xff.gguf")], 2),
    ):
        command = [sys.executable, "-m", "reap", *map(os.fsencode, arguments), *more]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr
        if more and not status:
            json.loads(done.stdout)
