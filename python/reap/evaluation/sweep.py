"""sweep(): many choices of experts, tried virtually on one held-out text, with the weights loaded once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from reap.engine.options import EVALUATION_CTX_SIZE, EngineOptions, shows_engine_options
from reap.errors import ReapWarning, UsageError
from reap.evaluation.candidates import Choices
from reap.evaluation.fewer_experts import SweepArguments, UsedArguments, check_experts_used, with_experts_used
from reap.evaluation.keep_limits import allowed_keeps, parse_increase
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.evaluation.plan_options import ChoiceArguments, shows_plan_options, split_options
from reap.evaluation.resume_file import ResumeFile
from reap.evaluation.sweep_rows import Table
from reap.evaluation.sweep_run import ResultWriter, SweepRun, TextEvaluator
from reap.evaluation.sweep_table import Sweep
from reap.evaluation.sweep_winner import record_choice
from reap.files.arguments import divide, shows
from reap.files.paths import PathLike
from reap.gguf.model_info import inspect
from reap.gguf.shards import model_paths
from reap.profiling.interrupts import endings_as_interrupts
from reap.progress import ProgressCallback
from reap.pruning.compatibility import check_profile, plan_warnings
from reap.pruning.gguf import parse_size, size_after
from reap.scores.plan import PrunePlan, plan
from reap.scores.profile import METRICS, Profile
from reap.scores.ranking import Keep, resolve_keep
from reap.text.evaluation_text import Text, text_paths

if TYPE_CHECKING:
    from typing_extensions import Unpack

KEEPS = (0.75, 0.5, 0.25)
DEFAULT_METRICS = ("reap", "frequency", "weighted_ean_sum", "random")
RESUME_FORMAT = "reap.sweep.resume"


@shows((UsedArguments, check_experts_used))
@shows_engine_options(ctx_size=EVALUATION_CTX_SIZE)
@shows_plan_options()
def sweep(
    model: PathLike,
    profile: Profile | PathLike,
    text: Text,
    *,
    keep: Keep | Sequence[Keep] | None = None,
    metric: str | Sequence[str] | None = None,
    seeds: int = 1,
    plans: Sequence[PrunePlan | PathLike] = (),
    target_size: int | str | None = None,
    max_ppl_increase: float | str | None = None,
    max_tokens: int | None = None,
    output: PathLike | None = None,
    progress: ProgressCallback | None = None,
    **options: Unpack[SweepArguments],
) -> Sweep:
    """Try many choices of experts of `model` on the held-out `text`, without writing one.

    Args:
        model: a GGUF file.
        profile: of that model.
        text: as in `evaluate`.
        keep: numbers or fractions: `resolve_keep`; 0.75, 0.5 and 0.25 where neither this nor a limit is given.
        metric: names of METRICS; reap, frequency, weighted_ean_sum and random where none is given.
        seeds: how many selections of metric random, with the seeds 0, 1, ...
        plans: plans (or files of them) to try as well, under their own names.
        target_size: bytes, or a text like "12G" (10^9): also the largest keep of each metric whose file is no larger.
        max_ppl_increase: 0.05 or "5%": also the smallest keep of each metric whose perplexity on the text rises by no
            more, found by bisection, which takes it for rising with each expert that goes; what is returned was
            measured.
        max_tokens: about so many tokens of the text, in windows spread over each domain; None: all of it.
        output: a file that holds the rows so far after each candidate, whole or not at all; one that exists needs
            `force`.
        progress: called with scored tokens, of those of all candidates.
        options: allow_mismatch (go on with a profile or plans of another model, where layers and experts are as many;
            the warnings say what differs), resume (take what `OUTPUT.resume`, which an interrupted sweep left, has of
            the same candidates, and replace the output), force (replace an output that exists), experts_used (numbers
            of experts of each token, fewer than the model's own: the whole model and every candidate are tried with
            each as well, by the engine's own override; a token then takes less work, which pruning does not save;
            `Sweep.select(experts_used=)` has these rows, winners and limits are of the others); those of `plan`
            (protect, protect_super_experts, blend), for every candidate, and of the engine.

    Raises:
        UsageError, MismatchError, FormatError, UnsupportedModelError, CalibrationError: as `plan`, `prune` and
            `evaluate`, for a call that cannot work before the model is loaded.
        Interrupted: on Ctrl-C; its `result` is the table so far.
        KeyboardInterrupt: on Ctrl-C before there is a row.

    A ReapWarning where part of the text was in the calibration.
    """
    for_used, for_choice = divide("sweep", options, UsedArguments, ChoiceArguments)
    given = split_options(for_choice)
    engine_options = EngineOptions.of(given.engine, ctx_size=EVALUATION_CTX_SIZE)
    info = inspect(model)
    engine_options = engine_options.within(given.engine, info.context_length)
    source = Profile.of(profile)
    check_profile(info, source, allow_mismatch=given.allow_mismatch)
    max_bytes = None if target_size is None else parse_size(target_size)
    increase = None if max_ppl_increase is None else parse_increase(max_ppl_increase)
    if keep is None and target_size is None and max_ppl_increase is None:
        keep = KEEPS
    choose = partial(plan, **{name: value for name, value in given.plan.items() if name != "seed"})
    measure_size = partial(size_after, model, allow_mismatch=given.allow_mismatch)
    choices = Choices(source, _metrics(metric), _seeds(seeds), allowed_keeps(info), choose, measure_size)
    candidates = choices.grid(_keeps(keep, source))
    judged = choices.given(PrunePlan.of(item) for item in plans)
    candidates += judged
    fewer = check_experts_used(info, (item.plan.keep for item in candidates), **for_used)
    within = {} if max_bytes is None else choices.largest_within(max_bytes)
    file = None if output is None else ResumeFile(output, RESUME_FORMAT, resume=given.resume)
    target = given.output(output, file, (*model_paths(model), profile, *text_paths(text), *plans))
    load = partial(PlanEvaluator, model, text, max_tokens=max_tokens, allow_mismatch=given.allow_mismatch)
    evaluator = TextEvaluator(load(options=engine_options), progress)
    n_bisected = 0 if increase is None else len(choices.metrics) * len(choices.keeps).bit_length()
    evaluator.expect((1 + len(candidates)) * (1 + len(fewer)) + sum(map(len, within.values())) + n_bisected)
    run = SweepRun(choices, Table(evaluator), choice=record_choice(profile, given.plan, judged))
    writer = ResultWriter(run, evaluator, engine_options, target, file)
    tried = [*candidates, *(item for found in within.values() for item in found)]
    tried = tried or [choices.candidate(choices.metrics[0], choices.keeps[-1])]
    writer.warnings += tuple(dict.fromkeys(line for item in tried for line in plan_warnings(info, item.plan)))
    for warning in writer.warnings:
        warnings.warn(warning, ReapWarning, stacklevel=2)
    with endings_as_interrupts(), writer.keeping():
        run.table.add_baseline(evaluator.evaluator.info.n_experts, evaluator.evaluator.info.n_bytes)
        writer.restore()
        run.after_each = writer.save
        run.try_all(candidates)
        if max_bytes is not None:
            run.fit_size(max_bytes, within)
        if increase is not None:
            run.fit_perplexity(increase)
        for used in fewer:
            evaluator.reopen(partial(load, options=with_experts_used(engine_options, info.architecture, used)))
            run.try_with(used, candidates)
    return writer.finish()


def _metrics(metric: str | Sequence[str] | None) -> tuple[str, ...]:
    names = (
        DEFAULT_METRICS if metric is None else (metric,) if isinstance(metric, str) else tuple(dict.fromkeys(metric))
    )
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise UsageError(
            f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}"
            if unknown
            else "sweep needs at least one metric"
        )
    return names


def _seeds(seeds: int) -> int:
    if type(seeds) is not int or not 1 <= seeds <= 1000:
        raise UsageError(
            f"seeds is {seeds!r}, expected how many selections of metric random there are to be, from 1 on"
        )
    return seeds


def _keeps(keep: Keep | Sequence[Keep] | None, profile: Profile) -> list[int]:
    """The numbers that are meant, each once, the largest first."""
    listed = [] if keep is None else list(keep) if isinstance(keep, Sequence | np.ndarray) else [keep]
    return sorted(
        {resolve_keep(item, profile.n_experts, profile.n_groups, profile.model) for item in listed}, reverse=True
    )
