"""shrink: what it leaves, what it does again and what not, what it never touches, and that a killed one goes on.

REAP_KILLS says how many processes are killed, as in the other tests that do so; of these, which take seconds each, a
tenth, and never fewer than 4.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap
from helpers.gguf_builder import build_moe
from reap.cli import main
from reap.engine.session import open_vocabulary
from reap.errors import Interrupted, OutputError, UsageError
from reap.pipeline.shrink_estimate import estimate_shrink
from reap.text.evaluation_text import read_evaluation_text

KILLS = max(4, int(os.environ.get("REAP_KILLS", "10")) // 10)
CTX = 32
ENGINE: dict[str, Any] = {"ctx_size": CTX, "ubatch_size": CTX, "threads": 1}
METRICS = ["reap", "frequency"]  # the model's weights are random, so that a random choice may well be better than both
STEPS = ["text", "profile", "sweep", "plan", "prune", "evaluate", "page", "card"]
LEFT = {
    "MODEL_CARD.md", "evaluation.json", "m-pruned.gguf", "plan.json", "profile.json", "report.html", "shrink.json",
    "sweep.json", "text-choose.jsonl", "text-judge.jsonl",
}  # fmt: skip


def write_lines(path: Path, seed: int, n_lines: int, length: int) -> Path:
    rng = np.random.default_rng(seed)
    lines = [
        {"tokens": rng.integers(0, 64, length).tolist(), "domain": ("a", "b")[number % 2]} for number in range(n_lines)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, a calibration and a held-out text of two domains."""
    folder = tmp_path_factory.mktemp("inputs")
    build_moe(folder / "m.gguf", n_layers=2, n_experts=8, n_used=2)
    write_lines(folder / "c.jsonl", 1, 24, 50)
    write_lines(folder / "t.jsonl", 2, 12, 64)
    return folder


def shrink(inputs: Path, out: Path, **options: Any) -> tuple[reap.ShrinkResult, list[str]]:
    """The result, and the steps that were run."""
    run: list[str] = []
    given: dict[str, Any] = {
        "calibration": inputs / "c.jsonl",
        "text": inputs / "t.jsonl",
        "metric": METRICS,
    }
    given |= ENGINE | ({} if {"target_size", "max_ppl_increase"} & set(options) else {"keep": 0.5}) | options
    return reap.shrink(inputs / "m.gguf", out, on_step=run.append, **given), run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the job, by name; its own record, which knows times, apart."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "shrink.json"}


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    """A finished job, to look at or to copy."""
    shrink(inputs, inputs.parent / "finished")
    return inputs.parent / "finished"


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(finished, tmp_path / "job"))


# ---- what it leaves


def test_every_step_leaves_its_file(inputs: Path, finished: Path) -> None:
    result, run = shrink(inputs, finished)
    assert run == []
    assert {path.name for path in finished.iterdir()} == LEFT
    assert reap.inspect(finished / "m-pruned.gguf").n_experts == result.keep == 4
    table = reap.Sweep.load(finished / "sweep.json")
    assert reap.PrunePlan.load(finished / "plan.json").experts_sha256 == table.winner().row.experts_sha256
    assert result.metric == table.winner().row.metric
    again = reap.evaluate(
        finished / "m-pruned.gguf", finished / "text-judge.jsonl", reference=inputs / "m.gguf", **ENGINE
    )
    assert result.cost.ratio == again.perplexity_ratio
    assert result.cost.ratio_stderr == again.ratio_stderr
    assert result.n_bytes_after == (finished / "m-pruned.gguf").stat().st_size
    assert set(result.domains) == {"a", "b"}
    assert [name for name, _ in result.lines] == ["size", "cost", "criterion", "try next"]


def test_the_text_is_divided_and_nothing_is_in_both_parts(inputs: Path, finished: Path) -> None:
    tokenizer = open_vocabulary(inputs / "m.gguf")
    whole = read_evaluation_text(inputs / "t.jsonl", tokenizer, CTX)
    parts = [read_evaluation_text(finished / f"text-{name}.jsonl", tokenizer, CTX) for name in ("choose", "judge")]
    seen = [{(domain, *window.tolist()) for domain, window in zip(p.domain_of, p.windows, strict=True)} for p in parts]
    everything = {(domain, *window.tolist()) for domain, window in zip(whole.domain_of, whole.windows, strict=True)}
    assert seen[0] | seen[1] == everything
    assert not seen[0] & seen[1]
    assert all({key[0] for key in part} == {"a", "b"} for part in seen)
    assert reap.Sweep.load(finished / "sweep.json").text["windows"] == len(parts[0].windows)
    assert json.loads((finished / "evaluation.json").read_text())["windows"] == len(parts[1].windows)


