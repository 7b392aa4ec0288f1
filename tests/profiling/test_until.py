"""Parts of a calibration, counted as they should be however a run is disturbed; and runs that end when it is enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap
from helpers.slow_count import N_EXPERTS, N_LAYERS, Bytes, CountingSession, Tally
from reap.errors import Interrupted, UsageError
from reap.profiling.record import make_profile
from reap.profiling.resume import ResumeFile
from reap.profiling.run import RunResult, measure
from reap.profiling.until import Until
from reap.progress import Progress
from reap.scores.profile import Profile
from reap.scores.replicates import part_of
from reap.text.windows import Calibration

MODEL = {"n_experts": N_EXPERTS}
LINES = [{"tokens": [number % 7, number % 3, 9], "domain": "ab"[number % 2]} for number in range(400)]


def session() -> CountingSession:
    return CountingSession(64, 3, is_late=False, before=lambda: None)


def run(
    lines: Any, until: Until | None = None, kept: Path | None = None, progress: Any = None, **options: Any
) -> tuple[RunResult, Calibration, Profile]:
    keeper = None if kept is None else ResumeFile(kept, {}, shape=(N_LAYERS, N_EXPERTS), resume=True, seconds=0.0)
    source = Calibration(lines, ctx_size=8, **options)
    result = measure(session(), Bytes(), source, keeper, progress, until)
    made = make_profile(result, source, layers=range(N_LAYERS), model=MODEL, engine={}, until=until)
    return result, source, made


def until(overlap: float, keep: int = 1, metric: str = "weighted_ean_sum") -> Until:
    found = Until.of(MODEL, until=overlap, keep=keep, metric=metric)
    assert found is not None
    return found


def stop_after(n_batches: int) -> Any:
    left = iter(range(n_batches))

    def progress(_: Progress) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return progress


# ---- parts


def test_each_part_is_the_sum_of_its_units(tmp_path: Path) -> None:
    lines = LINES[:50]
    expected: dict[tuple[str, int], Tally] = {}
    for unit, line in enumerate(lines):
        tally = expected.setdefault((str(line["domain"]), part_of(unit)), Tally())
        for position, token in enumerate(line["tokens"]):
            tally.add(token, position)
    with pytest.raises(Interrupted):
        run(lines, kept=tmp_path / "r", progress=stop_after(5))
    for result in (run(lines)[0], run(lines, kept=tmp_path / "r")[0]):  # whole, and gone on with
        assert {(domain, part) for domain, parts in result.parts.items() for part in parts} == set(expected)
        for (domain, part), tally in expected.items():
            for name, values in tally.to_arrays().items():
                assert np.array_equal(result.parts[domain][part][name], values), name


def test_units_that_fail_or_are_skipped_leave_the_others_in_their_parts() -> None:
    bad, empty = {"tokens": [ord("X")]}, {"tokens": []}
    result = run([LINES[0], bad, empty, LINES[1]])[0]
    assert [list(result.parts[domain]) for domain in ("a", "b")] == [[part_of(0)], [part_of(2)]]


def test_a_profile_that_went_on_has_the_same_parts(tmp_path: Path) -> None:
    whole = run(LINES)[2]
    with pytest.raises(Interrupted):
        run(LINES, kept=tmp_path / "r", progress=stop_after(40))
    again = run(LINES, kept=tmp_path / "r")[2]
    assert again.to_dict()["replicates"] == whole.to_dict()["replicates"]
    assert again.domain("a").stability(1) == whole.domain("a").stability(1)


# ---- until


def test_a_run_ends_when_it_is_enough() -> None:
    asked = until(0.5)
    result, source, profile = run(LINES, asked)
    assert 32 <= source.samples < 60
    assert sum(int(sums["total_tokens"][0]) for sums in result.groups.values()) == 3 * source.samples == source.tokens
    assert profile.calibration["samples"] == source.samples
    record = profile.calibration["until"]
    assert record["reached"]
    assert record["found"] >= 0.5
    assert {name: record[name] for name in ("overlap", "keep", "metric")} == {
        "overlap": 0.5,
        "keep": 1,
        "metric": "weighted_ean_sum",
    }
    shorter = run(LINES[: source.samples])[2]
    for name in ("counts", "gated_norm_sum"):  # as if the calibration had ended there
        assert np.array_equal(getattr(shorter, name), getattr(profile, name))


def test_a_run_that_never_has_enough_reads_all_of_it() -> None:
    # the same at each token, so that which of them is kept is chance
    rng = np.random.default_rng(0)
    lines = [{"tokens": rng.integers(0, 250, 3).tolist()} for _ in range(60)]
    _, source, profile = run(lines, until(1.0))
    record = profile.calibration["until"]
    assert source.samples == 60
    assert not record["reached"]
    assert record["found"] == pytest.approx(profile.stability(1, "weighted_ean_sum").overlap, abs=0.01)


def test_too_little_text_is_not_judged() -> None:
    assert run(LINES[:3], until(0.1))[2].calibration["until"]["found"] is None


def test_a_text_file_ends_between_windows(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("abcdefg hijk " * 400)
    _, source, profile = run(path, until(0.4, keep=2))
    assert 32 <= source.n_windows < 100
    assert profile.calibration["until"]["reached"]
    assert profile.calibration["tokens"] == source.n_windows * 8


def test_a_long_sample_is_counted_whole() -> None:
    lines = [{"tokens": [number % 5, *range(80)]} for number in range(60)]
    _, source, profile = run(lines, until(0.4, keep=2))
    assert source.samples < 60
    assert profile.total_tokens.tolist() == [81 * source.samples] * N_LAYERS


def test_a_run_that_goes_on_ends_where_it_would_have(tmp_path: Path) -> None:
    whole = run(LINES, until(0.5))[2]
    with pytest.raises(Interrupted):
        run(LINES, until(0.5), tmp_path / "r", stop_after(4))
    again = run(LINES, until(0.5), tmp_path / "r")[2]
    assert json.dumps(again.to_dict()["layers"]) == json.dumps(whole.to_dict()["layers"])
    # and with more to ask for, what is kept of it serves the rest of the calibration
    assert run(LINES, None, tmp_path / "r")[1].samples == len(LINES)


def test_looking_is_rare() -> None:
    asked = until(1.0)
    looks = 0
    for units in range(100_000):
        if asked.is_due(units):
            asked.pass_over(units)
            looks += 1
    assert looks < 90
    later = until(1.0)
    later.pass_over(100)
    assert next(units for units in range(101, 140) if later.is_due(units)) <= 111


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"keep": 0.5}, "keep says what until is to judge"),
        ({"until": 0.9}, "until needs keep"),
        ({"until": 98, "keep": 0.5}, r"until is 98, expected a share above 0 and up to 1 \(0\.98 is 98%\)"),
        ({"until": True, "keep": 0.5}, "until is True, expected a share"),
        ({"until": 0.9, "keep": 0.5, "metric": "random"}, "cannot judge the metric 'random'; it can: reap, "),
        ({"until": 0.9, "keep": 99}, "keep 99 is not between 1 and the model's"),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_a_model_is_loaded(
    arguments: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.paths import GOLDEN

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("reap.profiling.gguf.open_session", never)
    with pytest.raises(UsageError, match=sentence):
        reap.profile(GOLDEN / "qwen3moe.gguf", [{"tokens": [1, 2]}], **arguments)
