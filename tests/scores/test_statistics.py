"""What a profile says in few numbers, against definitions written out slowly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reap
from helpers.profiles import from_scores, large_profile, make_profile
from reap.errors import MismatchError
from reap.reporting.gpu_fit import GIB, describe_fit, fits
from reap.scores import statistics as summaries

values = st.lists(st.floats(0, 100, allow_subnormal=False), min_size=2, max_size=8)


@given(values)
def test_gini_is_the_mean_difference_of_pairs(row: list[float]) -> None:
    total = math.fsum(row)
    (found,) = summaries.gini(np.array([row]))
    if total == 0:
        assert math.isnan(found)
    else:
        pairs = math.fsum(abs(a - b) for a in row for b in row)
        assert found == pytest.approx(pairs / (2 * len(row) * total), abs=1e-9)


def test_effective_experts_at_the_extremes() -> None:
    counts = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(summaries.effective_experts(counts), [4, 1, 2, np.nan])
    np.testing.assert_allclose(summaries.busiest_share(counts, 0.25), [0.25, 1, 0.5, np.nan])


@pytest.mark.parametrize(("keep", "n_groups"), [(3, 1), (4, 2), (6, 1), (6, 2)])
def test_a_blind_choice_by_trying_all_of_them(keep: int, n_groups: int) -> None:
    mass = np.random.default_rng(3).gamma(0.7, size=(2, 6))
    size = 6 // n_groups
    groups = [
        itertools.combinations(range(group * size, (group + 1) * size), keep // n_groups) for group in range(n_groups)
    ]
    choices = [list(itertools.chain(*choice)) for choice in itertools.product(*groups)]
    mean, deviation = summaries.random_share(mass, keep, n_groups)
    best = summaries.best_share(mass, keep, n_groups)
    for row in range(2):
        shares = [mass[row, choice].sum() / mass[row].sum() for choice in choices]
        assert mean[row] == pytest.approx(np.mean(shares))
        assert deviation[row] == pytest.approx(np.std(shares))
        assert best[row] == pytest.approx(max(shares))


def test_the_cut() -> None:
    score = np.array([[4.0, 3.0, 2.0, np.nan], [1.0, 2.0, 3.0, 4.0]])
    mask = np.array([[True, True, False, False], [True, False, False, True]])
    cut = summaries.find_cut(score, mask)
    np.testing.assert_allclose(cut.lowest_kept, [3, 1])
    np.testing.assert_allclose(cut.highest_removed, [2, 3])
    np.testing.assert_allclose(cut.gap, [1 / 3, -2])
    whole = summaries.find_cut(score, np.ones_like(mask))
    assert np.isnan(whole.highest_removed).all()
    assert np.isnan(whole.gap).all()


def test_kept_share_of_a_plan() -> None:
    profile = from_scores([[1, 2, 3, 4], [4, 3, 2, 1]])
    plan = reap.plan(profile, keep=2)
    mask = summaries.kept_mask(profile, plan.layers)
    np.testing.assert_allclose(summaries.kept_share(profile.gated_norm_sum, mask), [0.7, 0.7])
    assert summaries.lowest_of(np.array([0.5, np.nan, 0.2]), np.array([1, 4, 9])) == (0.2, 9)
    assert summaries.highest_of(np.array([np.nan]), np.array([1])) is None
    with pytest.raises(MismatchError, match="the plan has the layers 0, 1, but the profile 1, 3"):
        summaries.require_plan_of(make_profile(n_experts=4, model={"fingerprint": None}), plan)


def test_a_plan_of_another_model() -> None:
    profile = make_profile()
    with pytest.raises(MismatchError, match="of a model with 4 experts, but the profile of one with 8"):
        summaries.require_plan_of(profile, reap.plan(make_profile(n_experts=4), keep=2))
    other = make_profile(model={"fingerprint": "sha256:" + "1" * 64})
    with pytest.raises(MismatchError, match="fingerprint sha256:111"):
        summaries.require_plan_of(profile, reap.plan(other, keep=4))


def test_overlaps_are_shares_of_the_first() -> None:
    a, b = np.array([[True, True, False, False]]), np.array([[True, False, False, False]])
    np.testing.assert_allclose(summaries.overlaps([a, b]), [[1, 0.5], [1, 1]])


def test_what_a_metric_keeps_is_what_plan_keeps() -> None:
    profile = make_profile(5, n_experts=12)
    for metric in ("reap", "frequency", "random"):
        plan = reap.plan(profile, keep=5, metric=metric, seed=2)
        assert (summaries.mask_by(profile, metric, 5, 2) == summaries.kept_mask(profile, plan.layers)).all()


def test_low_by_every_metric() -> None:
    profile = large_profile(n_layers=3, n_experts=16)
    low = summaries.low_by_every_metric(profile)
    for row, expert in itertools.product(range(3), range(16)):
        places = []
        for metric in set(reap.METRICS) - {"random"}:
            score = profile.score(metric)[row]
            places.append(
                sorted(range(16), key=lambda one: (-score[one], -profile.counts[row, one], one)).index(expert)
            )
        assert low[row, expert] == (min(places) >= 12), (row, expert)


def test_half_as_the_router_allows() -> None:
    assert summaries.plan_of_half(make_profile()).keep == 4
    assert summaries.plan_of_half(make_profile(model={"n_experts_used": 6})).keep == 6
    assert summaries.plan_of_half(make_profile(model={"n_groups": 4, "n_groups_used": 2})).keep == 8


def test_which_memory_weights_fit_into() -> None:
    assert [fit.verdict for fit in fits(15 * GIB)] == [
        "too large",
        "too large",
        "tight",
        "fits",
        "fits",
        "fits",
        "fits",
    ]
    assert describe_fit(15 * GIB) == "24 GB, leaving 9.00 GiB for cache and buffers; 16 GB tightly"
    assert describe_fit(75 * GIB) == "80 GB, tightly"
    assert describe_fit(100 * GIB + 1) == "no less than 101 GB"
