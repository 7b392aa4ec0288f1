"""refine(): choose experts by what their absence does to the model instead of by a proxy.

A search that can be stopped at any time. It begins with the criterion that does best on the text. Then it takes the
layers in turn: it measures what single experts near the cut are worth (the loss with one more of those that are out,
with one fewer of those that are in), puts those that are worth more in the place of those that are worth less, and
keeps the exchange where the loss falls on windows that had no part in choosing it.

The loss is the divergence from what the model with all experts predicts, not the surprise at the token that came: both
are smallest at the same place where that model is right, but the token that came is one draw from what it predicts, and
its luck hides what an expert is worth.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reap.engine.options import EVALUATION_CTX_SIZE, EngineArguments, EngineOptions, shows_engine_options
from reap.errors import Interrupted, ReapWarning, UsageError
from reap.evaluation.paired_difference import Floats, paired_difference
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.gguf.model_info import inspect
from reap.progress import Progress, ProgressCallback
from reap.pruning.compatibility import check_plan
from reap.scores.plan import BLENDS, Protect, PrunePlan, plan
from reap.scores.profile import METRICS, Profile
from reap.scores.ranking import Keep, order_experts
from reap.text.evaluation_text import Text
from reap.text.overlap import Sketch, merge_sketches

if TYPE_CHECKING:
    from typing_extensions import Unpack

Kept = dict[int, tuple[int, ...]]
Swap = tuple[int, int]  # (expert that goes, expert that comes)

SCAN_SHARE = 8  # one window in so many is looked at, at a time
NEAR_THE_CUT = 4  # experts on either side that are tried on one visit to a layer
AGAIN = 2  # of these, so many that were tried before and looked most like being on the wrong side
IDLE_ROUNDS = 2  # rounds over all layers that find nothing, after which nothing more is expected
SURE = 2.0  # standard errors by which the loss has to fall before all windows have been asked
HOPELESS = 0.5  # standard errors by which it may have risen before the rest is not asked
ENOUGH = 1.0  # standard errors that do once they have
REMEMBERED = 0.5  # of what was measured before another exchange in the layer
BATCH_TRIES = 3  # an exchange of several that fails is tried again with the better half of them, so often


USEFUL_PASSES = 24  # over the text: where the time is short, it is spent on fewer windows instead
FEWEST_WINDOWS = 8


class OutOfTime(Exception):
    """The budget is spent; what is being tried is dropped."""


@dataclass
class SearchStats:
    """What a search did, for the record."""

    passes: float = 0.0  # over the whole text
    tried: int = 0
    exchanged: int = 0
    crossed: int = 0  # layers that took another criterion's choice


@dataclass
class Search:
    """The search itself, with nothing of an engine in it.

    measure    (kept by layer, window numbers) -> loss float64 [n_windows, n_scored] of the model with these experts
               alone
    n_windows  of the text
    plans      the choice of each criterion, the one to begin with first
    ranks      layer -> expert ids, best first: which are near the cut, before anything was measured
    fixed      layer -> experts that always stay
    n_groups   of the router: an expert is exchanged for one of its own group only
    seed       shuffles the windows
    spent      raises OutOfTime where there is no time for another measurement

    kept is the choice so far, start the criterion that it began with, first the one that did best by itself.
    """

    measure: Callable[[Kept, Sequence[int]], Floats]
    n_windows: int
    plans: Mapping[str, Kept]
    ranks: Mapping[int, Sequence[int]]
    fixed: Mapping[int, set[int]] = field(default_factory=dict)
    n_groups: int = 1
    seed: int = 0
    spent: Callable[[], None] = lambda: None
    trail: SearchStats = field(default_factory=SearchStats)

    def __post_init__(self) -> None:
        self.start, self.kept = next(iter(self.plans.items()))
        self.first = self.start
        self._windows = np.random.Generator(np.random.PCG64(self.seed)).permutation(self.n_windows).tolist()
        self._n_scan = max(1, self.n_windows // SCAN_SHARE)
        self._at = 0  # where the next windows begin, in the shuffled order
        self._turn = 0
        self._known: dict[int, Floats] = {}  # window -> loss of `kept`, where it was measured
        self._visits: dict[tuple[int, int], int] = {}
        self._worth: dict[tuple[int, int], float] = {}  # mean over the visits
        self._weight: dict[tuple[int, int], float] = {}  # visits, those before the layer last changed counting less
        self._order: list[str] = list(self.plans)

    def run(self) -> None:
        """Search until `spent` ends it, or until a search from every criterion found nothing more."""
        try:
            self._begin()
            self._improve()
            for name in [name for name in self._order if name != self.start]:
                self._begin_again(name)
        except OutOfTime:
            pass

    def _improve(self) -> None:
        """Exchange layers and experts until every expert near the cut was tried and rounds over all layers find nothing
        more."""
        self._cross()
        idle = 0
        while idle < IDLE_ROUNDS:
            idle = 0 if self._round() else idle + 1

    # ---- the beginning: whole criteria, then single layers of them

    def _begin(self) -> None:
        """The criterion that does best: all on some windows, the best two on more."""
        windows = self._next_windows()
        losses = {name: float(self._evaluate(kept, windows).mean()) for name, kept in self.plans.items()}
        self._order = sorted(losses, key=lambda name: losses[name])
        self._become(self._order[0], self.plans[self._order[0]])
        for name in self._order[1:2]:
            if self._is_better(self.plans[name], ()):
                self._become(name, self.plans[name])
        self.first = self.start

    def _begin_again(self, name: str) -> None:
        """A search from another criterion, which may end at a better choice than the best so far; that is kept
        otherwise."""
        best = self.start, self.kept, self._known
        self._become(name, self.plans[name])
        self._visits.clear()
        self._weight = {expert: weight * REMEMBERED for expert, weight in self._weight.items()}
        is_better = False
        try:
            self._improve()
            other = self.kept
            self.start, self.kept, self._known = best
            is_better = self._is_better(other, ())
            if is_better:
                self._become(name, other)
        finally:
            if not is_better:
                self.start, self.kept, self._known = best

    def _become(self, name: str, kept: Kept) -> None:
        self.start, self.kept, self._known = name, kept, {}

    def _cross(self) -> None:
        """Layer by layer, the choice of the next best criteria instead, where that is better."""
        for layer in list(self.kept):
            for name in [name for name in self._order if name != self.start][:2]:
                other = self.plans[name][layer]
                if other != self.kept[layer]:
                    self.trail.crossed += self._try(self._with(layer, set(other)), ())

    # ---- single experts

    def _round(self) -> bool:
        """Visit every layer once; whether there is reason for another round."""
        before = self.trail.exchanged
        fresh = [self._visit(layer) for layer in list(self.kept)]
        return any(fresh) or self.trail.exchanged > before

    def _visit(self, layer: int) -> bool:
        """Try experts near the cut of one layer and exchange what is worth it; whether any of them had not been tried
        before."""
        inside, outside = self._near_the_cut(layer)
        if not inside or not outside:
            return False
        fresh = any((layer, expert) not in self._visits for expert in (*inside, *outside))
        windows = self._next_windows()
        kept = self.kept[layer]
        current = self._current(windows).mean()
        worth = {
            expert: float(self._evaluate(self._with(layer, set(kept) - {expert}), windows).mean() - current)
            for expert in inside
        }
        worth |= {
            expert: float(current - self._evaluate(self._with(layer, {*kept, expert}), windows).mean())
            for expert in outside
        }
        self._turn += 1
        for expert, value in worth.items():
            self._learn((layer, expert), value)
        self.trail.tried += len(worth)
        self._exchange(layer, self._pairs(layer), windows)
        return fresh

    def _learn(self, expert: tuple[int, int], value: float) -> None:
        weight = self._weight.get(expert, 0.0)
        self._worth[expert] = (self._worth.get(expert, 0.0) * weight + value) / (weight + 1)
        self._weight[expert] = weight + 1
        self._visits[expert] = self._turn

    def _near_the_cut(self, layer: int) -> tuple[list[int], list[int]]:
        """Experts to try, in and out: some that looked most like being on the wrong side, then those that were tried
        longest ago or never, of these the worst that is in and the best that is out."""
        place = {expert: index for index, expert in enumerate(self.ranks[layer])}
        kept = set(self.kept[layer])
        inside, outside = kept - self.fixed.get(layer, set()), set(place) - kept
        return (
            self._choose(layer, inside, lambda expert: -place[expert], 1),
            self._choose(layer, outside, lambda expert: place[expert], -1),
        )

    def _choose(self, layer: int, experts: set[int], prior: Callable[[int], int], sign: int) -> list[int]:
        known = sorted(
            (expert for expert in experts if (layer, expert) in self._worth),
            key=lambda expert: sign * self._worth[layer, expert],
        )
        again = known[:AGAIN]
        others = sorted(experts - set(again), key=lambda expert: (self._visits.get((layer, expert), -1), prior(expert)))
        return [*again, *others[: NEAR_THE_CUT - len(again)]]

    def _pairs(self, layer: int) -> list[Swap]:
        """The least that is in for the most that is out, group by group, as long as that gains; the greatest gain
        first."""
        worth = {expert: value for (where, expert), value in self._worth.items() if where == layer}
        movable = worth.keys() - self.fixed.get(layer, set())
        group_size = len(self.ranks[layer]) // self.n_groups
        swaps: list[Swap] = []
        for group in range(self.n_groups):
            members = sorted(
                (expert for expert in movable if expert // group_size == group),
                key=lambda expert: (worth[expert], expert),
            )
            goes = [expert for expert in members if expert in self.kept[layer]]
            comes = [expert for expert in reversed(members) if expert not in self.kept[layer]]
            swaps += [(out, new) for out, new in zip(goes, comes, strict=False) if worth[new] > worth[out]]
        return sorted(swaps, key=lambda swap: worth[swap[0]] - worth[swap[1]])[:NEAR_THE_CUT]

    def _exchange(self, layer: int, swaps: list[Swap], chosen_on: Sequence[int]) -> None:
        """All exchanges at once, or the better half of them, where the loss falls on windows that did not choose
        them."""
        for _ in range(BATCH_TRIES):
            if not swaps:
                return
            kept = (set(self.kept[layer]) - {out for out, _ in swaps}) | {new for _, new in swaps}
            if self._try(self._with(layer, kept), chosen_on):
                self.trail.exchanged += len(swaps)
                for expert in self.ranks[layer]:  # what they are worth depends on the others that are there
                    self._weight[layer, expert] = self._weight.get((layer, expert), 0.0) * REMEMBERED
                return
            swaps = swaps[: len(swaps) // 2]

    # ---- measuring

    def _try(self, kept: Kept, chosen_on: Sequence[int]) -> bool:
        """Take `kept` where it is better than what is."""
        is_better = self._is_better(kept, chosen_on)
        if is_better:
            self.kept = kept
            self._known = dict(self._tried)
        return is_better

    def _is_better(self, kept: Kept, chosen_on: Sequence[int]) -> bool:
        """Whether the loss of `kept` is surely lower on windows that had no part in choosing it (on those, where there
        are no others): asks a few at a time, until it is sure, or until the loss does not look lower."""
        windows = [window for window in self._rotated() if window not in set(chosen_on)] or list(chosen_on)
        self._tried: dict[int, Floats] = {}
        for start in range(0, len(windows), self._n_scan):
            part = windows[start : start + self._n_scan]
            self._current(part)
            self._tried.update(zip(part, self._evaluate(kept, part), strict=True))
            asked = windows[: start + len(part)]
            gain = paired_difference(
                np.stack([self._known[window] for window in asked]), np.stack([self._tried[window] for window in asked])
            )
            if len(asked) == len(windows):
                return gain.exceeds(ENOUGH)
            if not gain.exceeds(-HOPELESS):
                return False
            if start and gain.exceeds(SURE):
                return True
        return False

    def _current(self, windows: Sequence[int]) -> Floats:
        """The loss of `kept`, measured where it is not known yet."""
        unknown = [window for window in windows if window not in self._known]
        if unknown:
            self._known.update(zip(unknown, self._evaluate(self.kept, unknown), strict=True))
        return np.stack([self._known[window] for window in windows])

    def _next_windows(self) -> list[int]:
        """The next few of the shuffled text."""
        windows = self._rotated()[: self._n_scan]
        self._at = (self._at + self._n_scan) % self.n_windows
        return windows

    def _rotated(self) -> list[int]:
        return [*self._windows[self._at :], *self._windows[: self._at]]

    def _with(self, layer: int, experts: set[int]) -> Kept:
        return {**self.kept, layer: tuple(sorted(experts))}

    def _evaluate(self, kept: Kept, windows: Sequence[int]) -> Floats:
        self.spent()
        self.trail.passes += len(windows) / self.n_windows
        return self.measure(kept, windows)


@shows_engine_options(ctx_size=EVALUATION_CTX_SIZE)
def refine(
    model: str | os.PathLike[str],
    profile: Profile | str | os.PathLike[str],
    text: Text,
    *,
    keep: Keep,
    seconds: float = 600.0,
    max_passes: float | None = None,
    metric: str | None = None,
    protect: str | Iterable[Protect] = (),
    blend: str | None = None,
    protect_super_experts: bool = False,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    allow_mismatch: bool = False,
    progress: ProgressCallback | None = None,
    **engine: Unpack[EngineArguments],
) -> PrunePlan:
    """A plan whose experts were chosen by the loss of `model` (a GGUF file) on `text` without them.

    Begins with the criterion that does best on the text (or with `metric` alone) and exchanges experts near the cut,
    until `seconds` have passed since the call, or after `max_passes` over the text, with which the result does not
    depend on the machine's speed. Where the time does not allow a few dozen passes over the whole text, as many windows
    of it are used as it does, spread over the domains. The text is what the plan is fitted to: use calibration text,
    never the text that the result will be judged on.

    text      as in `evaluate`; of JSON Lines the samples of one domain are laid end to end
    keep, protect, protect_super_experts  as in `plan`
    blend     as in `plan`; None: each criterion begins with both, where the calibration has domains
    seed      which windows of the text choose and which judge, in turn
    allow_mismatch  go on with a profile of another model, where layers and experts are as many; the plan's
              model["mismatch"] says what differs
    output    a file for the plan; on Ctrl-C it gets the best choice so far
    engine    options of the engine: `reap.engine.options.EngineOptions`

    The plan's metric is that of the beginning and "+refined"; its options record what was done, its calibration names
    the text as well. A ReapWarning where the budget ended before an expert was tried. Raises what `plan` and `evaluate`
    raise; Interrupted on Ctrl-C where `output` has the plan, else KeyboardInterrupt.
    """
    started = time.monotonic()
    options = EngineOptions.of(engine, ctx_size=EVALUATION_CTX_SIZE)
    if not 0 < seconds < math.inf or (max_passes is not None and not max_passes >= 0):
        raise UsageError(
            f"refine needs a time above 0 (found {seconds:g} s) and, where passes are limited, a number from 0 on"
        )
    source = Profile.of(profile)
    names = _criteria(source) if metric is None else (metric,)
    protected = [protect] if isinstance(protect, str) else list(protect)
    blends = (blend,) if blend is not None else BLENDS if source.domains else BLENDS[:1]
    choose = partial(plan, source, keep=keep, protect=protected, protect_super_experts=protect_super_experts, seed=seed)
    plans = _beginnings(choose, names, blends)
    first = next(iter(plans.values()))
    if mismatch := check_plan(inspect(model), first, allow_mismatch=allow_mismatch):
        warnings.warn(mismatch, ReapWarning, stacklevel=2)
        plans = {name: replace(made, model=made.model | {"mismatch": mismatch}) for name, made in plans.items()}
    judge = PlanEvaluator(model, text, options, allow_mismatch=allow_mismatch)
    all_windows = len(judge.text.windows)
    if max_passes is None:
        judge.thin_text(_affordable(judge, seconds - (time.monotonic() - started)))
    before_reference = time.monotonic()
    judge.reference()
    now = time.monotonic()
    n_trunk_layers = (
        judge.info.n_layers - judge.info.n_prediction_layers
    )  # a prediction block does not run, so its experts show no worth
    # the beginning and the end are scored on the whole text
    budget = _Budget(
        started, seconds, 2.2 * (now - before_reference), math.inf if max_passes is None else max_passes, progress
    )
    search = Search(
        partial(_divergence, judge),
        len(judge.text.windows),
        {
            name: {layer: kept for layer, kept in made.layers.items() if layer < n_trunk_layers}
            for name, made in plans.items()
        },
        _mean_ranks(source, names, seed),
        {int(layer): set(ids) for layer, ids in first.options["protected"].items()},
        source.n_groups,
        seed,
    )
    search.spent = partial(budget.check, search.trail)
    try:
        search.run()
        made = _scored(plans, search, judge)
    except KeyboardInterrupt as stop:
        if output is None:
            raise
        _described(plans[search.start], search, judge, time.monotonic() - started).save(output)
        raise Interrupted(f"stopped; {output} has the best choice of experts so far") from stop
    if not search.trail.tried:
        warnings.warn(
            f"the time was up after {search.trail.passes:.1f} passes over the text, before a single expert was tried; "
            "give more time or less text",
            ReapWarning,
            stacklevel=2,
        )
    record = {
        "seconds": round(time.monotonic() - started, 1),
        "windows": len(judge.text.windows),
        "windows_of_the_text": all_windows,
    }
    made = replace(made, options=made.options | {"refined": {**made.options["refined"], **record}})
    if output is not None:
        made.save(output)
    return made


def _beginnings(choose: Callable[..., PrunePlan], names: Sequence[str], blends: Sequence[str]) -> dict[str, PrunePlan]:
    """The choices of the criteria by name, each once."""
    plans: dict[str, PrunePlan] = {}
    for blend in blends:
        for name in names:
            made = choose(metric=name, blend=blend)
            if all(made.layers != other.layers for other in plans.values()):
                plans[name if blend == "sum" else f"{name}, {blend}"] = made
    return plans


def _affordable(judge: PlanEvaluator, seconds: float) -> int:
    """Windows of the text that `seconds` allow to be looked at USEFUL_PASSES times."""
    n_windows = int(seconds / (USEFUL_PASSES * judge.seconds_per_window()))
    return min(len(judge.text.windows), max(FEWEST_WINDOWS, n_windows))


def _divergence(judge: PlanEvaluator, kept: Kept, windows: Sequence[int]) -> Floats:
    measured = judge.try_experts(kept, windows)
    if measured.kl is None:
        raise AssertionError("what is tried is held against the reference")
    return measured.kl.reshape(len(windows), -1)


@dataclass
class _Budget:
    """Time and passes of a search; so many seconds are left over for what comes after it."""

    started: float
    seconds: float
    left_over: float
    max_passes: float
    progress: ProgressCallback | None

    def check(self, trail: SearchStats) -> None:
        """Raises OutOfTime where nothing more can be measured."""
        elapsed = time.monotonic() - self.started
        if self.progress is not None:
            self.progress(Progress(min(int(elapsed), int(self.seconds)), max(1, int(self.seconds)), "seconds"))
        if elapsed + self.left_over >= self.seconds or trail.passes >= self.max_passes:
            raise OutOfTime


def _criteria(profile: Profile) -> tuple[str, ...]:
    """All metrics that the profile has, but for chance."""
    return tuple(name for name in METRICS if name != "random" and (profile.trusted or name != "reap_l2"))


def _mean_ranks(profile: Profile, names: Sequence[str], seed: int) -> dict[int, list[int]]:
    """layer -> expert ids by the mean of their places in the criteria's orders, best first."""
    places = np.zeros(profile.counts.shape)
    for name in names:
        score = profile.score(name, seed=seed)
        for row in range(profile.n_layers):
            places[row, order_experts(score[row], profile.counts[row])] += np.arange(profile.n_experts)
    return {layer: np.argsort(places[row], kind="stable").tolist() for row, layer in enumerate(profile.layers.tolist())}


