"""What a file is that was given where another kind was expected."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest

import reap
from gguf import GGUFWriter
from helpers.checkpoint_builder import config, qwen
from helpers.gguf_builder import build_moe
from helpers.imatrices import write_gguf_imatrix, write_legacy_imatrix
from helpers.profiles import make_profile
from reap.errors import FormatError, UsageError
from reap.files.recognise import what_is
from reap.gguf.imatrix import read_imatrix
from reap.gguf.reader import GGUFModel
from reap.hf.disk.safetensors_file import SafetensorsFile

MATRIX = {"blk.0.ffn_gate_exps.weight": (4, 4)}


def build_folder(folder: Path) -> Path:
    from helpers.checkpoint_builder import build

    build(folder, qwen(), config())
    return folder


def typed(path: Path, kind: str) -> Path:
    writer = GGUFWriter(str(path), "qwen3moe")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def zipped(path: Path, name: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def kinds(folder: Path) -> dict[str, Path]:
    """What it is -> a file of that kind, made by the tools that make such files."""
    profile = make_profile()
    checkpoint = build_folder(folder / "checkpoint")
    (folder / "folder").mkdir()
    return {
        "a GGUF model": build_moe(folder / "m"),
        "an importance matrix": write_gguf_imatrix(folder / "i", MATRIX),
        "an importance matrix (in its old form)": write_legacy_imatrix(folder / "l", MATRIX),
        "a LoRA adapter in GGUF form": typed(folder / "a", "adapter"),
        "the vision or audio part of a model (mmproj)": typed(folder / "v", "mmproj"),
        "a safetensors file": checkpoint / "model.safetensors",
        "the folder of a Hugging Face checkpoint": checkpoint,
        "a checkpoint's config.json; give the folder": checkpoint / "config.json",
        "a folder": folder / "folder",
        "a profile of reap": profile.save(folder / "p"),
        "a plan of reap": reap.plan(profile, keep=4).save(folder / "plan"),
        "JSON Lines": written(folder / "jl", b'{"text": "a"}\n{"text": "b"}\n'),
        "a JSON file": written(folder / "j", json.dumps([{"text": "a"}]).encode()),
        "a text file": written(folder / "t", "ein Löwe\n".encode() * 1000),
        "a text file (UTF-16)": written(folder / "t16", "text".encode("utf-16")),
        "a web page (HTML)": written(folder / "h", b"\n<!DOCTYPE html><html><body>404</body></html>"),
        "a Git LFS pointer: the file itself was not downloaded (git lfs pull)": written(
            folder / "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4000000000\n"
        ),
        "a gzip archive": written(folder / "gz", gzip.compress(b"x")),
        "a ZIP archive": zipped(folder / "zip", "letter.txt"),
        "PyTorch weights (a pickle)": zipped(folder / "pt", "archive/data.pkl"),
        "a pickle": written(folder / "pickle", pickle.dumps({"a": 1}, protocol=2)),
        "an empty file": written(folder / "e", b""),
        "not fully downloaded: it begins with zeros": written(folder / "z", bytes(10_000)),
    }


def test_every_kind_has_a_name(tmp_path: Path) -> None:
    for what, path in kinds(tmp_path).items():
        assert what_is(path) == what


def test_what_is_not_known_has_none(tmp_path: Path) -> None:
    assert what_is(tmp_path / "absent") is None
    assert what_is("nul\0") is None
    os.mkfifo(tmp_path / "pipe")
    assert what_is(tmp_path / "pipe") is None
    assert what_is(written(tmp_path / "noise", bytes(range(256)) * 20)) is None


def test_a_model_that_is_none_is_called_by_its_name(tmp_path: Path) -> None:
    """At the door of every command that takes a model."""
    for what, path in kinds(tmp_path).items():
        if what.startswith(("a GGUF", "a LoRA", "the vision", "a folder")):
            continue
        with pytest.raises((FormatError, UsageError)) as caught:
            GGUFModel.open(path)
        assert what in str(caught.value)
        with pytest.raises((FormatError, UsageError)) as caught:
            reap.inspect(path)
        assert what in str(caught.value)


def test_a_profile_that_is_none_is_called_by_its_name(tmp_path: Path) -> None:
    for what, path in kinds(tmp_path).items():
        if path.is_dir() or "JSON" in what or "json" in what or " of reap" in what or "text file" in what:
            continue
        with pytest.raises(FormatError) as caught:
            reap.Profile.load(path)
        assert f"is {what}, expected a profile of reap" in str(caught.value)


def test_a_matrix_and_weights_that_are_none_are_called_by_their_name(tmp_path: Path) -> None:
    found = kinds(tmp_path)
    for what in ("a text file", "a safetensors file", "a ZIP archive", "a profile of reap"):
        with pytest.raises(FormatError) as caught:
            read_imatrix(found[what])
        assert what in str(caught.value)
    for what in ("a text file", "a GGUF model", "PyTorch weights (a pickle)", "a profile of reap"):
        with pytest.raises(FormatError) as caught:
            SafetensorsFile.open(found[what])
        assert what in str(caught.value)
