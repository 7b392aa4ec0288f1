"""Results of benchmarks as files: what was run, on what, what it printed, and whether the code has changed since."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.resources import files
from itertools import takewhile
from pathlib import Path

from benchmarks.registry import BENCHMARKS, Benchmark, find

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
OLD = "†"
_FIGURE = re.compile(r"(?P<head><!-- figure (?P<name>\w+): (?P<what>.+?) -->).*?<!-- end -->", re.DOTALL)
_TABLE = re.compile(r"(?P<head><!-- table (?P<name>\w+): (?P<first>.+?) -->\n).*?<!-- end -->", re.DOTALL)
_BETWEEN_CELLS = re.compile(r"\s+\|\s+|\s{2,}")


@dataclass(frozen=True)
class Result:
    """One run of a benchmark. code: a digest of the files that it measures; models: file name -> sha256."""

    name: str
    command: str
    date: str
    commit: str
    code: str
    machine: dict[str, str]
    models: dict[str, str]
    seconds: float
    figures: dict[str, str]

    def save(self, output: str) -> None:
        """results/NAME.json, and beside it what was printed."""
        path = FOLDER / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        path.with_suffix(".txt").write_text(output, encoding="utf-8")


def load(name: str) -> Result | None:
    path = FOLDER / f"{name}.json"
    return Result(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def make(benchmark: Benchmark, command: str, seconds: float, output: str) -> Result:
    """What a run that has just ended becomes."""
    figures = {figure.what: figure.read(output) for figure in benchmark.figures}
    missing = [what for what, value in figures.items() if value is None]
    if missing:
        raise ValueError(f"{benchmark.name}: its output does not have: {'; '.join(missing)}")
    return Result(
        name=benchmark.name,
        command=command,
        date=datetime.now(timezone.utc).date().isoformat(),
        commit=_git("rev-parse", "--short", "HEAD"),
        code=digest_of(benchmark.measures),
        machine=machine(),
        models={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _models()},
        seconds=round(seconds, 1),
        figures={what: value for what, value in figures.items() if value is not None},
    )


def digest_of(measures: Iterable[str]) -> str:
    """SHA-256 over the source files in folders of the tree."""
    digest = hashlib.sha256()
    for name in measures:
        place = ROOT / name
        found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in (".py", ".cpp", ".h"))
        for path in found:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def is_old(result: Result, benchmark: Benchmark) -> bool:
    """Whether the code that was measured has changed since."""
    return result.code != digest_of(benchmark.measures)


def machine() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def table() -> str:
    """Markdown: every figure on record, how it is printed, on what, and a mark where the code has changed since."""
    rows = ["| what | figure | printed by | measured |", "|---|---|---|---|"]
    for benchmark in BENCHMARKS:
        result = load(benchmark.name)
        if result is None:
            continue
        mark = f" {OLD}" if is_old(result, benchmark) else ""
        where = f"{result.date}, {result.machine.get('processor', '')}"
        for what, value in result.figures.items():
            rows.append(f"| {what} | {value}{mark} | `python -m benchmarks run {benchmark.name}` | {where} |")
    return "\n".join(rows)


def pages() -> list[Path]:
    """What may show figures on record."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: str) -> str:
    """A page with what is on record: one figure of a benchmark between `<!-- figure NAME: what -->` and `<!-- end -->`,
    and between `<!-- table NAME: first column -->` and `<!-- end -->` a table that it printed.

    KeyError for what is not on record.
    """

    def figure(match: re.Match[str]) -> str:
        return f"{match['head']}{figures_of(match['name'])[match['what']]}<!-- end -->"

    def table(match: re.Match[str]) -> str:
        return f"{match['head']}{printed_table(match['name'], match['first'])}<!-- end -->"

    return _TABLE.sub(table, _FIGURE.sub(figure, page))


def figures_of(name: str) -> dict[str, str]:
    """What a benchmark found, by what it is; of a run with other options, which has no record, as its text has it."""
    result = load(name)
    if result is not None:
        return result.figures
    (benchmark,) = find([name])
    output = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    return {figure.what: value for figure in benchmark.figures if (value := figure.read(output)) is not None}


def printed_table(name: str, first: str) -> str:
    """The table of a record whose first column has that head, in Markdown. KeyError where the record has none."""
    rows = [
        _BETWEEN_CELLS.split(line.strip()) for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    ]
    begin = next((at for at, row in enumerate(rows) if row[0] == first and len(row) > 1), None)
    if begin is None:
        raise KeyError(f"{name}: {first}")
    head = rows[begin]
    body = list(takewhile(lambda row: len(row) == len(head), rows[begin + 1 :]))
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def _models() -> list[Path]:
    return sorted(Path(str(files("reap") / "data")).glob("*.gguf"))


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
