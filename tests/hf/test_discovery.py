"""Which files of a checkpoint's folder are read: one answer for all, no link that leads out, and bounds on
the index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoint_builder import KEPT, N_EXPERTS, build, config, qwen
from reap.errors import FormatError, UsageError
from reap.hf import prune
from reap.hf.disk import discovery
from reap.hf.disk.checkpoint_files import Checkpoint
from reap.hf.disk.discovery import CONFIG, INDEX, SINGLE
from reap.scores.plan import PrunePlan


def plan_of() -> PrunePlan:
    return PrunePlan({"n_experts": N_EXPERTS}, "reap", len(next(iter(KEPT.values()))), KEPT)


def in_a_cache(tmp_path: Path, **options: Any) -> Path:
    """A snapshot as a hub's cache has it: every file a link to a blob."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123abcd"
    build(snapshot, qwen(), config(), **options)
    (repository / "blobs").mkdir()
    (snapshot / "README.md").write_text("README of the model")
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return snapshot


# ---- links


@pytest.mark.parametrize("options", [{}, {"n_shards": 2}])
def test_a_snapshot_of_a_hub_s_cache_is_read_through_its_links(tmp_path: Path, options: dict[str, Any]) -> None:
    snapshot = in_a_cache(tmp_path, **options)
    (tmp_path / "link").symlink_to(snapshot)
    for number, source in enumerate((snapshot, tmp_path / "link")):
        prune(source, tmp_path / f"out{number}", plan_of())
        assert (tmp_path / f"out{number}" / "README.md").read_text() == "README of the model"
        assert not any(path.is_symlink() for path in (tmp_path / f"out{number}").iterdir())


def link_file(folder: Path, secret: Path) -> None:
    (folder / "notes.txt").symlink_to(secret)


def link_folder(folder: Path, secret: Path) -> None:
    (folder / "notes").symlink_to(secret.parent)


def link_config(folder: Path, secret: Path) -> None:
    secret.write_bytes((folder / CONFIG).read_bytes())
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(secret)


def link_weights(folder: Path, secret: Path) -> None:
    (folder / SINGLE).rename(secret)
    (folder / SINGLE).symlink_to(secret)


def link_inside(folder: Path, _: Path) -> None:
    (folder / "again.json").symlink_to(CONFIG)


def link_to_nowhere(folder: Path, _: Path) -> None:
    (folder / "gone").symlink_to("nowhere")


def link_deep(folder: Path, secret: Path) -> None:
    (folder / "templates").mkdir()
    (folder / "templates" / "tool.jinja").symlink_to(secret)


def blobs_of_another(folder: Path, secret: Path) -> None:
    """A folder called blobs beside makes no cache."""
    (folder.parent / "blobs").mkdir()
    (folder.parent / "blobs" / "x").write_bytes(secret.read_bytes())
    (folder / "notes.txt").symlink_to("../blobs/x")


LINKS: tuple[Callable[[Path, Path], None], ...] = (
    link_file, link_folder, link_config, link_weights, link_inside, link_to_nowhere, link_deep, blobs_of_another,
)  # fmt: skip


@pytest.mark.parametrize("attack", LINKS, ids=lambda attack: attack.__name__)
def test_any_other_link_is_refused_by_name(tmp_path: Path, attack: Callable[[Path, Path], None]) -> None:
    (tmp_path / "secrets").mkdir()
    secret = tmp_path / "secrets" / "id_ed25519"
    secret.write_text("PRIVATE KEY")
    build(tmp_path / "in", qwen(), config())
    attack(tmp_path / "in", secret)
    with pytest.raises(UsageError, match=r"in/.*: is a link to .*; reap follows only links from a snapshot"):
        prune(tmp_path / "in", tmp_path / "out", plan_of())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attack", ["blob is a link", "blobs is a link", "another cache"])
def test_a_cache_that_was_made_to_lead_out(tmp_path: Path, attack: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("PRIVATE KEY")
    snapshot = in_a_cache(tmp_path)
    readme = snapshot / "README.md"
    blob = Path(os.path.realpath(readme))
    if attack == "blob is a link":
        blob.unlink()
        blob.symlink_to(secret)
    elif attack == "blobs is a link":
        blob.parent.rename(tmp_path / "elsewhere")
        blob.parent.symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "models--c--d" / "blobs").mkdir(parents=True)
        other = tmp_path / "models--c--d" / "blobs" / "x"
        other.write_text("PRIVATE KEY")
        readme.unlink()
        readme.symlink_to(other)
    with pytest.raises(UsageError, match="is a link to"):
        Checkpoint.open(snapshot)


# ---- one discovery


def test_one_file_comes_before_an_index_for_all(tmp_path: Path) -> None:
    """As transformers has it; both halves of reap ask the same function."""
    build(tmp_path / "in", qwen(), config(), n_shards=2)
    build(tmp_path / "single", qwen(), config())
    assert len(discovery.find_weights(tmp_path / "in").names) == 2
    assert discovery.other_weights(tmp_path / "in") == []
    shards = discovery.find_weights(tmp_path / "in").names
    (tmp_path / "in" / SINGLE).write_bytes((tmp_path / "single" / SINGLE).read_bytes())
    assert discovery.find_weights(tmp_path / "in").names == [SINGLE]
    assert sorted(discovery.other_weights(tmp_path / "in")) == sorted(shards)
    with pytest.raises(UsageError, match=r"has 2 files with weights .*model-00001-of-00002.safetensors holds model"):
        prune(tmp_path / "in", tmp_path / "out", plan_of())
    report = prune(tmp_path / "in", tmp_path / "out", plan_of(), other_weights="leave")
    assert {path.name for path in report.files} & {SINGLE, INDEX, *shards} == {SINGLE}
    with Checkpoint.open(tmp_path / "in") as checkpoint:
        assert [path.name for path in checkpoint.weights_paths] == [SINGLE]