def test_a_real_text_s_windows_are_those_of_the_whole(tmp_path: Path) -> None:
    """With a tokenizer: what is written and read again is what the engine would have got."""
    data = Path(reap.__file__).parent / "data"
    model, text = next(data.glob("*.gguf")), data / "heldout" / "c.txt"
    from reap.pipeline.text_parts import divide_text, write_part

    parts = divide_text(model, text, 128, 4000)
    for part in parts:
        write_part(part, tmp_path / "p.jsonl")
        read = read_evaluation_text(tmp_path / "p.jsonl", open_vocabulary(model), 128)
        assert [window.tolist() for window in read.windows] == [window.tolist() for window in part.windows]
    assert len(parts[0].windows) + len(parts[1].windows) == 4000 // 128


def test_limits(inputs: Path, tmp_path: Path) -> None:
    info = reap.inspect(inputs / "m.gguf")
    limit = info.n_bytes - 3 * info.bytes_per_expert + 4096
    result, _ = shrink(inputs, tmp_path / "size", target_size=limit)
    assert result.keep == 5
    assert result.n_bytes_after <= limit
    result, _ = shrink(inputs, tmp_path / "loss", max_ppl_increase="400%")
    table = reap.Sweep.load(tmp_path / "loss" / "sweep.json")
    chosen = table.select(metric=result.metric, keep=result.keep)[0]
    assert chosen.perplexity <= 5 * table.baseline.perplexity
    assert result.max_ppl_increase == 4.0


# ---- what is done again


def test_a_file_that_was_touched_but_is_equal_changes_nothing(inputs: Path, job: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(inputs, tmp_path / "inputs"))  # other inodes, other times, the same contents
    assert shrink(inputs, job)[1] == []
    for path in job.iterdir():
        if path.name != "shrink.json":
            os.utime(path)
    os.utime(inputs / "c.jsonl")
    assert shrink(inputs, job)[1] == []
    assert shrink(copy, job, calibration=inputs / "c.jsonl")[1] == []


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"keep": 6}, ["sweep", "plan", "prune", "evaluate", "page", "card"]),
        ({"metric": ["reap"]}, ["sweep", "page", "card"]),
        ({"mask": "response"}, ["profile"]),
        ({"loops": True}, ["evaluate", "card"]),
        ({"ubatch_size": 16}, ["profile", "sweep", "evaluate", "page", "card"]),
        ({"max_text_tokens": 8 * CTX}, ["text", "sweep", "evaluate", "page", "card"]),
    ],
)
def test_an_option_does_again_what_follows_from_it(
    options: dict[str, Any], again: list[str], inputs: Path, job: Path, tmp_path: Path
) -> None:
    """At least that; where the sweep has another winner, what follows from it as well."""
    run = shrink(inputs, job, **options)[1]
    assert set(again) <= set(run)
    assert run == [name for name in STEPS if name in run]
    if options != {"mask": "response"}:
        assert "text" not in run or "text" in again
        assert "profile" not in run or "profile" in again
    fresh = tmp_path / "job-fresh"
    shrink(inputs, fresh, **options)
    assert {name for name in contents(job)} == {name for name in contents(fresh)}
    for name, content in contents(job).items():
        if name in ("plan.json", "m-pruned.gguf", "text-choose.jsonl", "text-judge.jsonl"):
            assert content == (fresh / name).read_bytes(), name


def test_what_a_step_leaves_unchanged_is_not_followed(inputs: Path, job: Path) -> None:
    """More criteria, and the same one wins: the same plan, so nothing is written or judged again."""
    before = (job / "plan.json").read_bytes()
    run = shrink(inputs, job, metric=[*METRICS, "gate_sum"])[1]
    if (job / "plan.json").read_bytes() == before:
        assert run == ["sweep", "plan", "page", "card"]


def test_another_calibration_under_the_same_name(inputs: Path, job: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(inputs, tmp_path / "inputs"))
    shrink(mine, job)
    write_lines(mine / "c.jsonl", 5, 24, 50)
    assert shrink(mine, job)[1][:2] == ["profile", "sweep"]


def test_a_file_that_is_gone_is_written_again(inputs: Path, job: Path) -> None:
    before = contents(job)
    for name in ("m-pruned.gguf", "report.html", "text-judge.jsonl"):
        (job / name).unlink()
    assert shrink(inputs, job)[1] == ["text", "prune", "page"]
    assert contents(job) == before


