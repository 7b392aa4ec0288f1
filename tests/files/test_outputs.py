"""The one rule of outputs: no output is an input or another output, nothing is replaced without force, what a killed
process left is cleaned up. For every writer of a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import reap
from helpers.gguf_builder import build_moe
from helpers.profiles import make_profile
from reap.errors import OutputError, UsageError
from reap.files import atomic, temporaries
from reap.files.atomic import check_outputs, is_stream, write_whole, written_elsewhere
from reap.files.atomic_directory import check_output_directory, new_directory
from reap.scores.plan import PrunePlan

# ---- no output is an input or another output


def spellings(folder: Path) -> list[Path]:
    """Ways to name folder/file."""
    real = folder / "file"
    real.write_text("precious")
    (folder / "sub").mkdir()
    (folder / "link").symlink_to("file")
    (folder / "chain").symlink_to("link")
    (folder / "dir").symlink_to(folder)
    os.link(real, folder / "hard")
    return [
        real, folder / "sub" / ".." / "file", Path(os.path.relpath(real)), folder / "link", folder / "chain",
        folder / "dir" / "file", folder / "hard",
    ]  # fmt: skip


def test_an_output_is_no_input_and_no_other_output_however_it_is_spelled(tmp_path: Path) -> None:
    for a, b in combinations(spellings(tmp_path), 2):
        for one, other in ((a, b), (b, a)):
            with pytest.raises(UsageError, match=r"is the input .* itself"):
                check_outputs([one], [other], force=True)
            with pytest.raises(UsageError, match=r"is the output .* itself"):
                check_outputs([one, other], force=True)
    check_outputs([tmp_path / "file", tmp_path / "new"], [tmp_path / "other", None, "-"], force=True)


def test_outputs_that_are_not_there_yet_are_compared_by_place(tmp_path: Path) -> None:
    (tmp_path / "dir").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to("x.json")
    for other in (tmp_path / "dir" / "x.json", tmp_path / "dangling", os.path.relpath(tmp_path / "x.json")):
        with pytest.raises(UsageError, match="as well"):
            check_outputs([tmp_path / "x.json", other], force=False)
        with pytest.raises(UsageError, match="as well"):
            check_outputs([tmp_path / "x.json"], [other], force=False)
    check_outputs([tmp_path / "x.json", tmp_path / "y.json"], [tmp_path / "z.json"], force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "dir"]


@pytest.mark.parametrize("ignores_case", [False, True])
def test_names_that_differ_in_case_only_are_tried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores_case: bool
) -> None:
    """Where the directory finds one by the other's name they are one file."""
    if (tmp_path / "A").mkdir() or (tmp_path / "a").exists():
        pytest.skip("the file system itself ignores case")
    real = os.path.exists

    def exists(path: Any) -> bool:
        if ignores_case:
            path = Path(path)
            return any(found.name.casefold() == path.name.casefold() for found in path.parent.iterdir())
        return real(path)

    monkeypatch.setattr(temporaries.os.path, "exists", exists)
    paths = [tmp_path / "Profile.json", tmp_path / "profile.JSON"]
    if ignores_case:
        with pytest.raises(UsageError, match="as well"):
            check_outputs(paths, force=False)
    else:
        check_outputs(paths, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["A"]


def test_a_folder_that_is_read_makes_inputs_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "weights").write_text("precious")
    (tmp_path / "blob").write_text("precious")
    (folder / "linked").symlink_to(tmp_path / "blob")
    os.link(folder / "inner" / "weights", tmp_path / "hard")
    for output in (folder / "inner" / "weights", tmp_path / "blob", tmp_path / "hard"):
        with pytest.raises(UsageError, match="is a file of the input"):
            check_outputs([output], [folder], force=True)
    check_outputs([folder / "new.json"], [folder], force=False)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, message in (
        (tmp_path / "file", "exists already; --force"),
        (tmp_path, "exists and is a directory"),
        (tmp_path / "absent" / "x", "there is no directory"),
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / "nul\0", "null"),
    ):
        with pytest.raises(UsageError, match=message):
            check_outputs([output], force=False)
    check_outputs([tmp_path / "file"], force=True)


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    check_outputs([pipe, pipe, "/dev/stdout", "/dev/null"], [pipe], force=False)
    write_whole(pipe, b"text", force=False)
    reader.join()
    assert got == [b"text"]
    assert is_stream("/dev/fd/1")
    assert not is_stream(tmp_path / "absent")


def test_stdout_that_is_a_file_is_not_replaced(tmp_path: Path) -> None:
    """`reap plan ... -o /dev/stdout > file`: what was printed before stays."""
    script = "from reap.files.atomic import write_whole; print('first', flush=True);"
    script += "write_whole('/dev/stdout', b'second\\n', force=False)"
    with open(tmp_path / "file", "ab") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True)
    assert (tmp_path / "file").read_text().splitlines()[-1] == "second"


