"""An output appears whole or not at all: processes killed at random moments, two at once, disks that are full, slow or
read-only.

REAP_KILLS says how many processes are killed in each of the tests that do so; 10 by default, 100 where CI is set.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.gguf_builder import build_moe
from reap.errors import FormatError, OutputError
from reap.files import atomic, ranges
from reap.gguf.model_info import inspect
from reap.pruning.gguf import prune
from reap.scores.plan import PrunePlan

KILLS = int(os.environ.get("REAP_KILLS") or (100 if os.environ.get("CI") else 10))
PLANS = {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7)}

# Forks one process per line of input: [[plan, delay in seconds or null], ...]. A delay is when it is killed. Answers
# with their statuses.
KILLER = """
import json, os, signal, sys, time, warnings
warnings.simplefilter("ignore")
from reap.errors import ReapError
from reap.scores.plan import PrunePlan
from reap.pruning.gguf import prune
source, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
plans = {name: PrunePlan.load(path) for name, path in json.loads(sys.argv[4]).items()}

def start(name):
    child = os.fork()
    if child == 0:
        status = 9
        try:
            prune(source, output, plans[name], **options)
            status = 0
        except ReapError as error:
            print(error, file=sys.stderr)
            status = 3
        finally:
            os._exit(status)
    return child

for line in sys.stdin:
    began, jobs = time.perf_counter(), [(start(name), delay) for name, delay in json.loads(line)]
    for child, delay in jobs:
        if delay is not None:
            time.sleep(max(0, began + delay - time.perf_counter()))
            os.kill(child, signal.SIGKILL)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in jobs]
    print(json.dumps([statuses, time.perf_counter() - began]), flush=True)
"""


class Killer:
    """A helper that starts prunes of one source to one output and kills them when told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, *jobs: tuple[str, float | None]) -> tuple[list[int], float]:
        """(exit status of each, seconds that all took); -9 is killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        statuses, seconds = json.loads(self.process.stdout.readline())
        return statuses, seconds


@contextmanager
def killer(source: Path, output: Path, **options: Any) -> Iterator[Killer]:
    plans = {name: str(plan_for(source, name).save(source.with_name(f"{name}.json"))) for name in PLANS}
    command = [sys.executable, "-c", KILLER, str(source), str(output), json.dumps(options), json.dumps(plans)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Killer(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def plan_for(source: Path, name: str = "a") -> PrunePlan:
    info = inspect(source)
    kept = PLANS[name]
    return PrunePlan(
        {"n_experts": info.n_experts, "fingerprint": info.fingerprint}, "reap", 4, dict.fromkeys(info.moe_layers, kept)
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of about 6 MB, alone in its folder."""
    (tmp_path / "in").mkdir()
    return build_moe(tmp_path / "in" / "m.gguf", n_layers=2, n_embd=128, n_ff=256, n_vocab=1024)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def folder_of(source: Path) -> Path:
    folder = source.parent.parent / "out"
    folder.mkdir()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def temporaries(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.endswith(".reap-tmp")]


def wanted(source: Path, **options: Any) -> dict[str, dict[str, str]]:
    """Plan -> name of each file -> digest, as an undisturbed prune writes them."""
    found = {}
    for name in PLANS:
        folder = source.parent / f"want-{name}"
        folder.mkdir()
        report = prune(source, folder / "s.gguf", plan_for(source, name), verify="full", **options)
        found[name] = {path.name: digest(path) for path in report.files}
    return found


def test_a_killed_prune_leaves_no_output_or_a_whole_one(source: Path) -> None:
    folder, before = folder_of(source), digest(source)
    expected, rng, killed, survived = wanted(source), random.Random(1), 0, 0
    with killer(source, folder / "s.gguf") as helper:
        _, seconds = helper.run(("a", None))
        for _ in range(KILLS):
            (folder / "s.gguf").unlink(missing_ok=True)
            [status], _ = helper.run(("a", rng.uniform(0, 1.2 * seconds)))
            killed += status == -9
            assert status in (0, -9)
            if (folder / "s.gguf").exists():
                assert digest(folder / "s.gguf") == expected["a"]["s.gguf"]
                survived += status == -9
            else:
                assert status == -9
            assert len(temporaries(folder)) <= 1, "the next prune removes what a killed one left"
        (folder / "s.gguf").unlink(missing_ok=True)
        assert helper.run(("a", None))[0] == [0]
    assert names(folder) == ["s.gguf"]
    assert digest(source) == before
    assert killed > KILLS / 4, "the delays no longer fall into the work"


