"""refine(): choose experts by what their absence does to the model instead of by a proxy.

The text's windows are divided before anything starts. Those held out choose the plain criterion to begin with, and at
the end say whether what was found is clearly better than that; where it is not, the plain choice is what comes back. In
between `search` exchanges experts, on windows that propose and windows that confirm.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from reap.engine.options import EVALUATION_CTX_SIZE, EngineOptions, shows_engine_options
from reap.errors import Interrupted, ReapWarning, UsageError
from reap.evaluation.hold_out import HoldOut, Verdict
from reap.evaluation.keep_limits import allowed_keeps
from reap.evaluation.paired_difference import Floats
from reap.evaluation.plain_plans import criteria, mean_ranks, plain_plans
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.evaluation.plan_options import ChoiceArguments, shows_plan_options, split_options
from reap.evaluation.refine_budget import Budget, Needs
from reap.evaluation.refined_plan import refined_plan
from reap.evaluation.resume_file import ResumeFile
from reap.evaluation.search import Search
from reap.evaluation.search_state import Kept, SearchState, SearchStats
from reap.evaluation.search_windows import divide_windows
from reap.files.atomic import RewrittenOutput
from reap.files.paths import PathLike
from reap.files.version import version
from reap.gguf.model_info import inspect
from reap.gguf.shards import model_paths
from reap.profiling.interrupts import endings_as_interrupts, uninterrupted
from reap.progress import ProgressCallback
from reap.pruning.compatibility import check_plan, check_profile
from reap.scores.plan import PrunePlan
from reap.scores.profile import Profile
from reap.scores.ranking import Keep
from reap.text.evaluation_text import Text, text_paths

if TYPE_CHECKING:
    from typing_extensions import Unpack

RESUME_FORMAT = "reap.refine.resume"


@shows_engine_options(ctx_size=EVALUATION_CTX_SIZE)
@shows_plan_options(blend=None)
def refine(
    model: PathLike,
    profile: Profile | PathLike,
    text: Text,
    *,
    keep: Keep,
    seconds: float = 600.0,
    max_passes: float | None = None,
    metric: str | None = None,
    output: PathLike | None = None,
    progress: ProgressCallback | None = None,
    **options: Unpack[ChoiceArguments],
) -> PrunePlan:
    """A plan whose experts were chosen by the loss of `model` on `text` without them.

    Begins with the criterion that does best on the text (or with `metric` alone) and exchanges experts near the cut,
    until `seconds` have passed since the call, or after `max_passes` over the text, with which the result does not
    depend on the machine's speed. What was found is returned where it is clearly better than every plain criterion on
    windows that had no part in finding it, otherwise the best of those. The text is what the plan is fitted to: use
    calibration text, never the text that the result will be judged on.

    Args:
        model: a GGUF file.
        profile: of that model.
        text: as in `evaluate`; of JSON Lines the samples of one domain are laid end to end. A long text is used as far
            as the time allows, never less than a search needs to tell a gain from chance.
        keep: as in `plan`.
        seconds: the budget.
        max_passes: over the text, another budget.
        metric: the only criterion to begin with; None: every one that the profile has.
        output: a file for the plan; on Ctrl-C it gets the best choice so far. One that exists needs `force`.
        progress: called with seconds.
        options: allow_mismatch (go on with a profile of another model, where layers and experts are as many; the plan's
            model["mismatch"] says what differs), resume (from `OUTPUT.resume`, which an interrupted call left), force
            (replace an output that exists); those of `plan` (protect, protect_super_experts, blend, seed; with blend
            None each criterion begins with both where the calibration has domains, and seed divides the windows as
            well), and of the engine.

    Returns:
        The plan. Its metric is that of the beginning and "+refined", or that of the beginning alone where nothing
        clearly better was found; its options record what was done, its calibration names the text as well.

    Raises:
        UsageError, MismatchError, FormatError, UnsupportedModelError, CalibrationError, EngineError: as `plan` and
            `evaluate`.
        Interrupted: on Ctrl-C, where `output` has a plan.
        KeyboardInterrupt: on Ctrl-C otherwise.

    A ReapWarning before the search where the text is too short for one, or the time too short to reach every layer.
    """
    started = time.monotonic()
    if not 0 < seconds < math.inf or (max_passes is not None and not max_passes >= 0):
        raise UsageError(
            f"refine needs a time above 0 (found {seconds:g} s) and, where passes are limited, a number from 0 on"
        )
    given = split_options(options, blend=None)
    engine_options = EngineOptions.of(given.engine, ctx_size=EVALUATION_CTX_SIZE)
    info = inspect(model)
    engine_options = engine_options.within(given.engine, info.context_length)
    source = Profile.of(profile)
    check_profile(info, source, allow_mismatch=given.allow_mismatch)
    plans = plain_plans(source, keep, metric, given.plan)
    if mismatch := check_plan(info, next(iter(plans.values())), allow_mismatch=given.allow_mismatch):
        warnings.warn(mismatch, ReapWarning, stacklevel=2)
        plans = {name: replace(made, model=made.model | {"mismatch": mismatch}) for name, made in plans.items()}
    file = None if output is None else ResumeFile(output, RESUME_FORMAT, resume=given.resume)
    target = given.output(output, file, (*model_paths(model), profile, *text_paths(text)))
    ranks = mean_ranks(source, criteria(source) if metric is None else (metric,), given.plan["seed"])
    evaluator = PlanEvaluator(model, text, engine_options, allow_mismatch=given.allow_mismatch)
    budget = Budget(seconds, math.inf if max_passes is None else max_passes, progress, started=started)
    evaluator.like = source.model
    run = Refinement(evaluator, plans, ranks, budget, given.plan["seed"], file)
    with endings_as_interrupts(), run.keeping(target):
        made = run.go()
    if target is not None:
        target.save(made)
    if file is not None:
        file.remove()
    return made


@dataclass
class Refinement:
    """One search on one model, from dividing the windows to the plan."""

    evaluator: PlanEvaluator
    """The model and the text."""
    plans: Mapping[str, PrunePlan]
    """The plain criteria's choices."""
    ranks: Mapping[int, Sequence[int]]
    """layer -> expert ids, best first."""
    budget: Budget
    """Time and passes."""
    seed: int
    """Divides the windows."""
    file: ResumeFile | None = None
    """Where the state is kept."""
    search: Search | None = None
    """Once the start is chosen."""
    order: list[str] = field(default_factory=list)
    """The criteria, the best first, once they were compared."""
    n_windows_of_the_text: int = 0
    """Before it was thinned."""
    warnings: list[str] = field(default_factory=list)
    """What was too little."""

    def go(self) -> PrunePlan:
        """Search, and judge what was found."""
        state = self._prepare()
        windows = divide_windows(self.evaluator.text.domain_of, self.seed)
        hold_out = HoldOut(self._scores, windows.hold_out)
        trunk = {name: self._trunk(made) for name, made in self.plans.items()}
        stats = state.stats if state is not None else SearchStats()
        self.budget.begin(stats, windows.n_windows, len(windows.hold_out))
        if not self.order:
            self.order = hold_out.rank(trunk, self.budget.spend)
        first = self.plans[self.order[0]]
        self.search = Search(
            measure=self._divergence,
            windows=windows,
            plans={name: trunk[name] for name in self.order},
            ranks=self.ranks,
            fixed={int(layer): set(ids) for layer, ids in first.options["protected"].items()},
            n_groups=self.evaluator.info.n_groups,
            may_lose_one=first.keep - self.evaluator.info.n_groups in allowed_keeps(self.evaluator.info),
            spent=self.budget.check,
            state=state,
        )
        self.search.stats.passes = stats.passes
        self.budget.stats = self.search.stats
        self.search.run(self._after_step)
        return self._plan(self.search, hold_out.judge(trunk[self.order[0]], self.search.kept))

    @contextmanager
    def keeping(self, output: RewrittenOutput | None) -> Iterator[None]:
        """On Ctrl-C the best choice so far is kept where a file was asked for, and Interrupted says so."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if output is None or self.search is None or self.file is None:
                raise
            with uninterrupted():  # by a second Ctrl-C
                output.save(self._plan(self.search, None))
                self.file.save(self._last_state or self._state())
            raise Interrupted(
                f"stopped; {output.path} has the best choice of experts so far, which was not judged on windows held"
                f" out; --resume (resume=True) goes on from {self.file.path}"
            ) from stop

    # ---- how

    def _prepare(self) -> SearchState | None:
        """Say what is too little, take as much of the text as the time is enough for, and run the whole model on it;
        the state to go on from, if there is one."""
        text = self.evaluator.text
        self.n_windows_of_the_text = len(text.windows)
        self.warnings = list(self.evaluator.warnings)
        if self.file is not None:
            self.file.check(self._identity())
        saved = None if self.file is None or self.file.node is None else self.file.node["state"]
        needs = Needs(self.evaluator.seconds_per_window(), len(self.ranks), len(text.windows))
        self.budget.seconds_per_window = needs.seconds_per_window
        if saved is not None:
            n_windows = saved["windows"].integer(1)
            self.budget.spent_before = saved["seconds"].number()
            names = [saved["order"].entry(index).string() for index in range(len(saved["order"].entries()))]
            if sorted(names) != sorted(self.plans):
                saved["order"].fail(f"should name {', '.join(self.plans)}")
            self.order = names
        else:
            self.warnings += needs.shortcomings(self.budget.seconds, self.budget.max_passes, self.budget.elapsed)
            is_timed = self.budget.max_passes == math.inf
            n_windows = needs.affordable(self.budget.seconds - self.budget.elapsed) if is_timed else needs.n_windows
        for warning in self.warnings:
            warnings.warn(warning, ReapWarning, stacklevel=4)
        if n_windows < len(text.windows):
            self.evaluator.thin_text(n_windows)
        self.evaluator.reference(self.budget.report)
        return None if saved is None else SearchState.from_node(saved["search"])

    _last_state: dict[str, Any] | None = None

    def _after_step(self) -> None:
        if self.file is not None:
            self._last_state = self._state()
            self.file.save_if_due(self._last_state)

    def _state(self) -> dict[str, Any]:
        if self.search is None:
            raise AssertionError("there is a state once the search began")
        return {
            "windows": len(self.evaluator.text.windows),
            "seconds": self.budget.elapsed,
            "order": self.order,
            "search": self.search.state_dict(),
        }

    def _identity(self) -> dict[str, Any]:
        """What makes two calls the same search."""
        info, text = self.evaluator.info, self.evaluator.text
        return {
            "model": [info.fingerprint, info.router_fingerprint, info.n_bytes],
            "text": text.digest,
            "plans": {name: [list(kept) for kept in made.layers.values()] for name, made in self.plans.items()},
            "seed": self.seed,
            "max_passes": None if self.budget.max_passes == math.inf else self.budget.max_passes,
            "reap": version(),
        }

    def _plan(self, search: Search, verdict: Verdict | None) -> PrunePlan:
        record = {
            "seconds": round(self.budget.elapsed, 1),
            "seed": self.seed,
            "windows": len(self.evaluator.text.windows),
            "windows_of_the_text": self.n_windows_of_the_text,
            "warnings": self.warnings,
        }
        return refined_plan(self.plans, self.order, search, verdict, self.evaluator.text, record)

    def _trunk(self, made: PrunePlan) -> Kept:
        """Without prediction blocks, which do not run, so that their experts show no worth."""
        n_layers = self.evaluator.info.n_layers - self.evaluator.info.n_prediction_layers
        return {layer: kept for layer, kept in made.layers.items() if layer < n_layers}

    def _scores(self, kept: Kept, windows: Sequence[int]) -> Any:
        return self.evaluator.try_experts(kept, windows)

    def _divergence(self, kept: Kept, windows: Sequence[int]) -> Floats:
        return self.evaluator.try_experts(kept, windows).divergence()
