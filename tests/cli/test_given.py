"""What is given where something else belongs is named, with what to give."""

from __future__ import annotations

from pathlib import Path

import pytest

import reap
from helpers.gguf_builder import build_moe
from helpers.profiles import make_profile
from reap.cli import main
from reap.errors import UsageError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("given")
    model = build_moe(work / "m.gguf", n_layers=2, n_experts=8)
    fingerprint = reap.inspect(model).fingerprint
    profile = make_profile(layers=(0, 1), model={"fingerprint": fingerprint}).save(work / "p.json")
    reap.plan(profile, keep=4).save(work / "plan.json")
    (work / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (work / "t.txt").write_text("words in a row, and more words\n" * 20)
    (work / "hf").mkdir()
    (work / "hf" / "config.json").write_text('{"architectures": ["X"]}')
    return work


SWAPPED = "give them the other way round"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("profile c.jsonl m.gguf -o x.json", SWAPPED),
        ("evaluate t.txt m.gguf", SWAPPED),
        ("sweep p.json m.gguf t.txt", SWAPPED),
        ("prune plan.json --plan m.gguf -o x.gguf", SWAPPED),
        ("report plan.json --plan p.json -o x.html", SWAPPED),
        ("plan m.gguf --keep 4", "`reap profile m.gguf CALIBRATION -o PROFILE.json` makes a profile of it"),
        ("plan plan.json --keep 4", "is a plan of reap, where PROFILE.json should be a profile of reap"),
        ("prune m.gguf --plan p.json -o x.gguf", "`reap plan p.json --keep 0.5 -o PLAN.json` makes a plan of it"),
        ("evaluate m.gguf t.txt --plan p.json", "makes a plan of it"),
        ("inspect p.json", "give the model that it is a profile of"),
        ("inspect hf", "`reap convert hf model.gguf` makes a GGUF file of it"),
        ("profile hf c.jsonl -o x.json", "`reap convert hf model.gguf`"),
        ("merge p.json m.gguf -o x.json", "is a GGUF model, where A.json B.json... should be a profile of reap"),
        ("hf prune m.gguf --plan plan.json -o x", "the commands without hf work on GGUF files"),
        ("inspect Qwen/Qwen3-30B-A3B", "download it (hf download Qwen/Qwen3-30B-A3B)"),
        ("inspect Qwen/Qwen3-30B-A3B-GGUF:Q4_K_M", "download it (hf download Qwen/Qwen3-30B-A3B-GGUF)"),
        ("convert Qwen/Qwen3-30B-A3B x.gguf", "download it (hf download Qwen/Qwen3-30B-A3B)"),
        ("hf prune Qwen/Qwen3-30B-A3B --plan plan.json -o x", "download it (hf download Qwen/Qwen3-30B-A3B)"),
        ("inspect https://huggingface.co/a/b.gguf", "https://huggingface.co/a/b.gguf is a URL: download it"),
        ("evaluate m.gguf https://h.co/a/b.txt", "error: https://h.co/a/b.txt is a URL: download it"),
        ("evaluate m.gguf t.txt --plan https://h.co/a/b.json", "error: https://h.co/a/b.json is a URL: download it"),
        ("sweep m.gguf hf://datasets/a/b t.txt", "error: hf://datasets/a/b is a URL: download it"),
        ("profile m.gguf code=https://h.co/a/b.jsonl -o x.json", "error: https://h.co/a/b.jsonl is a URL: download it"),
        ("profile m.gguf c.jsonl -o https://h.co/a", "error: https://h.co/a is a URL: an output is a file on this mac"),
        ("profile m.gguf c.jsonl -o x.json --chat-template https://h.co/a", "https://h.co/a is a URL: download it"),
        ("profile m.gguf org/data -o x.json", "download it (hf download --repo-type dataset org/data)"),
        ("evaluate m.gguf org/data", "download it (hf download --repo-type dataset org/data)"),
        ("plan org/profile --keep 4", "download it (hf download org/profile)"),
        ("convert https://huggingface.co/a/b x.gguf", "https://huggingface.co/a/b is a URL: download it"),
        ("plan p.json --keep 0.001", "the least that works is 2"),
        ("plan p.json --keep 1", "the least that works is 2"),
    ],
)
def test_what_was_given_and_what_to_give(
    arguments: str, sentence: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert sentence in err
    assert out == ""
    assert len(err.splitlines()) == 1


def test_a_directory_that_is_there_is_not_taken_for_a_hub(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    with pytest.raises(UsageError, match=r"hf/absent.gguf: no such file$"):
        reap.inspect("hf/absent.gguf")


def test_the_right_files_in_the_right_places_pass(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(work / "m.gguf")]) == 0
    assert main(["plan", str(work / "p.json"), "--keep", "50%", "-m", str(work / "m.gguf")]) == 0
    dry_run = [
        "prune",
        str(work / "m.gguf"),
        "--plan",
        str(work / "plan.json"),
        "-o",
        str(work / "x.gguf"),
        "--dry-run",
    ]
    assert main(dry_run) == 0
