"""evaluate(): how well a model predicts a text, with all of its experts, virtually pruned, or beside a reference."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from reap.engine.options import EVALUATION_CTX_SIZE, EngineArguments, EngineOptions, shows_engine_options
from reap.errors import ReapWarning
from reap.evaluation.loop_probe import LoopProbe
from reap.evaluation.loops import Continuations, loop_metrics, loop_warnings
from reap.evaluation.plan_evaluator import PlanEvaluator, Reference, Steps
from reap.evaluation.result import Evaluation
from reap.files.paths import PathLike
from reap.gguf.model_info import inspect
from reap.progress import ProgressCallback
from reap.pruning.compatibility import check_plan
from reap.scores.plan import PrunePlan
from reap.text.evaluation_text import EvaluationText, Text
from reap.text.overlap import overlap_warnings
from reap.text.samples import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack


@shows_engine_options(ctx_size=EVALUATION_CTX_SIZE)
def evaluate(
    model: PathLike,
    text: Text,
    *,
    reference: PathLike | None = None,
    plan: PrunePlan | PathLike | None = None,
    loops: bool = False,
    loop_prompts: int | Source | None = None,
    max_tokens: int | None = None,
    allow_mismatch: bool = False,
    progress: ProgressCallback | None = None,
    **engine: Unpack[EngineArguments],
) -> Evaluation:
    """How well `model` predicts `text`: perplexity, comparable with what llama-perplexity prints, and agreement.

    Args:
        model: a GGUF file.
        text: `read_evaluation_text`: a text file, JSON Lines with domains, or several files, each a domain. It is
            tokenised whole (special tokens in it are not parsed) and cut into windows of `ctx_size`; the first token of
            each is replaced by BOS where the model adds one; of each window the positions ctx_size/2 + 1 to
            ctx_size - 1 are scored; what is left at the end is dropped.
        reference: a GGUF file with the same tokenizer, the model before pruning say: KL divergence, agreement on the
            most probable token, and tokens whose probability fell by half are of this one.
        plan: a PrunePlan or the path of one: its experts are removed virtually, no file is written. Without
            `reference` the model as it is is the reference, and its weights are loaded once.
        loops: continue a few prompts from the text as well, and say how much of that is repetition.
        loop_prompts: the same, with so many beginnings of the text's windows, or with prompts of your own (a file, as
            of `generate`), each answered by up to 512 of the most probable tokens in a context of 4096, or what the
            model was trained with; where prompts carry tools, the calls are read and held against their schemas.
        max_tokens: about so many tokens of the text, in windows spread over each domain; None: all of it.
        allow_mismatch: go on with a plan that was made of another model, where layers and experts are as many; the
            warnings say what differs.
        progress: called with tokens.
        engine: options of the engine: `reap.engine.options.EngineOptions`. ctx_size is 512 where none is given, or what
            the model was trained with where that is less.

    Raises:
        UsageError: an option, a file that is not there, a plan that no such model can follow.
        MismatchError: a plan of another model, a reference with other tokens.
        FormatError: a damaged file.
        UnsupportedModelError: the experts cannot be removed, or not virtually; the model sees what it should predict.
        CalibrationError: the text cannot be used, or a domain is shorter than one window.
        EngineError: llama.cpp failed.
        KeyboardInterrupt: Ctrl-C.

    What the engine warns of is a ReapWarning, and in the result's warnings.
    """
    started = time.perf_counter()
    the_plan = None if plan is None else PrunePlan.of(plan)
    options = EngineOptions.of(engine, ctx_size=EVALUATION_CTX_SIZE)  # a misspelt option is said before a file is read
    info = inspect(model)  # before a reference is run for nothing
    options = options.within(engine, info.context_length)
    if the_plan is not None:
        check_plan(info, the_plan, allow_mismatch=allow_mismatch)
    has_other = reference is not None and not (
        the_plan is not None and os.path.realpath(reference) == os.path.realpath(model)
    )
    is_compared = has_other or the_plan is not None
    probe = LoopProbe.of(loops, loop_prompts)
    steps = Steps(progress, (1 + is_compared) * (1 + probe.of_text))
    said: list[str] = []

    def opened(path: PathLike, *, lora: bool = True) -> PlanEvaluator:
        chosen = options if lora else replace(options, lora=())  # an adapter is of `model`
        evaluator = PlanEvaluator(path, text, chosen, max_tokens=max_tokens, allow_mismatch=allow_mismatch)
        for warning in evaluator.warnings:
            if warning not in said:
                said.append(warning)
                warnings.warn(warning, ReapWarning, stacklevel=3)
        return evaluator

    def examine(evaluator: PlanEvaluator) -> tuple[Reference, Continuations | None]:
        expected = evaluator.reference(steps.next())
        return expected, probe.continuations(evaluator, None, steps.next()) if probe.of_text else None

    expected, before = examine(opened(reference, lora=False)) if has_other and reference is not None else (None, None)
    evaluator = opened(model)  # the reference's weights are gone by now
    if the_plan is not None and expected is None:
        expected, before = examine(evaluator)
    result = evaluator.score(the_plan, reference=expected, progress=steps.next())
    found = probe.continuations(evaluator, the_plan, steps.next()) if probe.of_text else None
    scored = evaluator.text
    del evaluator  # its weights go before those that answer prompts come
    if probe.prompts is not None:
        other = reference if has_other else None
        found, before = probe.answers(model, the_plan, other, engine, progress)
    metrics = loop_metrics(found, before) if found else None
    sentences = (*said, *result.warnings, *loop_warnings(metrics), *_seen_before(scored, the_plan))
    return replace(
        result,
        loops=metrics,
        warnings=tuple(dict.fromkeys(sentences)),
        seconds=time.perf_counter() - started,
    )


def _seen_before(text: EvaluationText, plan: PrunePlan | None) -> list[str]:
    """Sentences where the plan's calibration had part of the text."""
    if plan is None:
        return []
    return overlap_warnings(text.file_digests(), np.concatenate(text.windows), plan.calibration)
