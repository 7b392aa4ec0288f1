"""Commands: registered once, in the file of their panel; llama.cpp's habits; what the shell completes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import reap
from reap.cli import app, completion, hf, main
from reap.cli.commands import Command
from reap.cli.habits import put_model_first
from reap.errors import UsageError
from reap.scores.profile import METRICS

COMMANDS = [command for panel in (*app.PANELS, hf.PANEL) for command in panel.commands]


class Called:
    """Stands in for a function of the library, and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}
        monkeypatch.setattr(reap, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.arguments, self.options = arguments, options
        raise UsageError("reached the library")


def test_a_panel_is_a_file() -> None:
    for panel in app.PANELS:
        home = panel.title.lower()
        assert {command.run.__module__ for command in panel.commands} == {f"reap.cli.{home}"}
    registered = [command.name for panel in app.PANELS for command in panel.commands]
    assert [command.name for command in app.app.registered_commands] == registered
    assert len(set(registered)) == len(registered)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_has_few_parameters_of_its_own(command: Command) -> None:
    assert len(inspect.signature(command.run).parameters) <= 12


@pytest.mark.parametrize("model", [["-m", "x.gguf"], ["--model", "x.gguf"], ["--model=x.gguf"], ["-m=x.gguf"]])
def test_the_model_may_be_named_as_llama_cpp_has_it(model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["t.txt", *model], [*model, "t.txt"], ["-ngl", "3", "t.txt", *model]):
        called = Called(monkeypatch, "evaluate")
        assert main(["evaluate", *arguments]) == 2
        assert called.arguments == (Path("x.gguf"), Path("t.txt"))


def test_m_is_the_model_of_a_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = Called(monkeypatch, "report")
    assert main(["report", "p.json", "-m", "x.gguf", "-o", str(tmp_path / "r.html")]) == 2
    assert called.options["model"] == Path("x.gguf")


def test_what_follows_two_dashes_is_no_option() -> None:
    assert put_model_first(["--", "-m", "x"]) == ["--", "-m", "x"]
    assert put_model_first(["a", "-m"]) == ["a", "-m"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--cpu-moe"], [(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", "CPU")]),
        (["-cmoe"], [(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", "CPU")]),
        (["--n-cpu-moe", "0"], []),
        (["-ncmoe", "2"], [(rf"blk\.{n}\.ffn_(up|down|gate|gate_up)_(ch|)exps", "CPU") for n in (0, 1)]),
        (["-ot", "a=B", "-cmoe"], [("a", "B"), (r"\.ffn_(up|down|gate|gate_up)_(ch|)exps", "CPU")]),
    ],
)
def test_experts_in_host_memory(given: list[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called(monkeypatch, "evaluate")
    assert main(["evaluate", "m", "t", *given]) == 2
    assert list(called.options["override_tensors"]) == expected


def test_metadata_overrides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called = Called(monkeypatch, "evaluate")
    given = ["--override-kv", "a.b=int:3,c=str:x, y,d=bool:true", "--override-kv", "e=float:1e-5"]
    assert main(["evaluate", "m", "t", *given]) == 2
    expected = (("a.b", "int", "3"), ("c", "str", "x, y"), ("d", "bool", "true"), ("e", "float", "1e-5"))
    assert called.options["override_kv"] == expected
    assert main(["evaluate", "m", "t", "--override-kv", "a=3"]) == 2
    assert "--override-kv should be KEY=TYPE:VALUE" in capsys.readouterr().err


def test_a_negative_number_of_layers_in_host_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "m", "t", "-ncmoe", "-1"]) == 2
    assert "--n-cpu-moe is -1" in capsys.readouterr().err


def test_a_metric_in_capitals_and_a_share_in_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called(monkeypatch, "compare")
    assert main(["compare", "a", "b", "--metric", "REAP", "--keep", "25%"]) == 2
    assert (called.options["metric"], called.options["keep"]) == ("reap", 0.25)


def test_quiet_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, shown in (([], True), (["--quiet"], False), (["-q"], False), ([], True)):
        monkeypatch.setattr("rich.console.Console.is_terminal", True)
        called = Called(monkeypatch, "evaluate")
        assert main(["evaluate", "m", "t", *given]) == 2
        assert (called.options["progress"] is not None) is shown


# ---- what the shell completes


def completed(words: str, flag: str, incomplete: str) -> list[str]:
    command = next(it for it in COMMANDS if it.name == words)
    parameter = next(it for it in command.parameters if flag in it.flags or flag == it.name)
    assert parameter.info.autocompletion is not None
    return list(parameter.info.autocompletion(incomplete))


def test_values_complete() -> None:
    assert completed("plan", "--metric", "") == list(METRICS)
    assert completed("sweep", "--metric", "reap,fre") == ["reap,frequency"]
    assert completed("compare", "--metric", "RE") == ["reap", "reap_l2"]
    assert completed("profile", "--chat-template", "a") == ["auto"]
    assert completed("profile", "--mask", "") == ["all", "response"]
    assert completed("profile", "--flash-attn", "o") == ["on", "off"]
    assert completed("prune", "--verify", "f") == ["fast", "full"]
    assert completed("plan", "--blend", "m") == ["maxmin"]
    assert completed("convert", "--outtype", "b") == ["bf16"]
    assert "Q4_K_M" in completed("quantize", "type", "q4")
    assert "q8_0" in completed("quantize", "--output-tensor-type", "q8")
    assert "CPU" in completed("profile", "--device", "C")


def test_nothing_completes_where_the_engine_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UsageError("not built")

    monkeypatch.setattr("reap.engine.native.load", missing)
    assert completion.file_types()("") == completion.tensor_types()("") == completion.device_names()("") == []


def test_the_shell_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_REAP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "reap plan p.json --metric fr")
    monkeypatch.setenv("COMP_CWORD", "4")
    assert main(["plan"]) == 0
    assert capsys.readouterr().out.strip() == "frequency"
