"""evaluate_tasks(): the tasks of lm-evaluation-harness, with all experts and with those that a plan keeps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from reap.engine.options import GENERATION_CTX_SIZE, EngineArguments, shows_engine_options
from reap.errors import MissingExtraError, ReapError, UsageError
from reap.evaluation.plan_evaluator import plan_record
from reap.files.paths import PathLike
from reap.progress import Progress, ProgressCallback
from reap.scores.plan import PrunePlan

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FEWSHOT_SEED = 1234
_BOOTSTRAPS = 1000


@dataclass(frozen=True, kw_only=True)
class PairedAnswers:
    """A model beside the whole one on the same questions."""

    value: float
    """The whole model's value."""
    difference: float
    """The model's value less that."""
    stderr: float | None
    """Standard error of the difference, from the questions' differences; None where it cannot be told from them."""
    gained: int | None
    """Questions that only this model answers rightly; None where answers are not simply right or wrong."""
    lost: int | None
    """Questions that only the whole model answers rightly."""
    p_value: float | None
    """McNemar's exact test: how probable so uneven a split of those questions is where neither model is better."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One figure of one task."""

    task: str
    """The task's name."""
    metric: str
    """As the harness names it: acc, acc_norm, exact_match, word_perplexity."""
    filter: str
    """What was done to the answers first; "none" mostly."""
    value: float
    """The figure."""
    stderr: float | None
    """Its standard error, by the harness."""
    higher_is_better: bool | None
    """None where the task does not say."""
    questions: int
    """How many."""
    whole: PairedAnswers | None
    """The whole model's, where a plan is in force."""


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """What `evaluate_tasks` found."""

    model: str
    """The file."""
    plan: dict[str, Any] | None
    """Metric, number and digest of kept experts of the plan in force; None: all experts."""
    reference: str | None
    """The file of the whole model that answered the same questions; None: none did."""
    results: tuple[TaskResult, ...]
    """By task, metric and filter."""
    harness: str
    """Version of lm-evaluation-harness."""
    seconds: float
    """The call took."""
    warnings: tuple[str, ...] = ()
    """Sentences worth reading."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**asdict(self), "results": [asdict(it) for it in self.results], "warnings": list(self.warnings)}


@shows_engine_options(ctx_size=GENERATION_CTX_SIZE)
def evaluate_tasks(
    model: PathLike,
    tasks: str | Sequence[str],
    *,
    plan: PrunePlan | PathLike | None = None,
    reference: PathLike | None = None,
    include_path: PathLike | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    allow_mismatch: bool = False,
    progress: ProgressCallback | None = None,
    **engine: Unpack[EngineArguments],
) -> TaskEvaluation:
    """Run tasks of EleutherAI's lm-evaluation-harness.

    Args:
        model: a GGUF file.
        tasks: names of tasks or groups, as the harness has them. It fetches their data sets itself.
        plan: a PrunePlan or the path of one, in force virtually. The model as it is answers the same questions first,
            and each figure is given with the paired difference.
        reference: a GGUF file that answers the same questions first instead, the model before pruning say.
        include_path: a folder with task files of one's own.
        limit: of each task only so many questions, the first ones.
        num_fewshot: answered questions before each; None: as the task says.
        allow_mismatch: go on with a plan that was made of another model, where layers and experts are as many.
        progress: called with the tokens run so far; there is no total.
        engine: options of the engine. ctx_size is 4096 where none is given, or what the model was trained with where
            that is less.

    Raises:
        MissingExtraError: the extra `tasks` is not installed.
        UsageError: a task that there is not, or whose data cannot be had; an option; a plan that no such model can
            follow.
        MismatchError: a plan of another model.
        UnsupportedModelError: a model without a tokenizer, or that sees what it should predict.
        FormatError, EngineError: the model's file, the engine.
    """
    started = time.perf_counter()
    if find_spec("lm_eval") is None:
        raise MissingExtraError("tasks need lm-evaluation-harness: pip install 'reap-moe[tasks]'")
    import lm_eval

    from reap.evaluation.harness_model import HarnessModel

    names = [tasks] if isinstance(tasks, str) else list(tasks)
    _check(names, include_path, limit, num_fewshot)
    the_plan = None if plan is None else PrunePlan.of(plan)
    n_done = 0

    def report(n_tokens: int) -> None:
        nonlocal n_done
        n_done += n_tokens
        if progress is not None:
            progress(Progress(n_done, None))

    def opened(path: PathLike) -> HarnessModel:
        return HarnessModel(path, allow_mismatch=allow_mismatch, progress=report, **engine)

    manager = _manager(names, include_path)

    def run(lm: HarnessModel) -> dict[str, Any]:
        return _run(lm, _load(manager, names, num_fewshot), limit)

    whole = None if reference is None else run(opened(reference))
    lm = opened(model)  # the reference's weights are gone by now
    if the_plan is not None:
        lm.check_plan(the_plan)  # before hours of questions
        whole = whole or run(lm)
        lm.set_plan(the_plan)
    compared = None if whole is None else os.fspath(model if reference is None else reference)
    return TaskEvaluation(
        model=os.fspath(model),
        plan=None if the_plan is None else plan_record(the_plan),
        reference=compared,
        results=tuple(_results(run(lm), whole)),
        harness=lm_eval.__version__,
        seconds=time.perf_counter() - started,
        warnings=lm.warnings,
    )


def _check(names: list[str], include_path: Any, limit: int | None, num_fewshot: int | None) -> None:
    if not names:
        raise UsageError("no task was named")
    if include_path is not None and not os.path.isdir(include_path):
        raise UsageError(f"{os.fspath(include_path)} is not a folder; task files are looked for in one")
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}, expected at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"num_fewshot is {num_fewshot}, expected at least 0")


def _manager(names: list[str], include_path: Any) -> Any:
    """What finds tasks by their names. The harness's own files take it long to read, so they are left out where the
    user's have all that was named, unless those refer to the others."""
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else os.fspath(include_path)
    if path is not None:
        manager = TaskManager(include_path=path, include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            with suppress(Exception):
                manager.load(names)
                return manager
    manager = TaskManager(include_path=path)
    strange = [name for name in names if not manager.match_tasks([name])]
    if strange:
        raise UsageError(f"lm-evaluation-harness has no task {strange[0]!r}; `lm_eval ls tasks` lists those it has")
    return manager


def _load(manager: Any, names: list[str], num_fewshot: int | None) -> Any:
    """The tasks, prepared as the harness's own command line does it."""
    try:
        loaded = manager.load(names)
    except ReapError:
        raise
    except Exception as error:  # whatever a task file, its code or its data set may raise
        raise UsageError(f"the tasks {', '.join(names)} cannot be loaded: {error}") from error
    for task in loaded["tasks"].values():
        usual = task.get_config("num_fewshot")
        if num_fewshot is not None and usual != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif usual is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _run(lm: Any, loaded: Any, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    try:
        found: dict[str, Any] = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS)
    except ReapError:
        raise
    except Exception as error:  # a task is code of its own
        raise ReapError(f"lm-evaluation-harness failed: {type(error).__name__}: {error}") from error
    return found


# ---- the harness's results as ours


def _results(found: Mapping[str, Any], whole: Mapping[str, Any] | None) -> list[TaskResult]:
    results = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            samples = _samples(found, task, metric, filter_name)
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            results.append(
                TaskResult(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=_number(stderr),
                    higher_is_better=found.get("higher_is_better", {}).get(task, {}).get(metric),
                    questions=len(samples) or int(values.get("sample_len") or 0),
                    whole=None if whole is None else _paired(whole, task, key, float(value), samples),
                )
            )
    return results


def _samples(found: Mapping[str, Any], task: str, metric: str, filter_name: str) -> dict[Any, Any]:
    """Question -> what it counted for a metric."""
    samples = found.get("samples", {}).get(task, ())
    return {
        (it["doc_id"], it["doc_hash"], it["prompt_hash"]): it[metric]
        for it in samples
        if it["filter"] == filter_name and metric in it
    }


def _paired(whole: Mapping[str, Any], task: str, key: str, value: float, ours: Mapping[Any, Any]) -> PairedAnswers:
    before = float(whole["results"][task][key])
    theirs = _samples(whole, task, *key.split(",", 1))
    if ours.keys() != theirs.keys():
        raise ReapError(f"the task {task} asked the two models different questions")
    stderr = gained = lost = p_value = None
    mine, others = (np.array([_sum_and_weight(found[it]) for it in ours], np.float64) for found in (ours, theirs))
    slope, slope_before = _slope(mine, value), _slope(others, before)
    if len(ours) > 1 and slope is not None and slope_before is not None:
        influence = slope * _influence(mine) - slope_before * _influence(others)
        stderr = math.sqrt(len(ours) / (len(ours) - 1) * float((influence**2).sum()))
        answers = np.concatenate([mine, others])
        if slope == slope_before == 1 and np.isin(answers[:, 0], (0, 1)).all() and (answers[:, 1] == 1).all():
            gained, lost = (int((sign * (mine - others)[:, 0] > 0).sum()) for sign in (1, -1))
            p_value = mcnemar(gained, lost)
    return PairedAnswers(
        value=before, difference=value - before, stderr=stderr, gained=gained, lost=lost, p_value=p_value
    )


def _sum_and_weight(sample: Any) -> tuple[float, float]:
    """What a question adds to a figure's numerator and denominator: a number, or a pair as of perplexities by word."""
    if isinstance(sample, (int, float)):
        return float(sample), 1.0
    if isinstance(sample, (tuple, list)) and len(sample) == 2 and all(isinstance(it, (int, float)) for it in sample):
        return float(sample[0]), float(sample[1])
    return math.nan, math.nan


def _slope(parts: Any, value: float) -> float | None:
    """The derivative of a figure by the ratio r of its sums [n, 2]: of r itself, of exp(-r) (perplexities) or of bits.

    None where the figure is none of these, so that its error cannot be told from its questions.
    """
    if not len(parts) or not np.isfinite(parts).all() or parts[:, 1].sum() <= 0:
        return None
    ratio = float(parts[:, 0].sum() / parts[:, 1].sum())
    for figure, slope in (
        (ratio, 1.0),
        (math.exp(min(-ratio, 700.0)), -value),
        (-ratio / math.log(2), -1 / math.log(2)),
    ):
        if math.isclose(figure, value, rel_tol=1e-6, abs_tol=1e-12):
            return slope
    return None


def _influence(parts: Any) -> Any:
    """How far each question moves the ratio of the sums [n, 2], to first order: float64 [n]."""
    ratio = parts[:, 0].sum() / parts[:, 1].sum()
    return (parts[:, 0] - ratio * parts[:, 1]) / parts[:, 1].sum()


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test: of a fair coin that fell `gained` and `lost` times on its sides."""
    n, few = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def _number(value: Any) -> float | None:
    """None for what the harness calls "N/A"."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