def _scored(plans: Mapping[str, PrunePlan], search: Search, judge: PlanEvaluator) -> PrunePlan:
    """What the search found, or what it began with, whichever is better on the whole text."""
    first, found = plans[search.first], _described(plans[search.start], search, judge, 0.0)
    scores = {
        name: judge.score(made, reference=judge.reference()) for name, made in (("before", first), ("after", found))
    }
    if (scores["after"].kl_mean or 0.0) >= (scores["before"].kl_mean or 0.0):
        found = replace(found, layers=first.layers)
        scores["after"] = scores["before"]
    measured = {
        f"{figure}_{name}": value
        for name, score in scores.items()
        for figure, value in (("kl", score.kl_mean), ("perplexity", score.perplexity))
    }
    return replace(found, options=found.options | {"refined": {**found.options["refined"], **measured}})


def _described(first: PrunePlan, search: Search, judge: PlanEvaluator, seconds: float) -> PrunePlan:
    """The plan of what a search found, with where it came from."""
    text = judge.text
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in text.files]
    record = {
        "start": search.start,
        "best_criterion": search.first,
        "seconds": round(seconds, 1),
        "passes": round(search.trail.passes, 2),
        "experts_tried": search.trail.tried,
        "experts_exchanged": search.trail.exchanged,
        "layers_of_another_criterion": search.trail.crossed,
        "seed": search.seed,
        "text": list(text.files),
        "text_sha256": digests,
        "ctx_size": text.ctx_size,
    }
    layers = {**first.layers, **search.kept}
    super_experts = [
        {**found, "kept": found["expert"] in layers[found["layer"]]} for found in first.options["super_experts"]
    ]
    calibration = first.calibration | {
        key: [*first.calibration.get(key, ()), *(item for item in items if item not in first.calibration.get(key, ()))]
        for key, items in (("files", list(text.files)), ("sha256", digests))
    }
    seen = Sketch()
    for window in text.windows:
        seen.add(window)
    calibration["sketch"] = merge_sketches([*filter(None, [first.calibration.get("sketch")]), seen.to_dict()])
    options = {**first.options, "super_experts": super_experts, "refined": record}
    return replace(first, metric=f"{first.metric}+refined", layers=layers, calibration=calibration, options=options)
