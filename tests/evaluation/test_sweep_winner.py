"""What a sweep found to be best, and the plan that is made of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reap
from helpers.profiles import make_profile
from reap.errors import MismatchError, UsageError
from reap.evaluation.sweep_table import Sweep, SweepRow, Target, Verdict
from reap.evaluation.sweep_winner import plan_remark, record_choice

PERPLEXITIES = {("reap", 6): 11.0, ("frequency", 6): 12.0, ("reap", 4): 15.0, ("frequency", 4): 14.0}
PROFILE = make_profile(3)


def row(metric: str, keep: int, perplexity: float, **more: Any) -> SweepRow:
    base: dict[str, Any] = dict(seed=None, bytes=100 * keep, domain=None, tokens=50, stderr=0.5, kl_mean=0.1, top1=0.9)
    loss = math.log(perplexity / 10)
    return SweepRow(
        metric=metric, keep=keep, perplexity=perplexity, loss_increase=loss, loss_increase_stderr=0.01, **(base | more)
    )


def sweep(keeps: tuple[int, ...] = (6, 4), **more: Any) -> Sweep:
    rows = [row("baseline", 8, 10.0)]
    for (metric, keep), perplexity in PERPLEXITIES.items():
        if keep in keeps:
            digest = reap.plan(PROFILE, keep=keep, metric=metric).experts_sha256
            rows.append(row(metric, keep, perplexity, experts_sha256=digest))
    verdicts = (
        Verdict(keep=6, domain=None, metric="reap", runner_up="frequency", margin=0.1, spread=0.01, clear=True),
        Verdict(keep=4, domain=None, metric="frequency", runner_up="reap", margin=0.01, spread=0.02, clear=False),
    )
    options = {"protect": [], "protect_super_experts": False, "blend": "sum"}
    known = tuple(verdict for verdict in verdicts if verdict.keep in keeps)
    return Sweep(**({"rows": tuple(rows), "verdicts": known, "choice": options} | more))


def test_the_winner_at_a_size() -> None:
    table = sweep()
    assert (table.winner(6).row.metric, table.winner(6).is_clear) == ("reap", True)
    assert (table.winner(0.5).row.metric, table.winner(0.5).is_clear) == ("frequency", False)
    assert sweep((4,)).winner().row.metric == "frequency"
    with pytest.raises(UsageError, match=r"at each of its sizes \(6, 4 experts\): say which, with --keep"):
        table.winner()
    with pytest.raises(UsageError, match="did not try 5 experts, but 6, 4"):
        table.winner(5)
    with pytest.raises(UsageError, match="interrupted before its end"):
        replace(table, complete=False).winner(6)


def target(kind: str, metric: str, keep: int) -> Target:
    return Target(
        kind=kind, limit=1.0, metric=metric, keep=keep, bytes=100 * keep, perplexity=PERPLEXITIES[metric, keep]
    )


def test_the_winner_within_a_limit() -> None:
    size = (target("size", "reap", 6), target("size", "frequency", 4))
    assert sweep(targets=size).winner().row.keep == 6  # the lowest perplexity that fits
    perplexity = (target("perplexity", "reap", 6), target("perplexity", "frequency", 4))
    assert sweep(targets=perplexity).winner().row.keep == 4  # the fewest experts that do
    with pytest.raises(UsageError, match="say which"):
        sweep(targets=(size[0], perplexity[1])).winner()


def test_of_random_the_seed_that_did_best() -> None:
    rows = [row("baseline", 8, 10.0)]
    for seed, perplexity in enumerate((14.0, 12.0, 13.0)):
        digest = reap.plan(PROFILE, keep=4, metric="random", seed=seed).experts_sha256
        rows.append(row("random", 4, perplexity, seed=seed, experts_sha256=digest))
    made = Sweep(rows=tuple(rows)).plan(PROFILE)
    assert made.layers == reap.plan(PROFILE, keep=4, metric="random", seed=1).layers


def test_the_plan_of_the_winner(tmp_path: Path) -> None:
    path = PROFILE.save(tmp_path / "p.json")
    table = sweep(choice={**sweep().choice, "profile": str(path)})
    loaded = Sweep.load(table.save(tmp_path / "sweep.json"))
    assert loaded == table
    assert loaded.plan(keep=4).layers == reap.plan(PROFILE, keep=4, metric="frequency").layers
    with pytest.raises(MismatchError, match="other experts than those that the sweep judged"):
        loaded.plan(make_profile(4), keep=4)
    with pytest.raises(UsageError, match="the sweep names no profile"):
        sweep().plan(keep=4)


def test_options_that_held_for_every_candidate_hold_for_the_plan() -> None:
    options = {"protect": [(1, 7), "3:0"], "protect_super_experts": False, "blend": "sum"}
    choice = record_choice(PROFILE, options, ())
    assert choice == {"protect": ["1:7", "3:0"], "protect_super_experts": False, "blend": "sum", "plans": []}
    wanted = reap.plan(PROFILE, keep=4, metric="reap", protect=options["protect"])
    rows = (row("baseline", 8, 10.0), row("reap", 4, 12.0, experts_sha256=wanted.experts_sha256))
    assert Sweep(rows=rows, choice=choice).plan(PROFILE).layers == wanted.layers


def test_a_plan_that_was_given_is_not_made_again() -> None:
    rows = (row("baseline", 8, 10.0), row("reap", 4, 12.0))
    table = Sweep(rows=rows, choice={"plans": ["reap"]})  # a plan's own name may be that of a criterion
    with pytest.raises(UsageError, match="a plan that the sweep was given"):
        table.plan(PROFILE)


def test_a_plan_that_is_not_the_winner_is_said() -> None:
    table = sweep()
    assert plan_remark(table, reap.plan(PROFILE, keep=6, metric="reap")) is None
    assert plan_remark(table, reap.plan(PROFILE, keep=6, metric="frequency")) == (
        "The plan is not the sweep's winner: with 6 experts reap (perplexity 11) is best; the plan's experts, by"
        " frequency, have 12."
    )
    said = plan_remark(table, reap.plan(PROFILE, keep=4, metric="reap"))
    assert said is not None
    assert "frequency (perplexity 14) is best, though not clearly" in said
    edited = replace(reap.plan(PROFILE, keep=6), layers={1: (0, 1, 2, 3, 4, 7), 3: (0, 1, 2, 3, 4, 7)})
    assert "is not one that the sweep judged" in (plan_remark(table, edited) or "")
    assert "did not try 5 experts" in (plan_remark(table, reap.plan(PROFILE, keep=5)) or "")


def test_the_page_says_it_too(tmp_path: Path) -> None:
    with pytest.warns(reap.ReapWarning, match="not the sweep's winner"):
        page = reap.report(
            PROFILE, tmp_path / "r.html", plan=reap.plan(PROFILE, keep=6, metric="frequency"), sweep=sweep()
        )
    assert "The plan is not the sweep&#39;s winner" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value"),
    [("protect", "1:7"), ("plans", [3]), ("blend", 1), ("protect_super_experts", "yes"), ("profile", [])],
)
def test_a_damaged_choice_is_refused(key: str, value: object, tmp_path: Path) -> None:
    path = sweep(choice={key: value}).save(tmp_path / "s.json")
    with pytest.raises(reap.FormatError, match=f"choice: {key}"):
        Sweep.load(path)
