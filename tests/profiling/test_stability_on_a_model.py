"""What a profile of the embedded model promises, against what another profile of as much text chooses."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import reap
from helpers.paths import ROOT
from reap.cli.app import app
from reap.errors import UsageError
from reap.scores.replicates import part_of

sys.path.insert(0, str(ROOT))

from benchmarks.stability import Lines, promises

DATA = Path(str(files("reap") / "data"))
MODEL = next(DATA.glob("*.gguf"))
SPLITS = 25


@pytest.fixture(scope="module")
def lines() -> Lines:
    return Lines.measure(MODEL, DATA / "calibration.jsonl")


@pytest.mark.parametrize("metric", ["reap", "weighted_ean_sum", "frequency"])
@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_promises_are_kept(lines: Lines, metric: str, keep: float) -> None:
    """benchmarks/stability.py does it with 200 splits, of six metrics and three amounts of text."""
    promised, observed = promises(lines, metric, keep, 2, SPLITS)
    print(f"{metric}, {keep:.0%}: promised {promised.mean():.1%}, observed {observed.mean():.1%}")
    assert abs(promised.mean() - observed.mean()) < 0.03


def test_a_run_deals_its_samples_out_as_the_lines_were(lines: Lines) -> None:
    numbers = range(40)
    texts = [json.loads(line) for line in (DATA / "calibration.jsonl").read_text().splitlines()][:40]
    measured = reap.profile(MODEL, texts, ctx_size=512, threads=1)
    expected = lines.profile(numbers)
    assert measured.replicates is not None
    assert expected.replicates is not None
    mine, theirs = measured.replicates.sums(measured), expected.replicates.sums(expected)
    assert np.array_equal(np.rint(mine["counts"]), np.rint(theirs["counts"]))
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-4 * theirs[name].max(), err_msg=name)
    assert len({part_of(unit) for unit in numbers}) == 16


def test_until_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    command = ["profile", str(MODEL), str(DATA / "calibration.jsonl"), "-o", str(out), "-c", "512", "-t", "1"]
    done = CliRunner().invoke(app, [*command, "--until", "90%", "--keep", "0.75", "--metric", "weighted_ean_sum"])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())["calibration"]
    assert record["until"]["reached"]
    assert record["samples"] < 100
    words = " ".join(done.output.split())
    assert f"ended early: at {record['until']['found']:.1%} (90.0% asked for by weighted_ean_sum at 24 kept)" in words
    assert f"after {record['samples']} samples" in words
    assert "how sure of the 24 experts that weighted_ean_sum keeps, another profile of as much text would keep" in words


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--until", "98%"], "--until needs --keep"),
        (["--keep", "0.5"], "--keep is for --until"),
        (["--metric", "msan"], "--metric is for --until"),
        (["--until", "98", "--keep", "0.5"], "--until should be a share such as 98% or 0.98, found '98'"),
        (["--until", "often", "--keep", "0.5"], "--until should be a share such as 98% or 0.98, found 'often'"),
    ],
)
def test_until_needs_to_know_what_for(options: list[str], sentence: str, tmp_path: Path) -> None:
    calibration = str(DATA / "calibration.jsonl")
    done = CliRunner().invoke(app, ["profile", str(MODEL), calibration, "-o", str(tmp_path / "p.json"), *options])
    assert isinstance(done.exception, UsageError)
    assert sentence in str(done.exception)
