"""reap.gguf.writer: the bytes of new files, ways of copying, and outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gguf
from gguf import GGUFValueType
from helpers.gguf_builder import build_moe
from reap.errors import FormatError, OutputError, UsageError
from reap.files import copying, temporaries
from reap.files.atomic import check_output, check_space, write
from reap.files.copying import Copier
from reap.files.ranges import Span, merge_spans
from reap.gguf.reader import GGUFFile
from reap.gguf.tensor_types import ValueType
from reap.gguf.writer import NewFile, NewTensor, edit_metadata, encode_pair
from reap.progress import Progress


@pytest.fixture
def source(tmp_path: Path) -> Iterator[GGUFFile]:
    with GGUFFile.open(build_moe(tmp_path / "source.gguf", tokenizer="words", n_vocab=300)) as file:
        yield file


def copy_of(file: GGUFFile, **metadata: Any) -> NewFile:
    n_keys, pieces = edit_metadata(file, **{"replace": {}, **metadata})
    tensors = tuple(
        NewTensor(t.name, t.shape, t.type, (Span(file, t.offset_bytes, t.n_bytes),)) for t in file.tensors.values()
    )
    return NewFile(file.version, file.alignment, n_keys, pieces, tensors)


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


# ---- bytes


def test_an_unchanged_copy_is_the_same_file(source: GGUFFile, tmp_path: Path) -> None:
    new_file = copy_of(source)
    assert new_file.n_bytes == source.size
    write(tmp_path / "copy.gguf", new_file)
    assert (tmp_path / "copy.gguf").read_bytes() == source.path.read_bytes()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_the_size_is_known_to_the_byte_at_any_alignment(tmp_path: Path, alignment: int) -> None:
    with GGUFFile.open(build_moe(tmp_path / "a.gguf", alignment=alignment, n_embd=8, n_ff=8)) as file:
        new_file = copy_of(file, append=[encode_pair("reap.version", "0", ValueType.STRING)])
        write(tmp_path / "b.gguf", new_file)
    assert new_file.n_bytes == (tmp_path / "b.gguf").stat().st_size
    with GGUFFile.open(tmp_path / "b.gguf") as written:
        assert written.alignment == alignment
        assert all(tensor.offset_bytes % alignment == 0 for tensor in written.tensors.values())
        assert written.size % alignment == 0


VALUES = [
    ("a", 200, GGUFValueType.UINT8, None),
    ("a", -3, GGUFValueType.INT16, None),
    ("a", 2**40, GGUFValueType.UINT64, None),
    ("a", 0.1, GGUFValueType.FLOAT64, None),
    ("a", True, GGUFValueType.BOOL, None),
    ("schlüssel", "wörter \x00", GGUFValueType.STRING, None),
    ("a", [1, -2, 3], GGUFValueType.ARRAY, GGUFValueType.INT32),
    ("a", ["x", "", "ü"], GGUFValueType.ARRAY, GGUFValueType.STRING),
]


@pytest.mark.parametrize(("key", "value", "kind", "element"), VALUES, ids=str)
def test_pairs_are_encoded_as_the_gguf_package_does(
    key: str, value: Any, kind: GGUFValueType, element: Any, tmp_path: Path
) -> None:
    theirs = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "x")
    name = key.encode()
    expected = len(name).to_bytes(8, "little") + name + theirs._pack_val(value, kind, add_vtype=True, sub_type=element)
    assert encode_pair(key, value, int(kind), None if element is None else int(element)) == expected


def test_a_value_that_does_not_fit_its_type_is_an_error() -> None:
    with pytest.raises(FormatError, match="'n': 300 does not fit its type UINT8"):
        encode_pair("n", 300, ValueType.UINT8)


def test_edited_metadata_keeps_order_and_bytes_of_the_rest(source: GGUFFile, tmp_path: Path) -> None:
    replace = {"general.name": encode_pair("general.name", "a much longer name", ValueType.STRING)}
    append = [encode_pair("x.y", 1, ValueType.UINT32)]
    new_file = copy_of(source, replace=replace, drop={"qwen3moe.context_length"}, append=append)
    write(tmp_path / "b.gguf", new_file)
    with GGUFFile.open(tmp_path / "b.gguf") as written:
        assert list(written.metadata) == [key for key in source.metadata if key != "qwen3moe.context_length"] + ["x.y"]
        for key, pair in written.metadata.items():
            if key not in ("general.name", "x.y"):
                assert (pair.type, bytes(pair.raw)) == (source.metadata[key].type, bytes(source.metadata[key].raw))
        assert written.get("general.name") == "a much longer name"


def test_neighbouring_spans_become_one(source: GGUFFile) -> None:
    def span(offset: int, n_bytes: int) -> Span:
        return Span(source, offset, n_bytes)

    assert merge_spans([span(0, 4), b"", span(4, 4), b"x", b"y", span(8, 1), span(10, 1)]) == (
        span(0, 8),
        b"xy",
        span(8, 1),
        span(10, 1),
    )


# ---- ways of copying


def fail_with(code: int) -> Any:
    def way(*_: Any, **__: Any) -> int:
        raise OSError(code, os.strerror(code))

    return way


def answer_zero(*_: Any, **__: Any) -> int:
    return 0


LADDERS = {
    "splice": {},
    "copy_file_range": {"splice": fail_with(errno.EINVAL)},
    "sendfile": {"splice": fail_with(errno.EPERM), "copy_file_range": fail_with(errno.EXDEV)},
    "buffer": {name: fail_with(errno.ENOSYS) for name in ("splice", "copy_file_range", "sendfile")},
    "buffer after zeros": {name: answer_zero for name in ("splice", "copy_file_range", "sendfile")},
}


@pytest.mark.parametrize("ladder", LADDERS)
def test_every_way_of_copying_gives_the_same_file(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ladder: str
) -> None:
    for name, way in LADDERS[ladder].items():
        monkeypatch.setattr(os, name, way, raising=False)
    monkeypatch.setattr(copying, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(copying, "KERNEL_CHUNK_BYTES", 3000)
    monkeypatch.setattr(copying, "PIPE_BYTES", 4096)
    write(tmp_path / "copy.gguf", copy_of(source))
    assert (tmp_path / "copy.gguf").read_bytes() == source.path.read_bytes()


def test_a_way_that_gives_up_in_the_middle_is_taken_over_without_a_seam(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = os.sendfile

    def flaky(target: int, src: int, offset: int, count: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(errno.EOPNOTSUPP, "no more")
        return real(target, src, offset, min(count, 777))

    monkeypatch.setattr(os, "splice", fail_with(errno.EINVAL), raising=False)
    monkeypatch.setattr(os, "copy_file_range", fail_with(errno.EXDEV), raising=False)
    monkeypatch.setattr(os, "sendfile", flaky)
    write(tmp_path / "copy.gguf", copy_of(source))
    assert calls == 4
    assert (tmp_path / "copy.gguf").read_bytes() == source.path.read_bytes()


@pytest.mark.skipif(not hasattr(os, "splice"), reason="the system has no splice")
@pytest.mark.parametrize("fails_at", range(1, 8))
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSPC])
def test_what_is_left_in_a_pipe_is_neither_lost_nor_written_twice(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, code: int
) -> None:
    real, calls = os.splice, 0

    def flaky(src: int, dst: int, count: int, offset_src: int | None = None) -> int:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(code, os.strerror(code))
        return real(src, dst, min(count, 5000 if offset_src is not None else 2000), offset_src)

    monkeypatch.setattr(os, "splice", flaky)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    try:
        write(tmp_path / "copy.gguf", copy_of(source))
    except OutputError:
        assert code == errno.ENOSPC
        assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]
    else:
        assert (tmp_path / "copy.gguf").read_bytes() == source.path.read_bytes()
    assert before is None or len(os.listdir("/proc/self/fd")) == before


def test_a_server_that_copies_is_asked_to(source: GGUFFile, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("the system has no copy_file_range")
    assert copying.file_system(source.fileno())
    assert Copier(source.fileno()).ways[0].__name__ == "_by_splice"
    monkeypatch.setattr(copying, "file_system", lambda _: "nfs4")
    assert Copier(source.fileno()).ways[0].__name__ == "_by_copy_file_range"


def test_progress_ends_at_the_size(source: GGUFFile, tmp_path: Path) -> None:
    seen: list[Progress] = []
    write(tmp_path / "copy.gguf", copy_of(source), progress=seen.append)
    assert [step.done for step in seen] == sorted({step.done for step in seen})
    assert seen[-1] == Progress(source.size, source.size, "bytes")


# ---- failures leave nothing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_is_an_output_error_and_leaves_nothing(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    for name in ("splice", "copy_file_range"):
        monkeypatch.setattr(os, name, fail_with(code), raising=False)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="disk is full" if code == errno.ENOSPC else "Input/output error"):
        write(tmp_path / "copy.gguf", copy_of(source))
    assert sorted(tmp_path.iterdir()) == before


def test_a_real_limit_on_file_size_is_an_output_error(source: GGUFFile, tmp_path: Path) -> None:
    script = f"""
