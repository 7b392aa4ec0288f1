"""Every command and every Python block of the README and the tutorial, run in order on the embedded model.

What a page says that a command prints has to be among the lines that it prints; numbers may differ between machines.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import pytest

from helpers.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md"]
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[\d.,]*\d(?:e-?\d+)?")


@dataclass
class Step:
    """A command with the lines that the page shows of it, or a block of Python."""

    command: list[str]
    shown: list[str] = field(default_factory=list)


def steps(page: Path) -> list[Step]:
    found: list[Step] = []
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "python":
            found.append(Step([sys.executable, "-c", text]))
            continue
        for line in text.splitlines():
            if line.startswith("$ "):
                words = shlex.split(line[2:])
                found.append(Step([sys.executable, "-m", *words] if words[0] == "reap" else words))
            elif line != "…":
                found[-1].shown.append(line)
    return found


def shape(line: str) -> str:
    """A line without its numbers and its padding."""
    return " ".join(NUMBER.sub("#", line).split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = Path(str(files("reap") / "data"))
    shutil.copy(next(data.glob("*.gguf")), tmp_path / "model.gguf")
    shutil.copy(data / "calibration.jsonl", tmp_path)
    shutil.copy(data / "heldout" / "c.txt", tmp_path / "heldout.txt")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_runs_as_it_stands(page: Path, folder: Path) -> None:
    patient = {**os.environ, "GOMP_SPINCOUNT": "0"}  # threads that wait do not take the cores from those that work
    for step in steps(page):
        done = subprocess.run(
            step.command, cwd=folder, capture_output=True, text=True, check=False, timeout=600, env=patient
        )
        assert done.returncode == 0, f"{step.command}: {done.stderr}"
        printed = {shape(line) for line in done.stdout.splitlines()}
        for line in step.shown:
            assert shape(line) in printed, (
                f"{page.name}: {step.command[2:]} does not print {line!r}, but:\n{done.stdout}"
            )


def test_there_is_something_to_run() -> None:
    for page in PAGES:
        assert sum(step.command[1] == "-m" for step in steps(page)) >= 5
        assert any(step.command[1] == "-c" for step in steps(page))
        assert any(step.shown for step in steps(page))
