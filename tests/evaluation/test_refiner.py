"""The search for a better choice of experts, on made-up losses whose best choice is known."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from reap.errors import FormatError
from reap.evaluation.hold_out import HoldOut
from reap.evaluation.paired_difference import Floats, paired_difference
from reap.evaluation.quality_metrics import TokenScores
from reap.evaluation.refine_budget import Budget, Needs
from reap.evaluation.search import OutOfTime, Search
from reap.evaluation.search_state import Kept, SearchState, SearchStats
from reap.evaluation.search_windows import ENOUGH_WINDOWS, divide_windows
from reap.files.strict_json import Node

LAYERS = (0, 2)
N_EXPERTS, KEEP = 12, 6
N_WINDOWS, N_SCORED = 64, 50
FIRST = {layer: tuple(range(0, N_EXPERTS, 2)) for layer in LAYERS}
SECOND = {layer: tuple(range(1, N_EXPERTS, 2)) for layer in LAYERS}


class MadeUp:
    """Every expert that is gone costs its worth, in each window more or less of it; what is common to all tokens is
    noisy. The windows beyond the text's are what it is judged on."""

    def __init__(self, seed: int = 0, *, scale: float = 0.2, scatter: float = 0.5) -> None:
        rng = np.random.default_rng(seed)
        n = 2 * N_WINDOWS
        self.worth = {layer: rng.random(N_EXPERTS) * scale for layer in LAYERS}
        self.common = rng.normal(3, 2, (n, N_SCORED))
        self.cost = {
            layer: worth[:, None, None] * rng.normal(1, 0.5, (N_EXPERTS, n, N_SCORED))
            + rng.normal(0, scale * scatter, (N_EXPERTS, n, 1))
            for layer, worth in self.worth.items()
        }
        self.fewest = {layer: N_EXPERTS for layer in LAYERS}

    def measure(self, kept: Kept, windows: Sequence[int]) -> Floats:
        loss = self.common[list(windows)].copy()
        for layer, ids in kept.items():
            self.fewest[layer] = min(self.fewest[layer], len(ids))
            for expert in set(range(N_EXPERTS)) - set(ids):
                loss += self.cost[layer][expert][list(windows)]
        return loss

    def scores(self, kept: Kept, windows: Sequence[int]) -> TokenScores:
        loss = self.measure(kept, windows)
        return TokenScores(-loss, -loss, loss, np.ones(loss.shape, dtype=np.bool_), np.zeros(loss.shape))

    def loss(self, kept: Kept) -> float:
        """What the choice costs on average, without noise."""
        return float(
            sum(self.worth[layer][expert] for layer in LAYERS for expert in set(range(N_EXPERTS)) - {*kept[layer]})
        )

    def heldout(self, kept: Kept) -> Floats:
        return self.measure(kept, range(N_WINDOWS, 2 * N_WINDOWS))

    def ideal(self, n_groups: int = 1) -> Kept:
        size = N_EXPERTS // n_groups
        return {
            layer: tuple(
                expert
                for group in range(n_groups)
                for expert in best_of(worth, range(group * size, (group + 1) * size))[: KEEP // n_groups]
            )
            for layer, worth in self.worth.items()
        }  # fmt: skip


def best_of(worth: Floats, experts: Sequence[int]) -> list[int]:
    return sorted(experts, key=lambda expert: -worth[expert])


def search(
    world: MadeUp,
    *,
    passes: float = 1e9,
    n_groups: int = 1,
    may_lose_one: bool = True,
    fixed: dict[int, set[int]] | None = None,
    seed: int = 0,
    state: SearchState | None = None,
    after_step: Callable[[Search], None] = lambda _: None,
) -> Search:
    """A search from two criteria that know nothing of the experts' worth."""

    def spent() -> None:
        if found.stats.passes >= passes:
            raise OutOfTime

    second = dict(SECOND)
    for layer, experts in (fixed or {}).items():
        for expert in experts:  # every criterion's choice has them, here in the place of a neighbour
            second[layer] = tuple(sorted({*second[layer], expert} - {expert + 1}))
    found = Search(
        measure=world.measure,
        windows=divide_windows([None] * N_WINDOWS, seed),
        plans={"one": FIRST, "two": second},
        ranks={layer: [*range(0, N_EXPERTS, 2), *range(1, N_EXPERTS, 2)] for layer in LAYERS},
        fixed=fixed or {},
        n_groups=n_groups,
        may_lose_one=may_lose_one,
        spent=spent,
        state=state,
    )
    found.run(lambda: after_step(found))
    return found


@pytest.mark.parametrize("may_lose_one", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_best_choice(seed: int, may_lose_one: bool) -> None:
    world = MadeUp(seed, scatter=0.1)
    found = search(world, may_lose_one=may_lose_one)
    assert world.loss(found.kept) < world.loss(world.ideal()) + 0.05  # what is left is less than the noise can tell
    assert world.loss(found.kept) < min(world.loss(plan) for plan in found.plans.values()) - 0.1
    assert found.stats.exchanged > 0


def test_more_time_is_not_worse() -> None:
    world = MadeUp(3)
    losses = [world.loss(search(world, passes=passes).kept) for passes in (2, 4, 8, 16, 48)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_the_same_steps_give_the_same_choice() -> None:
    kept = [search(MadeUp(1), passes=20, seed=seed).kept for seed in (0, 0, 1)]
    assert kept[0] == kept[1]
    assert all(len(ids) == KEEP for choice in kept for ids in choice.values())


def test_no_time_at_all_leaves_the_first_guess() -> None:
    found = search(MadeUp(), passes=0)
    assert found.kept == FIRST
    assert found.stats.passes == 0


def test_fixed_experts_stay_and_groups_keep_their_number() -> None:
    world = MadeUp(2)
    worst = {layer: {int(np.argmin(world.worth[layer][::2])) * 2} for layer in LAYERS}
    found = search(world, n_groups=3, fixed=worst)
    for layer in LAYERS:
        assert worst[layer] <= set(found.kept[layer])
        assert [sum(expert // 4 == group for expert in found.kept[layer]) for group in range(3)] == [2, 2, 2]
    assert found.stats.exchanged > 0


@pytest.mark.parametrize("n_groups", [1, 3])
def test_fewer_than_the_router_needs_are_never_offered(n_groups: int) -> None:
    """At as many experts as a token uses, or two in each group, an expert goes only while another is there."""
    counts: Counter[int] = Counter()

    class Watched(MadeUp):
        def measure(self, kept: Kept, windows: Sequence[int]) -> Floats:
            size = N_EXPERTS // n_groups
            for ids in kept.values():
                counts.update(Counter(expert // size for expert in ids).values())
            return super().measure(kept, windows)

    world = Watched(4, scatter=0.1)
    found = search(world, n_groups=n_groups, may_lose_one=False)
    assert min(counts) == KEEP // n_groups
    assert found.stats.exchanged > 0
    assert world.loss(found.kept) < world.loss(FIRST)
    counts.clear()
    search(Watched(4, scatter=0.1), n_groups=n_groups, may_lose_one=True, passes=10)
    assert min(counts) == KEEP // n_groups - 1


def test_noise_alone_changes_little() -> None:
    """Experts of no worth: what seems to gain on the windows that chose it does not on the others."""
    world = MadeUp(5, scale=1.0)
    for layer in LAYERS:
        world.cost[layer] -= world.cost[layer].mean(axis=(1, 2), keepdims=True)
    found = search(world, passes=60)
    assert found.stats.tried > 50
    assert found.stats.exchanged < 0.1 * found.stats.tried


# ---- going on


def test_a_search_goes_on_from_any_step() -> None:
    """From what a file holds, to the choice of a search that was never stopped."""
    states: list[str] = []
    world = MadeUp(6)
    whole = search(world, passes=40, after_step=lambda it: states.append(json.dumps(it.state_dict())))
    assert len(states) > 6

    for text in states[:: len(states) // 5]:
        state = SearchState.from_node(Node(json.loads(text), "state"))
        assert json.dumps(state.to_dict()) == text
        again = search(world, passes=40, state=state)
        assert world.loss(again.kept) == pytest.approx(world.loss(whole.kept), abs=0.05)
        assert again.stats.passes >= 40 or again.stats.exchanged >= whole.stats.exchanged


def test_a_damaged_state_is_refused() -> None:
    state = search(MadeUp(), passes=3).state_dict()
    for name in state:
        with pytest.raises(FormatError):
            SearchState.from_node(Node({key: value for key, value in state.items() if key != name}, "state"))
    with pytest.raises(FormatError, match=r"state: kept: 0\[0\] should be an integer"):
        SearchState.from_node(Node({**state, "kept": {"0": ["x"]}}, "state"))


# ---- windows


def test_windows_are_divided_by_domain_and_none_is_in_two_parts() -> None:
    domains = ["a"] * 40 + ["b"] * 16 + [None] * 8
    found = divide_windows(domains, seed=3)
    assert sorted((*found.propose, *found.confirm, *found.hold_out)) == list(range(64))
    for part, share in ((found.propose, 3 / 8), (found.confirm, 3 / 8), (found.hold_out, 2 / 8)):
        counts = Counter(domains[window] for window in part)
        for name, total in Counter(domains).items():
            assert abs(counts[name] - share * total) <= 1
    first_half = found.propose[: len(found.propose) // 2]
    assert Counter(domains[window] for window in first_half)["a"] == pytest.approx(len(first_half) * 40 / 64, abs=2)
    assert divide_windows(domains, seed=3) == found != divide_windows(domains, seed=4)


def test_too_little_is_said_with_what_would_do() -> None:
    needs = Needs(seconds_per_window=0.5, n_layers=20, n_windows=500)
    [sentence] = needs.shortcomings(60.0, math.inf)
    assert sentence == "60 s do not reach every layer once on 64 windows of this text; about 12 min do"
    assert not list(needs.shortcomings(13 * 60.0, math.inf))
    [sentence] = Needs(0.5, 4, 14).shortcomings(6000.0, math.inf)
    assert sentence.startswith("the text has 14 windows, and a search needs at least 64")
    [sentence] = needs.shortcomings(60.0, 5)
    assert sentence == "5 passes over the text do not reach every layer once; about 23 do"


def test_a_preparation_longer_than_the_time_is_said_before_it_begins() -> None:
    needs = Needs(seconds_per_window=0.5, n_layers=4, n_windows=500)
    [_, sentence] = needs.shortcomings(3.0, math.inf, elapsed=2.0)
    assert sentence.startswith("it will take about 42 s instead of 3 s: to open the model, to run all of it on 64 win")
    assert len(list(needs.shortcomings(45.0, math.inf, elapsed=2.0))) == 1
    assert len(list(needs.shortcomings(3.0, 1.0))) == 1  # passes count, not time


def test_time_is_spent_on_enough_windows_first() -> None:
    needs = Needs(seconds_per_window=0.5, n_layers=4, n_windows=500)
    assert needs.affordable(10.0) == ENOUGH_WINDOWS
    assert needs.affordable(24 * 0.5 * 200) == 200
    assert needs.affordable(1e6) == 500
    assert Needs(0.5, 4, 20).affordable(1e6) == 20


def test_enough_is_left_over_for_the_end() -> None:
    budget = Budget(1e6, max_passes=10.0)
    stats = SearchStats()
    budget.begin(stats, n_windows=64, n_judging=16)
    stats.passes = 9.4
    budget.check()
    stats.passes = 9.5
    with pytest.raises(OutOfTime):
        budget.check()


# ---- the windows held out


def test_the_start_is_the_best_criterion_on_windows_held_out() -> None:
    world = MadeUp(7)
    plans = {"one": FIRST, "best": world.ideal(), "two": SECOND}
    asked: list[int] = []
    hold_out = HoldOut(world.scores, range(16))
    assert hold_out.rank(plans, asked.append)[0] == "best"
    assert sum(asked) < 3 * 16  # what is clearly worse is not asked any more

    def out_of_time(n_windows: int) -> None:
        raise OutOfTime

    assert hold_out.rank(plans, out_of_time) == ["one", "best", "two"]


def test_what_is_not_clearly_better_is_not_taken() -> None:
    world = MadeUp(8)
    hold_out = HoldOut(world.scores, range(16))
    assert hold_out.judge(FIRST, world.ideal()).is_better
    assert not hold_out.judge(world.ideal(), FIRST).is_better
    same = hold_out.judge(FIRST, FIRST)
    assert not same.is_better
    assert (same.divergence.mean, same.divergence.stderr) == (0.0, 0.0)


@pytest.mark.parametrize("scale", [0.0, 0.005, 0.05])
def test_it_never_makes_things_worse(scale: float) -> None:
    """Worths from nothing at all to what noise hides: over ten seeds and three budgets, what comes back is not worse on
    text that nothing was chosen by than what it began with, by more than a standard error."""
    taken = 0
    for seed in range(10):
        world = MadeUp(seed, scale=max(scale, 1e-9), scatter=0.0)
        for layer in LAYERS:
            world.cost[layer] += np.random.default_rng(seed).normal(0, 0.02, (N_EXPERTS, 2 * N_WINDOWS, 1))
        for passes in (3, 10, 40):
            found = search(world, passes=passes, seed=seed)
            hold_out = HoldOut(world.scores, found.windows.hold_out)
            start = found.plans[hold_out.rank(found.plans, lambda _: None)[0]]
            kept = found.kept if hold_out.judge(start, found.kept).is_better else start
            taken += kept != start
            worse = paired_difference(world.heldout(kept), world.heldout(start))
            assert not worse.exceeds(1.0), (seed, passes, worse)
    assert taken > 5 or scale < 0.05
