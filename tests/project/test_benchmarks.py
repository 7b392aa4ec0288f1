"""The harness of benchmarks: its list is whole, and what is on record is what was printed."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.paths import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import results
from benchmarks.registry import BENCHMARKS, Benchmark, Figure, find

# Scripts that measure nothing that is quoted: they make something, or need a machine that this project has not.
NO_MEASUREMENT = {
    "architecture_survey",
    "architecture_table",
    "cuda_check",
    "trap_scores",
    "train_embedded_model",
    "small_model",
}

each = pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)


def test_every_script_is_listed() -> None:
    scripts = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if "argparse" in path.read_text() and not path.stem.startswith("__")
    }
    called = " ".join(benchmark.command for benchmark in BENCHMARKS)
    assert {name for name in scripts if f"benchmarks/{name}.py" not in called} == NO_MEASUREMENT


@each
def test_what_is_called_and_measured_exists(benchmark: Benchmark) -> None:
    for command in filter(None, (benchmark.command, benchmark.quick)):
        script = next(word for word in shlex.split(command) if word.endswith(".py"))
        assert (ROOT / script).exists()
        options = {word for word in shlex.split(command) if word.startswith("--")}
        assert all(f'"{option}"' in (ROOT / script).read_text() for option in options)
    assert all((ROOT / place).exists() for place in benchmark.measures)


@each
def test_figures_on_record_are_those_in_the_text(benchmark: Benchmark) -> None:
    result = results.load(benchmark.name)
    if result is None:
        return
    output = (results.FOLDER / f"{benchmark.name}.txt").read_text(encoding="utf-8")
    assert result.figures == {figure.what: figure.read(output) for figure in benchmark.figures}


def test_a_figure_is_read_with_its_range() -> None:
    figure = Figure("speed", r"ratio # of #", "{0} to {1} times")
    assert figure.read("ratio 1.5 of 2\nratio 0.5 of 2") == "0.5 to 1.5 to 2 times"
    assert figure.read("nothing") is None


@pytest.mark.parametrize("page", results.pages(), ids=lambda page: page.name)
def test_the_figures_of_a_page_are_those_on_record(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert results.filled(text) == text, "python -m benchmarks fill"
    changed = re.sub(r"(<!-- (?:figure|table) [^>]*-->\n?)[^<]+", r"\1something else", text)
    assert results.filled(changed) == text
    assert (changed == text) == ("<!-- end -->" not in text)


def test_pages_show_figures_and_tables() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in results.pages())
    assert {"figure", "table"} <= set(re.findall(r"<!-- (\w+) \w+: ", text))
    assert len(re.findall(r"<!-- (?:figure|table) ", text)) == text.count("<!-- end -->") > 20


@pytest.mark.parametrize("marker", ["figure fuzz: speed", "figure speed_of_light: c", "table fuzz: speed"])
def test_a_figure_that_is_not_on_record_is_an_error(marker: str) -> None:
    with pytest.raises(KeyError):
        results.filled(f"<!-- {marker} -->\n<!-- end -->")


def test_an_output_without_its_figures_is_a_failure() -> None:
    with pytest.raises(ValueError, match="virtual_pruning: its output does not have"):
        results.make(next(find(["virtual_pruning"])), "", 0.0, "something else")


def test_a_change_of_the_code_makes_figures_old() -> None:
    benchmark = next(find(["virtual_pruning"]))
    output = (results.FOLDER / "virtual_pruning.txt").read_text(encoding="utf-8")
    result = results.make(benchmark, "", 0.0, output)
    assert not results.is_old(result, benchmark)
    assert results.is_old(replace(result, code="of another tree"), benchmark)


def test_an_unknown_name_is_said() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", "speed_of_light"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no benchmark speed_of_light" in done.stderr


def test_only_the_harness_keeps_results() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert path.stem in {benchmark.name for benchmark in BENCHMARKS}
    for path in (ROOT / "benchmarks").glob("*.py"):
        ast.parse(path.read_text())