def test_a_file_that_was_changed_is_not_overwritten(inputs: Path, job: Path) -> None:
    plan = json.loads((job / "plan.json").read_text())
    plan["metric"] = "mine"
    (job / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match=r"plan\.json: was changed since .* wrote it; --force"):
        shrink(inputs, job)
    assert json.loads((job / "plan.json").read_text())["metric"] == "mine"
    assert shrink(inputs, job, force=True)[1] == ["plan"]
    assert json.loads((job / "plan.json").read_text())["metric"] in METRICS


# ---- what it never touches


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["profile.json", "m-pruned.gguf", "MODEL_CARD.md", "shrink.json"])
def test_a_file_of_somebody_else_s_stays(name: str, force: bool, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}')
    (out / "notes.txt").write_text("mine")
    with pytest.raises(reap.ReapError, match=rf"{name}:? (is there and was not written by this job|lacks)"):
        shrink(inputs, out, force=force)
    assert (out / name).read_text() == '{"mine": 1}'
    assert {path.name for path in out.iterdir()} == {name, "notes.txt"}


def test_other_files_in_the_folder_are_no_obstacle(inputs: Path, job: Path) -> None:
    (job / "notes.txt").write_text("mine")
    (job / "m-pruned.gguf").unlink()
    shrink(inputs, job)
    assert (job / "notes.txt").read_text() == "mine"


def test_calls_that_cannot_work(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="how small is it to become"):
        shrink(inputs, tmp_path / "o", keep=0.5, target_size="1G")
    with pytest.raises(UsageError, match="is the calibration and the text as well"):
        shrink(inputs, tmp_path / "o", text=inputs / "c.jsonl")
    with pytest.raises(UsageError, match=r"standard input \(-\) cannot be read again"):
        shrink(inputs, tmp_path / "o", calibration="-")
    with pytest.raises(UsageError, match="should be of files"):
        shrink(inputs, tmp_path / "o", calibration=[{"tokens": [1, 2, 3]}])
    with pytest.raises(reap.ReapError, match=r"absent\.jsonl"):  # before the text is divided
        shrink(inputs, tmp_path / "o", calibration=inputs / "absent.jsonl")
    with pytest.raises(UsageError, match="mask is 'some'"):
        shrink(inputs, tmp_path / "o", mask="some")
    assert not (tmp_path / "o").exists()
    with pytest.raises(UsageError, match="is the input"):
        shrink(inputs, inputs)
    with pytest.raises(UsageError, match="name a criterion as well"):
        shrink(inputs, tmp_path / "o", metric="random")
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        shrink(inputs, tmp_path / "o", speed=3)
    with pytest.raises(UsageError, match="there is no directory"):
        shrink(inputs, tmp_path / "absent" / "o")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="exists and is not a folder"):
        shrink(inputs, tmp_path / "file")
    write_lines(tmp_path / "short.jsonl", 3, 2, CTX + 1)
    with pytest.raises(reap.CalibrationError, match="has 1 window of 32 tokens, expected two or more"):
        shrink(inputs, tmp_path / "o", text=tmp_path / "short.jsonl")
    assert {path.name for path in (tmp_path / "o").iterdir()} <= {"shrink.json"}


