"""The choices of the plain criteria, which a search begins with and has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from reap.scores.plan import BLENDS, PrunePlan, plan
from reap.scores.profile import Profile
from reap.scores.ranking import Keep, order_experts


def criteria(profile: Profile) -> tuple[str, ...]:
    """All metrics that the profile has, except chance."""
    return tuple(name for name in profile.metrics if name != "random")


def plain_plans(profile: Profile, keep: Keep, metric: str | None, options: Mapping[str, Any]) -> dict[str, PrunePlan]:
    """The choices of the criteria (or of `metric` alone) by name, each choice once.

    Where `options` have no blend, each is made with both, if the calibration has domains. Raises what `plan` raises.
    """
    blend = options["blend"]
    blends = (blend,) if blend is not None else BLENDS if profile.domains else BLENDS[:1]
    choose = partial(plan, profile, keep=keep, **{name: it for name, it in options.items() if name != "blend"})
    plans: dict[str, PrunePlan] = {}
    for one in blends:
        for name in criteria(profile) if metric is None else (metric,):
            made = choose(metric=name, blend=one)
            if all(made.layers != other.layers for other in plans.values()):
                plans[name if one == "sum" else f"{name}, {one}"] = made
    return plans


def mean_ranks(profile: Profile, names: Sequence[str], seed: int) -> dict[int, list[int]]:
    """layer -> expert ids by the mean of their places in the criteria's orders, best first."""
    places = np.zeros(profile.counts.shape)
    for name in names:
        score = profile.score(name, seed=seed)
        for row in range(profile.n_layers):
            places[row, order_experts(score[row], profile.counts[row])] += np.arange(profile.n_experts)
    return {layer: np.argsort(places[row], kind="stable").tolist() for row, layer in enumerate(profile.layers.tolist())}
