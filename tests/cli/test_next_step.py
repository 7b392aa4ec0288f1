"""Every command ends with what comes next, as a line that a shell takes as it stands."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import reap
from helpers.profiles import make_profile
from reap.cli import main
from reap.cli.app import app
from reap.cli.next_step import command_line
from reap.cli.sweep_text import print_next_plans
from reap.evaluation.sweep_table import Sweep, SweepRow, Target, Verdict

DATA = Path(str(files("reap") / "data"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name, and whose files' names, need quoting."""
    folder = tmp_path_factory.mktemp("it's here")
    shutil.copy(next(DATA.glob("*.gguf")), folder / "my model.gguf")
    lines = (DATA / "calibration.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "c.jsonl").write_text("".join(lines[:12]), encoding="utf-8")
    text = (DATA / "heldout" / "c.txt").read_bytes()[:6000]
    (folder / "t.txt").write_bytes(text)
    return folder


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.rstrip("\n").splitlines()[-1]


def words_of(line: str) -> list[str]:
    """The command of a line, which has to be one that reap takes."""
    assert line.startswith("next: "), line
    words = shlex.split(line.removeprefix("next: "))
    assert words[0] == "reap"
    command: Any = get_command(app)
    rest = words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(words[1], list(rest))
    return words[1:]


def test_every_step_names_the_next(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """From inspect to card, with what each line says, where nothing has to be filled in."""
    monkeypatch.chdir(work)
    fill = {"CALIBRATION": "c.jsonl", "TEXT": "t.txt"}
    words = ["inspect", "my model.gguf"]
    seen = []
    for _ in range(12):
        seen.append(words[0])
        more = {"profile": ["-c", "512", "-t", "1"], "sweep": ["--keep", "0.5", "--metric", "reap,random"]}
        assert main([*words, *more.get(words[0], [])]) == 0, words
        line = last_line(capsys)
        if words[0] == "card":
            break
        words = [fill.get(word, word) for word in words_of(line)]
    assert seen == ["inspect", "profile", "sweep", "plan", "prune", "evaluate", "card"]
    assert line == "next: read the card, say what was not tried, and publish it with the model and its plan"
    card = (work / "MODEL_CARD.md").read_text(encoding="utf-8")
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert "16 of 32 experts" in title  # the name that prune gave it, not the source's
    assert "| small.gguf | t.txt |" in card


def test_the_engine_s_options_go_along(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(work)
    options = ["-t", "1", "-ngl", "0", "-ot", "a=CPU,b=CPU"]
    assert main(["preview", "my model.gguf", "c.jsonl", "--mask", "all", "-c", "256", *options]) == 0
    words = words_of(last_line(capsys))
    assert words[:5] == ["profile", "my model.gguf", "c.jsonl", "-o", "my model.reap.json"]
    assert words[5:] == ["--ctx-size", "256", "--threads", "1", "--gpu-layers", "0", "--override-tensor", "a=CPU,b=CPU"]


def test_commands_that_need_no_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        make_profile(number).save(tmp_path / f"{number}.json")
    assert main(["compare", "1.json", "2.json"]) == 0
    assert words_of(last_line(capsys)) == ["merge", "1.json", "2.json", "-o", "both.reap.json"]
    assert main(["merge", "1.json", "2.json", "-o", "both.json"]) == 0
    assert words_of(last_line(capsys))[:3] == ["sweep", "MODEL", "both.json"]
    assert main(["plan", "1.json", "--keep", "0.5"]) == 0
    assert last_line(capsys) == "next: the same with -o plan.json, which keeps it"
    assert main(["plan", "1.json", "--keep", "0.5", "-o", "plan.json"]) == 0
    assert words_of(last_line(capsys)) == ["prune", "MODEL", "--plan", "plan.json", "-o", "small.gguf"]
    assert main(["report", "1.json", "-o", "r.html"]) == 0
    assert words_of(last_line(capsys))[:2] == ["plan", "1.json"]
    assert main(["report", "1.json", "--plan", "plan.json", "-o", "r.html", "--force"]) == 0
    assert last_line(capsys) == "next: open r.html in a browser"
    assert main(["devices"]) == 0
    assert words_of(last_line(capsys))[0] == "profile"
    for command in (["plan", "1.json", "--keep", "0.5"], ["compare", "1.json", "2.json"], ["devices"]):
        assert main([*command, "--json"]) == 0
        json.loads(capsys.readouterr().out)  # nothing follows the document


def test_a_dry_run_asks_for_the_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(work / "my model.gguf")
    assert main(["quantize", model, str(work / "q.gguf"), "Q4_0", "--allow-requantize", "--dry-run"]) == 0
    assert last_line(capsys) == "next: the same without --dry-run"


def test_names_that_a_shell_would_read_otherwise() -> None:
    names = ["plain.gguf", "with space", "it's", "$HOME", "a;b", "new\nline", "\udcff.gguf", "*", "back\\slash"]
    line = command_line("printf", "%s\\0", *map(Path, names))
    assert "\n" not in line
    echoed = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
    assert echoed.rstrip(b"\0").split(b"\0") == [name.encode("utf-8", "surrogateescape") for name in names]
    assert command_line("reap", Path("-x.gguf")) == "reap ./-x.gguf"


def table(**more: Any) -> Sweep:
    """A sweep of two sizes, two criteria and two seeds of chance."""
    same: dict[str, Any] = dict.fromkeys(("stderr", "kl_mean", "loss_increase", "loss_increase_stderr"), 0.1)
    same |= {"bytes": 100, "domain": None, "tokens": 9, "top1": 0.5}
    found = [("baseline", None, 8, 10.0), ("reap", None, 6, 11.0), ("random", 0, 6, 14.0), ("random", 1, 6, 13.0)]
    found += [("reap", None, 4, 15.0), ("random", 0, 4, 14.5), ("random", 1, 4, 12.0)]
    rows = [
        SweepRow(metric=metric, seed=seed, keep=keep, perplexity=value, **same) for metric, seed, keep, value in found
    ]
    both: dict[str, Any] = {"domain": None, "margin": 0.1, "spread": 0.01, "clear": True}
    verdicts = (
        Verdict(keep=6, metric="reap", runner_up="random", **both),
        Verdict(keep=4, metric="random", runner_up="reap", **both),
    )
    return Sweep(**({"rows": tuple(rows), "verdicts": verdicts} | more))


def test_of_several_sizes_each_has_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    print_next_plans(table(), Path("my model.gguf"), Path("p.json"), Path("s.json"), ["--blend", "maxmin"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "next: for 6 experts: reap plan p.json --keep 6 --metric reap --model 'my model.gguf' --blend maxmin"
        " -o plan-6.json",
        "next: for 4 experts: reap plan p.json --keep 4 --metric random --seed 1 --model 'my model.gguf' --blend maxmin"
        " -o plan-4.json",
    ]


def test_a_plan_that_was_given_and_won_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    print_next_plans(table(choice={"plans": ["reap"]}), Path("m.gguf"), Path("p.json"), None, [])
    first = capsys.readouterr().out.splitlines()[0]
    assert (
        first == "next: for 6 experts: the plan reap that it was given is best; reap prune MODEL --plan with its file"
    )


def test_a_limit_has_one_winner(capsys: pytest.CaptureFixture[str]) -> None:
    limit = Target(kind="perplexity", limit=0.2, metric="reap", keep=6, bytes=600, perplexity=11.0)
    print_next_plans(table(targets=(limit,)), Path("m.gguf"), Path("p.json"), Path("s.json"), [])
    assert words_of(capsys.readouterr().out.rstrip()) == [
        "plan", "p.json", "--sweep", "s.json", "--model", "m.gguf", "-o", "plan.json",
    ]  # fmt: skip


def test_plan_takes_the_sweep_s_winner(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, profile, sweep = work / "my model.gguf", tmp_path / "p.json", tmp_path / "sweep.json"
    reap.profile(model, work / "c.jsonl", ctx_size=512, threads=1).save(profile)
    table = reap.sweep(
        model, profile, work / "t.txt", keep=[0.75, 0.5], metric=["reap", "random"], threads=1, output=sweep
    )
    given = ["plan", "--sweep", str(sweep), "-o", str(tmp_path / "plan.json")]
    assert main(given) == 2
    assert "the sweep has a winner at each of its sizes (24, 16 experts): say which" in capsys.readouterr().err
    assert main([*given, "--keep", "50%"]) == 0
    made = reap.PrunePlan.load(tmp_path / "plan.json")
    assert made.experts_sha256 == table.winner(16).row.experts_sha256
    assert made.metric == table.winner(16).row.metric
    for more, message in (
        (["--metric", "reap"], "--metric: the sweep has decided that"),
        (["--super-experts"], "--super-experts: the sweep has decided that"),
        (["--refine", "1m", "--model", str(model), "--text", str(work / "t.txt")], "--refine begins with a criterion"),
    ):
        assert main([*given, "--force", "--keep", "16", *more]) == 2
        assert message in capsys.readouterr().err
    profile.unlink()
    assert main([*given, "--force", "--keep", "16"]) == 2
    assert f"{profile}: cannot read the profile" in capsys.readouterr().err
