"""The logic of a sweep, with a evaluator that needs no model: what is measured, which sizes are found, who wins and how
surely."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.profiles import make_profile
from reap.errors import UsageError
from reap.evaluation.candidates import Candidate, Choices
from reap.evaluation.keep_limits import allowed_keeps, largest, parse_increase, smallest
from reap.evaluation.paired_difference import paired_difference
from reap.evaluation.quality_metrics import TokenScores
from reap.evaluation.sweep_rows import Table, margin_between
from reap.evaluation.sweep_run import SweepRun
from reap.scores.plan import PrunePlan, plan
from reap.scores.profile import Profile

N_WINDOWS, N_SCORED = 6, 40


def router(n_experts: int, n_experts_used: int = 1, n_groups: int = 1, n_groups_used: int = 1, **_: object) -> Any:
    """What `allowed_keeps` asks of a model."""
    return SimpleNamespace(
        n_experts=n_experts, n_experts_used=n_experts_used, n_groups=n_groups, n_groups_used=n_groups_used
    )


class FakeEvaluator:
    """Each token loses 0.1 for every expert that is gone, and as much again as `penalty` says; every second window is
    of domain "b"."""

    domains = ("a", "b") * (N_WINDOWS // 2)

    def __init__(self, penalty: Callable[[PrunePlan], float] = lambda _: 0.0) -> None:
        self.penalty = penalty
        self.asked: list[PrunePlan | None] = []

    def token_scores(self, candidate: PrunePlan | None) -> TokenScores:
        self.asked.append(candidate)
        rng = np.random.default_rng(0)
        loss = 2 + rng.random((N_WINDOWS, N_SCORED))
        if candidate is not None:
            loss = loss + 0.1 * (candidate.n_experts - candidate.keep) + self.penalty(candidate)
            loss[1::2] += 0.05
        return TokenScores(-loss, kl=np.full(loss.shape, 0.25), same_top=np.ones(loss.shape, dtype=np.bool_))


def choices_of(profile: Profile, metrics: Sequence[str] = ("reap", "frequency"), seeds: int = 1) -> Choices:
    keeps = allowed_keeps(router(**{"n_experts": 8, "n_experts_used": 2} | profile.model))
    return Choices(profile, metrics, seeds, keeps, plan, lambda made: 1000 + 100 * made.keep + len(made.metric))


def sweeping(evaluator: FakeEvaluator, choices: Choices) -> SweepRun:
    table = Table(evaluator)
    table.add_baseline(choices.profile.n_experts, 2000)
    return SweepRun(choices, table)


# ---- bisection


@given(st.integers(0, 20), st.integers(0, 20))
def test_bisection_finds_the_edge(n: int, edge: int) -> None:
    keeps = [3 * index for index in range(1, n + 1)]
    asked: list[int] = []

    def fits(limit: Callable[[int], bool], keep: int) -> bool:
        asked.append(keep)
        return limit(keep)

    below = [keep for keep in keeps if keep <= 3 * edge]
    assert largest(keeps, partial(fits, lambda keep: keep <= 3 * edge)) == (max(below) if below else None)
    assert len(asked) <= math.ceil(math.log2(n + 1))
    above = [keep for keep in keeps if keep >= 3 * edge]
    assert smallest(keeps, partial(fits, lambda keep: keep >= 3 * edge)) == (min(above) if above else None)


def test_numbers_that_a_router_can_live_with() -> None:
    assert allowed_keeps(router(6)) == [1, 2, 3, 4, 5, 6]
    assert allowed_keeps(router(6, 4)) == [4, 5, 6]
    assert allowed_keeps(router(16, 2, 4, 2)) == [8, 12, 16]
    # three groups of a token hold the six that it needs only from 12 on
    assert allowed_keeps(router(16, 5, 4, 2)) == [12, 16]


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), (" 2.5 %", 0.025), (0.05, 0.05), (0, 0.0), ("0%", 0.0), (1, 1.0)]
)
def test_an_increase(text: str | float, share: float) -> None:
    assert parse_increase(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["5", "five%", "", "-5%", -0.1, math.nan, math.inf, True, "5%%"])
def test_no_increase(text: str | float) -> None:
    with pytest.raises(UsageError, match="should be a percentage such as 5%"):
        parse_increase(text)


# ---- rows


def test_rows_of_the_whole_text_and_of_each_domain() -> None:
    evaluator = FakeEvaluator()
    run = sweeping(evaluator, choices_of(make_profile()))
    run.try_all(run.choices.at("reap", 4))
    assert [(row.metric, row.domain) for row in run.table.rows] == [
        ("baseline", None),
        ("baseline", "a"),
        ("baseline", "b"),
        ("reap", None),
        ("reap", "a"),
        ("reap", "b"),
    ]
    base, whole, a, b = (run.table.rows[index] for index in (0, 3, 4, 5))
    loss = -evaluator.token_scores(None).log_probs
    assert base.perplexity == pytest.approx(np.exp(loss.mean()))
    assert base.stderr == pytest.approx(np.exp(loss.mean()) * loss.std() / np.sqrt(loss.size - 1))
    assert (base.loss_increase, base.loss_increase_stderr) == (0.0, 0.0)
    assert whole.loss_increase == pytest.approx(0.1 * 4 + 0.025)
    assert whole.perplexity == pytest.approx(base.perplexity * math.exp(whole.loss_increase))
    assert a.loss_increase == pytest.approx(0.4)
    assert b.loss_increase == pytest.approx(0.45)
    assert a.loss_increase_stderr == pytest.approx(0.0, abs=1e-12)
    assert (whole.tokens, a.tokens, b.tokens) == (240, 120, 120)
    assert (whole.bytes, whole.keep, whole.kl_mean, whole.top1) == (1404, 4, 0.25, 1.0)


def test_nothing_is_measured_twice() -> None:
    evaluator = FakeEvaluator()
    run = sweeping(evaluator, choices_of(make_profile(), ("random",), seeds=3))
    run.try_all(run.choices.at("random", 4))
    run.try_all(run.choices.at("random", 4))
    assert len(evaluator.asked) == 1 + 3
    assert [row.seed for row in run.table.rows if row.metric == "random" and row.domain is None] == [0, 1, 2]


def test_a_single_domain_is_no_domain() -> None:
    evaluator = FakeEvaluator()
    evaluator.domains = ("a",) * N_WINDOWS
    run = sweeping(evaluator, choices_of(make_profile()))
    assert [row.domain for row in run.table.rows] == [None]


def test_plans_made_elsewhere_have_names_of_their_own() -> None:
    choices = choices_of(make_profile())
    plans = [plan(choices.profile, keep=4, metric=name) for name in ("reap", "gate_sum", "gate_sum")]
    plans.append(plan(choices.profile, keep=5, metric="gate_sum"))
    assert [(item.name, item.plan.keep) for item in choices.given(plans)] == [
        ("reap-2", 4),
        ("gate_sum", 4),
        ("gate_sum-2", 4),
        ("gate_sum", 5),
    ]


# ---- who wins


def test_a_clear_winner_and_none() -> None:
    def penalty(made: PrunePlan) -> float:
        return {"reap": 0.0, "frequency": 0.3}[made.metric]

    run = sweeping(FakeEvaluator(penalty), choices_of(make_profile()))
    run.try_all([*run.choices.at("reap", 4), *run.choices.at("frequency", 4), *run.choices.at("reap", 6)])
    verdicts = run.table.verdicts()
    assert [(verdict.keep, verdict.domain) for verdict in verdicts] == [
        (4, None),
        (4, "a"),
        (4, "b"),
    ]  # alone at 6, there is no winner
    assert {(verdict.metric, verdict.runner_up, verdict.clear) for verdict in verdicts} == {("reap", "frequency", True)}
    assert verdicts[0].margin == pytest.approx(0.3)
    even = sweeping(FakeEvaluator(), choices_of(make_profile()))
    even.try_all([*even.choices.at("reap", 4), *even.choices.at("frequency", 4)])
    assert not even.table.verdicts()[0].clear


def test_paired_differences_are_far_surer_than_two_errors() -> None:
    rng = np.random.default_rng(1)
    common = rng.normal(3, 2, (20, 100))
    a, b = common + rng.normal(0.02, 0.1, common.shape), common
    found = paired_difference(a, b)
    assert found.mean == pytest.approx((a - b).mean())
    assert found.stderr == pytest.approx(0.1 / math.sqrt(2000), rel=0.5)
    assert found.stderr < common.std() / math.sqrt(2000) / 5


def test_tokens_of_a_window_that_go_together_make_it_less_sure() -> None:
    rng = np.random.default_rng(2)
    difference = np.repeat(rng.normal(0, 1, (30, 1)), 50, axis=1)
    found = paired_difference(difference, np.zeros_like(difference))
    assert found.stderr == pytest.approx(difference[:, 0].std(ddof=1) / math.sqrt(30))
    assert math.isnan(paired_difference(np.ones((1, 1)), np.zeros((1, 1))).stderr)


def test_the_scatter_of_seeds_counts() -> None:
    base = np.random.default_rng(3).random((10, 50))
    seeds = [base + shift for shift in (0.2, 0.4, 0.9)]
    margin = margin_between(seeds, [base])
    assert margin.mean == pytest.approx(0.5)
    assert margin.stderr == pytest.approx(math.sqrt(np.var([0.2, 0.4, 0.9], ddof=1) / 3), rel=1e-6)


# ---- limits


def test_the_largest_that_fits() -> None:
    evaluator = FakeEvaluator()
    run = sweeping(evaluator, choices_of(make_profile()))
    found = run.choices.largest_within(1610)
    assert {metric: items[0].plan.keep for metric, items in found.items()} == {"reap": 6, "frequency": 6}
    # its name is longer: 1609 bytes
    assert {metric: items[0].plan.keep for metric, items in run.choices.largest_within(1608).items()} == {
        "reap": 6,
        "frequency": 5,
    }
    assert len(evaluator.asked) == 1  # sizes are computed, not measured
    run.fit_size(1608, run.choices.largest_within(1608))
    assert [(item.kind, item.limit, item.metric, item.keep, item.bytes) for item in run.targets] == [
        ("size", 1608.0, "reap", 6, 1604),
        ("size", 1608.0, "frequency", 5, 1509),
    ]
    assert run.targets[0].perplexity == run.table.whole("reap", 6).perplexity


def test_a_size_that_cannot_be_reached() -> None:
    # two experts are used, so fewer cannot be kept
    with pytest.raises(
        UsageError, match=r"target_size: 900 bytes cannot be reached: with 2 experts, .* the file still has 1,204 bytes"
    ):
        choices_of(make_profile()).largest_within(900)


@pytest.mark.parametrize(("increase", "keep"), [(0.0, 8), (0.12, 8), (0.14, 7), (0.5, 5), (10.0, 2)])
def test_the_fewest_experts_within_a_perplexity(increase: float, keep: int) -> None:
    run = sweeping(
        FakeEvaluator(), choices_of(make_profile(), ("reap",))
    )  # each expert less costs 0.1 nats, and 0.025 for the first
    run.fit_perplexity(increase)
    assert [(item.kind, item.limit, item.metric, item.keep) for item in run.targets] == [
        ("perplexity", increase, "reap", keep)
    ]
    measured = run.table.whole("reap", keep)
    assert run.targets[0].perplexity == measured.perplexity
    if keep < 8:
        assert measured.perplexity <= run.table.rows[0].perplexity * (1 + increase)


def test_every_row_is_reported() -> None:
    rows: list[int] = []
    run = sweeping(FakeEvaluator(), choices_of(make_profile()))
    run.after_each = lambda: rows.append(len(run.table.rows))
    run.try_all(candidate for keep in (6, 4) for candidate in run.choices.at("reap", keep))
    assert rows == [6, 9]


def test_groups_of_a_router_are_respected() -> None:
    profile = make_profile(n_experts=16, model={"n_groups": 4, "n_groups_used": 2})
    run = sweeping(FakeEvaluator(), choices_of(profile, ("reap",)))
    run.fit_perplexity(0.6)
    assert run.targets[0].keep == 12
    assert isinstance(run.choices.candidate("reap", 8), Candidate)