# ---- every writer of a file


def saved_profile(output: Path, force: bool) -> None:
    make_profile().save(output, force=force)


def saved_plan(output: Path, force: bool) -> None:
    reap.plan(make_profile(), keep=4).save(output, force=force)


def written_report(output: Path, force: bool) -> None:
    reap.report(make_profile(), output, force=force)


def written_comparison(output: Path, force: bool) -> None:
    reap.comparison_report(make_profile(1), make_profile(2), output, force=force)


def pruned(output: Path, force: bool) -> None:
    folder = output.parent.parent / "model"
    folder.mkdir(exist_ok=True)
    model = folder / "m.gguf"
    info = reap.inspect(model if model.exists() else build_moe(model))
    kept = dict.fromkeys(info.moe_layers, (0, 1, 2, 3))
    plan = PrunePlan({"n_experts": info.n_experts, "fingerprint": info.fingerprint}, "reap", 4, kept)
    reap.prune(model, output, plan, force=force)


def carded(output: Path, force: bool) -> None:
    folder = output.parent.parent / "small"
    folder.mkdir(exist_ok=True)
    pruned(folder / "s.gguf", True)
    reap.model_card(folder / "s.gguf", output, force=force)


def written_by_another(output: Path, force: bool) -> None:
    with written_elsewhere(output, force=force) as temporary:
        temporary.write_text("new")


WRITERS: tuple[Callable[[Path, bool], None], ...] = (
    saved_profile, saved_plan, written_report, written_comparison, pruned, carded, written_by_another,
)  # fmt: skip


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_nothing_is_replaced_without_force(tmp_path: Path, write: Callable[[Path, bool], None]) -> None:
    output = tmp_path / "out" / "x"
    output.parent.mkdir()
    output.write_text("precious")
    with pytest.raises(UsageError, match="exists already; --force"):
        write(output, False)
    assert output.read_text() == "precious"
    write(output, True)
    assert output.read_bytes() != b"precious"
    assert [path.name for path in output.parent.iterdir()] == ["x"]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_what_appeared_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bool], None]
) -> None:
    """Another process writes the output in the last moment."""
    output, real = tmp_path / "out" / "x", atomic._publish
    output.parent.mkdir()

    def publish(temporary: Path, target: Path, *, force: bool) -> None:
        if target.name == "x":
            target.write_text("precious")
        real(temporary, target, force=force)

    monkeypatch.setattr(atomic, "_publish", publish)
    with pytest.raises(UsageError, match="exists already; --force"):
        write(output, False)
    assert output.read_text() == "precious"
    assert [path.name for path in output.parent.iterdir()] == ["x"]


KILLED = """
import os, signal, sys
from pathlib import Path
from reap.files import atomic
import test_outputs
real = atomic._publish

def publish(temporary, output, *, force):
    if output.name == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    real(temporary, output, force=force)

atomic._publish = publish
getattr(test_outputs, sys.argv[1])(Path(sys.argv[2]), True)
"""


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_what_a_killed_process_left_is_cleaned_up(tmp_path: Path, write: Callable[[Path, bool], None]) -> None:
    output = tmp_path / "out" / "x"
    output.parent.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", KILLED, write.__name__, str(output)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    left = [path.name for path in output.parent.iterdir()]
    assert len(left) == 1
    assert left[0].endswith(temporaries.SUFFIX)
    write(output, False)
    assert [path.name for path in output.parent.iterdir()] == ["x"]


def test_a_disk_that_is_full_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = make_profile(0).save(tmp_path / "p.json")
    before = output.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="the disk is full; nothing was left behind"):
        make_profile(1).save(output)
    assert output.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


# ---- directories


def test_a_directory_holds_no_input(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    (tmp_path / "out" / "plan.json").touch()
    with pytest.raises(UsageError, match=r"is the input .*plan\.json, lies in it or holds it"):
        check_output_directory(
            tmp_path / "out", [tmp_path / "in", tmp_path / "out" / "plan.json"], marker="config.json", force=True
        )


@pytest.mark.parametrize("fails", [False, True])
def test_the_directory_that_is_replaced_is_held_while_it_is_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Between two renames it has a temporary name, and another writer of the output must not take it for stale."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    real, seen = os.rename, []

    class Stop(Exception):
        pass

    def rename(source: Any, target: Any) -> None:
        if Path(target) == out and not seen:
            with suppress(Stop), new_directory(out, force=False):  # a second writer, which cleans up first
                seen.extend(path.name for path in tmp_path.iterdir())
                raise Stop
            if fails:
                raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with (
        pytest.raises(OutputError) if fails else nullcontext(),
        new_directory(out, force=True) as directory,
    ):
        (directory / "config.json").write_text("new")
    assert len(seen) == 3, "the new one, the old one and the second writer's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == ("old" if fails else "new")
