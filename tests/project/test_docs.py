"""The documentation is true where a machine can tell: commands parse, links lead somewhere, what is named exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import reap
from helpers.paths import ROOT
from reap.cli.app import app
from reap.pruning.sizing import measure_size

PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "vendor" / "llama.cpp" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
EXAMPLES = ROOT / "docs" / "examples"
FENCE = re.compile(r"^```.*$", re.MULTILINE)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_lines(text: str) -> Iterator[str]:
    """Lines of code blocks, fenced or indented; prompts and comments taken off."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ").split(" #")[0].strip()


def spans(text: str) -> list[str]:
    """Code within lines."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(lines: Iterator[str] | list[str]) -> Iterator[list[str]]:
    """The words after `reap` of every call of it."""
    for line in lines:
        for part in line.split(" && "):
            if part.startswith("reap "):
                yield shlex.split(part)[1:]


def subcommand(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words call, and those that are left for it; `reap hf` has commands of its own."""
    command: Any = get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]} of reap"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pages
def test_commands_parse(page: Path) -> None:
    for words in commands(code_lines(page.read_text(encoding="utf-8"))):
        try:
            command, rest = subcommand(words)
            command.make_context(words[0], rest)
        except Exception as error:
            pytest.fail(f"reap {shlex.join(words)}: {error}")


@pages
def test_options_that_are_mentioned_exist(page: Path) -> None:
    for words in commands(spans(page.read_text(encoding="utf-8"))):
        if words[0].startswith("-"):
            continue
        known = {option for parameter in subcommand(words)[0].params for option in parameter.opts}
        options = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert options <= known, f"reap {shlex.join(words)}: no {options - known}"


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:", target):
            assert (page.parent / target.split("#")[0]).exists(), target


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    for span in spans(page.read_text(encoding="utf-8")):
        for name in re.findall(r"(?<![\w/])(?:tests|benchmarks|csrc|python|docs)/[\w./-]*\w", span):
            assert (ROOT / name).exists(), name


@pages
def test_tests_that_are_named_exist(page: Path) -> None:
    for module, name in re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text(encoding="utf-8")):
        (path,) = (ROOT / "tests").rglob(module)
        assert f"def {name}(" in path.read_text(encoding="utf-8"), f"{module}::{name}"


def test_there_is_something_to_check() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"demo", "inspect", "profile", "plan", "prune", "evaluate"} <= {
        words[0] for words in commands(code_lines(readme))
    }
    assert any("::test_" in page.read_text(encoding="utf-8") for page in PAGES)


def test_the_layout_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    layout = page[page.index("## Layout") : page.index("## Who may know whom")]
    package = ROOT / "python" / "reap"
    for path in package.rglob("*.py"):
        if not {"_converter", "cli"} & set(path.parts) and path.name != "__init__.py":
            assert re.search(rf"\b{path.stem}\b", layout), f"docs/architecture.md does not say what {path} is"
    for path in (ROOT / "csrc").glob("*.cpp"):
        assert f" {path.stem} " in layout, f"docs/architecture.md does not say what csrc/{path.name} is"


def test_every_metric_is_explained() -> None:
    page = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")
    assert all(f"| `{metric}` |" in page for metric in reap.METRICS)


# ---- the examples


def test_the_example_plan_is_that_of_the_example_profile() -> None:
    profile = reap.Profile.load(EXAMPLES / "expert_stats_reap.json")
    assert profile.trusted
    made, saved = reap.plan(profile, keep=0.5), reap.PrunePlan.load(EXAMPLES / "plan-50.json")
    assert (saved.model, saved.metric, saved.keep, saved.layers) == (made.model, made.metric, made.keep, made.layers)


def test_what_the_recipe_says_of_the_embedded_model() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (model,) = Path(str(files("reap") / "data")).glob("*.gguf")
    info, profile = reap.inspect(model), reap.Profile.load(EXAMPLES / "expert_stats_reap.json")
    saved = f"{info.bytes_per_expert / 2**10:.0f} KiB"
    assert f"{info.n_experts} experts in each of {len(info.moe_layers)} layers" in page
    assert f"{info.n_bytes / 2**20:.1f} MiB, {saved} for each expert" in page
    limit = float(re.search(r"Say that ([\d.]+) MB", page)[1]) * 10**6
    sizes = {keep: measure_size(model, reap.plan(profile, keep=keep)).n_bytes_after for keep in range(4, 33)}
    most = max(keep for keep, n_bytes in sizes.items() if n_bytes <= limit)
    assert f"the most experts that fit, {most}," in page
    assert f"--keep {most} " in page


def test_the_example_profile_is_of_the_embedded_model() -> None:
    data = Path(str(files("reap") / "data"))
    (model,) = data.glob("*.gguf")
    info, recorded = reap.inspect(model), reap.Profile.load(EXAMPLES / "expert_stats_reap.json").model
    assert (recorded["fingerprint"], recorded["router_fingerprint"]) == (info.fingerprint, info.router_fingerprint)
    sample = (EXAMPLES / "sample_calibration.jsonl").read_bytes()
    assert sample
    assert (data / "calibration.jsonl").read_bytes().startswith(sample)