def complete(folder: Path, expected: dict[str, dict[str, str]]) -> str | None:
    """Which plan's set of shards is there, whole; None where the first shard is missing. Anything else is a failure."""
    first = folder / "s-00001-of-00004.gguf"
    there = {name: digest(folder / name) for name in names(folder) if name.endswith(".gguf")}
    if not first.exists():
        for name in there:
            with pytest.raises(FormatError, match=r"is missing, but .* is one of 4 shards"):
                inspect(folder / name)
        return None
    [plan] = [name for name in PLANS if expected[name] == there]
    assert inspect(first).n_experts == 4
    return plan


def test_a_killed_prune_leaves_a_whole_set_of_shards_or_one_that_is_refused(source: Path) -> None:
    """Two plans take turns, so that a set of mixed shards would be seen."""
    folder, before, options = folder_of(source), digest(source), {"split_max_size": "1.2M", "force": True}
    expected, rng, outcomes = wanted(source, **options), random.Random(2), []
    assert len(expected["a"]) == 4
    with killer(source, folder / "s.gguf", **options) as helper:
        _, seconds = helper.run(("a", None))
        for turn in range(KILLS):
            status, _ = helper.run(("ab"[turn % 2], rng.uniform(0, 1.2 * seconds)))
            outcomes.append(complete(folder, expected))
            assert status == [-9] or outcomes[-1] == "ab"[turn % 2]
            assert len(temporaries(folder)) <= 4
        assert helper.run(("b", None))[0] == [0]
    assert complete(folder, expected) == "b"
    assert temporaries(folder) == []
    assert digest(source) == before


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_names_of_a_set_appear_last_and_the_first_at_the_very_end(
    source: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """As if the process died after `stop` names: a complete old set loses its first shard before anything else
    changes."""
    folder, options = folder_of(source), {"split_max_size": "1.2M", "force": True}
    expected = wanted(source, **options)
    prune(source, folder / "s.gguf", plan_for(source, "a"), **options)
    real, given = atomic._publish, []

    class Killed(BaseException):
        pass

    def publish(temporary: Path, output: Path, *, force: bool) -> None:
        if len(given) == stop:
            os.unlink = keep  # a killed process cleans nothing up
            raise Killed
        given.append(output.name)
        real(temporary, output, force=force)

    def keep(*_: Any, **__: Any) -> None:
        raise OSError

    unlink = os.unlink
    monkeypatch.setattr(atomic, "_publish", publish)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: os.unlink(path))
    monkeypatch.setattr(os, "unlink", unlink)
    with suppress(Killed):
        prune(source, folder / "s.gguf", plan_for(source, "b"), **options)
    monkeypatch.undo()
    assert given == [f"s-{number:05d}-of-00004.gguf" for number in (4, 3, 2, 1)][:stop]
    assert complete(folder, expected) == ("b" if stop == 4 else None)


@pytest.mark.parametrize(
    "options", [{"force": True}, {"force": True, "split_max_size": "1.2M"}, {"split_max_size": "1.2M"}]
)
def test_two_prunes_to_one_output_do_not_mix(source: Path, options: dict[str, Any]) -> None:
    folder = folder_of(source)
    expected = wanted(source, **options)
    with killer(source, folder / "s.gguf", **options) as helper:
        for turn in range(8):
            if "force" not in options:
                for path in folder.iterdir():
                    path.unlink()
            statuses, _ = helper.run(*[("a", None), ("b", None)][:: 1 if turn % 2 else -1])
            assert sorted(statuses) == ([0, 0] if "force" in options else [0, 3])
            assert {name: digest(folder / name) for name in names(folder)} in expected.values()


