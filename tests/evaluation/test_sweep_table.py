"""The file of a sweep: what is written is read again, and what is damaged is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from reap.errors import FormatError, UsageError
from reap.evaluation.sweep_table import Sweep, SweepRow, Target, Verdict


def row(metric: str, keep: int, perplexity: float, *, domain: str | None = None, seed: int | None = None) -> SweepRow:
    return SweepRow(
        metric=metric,
        seed=seed,
        keep=keep,
        bytes=1000 * keep,
        domain=domain,
        tokens=100,
        perplexity=perplexity,
        stderr=0.5,
        kl_mean=0.1,
        top1=0.9,
        loss_increase=math.log(perplexity / 10) if math.isfinite(perplexity) else math.inf,
        loss_increase_stderr=0.01,
    )


def table() -> Sweep:
    rows = (
        row("baseline", 8, 10.0),
        row("baseline", 8, 9.0, domain="c"),
        row("reap", 4, 12.0),
        row("random", 4, math.inf, seed=0),
    )
    verdict = Verdict(keep=4, domain=None, metric="reap", runner_up="random", margin=0.2, spread=0.05, clear=True)
    target = Target(kind="size", limit=5000.0, metric="reap", keep=4, bytes=4000, perplexity=12.0)
    model = {"name": "tiny", "n_experts": 8, "bytes": 8000}
    return Sweep(
        rows,
        (verdict,),
        (target,),
        model,
        {"files": ["held.txt"]},
        {"files": ["c.txt"], "sha256": ["0" * 64]},
        {},
        True,
        ("note",),
    )


def test_it_survives_a_file(tmp_path: Path) -> None:
    table().save(tmp_path / "s.json")
    again = Sweep.load(tmp_path / "s.json")
    assert again.rows[:3] == table().rows[:3]
    assert again.verdicts == table().verdicts
    assert again.targets == table().targets
    assert again.to_dict() == table().to_dict()
    assert math.isnan(again.rows[3].perplexity)  # null in the file


def test_the_documented_keys(tmp_path: Path) -> None:
    table().save(tmp_path / "s.json")
    document = json.loads((tmp_path / "s.json").read_text())
    assert (document["format"], document["version"]) == ("reap.sweep", 1)
    assert {"metric", "keep", "bytes", "perplexity", "stderr", "kl_mean", "top1", "domain"} <= set(document["rows"][0])
    assert document["rows"][3]["perplexity"] is None


def test_selecting() -> None:
    assert table().domains == ("c",)
    assert table().metrics == ("reap", "random")
    assert table().baseline.perplexity == 10.0
    assert [found.metric for found in table().select(keep=4)] == ["reap", "random"]
    assert table().select(metric="baseline", domain="c")[0].perplexity == 9.0
    assert table().best()[4].metric == "reap"
    assert table().best("c") == {}


def test_a_row_is_read_as_in_the_file() -> None:
    assert table().rows[2]["metric"] == "reap"
    assert table().rows[2]["bytes"] == 4000
    with pytest.raises(KeyError):
        table().rows[2]["select"]


def test_the_least_that_a_row_needs(tmp_path: Path) -> None:
    least = {
        "metric": "baseline",
        "keep": 8,
        "bytes": 1,
        "perplexity": 3,
        "stderr": None,
        "kl_mean": 0,
        "top1": 1,
        "domain": None,
    }
    (tmp_path / "s.json").write_text(json.dumps({"format": "reap.sweep", "version": 1, "rows": [least]}))
    found = Sweep.load(tmp_path / "s.json")
    assert found.baseline.perplexity == 3.0
    assert math.isnan(found.baseline.stderr)
    assert found.complete


DAMAGE = [
    (lambda d: d.update(format="reap.plan"), "format should be 'reap.sweep'"),
    (lambda d: d.update(version=2), "version is 2"),
    (lambda d: d.pop("rows"), 'lacks "rows"'),
    (lambda d: d.update(rows={}), "rows should be a list"),
    (lambda d: d.update(rows=[]), "rows should begin with the model as it is"),
    (lambda d: d["rows"][2].update(metric=3), r"rows\[2\]: metric should be a string"),
    (lambda d: d["rows"][2].update(keep=0), r"rows\[2\]: keep should be an integer from 1"),
    (lambda d: d["rows"][2].update(keep=True), r"rows\[2\]: keep should be an integer"),
    (lambda d: d["rows"][2].update(bytes=-1), r"rows\[2\]: bytes should be an integer from 1"),
    (
        lambda d: d["rows"][2].update(perplexity="many"),
        r'rows\[2\]: perplexity should be a number, found the string "many"',
    ),
    (lambda d: d["rows"][2].update(perplexity=-2.0), r"rows\[2\]: perplexity should not be negative, found -2"),
    (lambda d: d["rows"][2].update(perplexity=10**400), r"rows\[2\]: perplexity is a number that is too large"),
    (lambda d: d["rows"][2].update(top1=1.5), r"rows\[2\]: top1 should be a share of at most 1"),
    (lambda d: d["rows"][2].update(domain=7), r"rows\[2\]: domain should be a string"),
    (lambda d: d["rows"][2].update(seed=-1), r"rows\[2\]: seed should be an integer"),
    (lambda d: d["best"][0].update(clear="yes"), r"best\[0\]: clear should be true or false"),
    (lambda d: d["best"][0].pop("runner_up"), r'best\[0\] lacks "runner_up"'),
    (lambda d: d["targets"][0].update(kind="speed"), r"targets\[0\]: kind should be one of size, perplexity"),
    (lambda d: d.update(complete=1), "complete should be true or false"),
    (lambda d: d.update(warnings=[1]), r"warnings\[0\] should be a string"),
    (lambda d: d["model"].update(n_experts="8"), "model: n_experts should be an integer"),
    (lambda d: d["calibration"].update(sha256=[1]), r"calibration: sha256\[0\] should be a string"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGE, ids=[problem for _, problem in DAMAGE])
def test_damaged_files(damage: Any, problem: str, tmp_path: Path) -> None:
    document = table().to_dict()
    damage(document)
    (tmp_path / "s.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=rf"s\.json.*{problem}"):
        Sweep.load(tmp_path / "s.json")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the sweep"):
        Sweep.load(tmp_path / "absent.json")