@pytest.mark.torch
@pytest.mark.parametrize("both", [False, True])
def test_the_half_in_memory_finds_the_same_files(tmp_path: Path, both: bool) -> None:
    from reap.hf.memory import loading

    build(tmp_path / "in", qwen(), config(), n_shards=2)
    build(tmp_path / "single", qwen(), config())
    if both:
        (tmp_path / "in" / SINGLE).write_bytes((tmp_path / "single" / SINGLE).read_bytes())
    with Checkpoint.open(tmp_path / "in") as checkpoint:
        assert loading.shards(tmp_path / "in") == checkpoint.weights_paths
    (tmp_path / "in" / "notes").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is a link to"):
        loading.check_folder(tmp_path / "in")


def test_what_is_no_folder_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("letter")
    for path, message in (
        (tmp_path / "file", "is a text file, where a Hugging Face checkpoint was expected"),
        (tmp_path / "absent", "no such file; a Hugging Face checkpoint was expected"),
        (tmp_path, r"it has no config\.json"),
    ):
        with pytest.raises(UsageError, match=message):
            discovery.check_folder(path)


# ---- bounds


def large_index(kind: str) -> str:
    if kind == "lists":
        return '{"weight_map": {}, "a": [' + "[]," * 19_000_000 + "[]]}"
    if kind == "numbers":
        return '{"weight_map": {}, "a": [' + "1," * 30_000_000 + "1]}"
    return '{"weight_map": {' + ",".join(f'"{number:x}": "a.safetensors"' for number in range(2_000_000)) + "}}"


# the peak of the program itself: getrusage counts what the process had before it as well
MEASURED = """
import re, sys
from pathlib import Path
from reap.hf.disk.discovery import find_weights
try:
    find_weights(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["lists", "numbers", "members"])
def test_an_index_of_60_mb_takes_little_memory(tmp_path: Path, kind: str) -> None:
    build(tmp_path / "in", qwen(), config(), n_shards=2)
    (tmp_path / "in" / INDEX).write_text(large_index(kind))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "in")], capture_output=True, text=True, check=True
    )
    said, peak_kib = done.stdout.splitlines()
    assert "FormatError" in said
    assert "no checkpoint has as many" in said
    assert int(peak_kib) < 200 * 1024


TIMED = """
import re, sys, time
from pathlib import Path
from reap.errors import FormatError
from reap.hf.disk.discovery import find_weights
from reap.hf.disk.safetensors_file import SafetensorsFile
read = {"index": find_weights, "header": lambda folder: SafetensorsFile.open(folder / "model.safetensors").close()}
started = time.process_time()
try:
    read[sys.argv[1]](Path(sys.argv[2]))
    print("read")
except FormatError as error:
    print(error)
print(time.process_time() - started)
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
NVFP4 = ("weight", "weight_scale", "weight_scale_2", "input_scale")


def names_of_experts(number: int) -> list[str]:
    """As of a model of 60 layers of 384 experts, in four tensors a matrix."""
    return [
        f"model.layers.{i // 4608}.mlp.experts.{i // 12 % 384}.{('gate', 'up', 'down')[i // 4 % 3]}_proj.{NVFP4[i % 4]}"
        for i in range(number)
    ]


def an_index(number: int, shard: str = "a.safetensors") -> str:
    return json.dumps({"weight_map": {name: shard.format(i) for i, name in enumerate(names_of_experts(number))}})


def a_header(number: int) -> str:
    entry = {"dtype": "U8", "shape": [0, 7168, 2048], "data_offsets": [0, 0]}
    return json.dumps(dict.fromkeys(names_of_experts(number), entry), separators=(",", ":"))


LARGE = {
    "an index of 300,000": ("index", lambda: an_index(300_000), "read"),
    "as many names of files": ("index", lambda: an_index(300_000, "{:08}.safetensors"), "more than 4,096 files"),
    "one wide character": (
        "index",
        lambda: an_index(300_000).replace("model", "\U0001f600", 1),
        "no checkpoint has as",
    ),
    "a header of 100,000": ("header", lambda: a_header(100_000), "read"),
    "a name that is not ASCII": ("header", lambda: a_header(30_000).replace("model", "\u00e9"), "read"),
    "much metadata": (
        "header",
        lambda: json.dumps({"__metadata__": {f"{i:030}": str(i) for i in range(400_000)}}, separators=(",", ":")),
        "expected at most 10,000",
    ),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("case", LARGE)
def test_the_largest_that_is_read_takes_a_second_and_200_mb(tmp_path: Path, case: str) -> None:
    kind, text, expected = LARGE[case]
    raw = text().encode()
    if kind == "index":
        (tmp_path / INDEX).write_bytes(raw)
        (tmp_path / "a.safetensors").write_bytes(b"")
    else:
        (tmp_path / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw)
    done = subprocess.run(
        [sys.executable, "-c", TIMED, kind, str(tmp_path)], capture_output=True, text=True, check=True
    )
    said, seconds, peak_kib = done.stdout.splitlines()
    assert expected in said
    assert int(peak_kib) < 200 * 1024
    assert float(seconds) < 2  # half a second to one on a machine that does nothing else


def test_other_texts_of_a_checkpoint_are_bounded_as_well(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    (tmp_path / "in" / CONFIG).write_text(
        json.dumps({**config(), "a": []}).replace("[]", "[" + "[]," * 200_000 + "[]]")
    )
    with pytest.raises(FormatError, match="lists and objects, more than 100,000"):
        Checkpoint.open(tmp_path / "in")