import resource, sys
from reap.gguf.reader import GGUFFile
from pathlib import Path
from reap.files.atomic import write
from reap.files.ranges import Span
from reap.gguf.writer import NewFile, NewTensor, edit_metadata
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
with GGUFFile.open({str(source.path)!r}) as file:
    tensors = tuple(NewTensor(t.name, t.shape, t.type, (Span(file, t.offset_bytes,
    t.n_bytes),)) for t in file.tensors.values())
    write(Path({str(tmp_path / "copy.gguf")!r}), NewFile(3, 32, *edit_metadata(file, replace={{}}), tensors))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "OutputError" in done.stderr
    assert "the disk is full" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(source: GGUFFile, tmp_path: Path, error: type[BaseException]) -> None:
    def stop(step: Progress) -> None:
        assert len(leftovers(tmp_path)) == 1
        if step.done > 20_000:
            raise error

    with pytest.raises(error):
        write(tmp_path / "copy.gguf", copy_of(source), progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_a_check_that_fails_leaves_nothing(source: GGUFFile, tmp_path: Path) -> None:
    def check(temporary: Path) -> None:
        assert temporary.read_bytes() == source.path.read_bytes()
        raise OutputError("no")

    with pytest.raises(OutputError, match="no"):
        write(tmp_path / "copy.gguf", copy_of(source), check=check)
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_a_source_that_shrinks_is_a_format_error_and_leaves_nothing(tmp_path: Path) -> None:
    with GGUFFile.open(build_moe(tmp_path / "source.gguf")) as file:
        new_file = copy_of(file)
        os.truncate(file.path, file.data_offset + 100)
        with pytest.raises(FormatError, match="was longer when it was opened"):
            write(tmp_path / "copy.gguf", new_file)
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


SLOW_WRITER = """
import sys, time
from reap.gguf.reader import GGUFFile
from pathlib import Path
from reap.files.atomic import write
from reap.files.ranges import Span
from reap.gguf.writer import NewFile, NewTensor, edit_metadata
with GGUFFile.open(sys.argv[1]) as file:
    tensors = tuple(NewTensor(t.name, t.shape, t.type, (Span(file, t.offset_bytes,
    t.n_bytes),)) for t in file.tensors.values())
    new_file = NewFile(3, 32, *edit_metadata(file, replace={}), tensors)
    write(Path(sys.argv[2]), new_file, progress=lambda step: (print(step.done, flush=True), time.sleep(60)))
"""


def test_a_killed_writer_leaves_no_output_and_the_next_one_cleans_up(source: GGUFFile, tmp_path: Path) -> None:
    output = tmp_path / "copy.gguf"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(source.path), str(output)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        alive = leftovers(tmp_path)
        assert len(alive) == 1
        write(output, copy_of(source))
        assert leftovers(tmp_path) == alive, "the file of a living writer was taken away"
        output.unlink()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not output.exists()
    assert leftovers(tmp_path) == alive
    (tmp_path / ".copy.gguf.backup").touch()
    (tmp_path / ".other.gguf.0123abcd.reap-tmp").touch()
    write(output, copy_of(source))
    assert leftovers(tmp_path) == [".copy.gguf.backup", ".other.gguf.0123abcd.reap-tmp"]


def test_a_temporary_file_unlinked_before_its_lock_is_made_anew(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        if not taken:
            taken.extend(leftovers(tmp_path))
            (tmp_path / taken[0]).unlink()
        real(fd, operation)

    monkeypatch.setattr(
        temporaries, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB)
    )
    write(tmp_path / "copy.gguf", copy_of(source))
    assert len(taken) == 1
    assert (tmp_path / "copy.gguf").read_bytes() == source.path.read_bytes()


# ---- outputs that must not be


def test_an_output_that_exists_is_kept_unless_forced(source: GGUFFile, tmp_path: Path) -> None:
    output = tmp_path / "copy.gguf"
    output.write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        check_output(output, [], force=False)
    with pytest.raises(UsageError, match="exists already"):
        write(output, copy_of(source))
    assert output.read_text() == "precious"
    check_output(output, [], force=True)
    write(output, copy_of(source), force=True)
    assert output.read_bytes() == source.path.read_bytes()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_while_writing_is_kept(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    output = tmp_path / "copy.gguf"
    if not links:
        monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    with pytest.raises(UsageError, match="exists already"):
        write(output, copy_of(source), progress=lambda _: output.write_text("precious") and None)
    assert output.read_text() == "precious"
    assert leftovers(tmp_path) == []


def test_a_file_system_without_hard_links_will_do(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    write(tmp_path / "copy.gguf", copy_of(source))
    assert (tmp_path / "copy.gguf").read_bytes() == source.path.read_bytes()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("spelling", ["same", "dotted", "symlink", "symlinked directory", "hard link"])
def test_an_output_that_is_the_input_is_refused_however_it_is_spelled(
    source: GGUFFile, tmp_path: Path, spelling: str
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.gguf").symlink_to(source.path)
    (tmp_path / "dir").symlink_to(tmp_path)
    os.link(source.path, tmp_path / "hard.gguf")
    output = {
        "same": source.path,
        "dotted": tmp_path / "sub" / ".." / "source.gguf",
        "symlink": tmp_path / "link.gguf",
        "symlinked directory": tmp_path / "dir" / "source.gguf",
        "hard link": tmp_path / "hard.gguf",
    }[spelling]
    for force in (False, True):
        with pytest.raises(UsageError, match="is the input"):
            check_output(output, [source.path], force=force)


def test_outputs_that_cannot_be_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a regular file"):
        check_output(tmp_path / "pipe", [], force=True)
    with pytest.raises(UsageError, match="exists and is a directory"):
        check_output(tmp_path, [], force=True)
    with pytest.raises(UsageError, match="there is no directory"):
        check_output(tmp_path / "absent" / "out.gguf", [], force=False)
    with pytest.raises(UsageError, match="Not a directory"):
        check_output(tmp_path / "file" / "out.gguf", [], force=False)


def test_an_output_through_a_symlink_replaces_the_file_it_names(source: GGUFFile, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real.gguf").write_text("old")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "disk" / "real.gguf")
    check_output(tmp_path / "link.gguf", [source.path], force=True)
    write(tmp_path / "link.gguf", copy_of(source), force=True)
    assert (tmp_path / "link.gguf").is_symlink()
    assert (tmp_path / "disk" / "real.gguf").read_bytes() == source.path.read_bytes()


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = SimpleNamespace(f_bavail=10, f_frsize=1000, f_blocks=100)
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    check_space(tmp_path / "copy.gguf", 10_000)
    with pytest.raises(OutputError, match=r"needs 10,001 bytes, but only 10,000 are free"):
        check_space(tmp_path / "copy.gguf", 10_001)
    with pytest.raises(OutputError, match="are free there"):
        write(tmp_path / "copy.gguf", copy_of(source))
    room.f_blocks = 0  # a file system that does not say
    write(tmp_path / "copy.gguf", copy_of(source))


def test_a_directory_without_permission_is_an_output_error(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as root every directory can be written, so the answer of the system is played
    monkeypatch.setattr(temporaries, "_create_locked", fail_with(errno.EACCES))
    with pytest.raises(OutputError, match="Permission denied"):
        write(tmp_path / "copy.gguf", copy_of(source))


def test_names_at_the_limit_of_the_file_system_can_be_outputs(source: GGUFFile, tmp_path: Path) -> None:
    output = tmp_path / ("n" * 250 + ".gguf")
    write(output, copy_of(source))
    assert output.stat().st_size == source.size
    assert leftovers(tmp_path) == []


def test_writers_of_the_same_output_do_not_disturb_each_other(source: GGUFFile, tmp_path: Path) -> None:
    output, errors = tmp_path / "copy.gguf", []

    def work() -> None:
        try:
            write(output, copy_of(source), progress=lambda _: time.sleep(0.0005))
        except UsageError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert output.read_bytes() == source.path.read_bytes()
    assert leftovers(tmp_path) == []


def test_random_layouts_equal_the_bytes_they_were_made_of(source: GGUFFile, tmp_path: Path) -> None:
    rng, content = np.random.default_rng(0), source.path.read_bytes()
    tensors, expected = [], []
    for index in range(20):
        lengths = rng.integers(0, 60, rng.integers(1, 5))
        pieces: list[Any] = [Span(source, int(rng.integers(0, source.size - 60)), int(n)) for n in lengths]
        pieces.insert(int(rng.integers(0, len(pieces) + 1)), rng.bytes(3))
        expected.append(
            b"".join(p if isinstance(p, bytes) else content[p.offset : p.offset + p.n_bytes] for p in pieces)
        )
        tensors.append(NewTensor(f"t{index}", (len(expected[-1]),), 24, tuple(pieces)))
    write(tmp_path / "r.gguf", NewFile(3, 32, 0, (), tuple(tensors)))
    with GGUFFile.open(tmp_path / "r.gguf") as written:
        assert [bytes(written.data(tensor)) for tensor in written.tensors.values()] == expected