def test_a_folder_that_another_process_works_in(inputs: Path, job: Path) -> None:
    import fcntl

    fd = os.open(job, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process works in this folder"):
            shrink(inputs, job)
    finally:
        os.close(fd)


def test_a_full_disk_is_said_and_does_no_harm(inputs: Path, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reap.pipeline import shrink_steps

    (job / "plan.json").unlink()

    def full(*_: object, **__: object) -> None:
        raise OutputError("plan.json: cannot be written: the disk is full")

    monkeypatch.setattr(shrink_steps, "plan_of_row", full)
    with pytest.raises(OutputError, match="the disk is full"):
        shrink(inputs, job)
    monkeypatch.undo()
    assert shrink(inputs, job)[1] == ["plan"]


# ---- interrupted and killed


def command(inputs: Path, out: Path) -> list[str]:
    options = ["--keep", "0.5", "--metric", ",".join(METRICS), "-c", str(CTX), "-ub", str(CTX), "-t", "1", "-q"]
    texts = ["--calibration", str(inputs / "c.jsonl"), "--text", str(inputs / "t.jsonl")]
    return [sys.executable, "-m", "reap", "shrink", str(inputs / "m.gguf"), *texts, *options, "-o", str(out)]


@pytest.mark.parametrize("step", ["profile", "sweep", "prune"])
def test_ctrl_c_keeps_what_is_done(step: str, inputs: Path, tmp_path: Path) -> None:
    def stop(name: str) -> None:
        if name == step:
            raise KeyboardInterrupt

    given: dict[str, Any] = {
        "calibration": inputs / "c.jsonl",
        "text": inputs / "t.jsonl",
        "metric": METRICS,
    }
    with pytest.raises(Interrupted, match=f"stopped in the step {step}; .* goes on from there"):
        reap.shrink(inputs / "m.gguf", tmp_path / "o", keep=0.5, on_step=stop, **given, **ENGINE)
    assert shrink(inputs, tmp_path / "o")[1] == STEPS[STEPS.index(step) :]


def test_sigterm_is_answered_like_ctrl_c(inputs: Path, tmp_path: Path) -> None:
    running = subprocess.Popen(command(inputs, tmp_path / "o"), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "o" / "profile.json").exists() and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode in (130, 0)  # 0: it was done by then
    assert running.returncode == 0 or "and the same command goes on from there" in said


def test_a_killed_job_goes_on_to_the_same_files(inputs: Path, tmp_path: Path) -> None:
    started = time.perf_counter()
    # each in a folder of the same name, which sweep.json and evaluation.json hold
    (tmp_path / "whole").mkdir()
    subprocess.run(command(inputs, Path("job")), cwd=tmp_path / "whole", check=True, capture_output=True)
    seconds = time.perf_counter() - started
    wanted = contents(tmp_path / "whole" / "job")
    rng, n_killed = random.Random(7), 0
    for number in range(10 * KILLS):
        place = tmp_path / str(number)
        place.mkdir()
        began = time.perf_counter()
        running = subprocess.Popen(
            command(inputs, Path("job")), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            running.wait(rng.uniform(0.1, 1.0) * seconds)
            seconds = min(seconds, time.perf_counter() - began)  # so that delays fall into the work
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            n_killed += 1
        done = subprocess.run(command(inputs, Path("job")), cwd=place, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = contents(place / "job")
        assert {path.name for path in (place / "job").iterdir()} == LEFT, "nothing is left over"
        for name, content in wanted.items():
            assert found[name] == content, f"{name} differs after kill {n_killed}"
        shutil.rmtree(place)
        if n_killed == KILLS:
            return
    pytest.fail("the delays no longer fall into the work")


# ---- before anything runs


def test_a_dry_run_says_what_would_run(inputs: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "calibration": inputs / "c.jsonl",
        "text": inputs / "t.jsonl",
        "metric": METRICS,
    }
    given |= ENGINE
    found = estimate_shrink(inputs / "m.gguf", tmp_path / "o", keep=0.5, **given)
    assert not (tmp_path / "o").exists()
    assert [step.name for step in found.steps] == STEPS
    assert all(step.runs for step in found.steps)
    assert found.seconds > 0
    result, _ = shrink(inputs, tmp_path / "o")
    assert found.n_bytes_after == (result.n_bytes_after, result.n_bytes_after)
    assert found.keep == (4, 4)
    again = estimate_shrink(inputs / "m.gguf", tmp_path / "o", keep=0.5, **given)
    assert [step.name for step in again.steps if step.runs] == []
    assert again.seconds == 0
    other = estimate_shrink(inputs / "m.gguf", tmp_path / "o", keep=6, **given)
    assert [step.name for step in other.steps if step.runs][:2] == ["sweep", "plan"]
    limited = estimate_shrink(inputs / "m.gguf", tmp_path / "o", max_ppl_increase="5%", **given)
    assert limited.keep == (2, 8)
    assert limited.n_bytes_after[0] < found.n_bytes_after[0] < limited.n_bytes_after[1]
    with pytest.raises(UsageError, match="cannot be reached: with 2 experts"):
        estimate_shrink(inputs / "m.gguf", tmp_path / "o", target_size=1000, **given)


# ---- the command


def test_the_command(inputs: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(inputs, job)[3:]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    # what the command line gives in so many words is what the library takes where nothing is given
    assert lines[0].startswith(f"{job}: nothing was left to do")
    assert [line.split("  ")[0] for line in lines[1:]] == ["size", "cost", "criterion", "try next", "run"]
    assert lines[-1].split("  ", 1)[1].strip() == f"llama-server -m {job / 'm-pruned.gguf'}"
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == 4
    assert main([*words, "--dry-run"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == [4, 4]
    assert main([*words, "--target-size", "1G"]) == 2
    assert "how small is it to become" in capsys.readouterr().err
