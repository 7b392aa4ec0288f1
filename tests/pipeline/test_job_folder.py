"""The folder of a job: what counts as done, at every moment at which a job may be killed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reap.errors import FormatError, UsageError
from reap.pipeline.contents import Contents
from reap.pipeline.job_folder import JobFolder, Step, opened

FORM = "reap.job"


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


class Job:
    """Two steps, the second of what the first wrote; each can be killed before or after it wrote."""

    def __init__(self, path: Path, first: str = "1", second: str = "2") -> None:
        self.path, self.options = path, (first, second)
        self.run: list[str] = []
        self.kill: tuple[str, str] | None = None
        self.is_whole = True

    def _step(self, name: str, output: str, identity: Callable[[], dict[str, Any]], content: Callable[[], str]) -> Step:
        def run() -> None:
            self.run.append(name)
            if self.kill == (name, "before"):
                raise Killed
            (self.path / output).write_text(content())
            if self.kill == (name, "after"):
                raise Killed

        return Step(name, (output,), identity, run, (f"{output}.resume",), lambda: self.is_whole)

    def steps(self, folder: JobFolder, second_name: str = "b.txt") -> tuple[Step, ...]:
        def of_first() -> dict[str, Any]:
            return {"a": folder.contents.sha256(self.path / "a.txt"), "option": self.options[1]}

        return (
            self._step("first", "a.txt", lambda: {"option": self.options[0]}, lambda: f"a{self.options[0]}"),
            self._step("second", second_name, of_first, lambda: (self.path / "a.txt").read_text() + self.options[1]),
        )

    def go(self, *, force: bool = False, second_name: str = "b.txt") -> list[str]:
        self.run.clear()
        with opened(self.path, FORM) as folder:
            steps = self.steps(folder, second_name)
            folder.check(steps, force=force)
            for step in steps:
                identity = step.identity()
                if folder.is_done(step, identity):
                    folder.clean(step)
                else:
                    folder.run(step, identity)
        return list(self.run)


def killed(job: Job, step: str, when: str) -> None:
    job.kill = step, when
    with pytest.raises(Killed):
        job.go()
    job.kill = None


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "job")


def names(job: Job) -> set[str]:
    return {path.name for path in job.path.iterdir()}


def test_what_is_done_is_not_done_again(job: Job) -> None:
    assert job.go() == ["first", "second"]
    assert job.go() == []
    job.options = "1", "3"
    assert job.go() == ["second"]
    assert (job.path / "b.txt").read_text() == "a13"
    assert names(job) == {"a.txt", "b.txt", "job.json"}


@pytest.mark.parametrize("step", ["first", "second"])
def test_killed_before_it_wrote(job: Job, step: str) -> None:
    killed(job, step, "before")
    assert job.go() == {"first": ["first", "second"], "second": ["second"]}[step]
    assert (job.path / "b.txt").read_text() == "a12"


@pytest.mark.parametrize("step", ["first", "second"])
def test_killed_after_it_wrote_and_before_it_could_say_so(job: Job, step: str) -> None:
    killed(job, step, "after")
    assert job.go() == {"first": ["second"], "second": []}[step]  # what is there is whole, and of these options


def test_what_is_not_whole_is_written_again(job: Job) -> None:
    killed(job, "second", "after")
    job.is_whole = False
    assert job.go() == ["second"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_and_then_another_option(job: Job, when: str) -> None:
    """What a killed step had written belongs to options that are no more."""
    job.go()
    job.options = "1", "3"
    killed(job, "second", when)
    job.options = "1", "4"
    assert job.go() == ["second"]
    assert (job.path / "b.txt").read_text() == "a14"


def test_killed_twice_in_different_steps(job: Job) -> None:
    """The second's file is still this job's, although the first was begun again since."""
    killed(job, "second", "after")
    job.options = "5", "2"
    killed(job, "first", "before")
    assert job.go() == ["first", "second"]
    assert (job.path / "b.txt").read_text() == "a52"


def test_what_a_step_keeps_for_going_on_stays_until_it_is_done(job: Job) -> None:
    killed(job, "first", "before")
    (job.path / "a.txt.resume").write_text("so far")
    killed(job, "first", "before")
    assert (job.path / "a.txt.resume").exists()
    job.go()
    assert not (job.path / "a.txt.resume").exists()
    (job.path / "a.txt.resume").write_text("killed at its very end")
    job.go()
    assert not (job.path / "a.txt.resume").exists()


def test_an_output_under_another_name_takes_the_old_one_s_place(job: Job) -> None:
    job.go()
    assert job.go(second_name="c.txt") == ["second"]
    assert names(job) == {"a.txt", "c.txt", "job.json"}


def test_changed_and_foreign_files(job: Job) -> None:
    job.go()
    (job.path / "b.txt").write_text("edited")
    with pytest.raises(UsageError, match=r"b\.txt: was changed since"):
        job.go()
    assert job.go(force=True) == ["second"]
    (job.path / "c.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError, match=r"c\.txt: is there and was not written by this job"):
            job.go(force=force, second_name="c.txt")
    assert (job.path / "c.txt").read_text() == "mine"


def test_a_link_to_nowhere_is_a_foreign_file(job: Job) -> None:
    job.path.mkdir()
    (job.path / "a.txt").symlink_to(job.path / "absent")
    with pytest.raises(UsageError, match="was not written by this job"):
        job.go()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "reap.plan"}, "is not the state of such a job"),
        ({"version": 9}, "is not the state of such a job"),
        ({"steps": {"first": {"identity": {}, "outputs": {"../a.txt": "0"}}}}, "should name files of this folder"),
        ({"contents": {"x": {"sha256": "0", "stamp": [1, 2], "at": 3}}}, "has 2 numbers, expected 5"),
        ({"begun": []}, "should be an object"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], message: str, job: Job) -> None:
    job.go()
    path = job.path / "job.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=message):
        job.go()
    assert (job.path / "b.txt").read_text() == "a12"


# ---- contents


def test_a_file_is_read_again_where_it_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_text("one")
    contents = Contents()
    first = contents.sha256(path)
    stamp = os.stat(path)
    path.write_text("two")  # as long, and with the times of before: only the inode's own time tells
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert contents.sha256(path) != first
    path.write_text("one")
    assert contents.sha256(path) == first


def test_a_file_that_was_not_touched_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_text("one")
    contents = Contents()
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr("reap.pipeline.contents.time.time_ns", lambda: later)
    first = contents.sha256(path)
    monkeypatch.setattr("reap.pipeline.contents.hashlib.sha256", lambda: pytest.fail("it was read again"))
    assert contents.sha256(path) == first
    with pytest.raises(UsageError, match="absent: cannot be read"):
        contents.sha256(tmp_path / "absent")
