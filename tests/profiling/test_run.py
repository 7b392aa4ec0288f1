"""The driver: random calibrations, failures, stops and resumes against what should be counted, worked out slowly.

REAP_RUN_CASES says how many cases, 2,000 by default, and REAP_RUN_FIRST the number of the first; a long run is 100,000.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.slow_count import N_EXPERTS, N_LAYERS, Bytes, CountingSession, Expected, Tally, count
from helpers.sums import COUNTS_AND_SUMS
from reap.errors import CalibrationError, EngineError, Interrupted, MismatchError
from reap.profiling.record import make_profile
from reap.profiling.resume import ResumeFile
from reap.profiling.run import measure
from reap.scores.profile import Profile
from reap.text.windows import Calibration

CASES = int(os.environ.get("REAP_RUN_CASES") or 2000)
FIRST = int(os.environ.get("REAP_RUN_FIRST") or 0)
Line = dict[str, Any] | None


class Case:
    """A random calibration, options, and how its run is disturbed."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.rng, self.folder = rng, folder
        self.is_text = rng.random() < 0.15
        self.bad_share = rng.choice((0.0, 0.0, 0.1, 0.3, 0.8))
        self.options: dict[str, Any] = {
            "ctx_size": rng.choice((3, 8, 40)),
            "mask": rng.choice(("all", "response")),
            "max_tokens": rng.choice((None, None, rng.randint(1, 150))),
        }
        self.sizes = {"batch_size": rng.choice((2, 5, 16, 64)), "n_sequences": rng.choice((1, 2, 8))}
        self.is_late = rng.random() < 0.5
        self.seconds = rng.choice((0.0, 1e9))
        self.lines: list[Line] = [self.line() for _ in range(1 if self.is_text else rng.randint(1, 24))]
        self.path = folder / ("c.txt" if self.is_text else "c.jsonl")
        self.kept = folder / "c.resume"
        self.kept.unlink(missing_ok=True)
        self.saved: list[bytes] = []  # what the resume file was each time it was written

    def line(self) -> Line:
        rng = self.rng
        if self.is_text:
            return {"text": self.text(200)}
        if rng.random() < 0.1:
            return None
        kind = rng.choice(("tokens", "text", "pair"))
        domain = rng.choice((None, None, "a", "b", "c"))
        line: dict[str, Any] = {} if domain is None else {"domain": domain}
        longest = rng.choice((0, 4, 10, 60))
        if kind == "tokens":
            return line | {"tokens": list(self.text(longest).encode())}
        if kind == "text":
            return line | {"text": self.text(longest)}
        return line | {"prompt": self.text(10), "response": self.text(longest)}

    def text(self, longest: int) -> str:
        letters = "".join(self.rng.choice("abcdefg ") for _ in range(self.rng.randint(0, longest)))
        if letters and self.rng.random() < self.bad_share:
            at = self.rng.randrange(len(letters))
            letters = letters[:at] + "X" + letters[at + 1 :]
        return letters

    def write(self, lines: list[Line], broken_at: int | None = None) -> None:
        if self.is_text:
            assert lines[0] is not None
            self.path.write_text(lines[0]["text"])
            return
        texts = ["" if line is None else json.dumps(line) for line in lines]
        if broken_at is not None:
            texts.insert(broken_at, "{oops")
        self.path.write_text("".join(text + "\n" for text in texts))

    def expected(self, lines: list[Line]) -> Expected:
        return count(lines, is_text=self.is_text, **self.options)

    def run(self, before: Callable[[], None] = lambda: None) -> Profile:
        source = Calibration(self.path, **self.options)
        keeper = ResumeFile(self.kept, {}, shape=(N_LAYERS, N_EXPERTS), resume=True, seconds=self.seconds)
        save = keeper.save

        def remember(state: Any) -> None:
            save(state)
            self.saved.append(self.kept.read_bytes())

        keeper.save = remember  # type: ignore[method-assign]
        session = CountingSession(**self.sizes, is_late=self.is_late, before=before)
        result = measure(session, Bytes(), source, keeper)
        return make_profile(
            result, source, layers=range(N_LAYERS), model={"n_experts": N_EXPERTS}, engine={"reap": "test"}
        )