# ---- disks


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own; skips where one may not be mounted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a file system needs root; RLIMIT_FSIZE stands in for a full disk elsewhere")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("options", [{}, {"split_max_size": "1M"}])
def test_a_disk_that_fills_up_is_an_error_and_nothing_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    with mounted(tmp_path / "disk", "2m") as disk:
        with pytest.raises(OutputError, match=r"needs [\d,]+ bytes, but only [\d,]+ are free"):
            prune(source, disk / "s.gguf", plan_for(source), **options)
        assert names(disk) == []
        monkeypatch.setattr(atomic, "check_space", lambda *_: None)  # others fill it while we write
        with pytest.raises(OutputError, match="the disk is full; nothing was left behind"):
            prune(source, disk / "s.gguf", plan_for(source), **options)
        assert names(disk) == []
    prune(source, tmp_path / "s.gguf", plan_for(source))


@pytest.mark.parametrize("options", [{}, {"split_max_size": "1.2M"}])
def test_a_limit_on_file_size_is_an_error_and_nothing_stays(source: Path, options: dict[str, Any]) -> None:
    folder = folder_of(source)
    script = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000));"
    script += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from reap.pruning.gguf import prune;"
    script += (
        f"prune({str(source)!r}, {str(folder / 's.gguf')!r},"
        f" {str(plan_for(source).save(source.with_name('p.json')))!r}, **{options!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "OutputError" in done.stderr
    assert "the disk is full; nothing was left behind" in done.stderr
    assert names(folder) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no other file system to write to")
@pytest.mark.parametrize("options", [{}, {"split_max_size": "1.2M"}])
def test_an_output_on_another_file_system(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = Path("/dev/shm") / f"reap-test-{os.getpid()}"
    folder.mkdir()
    try:
        if os.stat(folder).st_dev == os.stat(source).st_dev:
            pytest.skip("the tests run on it themselves")
        report = prune(source, folder / "s.gguf", plan_for(source), verify="full", **options)
        here = prune(source, tmp_path / "s.gguf", plan_for(source), **options)
        assert [digest(path) for path in report.files] == [digest(path) for path in here.files]
        assert len(names(folder)) == len(report.files)
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_source_on_read_only_media(source: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "16m") as disk:
        (disk / "m.gguf").write_bytes(source.read_bytes())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        prune(disk / "m.gguf", tmp_path / "s.gguf", plan_for(source), verify="full")
        with pytest.raises(OutputError, match="Read-only file system"):
            prune(source, disk / "s.gguf", plan_for(source))
        assert names(disk) == ["m.gguf"]
    assert inspect(tmp_path / "s.gguf").n_experts == 4


def test_a_source_that_nobody_may_write_and_links_to_it(source: Path, tmp_path: Path) -> None:
    source.chmod(0o444)
    (tmp_path / "link.gguf").symlink_to(source)
    (tmp_path / "again.gguf").symlink_to("link.gguf")
    stamp = source.stat()
    prune(tmp_path / "again.gguf", tmp_path / "s.gguf", plan_for(source), verify="full")
    after = source.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (stamp.st_mtime_ns, stamp.st_size, stamp.st_ino)


def test_the_cache_keeps_what_was_in_it_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages read for the copy alone are let go of; what was in memory before stays."""
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("the system cannot tell what is in memory")
    source = build_moe(tmp_path / "m.gguf", extra={"big.weight": np.zeros((4096, 2048), dtype=np.float32)})
    plan, forgotten = plan_for(source), list[tuple[str, int, int, int]]()

    def advise(fd: int, offset: int, n_bytes: int, advice: int) -> None:
        which = "source" if os.path.sameopenfile(fd, opened) else "output"
        forgotten.append((which, offset, n_bytes, advice))

    opened = os.open(source, os.O_RDONLY)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    prune(source, tmp_path / "warm.gguf", plan)
    # what it wrote is only told to the disk, and the source's pages stay
    assert all(fd != "source" for fd, *_ in forgotten)
    forgotten.clear()
    monkeypatch.setattr(ranges, "is_cached", lambda *_: False)
    prune(source, tmp_path / "cold.gguf", plan)
    for advice in (os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED):
        assert sum(n_bytes for fd, _, n_bytes, kind in forgotten if fd == "source" and kind == advice) >= 32 << 20
