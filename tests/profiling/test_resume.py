"""Resume files: what is refused, what a damaged one says, and what ends a run without losing it."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.slow_count import N_EXPERTS, N_LAYERS, Bytes, CountingSession
from reap.errors import CalibrationError, EngineError, FormatError, Interrupted, MismatchError, ReapWarning, UsageError
from reap.profiling.interrupts import endings_as_interrupts, uninterrupted
from reap.profiling.resume import ResumeFile, State, beside
from reap.profiling.run import RunResult, measure
from reap.progress import Progress
from reap.text.windows import Calibration

SHAPE = (N_LAYERS, N_EXPERTS)
LINES = [{"tokens": [number, 7, 8], "domain": "ab"[number % 2]} for number in range(20)]


def keeper(path: Path, identity: dict[str, Any] | None = None, *, seconds: float = 0.0) -> ResumeFile:
    return ResumeFile(path, identity or {}, shape=SHAPE, resume=True, seconds=seconds)


def session(before: Callable[[], None] = lambda: None) -> CountingSession:
    return CountingSession(6, 2, is_late=False, before=before)


def run(source: Any, keeping: ResumeFile | None, progress: Any = None, **options: Any) -> RunResult:
    return measure(session(), Bytes(), Calibration(source, ctx_size=8, **options), keeping, progress)


def stop_after(n_batches: int) -> Callable[[Progress], None]:
    left = iter(range(n_batches))

    def progress(_: Progress) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return progress


def left_by_a_stop(path: Path) -> dict[str, Any]:
    with pytest.raises(Interrupted, match=r"stopped after 4 samples, which .*run\.resume keeps; --resume"):
        run(LINES, keeper(path), stop_after(2))
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def total(result: RunResult) -> int:
    return sum(int(sums["total_tokens"][0]) for sums in result.groups.values())


# ---- what is counted


def test_a_skipped_line_moves_no_other(tmp_path: Path) -> None:
    lines = [{"tokens": [1] * 3}, {"tokens": []}, *[{"tokens": [2] * 3}] * 3]
    with pytest.raises(Interrupted, match="after 2 samples"):
        run(lines, keeper(tmp_path / "r"), stop_after(1))
    assert total(run(lines, keeper(tmp_path / "r"))) == 12


def test_failed_samples_survive(tmp_path: Path) -> None:
    lines = [{"tokens": [ord("X")]}, *LINES]
    with pytest.raises(Interrupted, match="after 4 samples"):
        run(lines, keeper(tmp_path / "r"), stop_after(2))
    result = run(lines, keeper(tmp_path / "r"))
    assert result.failed == ["sample 1: layer 0: not a finite number"]
    assert total(result) == 60


def test_a_domain_without_a_counted_token(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "response": "rr", "domain": "a"}, {"prompt": "qqqq", "response": "rr", "domain": "b"}]
    result = run(lines, keeper(tmp_path / "r"), mask="response", max_tokens=8)
    assert {domain: total(RunResult({domain: parts}, [])) for domain, parts in result.parts.items()} == {"a": 2}
    assert [group["domain"] for group in json.loads((tmp_path / "r").read_text())["groups"]] == ["a"]


def test_a_run_that_counted_nothing_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    pairs = [{"prompt": "abcd", "response": "e"}] * 3
    assert not run(pairs, keeper(tmp_path / "r"), mask="response", max_tokens=3).groups
    assert not (tmp_path / "r").exists()


def test_failures_are_counted_against_successes() -> None:
    bad = {"tokens": [ord("X")]}
    with pytest.raises(EngineError, match=r"sample 11: .* \(and so did 9 of the 10 samples before it\)"):
        run([{"tokens": [1]}, *[bad] * 50], None)
    assert len(run([*LINES, *[bad] * 20], None).failed) == 20


def test_a_line_that_cannot_be_read_keeps_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    good = [json.dumps(line) + "\n" for line in LINES]
    path.write_text("".join(good) + "{oops\n")
    kept = tmp_path / "run.resume"
    with pytest.raises(CalibrationError, match=r"c\.jsonl:21: is not JSON.*the run ended after \d+ samples, which .*"):
        run(path, keeper(kept, seconds=1e9))
    units = json.loads(kept.read_text())["units"]
    assert units >= len(LINES) - 2  # except those that wait to share a batch
    path.write_text("".join([*good, *good]))
    counting = CountingSession(6, 2, is_late=False, before=lambda: None)
    result = measure(counting, Bytes(), Calibration(path, ctx_size=8), keeper(kept))
    assert total(result) == 120
    assert counting.n_batches == (40 - units) / 2
    path.write_text("".join([good[1], *good[1:]]))
    with pytest.raises(MismatchError, match=r"run\.resume: is of another calibration: .*c\.jsonl does not begin with"):
        run(path, keeper(kept))


def test_a_calibration_of_objects_has_an_identity(tmp_path: Path) -> None:
    left_by_a_stop(tmp_path / "run.resume")
    with pytest.raises(MismatchError, match="<python> does not begin with the 4 samples that were measured"):
        run(LINES[::-1], keeper(tmp_path / "run.resume"))


def test_standard_input_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    def give() -> None:
        data = "".join(json.dumps(line) + "\n" for line in LINES).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    give()
    with pytest.raises(Interrupted, match=r"--resume .* given the same standard input again, goes on from there"):
        run("-", keeper(tmp_path / "r"), stop_after(3))
    give()
    assert total(run("-", keeper(tmp_path / "r"))) == 60


# ---- the file


def test_options_survive_their_file(tmp_path: Path) -> None:
    """Tuples become lists in JSON."""
    identity = {"options": {"override_tensors": ((".*", "CPU"),), "devices": None}}
    keeper(tmp_path / "r", identity).save(State())
    assert keeper(tmp_path / "r", identity).state == State()
    with pytest.raises(MismatchError, match="options override_tensors"):
        keeper(tmp_path / "r", {"options": {"override_tensors": (), "devices": None}})


def test_a_file_in_the_way_and_older_files(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text('{"format": "reap.checkpoint", "version": 1}')
    with pytest.raises(UsageError, match="a resume file is there already; --resume"):
        ResumeFile(path, {}, shape=SHAPE, resume=False)
    with pytest.raises(FormatError, match="of an older release of reap"):
        keeper(path)
    path.write_text('{"format": "reap.resume", "version": 1}')
    with pytest.raises(FormatError, match="of an older release of reap, which measured less; remove it to begin anew"):
        keeper(path)


def change_numbers(group: dict[str, Any], name: str, change: Callable[[Any], Any], dtype: str = "<f8") -> None:
    """Of one array of a resume file."""
    changed = change(np.frombuffer(base64.b64decode(group[name]), dtype).copy())
    group[name] = base64.b64encode(changed.tobytes()).decode()


DAMAGE: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (
        "an expert is gone",
        lambda d: change_numbers(d["groups"][0], "gate_sum", lambda a: a[1:]),
        "gate_sum holds 40 bytes where 48 were expected",
    ),
    (
        "a layer too many",
        lambda d: change_numbers(d["groups"][0], "total_tokens", lambda a: np.append(a, a)),
        "total_tokens holds 32 bytes where 16 were expected",
    ),
    ("no base64", lambda d: d["groups"][0].update(counts="?"), "counts should be base64"),
    (
        "not a number",
        lambda d: change_numbers(d["groups"][0], "gate_sum", lambda a: a * np.nan),
        "gate_sum has a number that is not finite",
    ),
    ("no sums", lambda d: d["groups"][0].pop("norm_sum"), 'lacks "norm_sum"'),
    ("a group without a name", lambda d: d["groups"][0].pop("domain"), 'lacks "domain"'),
    ("a part too many", lambda d: d["groups"][0].update(part=16), "part should be an integer from 0 to 15"),
    ("one part twice", lambda d: d.update(groups=[d["groups"][0]] * 2), "has a part of a domain twice"),
    ("negative", lambda d: d.update(units=-1), "units should be an integer from 0"),
    ("a word as a unit", lambda d: d.update(failed={"x": "why"}), "failed: x is not one of the 4 samples"),
    ("a failure to come", lambda d: d.update(failed={"4": "why"}), "failed: 4 is not one of the 4 samples"),
    ("no digest", lambda d: d.update(consumed="?"), "consumed should be the SHA-256"),
    (
        "sums that contradict",
        lambda d: change_numbers(d["groups"][0], "norm_max", lambda a: a + 1e9),
        "cannot be the sums",
    ),
    ("another format", lambda d: d.update(format="reap.profile"), "is not a resume file"),
    ("another version", lambda d: d.update(version=9), "is not a resume file of this version"),
    ("no identity", lambda d: d.pop("identity"), 'lacks "identity"'),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_damaged_file_is_one_sentence(change: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "run.resume"
    document = left_by_a_stop(path)
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(FormatError, match=f"run.resume.* {sentence}") as caught:
        keeper(path)
    assert "\n" not in str(caught.value)


def test_random_damage_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "run.resume"
    left_by_a_stop(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 4)] = rng.choice((b"", b"0", b"[", b"-1", b'"', b"null", b"1e400", b"\xff"))
        path.write_bytes(data)
        with suppress(FormatError, MismatchError):
            run(LINES, keeper(path))


def test_no_figure_can_change_unseen(tmp_path: Path) -> None:
    path = tmp_path / "run.resume"
    left_by_a_stop(path)
    whole = path.read_bytes()
    signs = [at for at, byte in enumerate(whole) if chr(byte).isalnum()]
    for at in random.Random(1).sample(signs, min(300, len(signs))):
        data = bytearray(whole)
        data[at] = ord("7" if data[at] != ord("7") else "8")
        path.write_bytes(data)
        with pytest.raises((FormatError, MismatchError), match=r"run\.resume"):
            keeper(path)


def test_a_resume_file_lies_beside_the_output(tmp_path: Path) -> None:
    assert beside(tmp_path / "p.json") == tmp_path / "p.json.resume"
    assert beside("/dev/null") is None


def test_a_disk_that_is_full_does_not_end_a_run(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    keeping = keeper(tmp_path / "folder" / "r")
    os.rmdir(tmp_path / "folder")
    with pytest.warns(ReapWarning, match="cannot be written.*; the run goes on without it") as warned:
        assert total(run(LINES, keeping)) == 60
    assert len(warned) == 1
    (tmp_path / "folder").mkdir()
    keeping = keeper(tmp_path / "folder" / "r", seconds=1e9)
    os.rmdir(tmp_path / "folder")
    with pytest.raises(Interrupted, match=r"stopped after 4 samples, which could not be kept \(.*cannot be written"):
        run(LINES, keeping, stop_after(2))


# ---- what ends a run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_are_answered_like_ctrl_c(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)

    def progress(step: Progress) -> None:
        if step.done > 6:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="after 2 samples"):
        run(LINES, keeper(tmp_path / "r"), progress)
    assert signal.getsignal(number) == before
    assert total(run(LINES, keeper(tmp_path / "r"))) == 60


def test_handlers_of_the_program_s_own_are_left_alone() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: calls.append(number))
    try:
        with endings_as_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    with endings_as_interrupts(), pytest.raises(KeyboardInterrupt, match="SIGHUP"):
        os.kill(os.getpid(), signal.SIGHUP)
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_may_run_as_well(tmp_path: Path) -> None:
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(run(LINES, keeper(tmp_path / "r"))))
    thread.start()
    thread.join()
    assert total(results[0]) == 60


def test_what_the_caller_raises_is_raised_and_the_state_is_kept(tmp_path: Path) -> None:
    def progress(step: Progress) -> None:
        if step.done > 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(LINES, keeper(tmp_path / "r", seconds=1e9), progress)
    assert json.loads((tmp_path / "r").read_text())["units"] == 2


# ---- how far it is


def test_the_rate_is_there_from_the_first_batch_on_and_counts_no_earlier_run(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    steps: list[Progress] = []
    run(path, None, steps.append)
    assert [step.done for step in steps] == list(range(6, 61, 6))
    totals = [step.total for step in steps]
    assert all(total is not None and abs(total - 60) <= 4 for total in totals)
    assert all(step.rate is not None and step.rate > 0 and step.seconds_left is not None for step in steps)
    assert steps[-1].seconds_left == 0
    with pytest.raises(Interrupted):
        run(path, keeper(tmp_path / "r"), stop_after(8))
    again: list[Progress] = []
    run(path, keeper(tmp_path / "r"), again.append)
    assert [step.done for step in again] == [54, 60]
    assert np.isfinite(again[0].rate or np.nan)
