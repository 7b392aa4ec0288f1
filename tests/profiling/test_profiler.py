"""profile(): batches, failures, checkpoints, Ctrl-C and kill."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf
from helpers.gguf_builder import build_moe
from helpers.sums import SUMS
from reap.errors import CalibrationError, EngineError, Interrupted, MismatchError, UnsupportedModelError, UsageError
from reap.profiling.gguf import profile
from reap.progress import Progress
from reap.scores.merging import merge
from reap.scores.profile import Profile

EXACT: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": "off", "threads": 2}


def samples(n: int = 12, longest: int = 90, seed: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest, n)
    return [{"tokens": rng.integers(0, 60, length).tolist(), "domain": "ab"[i % 2]} for i, length in enumerate(lengths)]


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_moe(tmp_path_factory.mktemp("profiler") / "tiny.gguf", n_layers=3, n_experts=8, n_used=3)


def assert_same(found: Profile, expected: Profile, rtol: float = 1e-5) -> None:
    assert (found.counts == expected.counts).all()
    for name in SUMS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=rtol, err_msg=name)


def test_shared_batches_long_samples_and_one_by_one_agree(model: Path) -> None:
    lines = samples()
    total = sum(len(line["tokens"]) for line in lines)
    alone = None
    for line in lines:
        part = profile(model, [line], **EXACT)
        alone = part if alone is None else merge([alone, part])
    assert alone is not None
    shared = profile(model, lines, **EXACT)
    split = profile(model, lines, ubatch_size=16, **EXACT)
    assert shared.total_tokens.tolist() == [total] * 3
    assert shared.counts.sum(axis=1).tolist() == [total * 3] * 3
    assert_same(shared, alone)
    assert_same(split, alone)


def test_the_smallest_batches(model: Path) -> None:
    one = profile(model, samples(2, longest=20), batch_size=1, ubatch_size=1, **EXACT)
    assert_same(one, profile(model, samples(2, longest=20), **EXACT))


def test_domains_add_up(model: Path) -> None:
    whole = profile(model, samples(), **EXACT)
    a, b = whole.domain("a"), whole.domain("b")
    assert whole.domains == ("a", "b")
    assert (a.counts + b.counts == whole.counts).all()
    only_a = profile(model, [line for line in samples() if line["domain"] == "a"], **EXACT)
    assert_same(a, only_a)


def test_windows_of_a_long_sample_are_all_counted(model: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 500).tolist()
    found = profile(model, [{"tokens": tokens}], ctx_size=64, **EXACT)
    assert found.calibration["windows"] == 8
    assert found.total_tokens.tolist() == [500, 500, 500]


def test_max_tokens(model: Path) -> None:
    found = profile(model, samples(), max_tokens=100, **EXACT)
    assert found.total_tokens.tolist() == [100, 100, 100]


def test_progress_reaches_the_total(model: Path) -> None:
    seen: list[Progress] = []
    found = profile(model, samples(), progress=seen.append, **EXACT)
    assert [report.done for report in seen] == sorted(report.done for report in seen)
    assert seen[-1].done == found.total_tokens[0]


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    dense = build_moe(tmp_path / "dense.gguf", architecture="qwen3", n_experts=0)
    with pytest.raises(UnsupportedModelError, match=r"dense\.gguf: qwen3 here is a dense model"):
        profile(dense, samples())


def test_an_empty_calibration_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CalibrationError, match=r"empty\.jsonl"):
        profile(model, tmp_path / "empty.jsonl")


def test_out_of_memory_says_what_to_lower(model: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot make a context of 1073741824 tokens \(a smaller ctx-size"):
        profile(model, samples(), ctx_size=1 << 30, **EXACT)


# --- samples that fail ---


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token 63 has an infinite embedding: a sample with it fails."""
    path = build_moe(tmp_path_factory.mktemp("broken") / "broken.gguf", n_layers=2)
    reader = gguf.GGUFReader(str(path), "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    tensor.data[63] = np.inf
    reader.data.flush()
    return path


def test_a_failing_sample_is_named_and_not_half_counted(broken_model: Path, tmp_path: Path) -> None:
    lines = samples(6, longest=40)
    bad = {"tokens": [1, 2, 3, 63], "domain": "a"}
    long_and_bad = {"tokens": [1] * 700 + [63] + [2] * 700, "domain": "b"}
    path = write_jsonl(tmp_path / "c.jsonl", [*lines[:2], bad, *lines[2:4], long_and_bad, *lines[4:]])
    found = profile(broken_model, path, **EXACT)
    assert_same(found, profile(broken_model, lines, **EXACT))
    assert found.calibration["failed"] == 2
    first, second = found.calibration["failed_samples"]
    assert "c.jsonl:3: layer 0: expert" in first
    assert "not a finite number" in first
    assert "c.jsonl:6: " in second


def test_when_every_sample_fails_it_is_an_error(broken_model: Path) -> None:
    with pytest.raises(EngineError, match="not a finite number"):
        profile(broken_model, [{"tokens": [63, 1]}] * 3)
    with pytest.raises(EngineError, match="so did each of the 9 samples before it"):
        profile(broken_model, [{"tokens": [63, 1]}] * 1000)


# --- checkpoints ---


def test_a_resumed_run_gives_the_same_to_the_last_bit(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", samples(40))
    options = {**EXACT, "ubatch_size": 64}
    straight = profile(model, path, **options)
    stop_after = iter(range(2, 1000, 2))

    def interrupt(limit: int):
        calls = 0

        def progress(_: Progress) -> None:
            nonlocal calls
            calls += 1
            if calls >= limit:
                raise KeyboardInterrupt

        return progress

    keep = tmp_path / "run.checkpoint"
    messages: list[str] = []
    while True:
        try:
            resumed = profile(
                model,
                path,
                checkpoint=keep,
                resume=True,
                checkpoint_seconds=0,
                progress=interrupt(next(stop_after)),
                **options,
            )
            break
        except Interrupted as stop:
            messages.append(str(stop))
    assert len(messages) >= 2
    assert any("run.checkpoint keeps; --resume" in message for message in messages)
    # the first sample may take more batches than the first limit
    assert all("goes on from there" in message or "before a sample was done" in message for message in messages)
    assert (resumed.counts == straight.counts).all()
    for name in SUMS:
        assert (getattr(resumed, name) == getattr(straight, name)).all()
    assert resumed.domains == straight.domains
    assert resumed.calibration == straight.calibration


def test_a_checkpoint_of_another_run_is_refused(model: Path, broken_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", samples(6))
    keep = tmp_path / "run.checkpoint"
    profile(model, path, checkpoint=keep, **EXACT)
    with pytest.raises(UsageError, match=r"run\.checkpoint: a resume file is there already"):
        profile(model, path, checkpoint=keep, **EXACT)
    again = {"checkpoint": keep, "resume": True, **EXACT}
    with pytest.raises(MismatchError, match="options ctx_size 256, where this one has 64"):
        profile(model, path, ctx_size=64, **again)
    with pytest.raises(MismatchError, match="options mask 'all'"):
        profile(model, path, mask="response", **again)
    with pytest.raises(MismatchError, match="model fingerprint"):
        profile(broken_model, path, **again)
    with pytest.raises(MismatchError, match="another calibration"):
        profile(model, write_jsonl(tmp_path / "d.jsonl", samples(7)), **again)
    with pytest.raises(UsageError, match="resume needs a checkpoint"):
        profile(model, path, resume=True, **EXACT)


RUN = """
import sys, reap
from pathlib import Path
model, text, keep, out = sys.argv[1:]
result = reap.profile(model, text, checkpoint=keep, resume=True, checkpoint_seconds=0, ubatch_size=64, ctx_size=256,
                               type_k="f32", type_v="f32", flash_attn="off", threads=1,
                               progress=lambda _: print(".", end="", flush=True))
result.save(out)
"""


def start(model: Path, text: Path, keep: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(model), str(text), str(keep), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


COMMAND = """
import signal, sys, reap
from reap.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background takes away
profile, batches = reap.profile, iter(range(sys.maxsize))
def noisy(*arguments, progress, **options):
    return profile(*arguments, progress=lambda _: next(batches) == 20 and print("begun", flush=True), **options)
reap.profile = noisy
sys.exit(main(sys.argv[1:]))
"""


def start_command(words: list[str]) -> subprocess.Popen[str]:
    """The command `reap profile`, which prints "begun" once some batches are done."""
    command = [sys.executable, "-c", COMMAND, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sigint_saves_and_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "c.jsonl", samples(3000))
    process = start(model, text, tmp_path / "keep", tmp_path / "out")
    assert process.stdout is not None
    process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Interrupted: stopped after" in errors
    assert "goes on from there" in errors
    kept = json.loads((tmp_path / "keep").read_text())
    assert kept["units"] > 0
    assert not (tmp_path / "out").exists()


def test_the_command_line_exits_with_130_and_goes_on(model: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "c.jsonl", samples(20000))
    keep, out = tmp_path / "keep", tmp_path / "out.json"
    arguments = [
        "-m",
        "reap",
        "profile",
        str(model),
        str(text),
        "-o",
        str(out),
        "-c",
        "256",
        "-ub",
        "64",
        "-t",
        "1",
        "--checkpoint",
        str(keep),
    ]
    process = start_command(arguments[2:])
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in errors
    assert keep.exists()
    assert not out.exists()
    again = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "a resume file is there already" in again.stderr
    short = write_jsonl(tmp_path / "d.jsonl", samples(5))
    arguments[3], arguments[4] = str(model), str(short)
    keep.unlink()
    assert subprocess.run([sys.executable, *arguments], check=False, capture_output=True).returncode == 0
    assert out.exists()
    assert not keep.exists()  # the profile holds all of it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_keeps_its_state_beside_its_output(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    """With no option at all: stopped, it says where its state is; with --resume it goes on; then the file is gone."""
    text = write_jsonl(tmp_path / "c.jsonl", samples(20000))
    out, kept = tmp_path / "out.json", tmp_path / "out.json.resume"
    words = ["profile", str(model), str(text), "-o", str(out), "-c", "256", "-ub", "64", "-t", "1"]
    process = start_command(words)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"which {kept} keeps; --resume" in errors
    assert json.loads(kept.read_text())["units"] > 0
    assert not out.exists()
    again = [sys.executable, "-m", "reap", *words, "--resume"]
    other = subprocess.run([*again, "--max-tokens", "1000000000"], capture_output=True, text=True, check=False)
    assert "max_tokens" in other.stderr
    write_jsonl(text, samples(20000)[: json.loads(kept.read_text())["units"] + 5])  # a shorter rest
    assert subprocess.run(again, capture_output=True, check=False).returncode == 0
    assert out.exists()
    assert not kept.exists()


def test_options_that_are_lists_can_be_resumed(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", samples(6))
    options = {"checkpoint": tmp_path / "keep", "override_tensors": [("ffn_down_exps", "CPU")], **EXACT}
    first = profile(model, path, **options)
    assert_same(profile(model, path, resume=True, **options), first, rtol=0)


def test_a_line_that_cannot_be_used_is_found_before_the_model_runs(model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", samples(6))
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(CalibrationError, match=r"c\.jsonl:7: is not JSON"):
        profile(model, path, progress=lambda _: pytest.fail("it ran"), **EXACT)


def test_kills_lose_nothing_beyond_the_checkpoint(model: Path, tmp_path: Path) -> None:
    """REAP_KILLS: how many; 10 where nothing is said, 100 in .ci/run."""
    n_kills = int(os.environ.get("REAP_KILLS", "10"))
    text = write_jsonl(tmp_path / "c.jsonl", samples(2500))
    keep, out = tmp_path / "keep", tmp_path / "out.json"
    rng = random.Random(5)
    units = 0
    for _ in range(n_kills):
        process = start(model, text, keep, out)
        assert process.stdout is not None
        process.stdout.read(1)  # it has begun: kill it in the middle of batches and of saving
        time.sleep(rng.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        if keep.exists():
            kept = json.loads(keep.read_text())  # never half-written
            assert kept["units"] >= units
            units = kept["units"]
            routed, tokens = (
                sum(np.frombuffer(base64.b64decode(group[name]), "<i8").sum() for group in kept["groups"])
                for name in ("counts", "total_tokens")
            )
            assert routed == 3 * tokens
    assert units > 0
    assert not out.exists()
    process = start(model, text, keep, out)
    process.communicate(timeout=300)
    assert process.returncode == 0
    finished = Profile.load(out)
    straight = profile(model, text, ubatch_size=64, ctx_size=256, **{**EXACT, "threads": 1})
    assert (finished.counts == straight.counts).all()
    for name in SUMS:
        assert (getattr(finished, name) == getattr(straight, name)).all()