def stop_at(step: int) -> Callable[[], None]:
    """Ctrl-C in the step of this number."""
    steps = iter(range(step, -1, -1))

    def before() -> None:
        if next(steps, None) == 0:
            raise KeyboardInterrupt

    return before


def finish(case: Case) -> Profile:
    """Run with Ctrl-C at random steps, and kills that leave an older resume file, until the end is reached."""
    limit = 3
    while True:
        try:
            return case.run(stop_at(case.rng.randrange(limit)) if limit < 60 else lambda: None)
        except Interrupted as stop:
            units = json.loads(case.kept.read_text())["units"] if case.kept.exists() else 0
            said = f"after {units} samples" if units else "before a sample was done"
            if said not in str(stop):
                raise AssertionError(f"{stop} where {said!r} was expected") from stop
            limit *= 2
        if case.saved and case.rng.random() < 0.3:
            case.kept.write_bytes(case.rng.choice(case.saved))


def disturb(case: Case) -> None:
    """Before the run that counts: a line that cannot be read, or a calibration that was shorter; then another
    beginning, which is refused."""
    if case.is_text:
        return
    chance = case.rng.random()
    at = case.rng.randrange(len(case.lines) + 1)
    if chance < 0.3:
        case.write(case.lines, broken_at=at)
        is_read = (
            case.options["max_tokens"] is None or case.expected(case.lines[:at]).tokens < case.options["max_tokens"]
        )
        if is_read and not case.expected(case.lines[:at]).is_hopeless:
            with pytest.raises(CalibrationError, match=f"c.jsonl:{at + 1}: is not JSON"):
                finish(case)
    elif chance < 0.5:
        case.write(case.lines[:at])
        if counts_something(case.expected(case.lines[:at])):
            finish(case)
    if case.kept.exists() and case.rng.random() < 0.5:
        begin_otherwise(case)


def begin_otherwise(case: Case) -> None:
    """Another calibration in the place of what an earlier run consumed."""
    kept = case.kept.read_bytes()
    n_samples = [case.expected(case.lines[:number]).samples for number in range(len(case.lines) + 1)]
    done = json.loads(kept)["units"]
    used = [at for at in range(len(case.lines)) if n_samples[at] < n_samples[at + 1] <= done]
    if used:
        changed = [*case.lines]
        changed[case.rng.choice(used)] = {"tokens": [1, 2, 3]}
        case.write(changed)
        with pytest.raises(MismatchError, match="is of another calibration"):
            case.run()
        assert case.kept.read_bytes() == kept


def counts_something(expected: Expected) -> bool:
    return bool(not expected.is_hopeless and any(any(tally.total_tokens) for tally in expected.domains.values()))


def check(case: Case) -> None:
    expected = case.expected(case.lines)
    case.write(case.lines)
    if expected.is_hopeless:
        with pytest.raises(EngineError, match="so did"):
            finish(case)
    elif not counts_something(expected):
        with pytest.raises(EngineError if expected.failed else CalibrationError):
            finish(case)
    else:
        compare(finish(case), expected)


def compare(found: Profile, expected: Expected) -> None:
    record = found.calibration
    assert [record[name] for name in ("samples", "tokens", "skipped", "failed")] == [
        expected.samples,
        expected.tokens,
        len(expected.skipped),
        len(expected.failed),
    ]
    assert [int(where.split(":")[1]) for where in record["failed_samples"]] == expected.failed or found_text(record)
    assert [int(where.split(":")[1]) for where in record["skipped_lines"]] == expected.skipped
    named = {name: tally for name, tally in expected.domains.items() if name is not None and any(tally.total_tokens)}
    assert found.domains == tuple(sorted(named))
    total = Tally()
    for tally in expected.domains.values():
        total = total.plus(tally)
    for profile, tally in ((found, total), *((found.domain(name), tally) for name, tally in named.items())):
        assert profile.total_tokens.tolist() == tally.total_tokens
        for name in COUNTS_AND_SUMS:
            np.testing.assert_array_equal(getattr(profile, name), tally.sums[name], err_msg=name)


def found_text(record: dict[str, Any]) -> bool:
    return str(record["files"][0]).endswith(".txt")


def test_what_is_counted_is_what_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for seed in range(FIRST, FIRST + CASES):
        case = Case(random.Random(seed), tmp_path)
        try:
            disturb(case)
            check(case)
        except Exception as error:
            raise AssertionError(f"case {seed}: {error}") from error
