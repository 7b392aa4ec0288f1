"""No command writes over what it reads, or one output over another, and none replaces a file without --force."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from reap.cli import app, hf, main
from reap.cli.commands import Command
from reap.cli.options import READS, RESUMES, WRITES, WRITES_FOLDER

COMMANDS: dict[str, Command] = {
    **{command.name: command for panel in app.PANELS for command in panel.commands},
    **{f"hf {command.name}": command for command in hf.PANEL.commands},
}
#: Values of what is not a path and has no default.
VALUES = {"keep": "0.5", "type": "Q8_0"}


def call(words: str, paths: dict[str, str]) -> list[str]:
    """A command line with all of the command's paths."""
    positional, options = [], []
    for parameter in COMMANDS[words].parameters:
        value = paths.get(parameter.name, VALUES.get(parameter.name))
        if value is not None:
            options += [parameter.flags[0], value] if parameter.flags else []
            positional += [] if parameter.flags else [value]
    return [*words.split(), *positional, *options]


def paths_of(words: str, work: Path) -> dict[str, str]:
    """A file of its own for each path of a command: inputs are there, outputs are not."""
    paths = {}
    for parameter in COMMANDS[words].parameters:
        if parameter.role is not None:
            path = work / f"{parameter.name}.file"
            paths[parameter.name] = str(path)
            if parameter.role is READS:
                path.write_text(parameter.name)
    return paths


def pairs() -> Iterator[tuple[str, str, str]]:
    """(command, an output, another path of it)."""
    for words, command in COMMANDS.items():
        named = [parameter for parameter in command.parameters if parameter.role is not None]
        for one, other in product(named, named):
            if one.role is not READS and one is not other:
                yield words, one.name, other.name


def as_it_is(path: Path) -> str:
    return str(path)


def through_its_directory(path: Path) -> str:
    return str(path.parent / "." / ".." / path.parent.name / path.name)


def relative(path: Path) -> str:
    return os.path.relpath(path)


def linked(path: Path) -> str:
    link = path.with_name(f"link-to-{path.name}")
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    return str(link)


def hard_linked(path: Path) -> str:
    link = path.with_name(f"same-{path.name}")
    link.unlink(missing_ok=True)
    if path.exists():
        os.link(path, link)
        return str(link)
    return str(path)


SPELLINGS: list[Callable[[Path], str]] = [as_it_is, through_its_directory, relative, linked, hard_linked]


@pytest.mark.parametrize("spelled", SPELLINGS)
@pytest.mark.parametrize(("words", "output", "other"), list(pairs()))
def test_an_output_is_not_another_path(
    words: str,
    output: str,
    other: str,
    spelled: Callable[[Path], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = paths_of(words, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    paths[output] = spelled(Path(paths[other]))
    has_force = any(parameter.name == "force" for parameter in COMMANDS[words].parameters)
    assert main([*call(words, paths), *(["--force"] if has_force else [])]) == 2
    out, err = capsys.readouterr()
    assert "choose another output" in err
    assert out == ""
    assert {path: path.read_bytes() for path in before} == before


def writing() -> list[tuple[str, str]]:
    return [
        (words, parameter.name)
        for words, command in COMMANDS.items()
        for parameter in command.parameters
        if parameter.role is WRITES
    ]


@pytest.mark.parametrize(("words", "output"), writing())
def test_an_output_that_is_there_needs_force(
    words: str, output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = paths_of(words, tmp_path)
    Path(paths[output]).write_text("mine")
    assert main(call(words, paths)) == 2
    assert "exists already; --force" in capsys.readouterr().err
    assert Path(paths[output]).read_text() == "mine"
    assert main([*call(words, paths), "--force"]) != 0  # the inputs are nothing of the kind
    assert "exists already" not in capsys.readouterr().err


def test_every_path_of_every_command_has_a_role() -> None:
    for words, command in COMMANDS.items():
        for parameter in command.parameters:
            if "Path" in str(parameter.kind) or parameter.name in ("calibration", "chat_template"):
                assert parameter.role is not None, f"{words} {parameter.name}"
    roles = {parameter.role for command in COMMANDS.values() for parameter in command.parameters}
    assert roles >= {READS, WRITES, RESUMES, WRITES_FOLDER}


def test_a_file_inside_an_input_directory_is_an_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "checkpoint" / "config.json"
    config.parent.mkdir()
    config.write_text("{}")
    (tmp_path / "c.txt").write_text("text")
    assert main(["hf", "profile", str(config.parent), str(tmp_path / "c.txt"), "-o", str(config), "--force"]) == 2
    assert "is a file of the input" in capsys.readouterr().err
    assert config.read_text() == "{}"


def test_a_domain_s_file_is_an_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = tmp_path / "code.jsonl"
    code.write_text("{}")
    assert main(["profile", "m.gguf", f"code={code}", "-o", str(code), "--force"]) == 2
    assert "is the input" in capsys.readouterr().err
