"""The search for a better choice of experts, on made-up losses whose best choice is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from reap.evaluation.paired_difference import Floats
from reap.evaluation.refine import Kept, OutOfTime, Search

LAYERS = (0, 2)
N_EXPERTS, KEEP = 12, 6
N_WINDOWS, N_SCORED = 16, 50


class MadeUp:
    """Every expert that is gone costs its worth, on each token more or less of it; what is common to all tokens is
    noisy."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.worth = {layer: rng.random(N_EXPERTS) * 0.2 for layer in LAYERS}
        self.common = rng.normal(3, 2, (N_WINDOWS, N_SCORED))
        self.scatter = {layer: rng.normal(1, 0.5, (N_EXPERTS, N_WINDOWS, N_SCORED)) for layer in LAYERS}
        self.measured = 0

    def measure(self, kept: Kept, windows: Sequence[int]) -> Floats:
        self.measured += 1
        loss = self.common.copy()
        for layer, ids in kept.items():
            for expert in set(range(N_EXPERTS)) - set(ids):
                loss += self.worth[layer][expert] * self.scatter[layer][expert]
        return loss[list(windows)]

    def loss(self, kept: Kept) -> float:
        return float(self.measure(kept, range(N_WINDOWS)).mean())

    def ideal(self, n_groups: int = 1) -> dict[int, set[int]]:
        size = N_EXPERTS // n_groups
        groups = [range(group * size, (group + 1) * size) for group in range(n_groups)]
        return {
            layer: {
                expert
                for group in groups
                for expert in sorted(group, key=lambda expert: -worth[expert])[: KEEP // n_groups]
            }
            for layer, worth in self.worth.items()
        }


def search(
    world: MadeUp, *, passes: float = 1e9, n_groups: int = 1, fixed: dict[int, set[int]] | None = None, seed: int = 0
) -> Search:
    def spent() -> None:
        if found.trail.passes >= passes:
            raise OutOfTime

    # two criteria that know nothing of the experts' worth
    first = {layer: tuple(range(0, N_EXPERTS, 2)) for layer in LAYERS}
    second = {layer: tuple(range(1, N_EXPERTS, 2)) for layer in LAYERS}
    for layer, experts in (fixed or {}).items():
        for expert in experts:  # every criterion's choice has them, here in the place of a neighbour
            second[layer] = tuple(sorted({*second[layer], expert} - {expert + 1}))
    ranks = {layer: [*range(0, N_EXPERTS, 2), *range(1, N_EXPERTS, 2)] for layer in LAYERS}
    found = Search(world.measure, N_WINDOWS, {"one": first, "two": second}, ranks, fixed or {}, n_groups, seed, spent)
    found.run()
    return found


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_best_choice(seed: int) -> None:
    world = MadeUp(seed)
    found = search(world)
    missing = {layer: world.ideal()[layer] - set(found.kept[layer]) for layer in LAYERS}
    # what is left differs by less than the noise can tell
    for layer, experts in missing.items():
        extra = set(found.kept[layer]) - world.ideal()[layer]
        assert sum(world.worth[layer][sorted(experts)]) - sum(world.worth[layer][sorted(extra)]) < 0.02
    assert world.loss(found.kept) < world.loss(found.plans[found.start]) - 0.1
    assert found.trail.exchanged > 0


def test_it_begins_with_the_better_criterion_and_never_ends_above_it() -> None:
    world = MadeUp()
    for passes in (1.3, 4, 8, 16):
        found = search(world, passes=passes)
        assert found.start == min(found.plans, key=lambda name: world.loss(found.plans[name]))
        assert world.loss(found.kept) <= world.loss(found.plans[found.start])


def test_more_time_is_not_worse() -> None:
    world = MadeUp(3)
    losses = [world.loss(search(world, passes=passes).kept) for passes in (3, 6, 12, 24, 48)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_the_same_steps_give_the_same_choice() -> None:
    kept = [search(MadeUp(1), passes=20, seed=seed).kept for seed in (0, 0, 1)]
    assert kept[0] == kept[1]
    assert all(len(ids) == KEEP for choice in kept for ids in choice.values())


def test_no_time_at_all_leaves_the_first_guess() -> None:
    found = search(MadeUp(), passes=0)
    assert found.kept == {layer: tuple(range(0, N_EXPERTS, 2)) for layer in LAYERS}
    assert found.trail.passes == 0


def test_fixed_experts_stay_and_groups_keep_their_number() -> None:
    world = MadeUp(2)
    worst = {layer: {int(np.argmin(world.worth[layer][::2])) * 2} for layer in LAYERS}
    found = search(world, n_groups=3, fixed=worst)
    for layer in LAYERS:
        assert worst[layer] <= set(found.kept[layer])
        assert [sum(expert // 4 == group for expert in found.kept[layer]) for group in range(3)] == [2, 2, 2]
    assert found.trail.exchanged > 0


def test_noise_alone_changes_little() -> None:
    """Experts of no worth: what seems to gain on the windows that chose it does not on the others."""
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.3, (N_EXPERTS, N_WINDOWS, N_SCORED))

    class Noise(MadeUp):
        def measure(self, kept: Kept, windows: Sequence[int]) -> Floats:
            return (3 + sum(noise[expert] for ids in kept.values() for expert in ids) / KEEP)[list(windows)]

    found = search(Noise(), passes=60)
    assert found.trail.tried > 50
    assert found.trail.exchanged < 0.1 * found.trail.tried
