"""From Python, as on the command line: no output is an input, and none replaces a file without force."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reap
from helpers.gguf_builder import build_moe
from helpers.profiles import make_profile
from reap.cli import main
from reap.errors import FormatError, UsageError
from reap.files.atomic import RewrittenOutput

Call = Callable[..., Any]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    model = build_moe(tmp_path / "m.gguf", n_layers=2, n_experts=8)
    profile = make_profile(layers=(0, 1), model=reap.inspect(model).record()).save(tmp_path / "p.json")
    reap.plan(profile, keep=4).save(tmp_path / "plan.json")
    (tmp_path / "t.txt").write_text("words in a row, and more words\n" * 20)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    return tmp_path


def sweep(work: Path, output: Path, **more: Any) -> Any:
    files = [work / "m.gguf", work / "p.json", work / "t.txt"]
    return reap.sweep(*files, keep=4, metric="reap", plans=[work / "plan.json"], output=output, **more)


def refine(work: Path, output: Path, **more: Any) -> Any:
    return reap.refine(work / "m.gguf", work / "p.json", [work / "t.txt"], keep=4, seconds=1, output=output, **more)


@pytest.mark.parametrize("spelled", ["{}", "./../{0.parent.name}/{0.name}", "link"])
@pytest.mark.parametrize(
    ("call", "inputs"), [(sweep, "m.gguf p.json t.txt plan.json"), (refine, "m.gguf p.json t.txt")]
)
def test_no_input_is_written_over(
    call: Call, inputs: str, spelled: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    for name in inputs.split():
        path = work / name
        before = path.read_bytes()
        output = Path(spelled.format(path))
        if spelled == "link":
            output = work / f"link-{name}"
            os.symlink(path, output)
        with pytest.raises(UsageError, match=r"is the input .*; choose another output"):
            call(work, output, force=True)
        assert path.read_bytes() == before


@pytest.mark.parametrize("call", [sweep, refine])
def test_another_file_is_replaced_with_force_alone(call: Call, work: Path) -> None:
    (work / "mine.json").write_text("mine")
    for more in ({}, {"resume": True}):  # there is nothing to go on from
        with pytest.raises(UsageError, match=r"mine\.json: exists already; --force"):
            call(work, work / "mine.json", **more)
    with pytest.raises(UsageError, match="there is no directory"):
        call(work, work / "nowhere" / "x.json")
    assert (work / "mine.json").read_text() == "mine"


def test_resume_replaces_what_an_interrupted_run_left_and_nothing_else(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "mine.json").write_text("mine")
    files = [str(work / name) for name in ("m.gguf", "p.json", "t.txt")]
    assert main(["sweep", *files, "-o", str(work / "mine.json"), "--resume"]) == 2
    assert "exists already; --force" in capsys.readouterr().err
    assert (work / "mine.json").read_text() == "mine"


def test_what_a_call_wrote_itself_it_replaces(work: Path) -> None:
    plan = reap.plan(work / "p.json", keep=2)
    output = RewrittenOutput(work / "new.json", [], force=False)
    output.save(plan)
    output.save(plan)
    late = RewrittenOutput(work / "late.json", [], force=False)
    (work / "late.json").write_text("of another process")
    with pytest.raises(UsageError, match="exists already"):
        late.save(plan)
    assert (work / "late.json").read_text() == "of another process"


@pytest.mark.parametrize("name", ["m.gguf", "c.jsonl", "chat.jinja"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_resume_file_is_not_an_input(name: str, resume: bool, work: Path) -> None:
    """It said "removing it begins anew" of the calibration."""
    before = (work / name).read_bytes()
    options: dict[str, Any] = {"checkpoint": work / name, "resume": resume, "chat_template": work / "chat.jinja"}
    with pytest.raises(UsageError, match=r"is the input .*; choose another output"):
        reap.profile(work / "m.gguf", work / "c.jsonl", **options)
    assert (work / name).read_bytes() == before


def test_a_file_of_another_kind_is_not_called_a_resume_file(work: Path) -> None:
    with pytest.raises(UsageError, match=r"p\.json: is a profile of reap, where a resume file would be written"):
        reap.profile(work / "m.gguf", work / "c.jsonl", checkpoint=work / "p.json")
    (work / "s.json.resume").write_text((work / "plan.json").read_text())
    with pytest.raises(UsageError, match="is a plan of reap, where a resume file would be written"):
        sweep(work, work / "s.json")
    with pytest.raises(FormatError):
        reap.profile(work / "m.gguf", work / "c.jsonl", checkpoint=work / "plan.json", resume=True)


def test_a_resume_file_that_could_not_be_written_is_refused_first(work: Path) -> None:
    with pytest.raises(UsageError, match="there is no directory"):
        reap.profile(work / "m.gguf", work / "c.jsonl", checkpoint=work / "nowhere" / "x.resume")
    with pytest.raises(UsageError, match="exists and is a directory"):
        reap.profile(work / "m.gguf", work / "c.jsonl", checkpoint=work, resume=True)
