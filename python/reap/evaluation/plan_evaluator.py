"""A model loaded once, to try many plans on virtually."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.engine.options import EVALUATION_CTX_SIZE, EngineOptions
from reap.engine.session import SessionTokenizer, open_session
from reap.errors import MismatchError, UnsupportedModelError, UsageError
from reap.evaluation.adapters import Adapters
from reap.evaluation.loops import N_PROMPTS, Continuations, choose_prompts, continue_prompts
from reap.evaluation.quality_metrics import Predictions, TokenScores, compare_predictions, quality_metrics
from reap.evaluation.result import Evaluation
from reap.evaluation.virtual import keep_only
from reap.files.paths import PathLike
from reap.gguf.missing_keys import sentences
from reap.gguf.model_info import ModelInfo, inspect
from reap.progress import Progress, ProgressCallback
from reap.pruning.compatibility import check_plan, plan_warnings
from reap.scores.plan import PrunePlan
from reap.text.evaluation_text import EvaluationText, Text, read_evaluation_text, text_files

#: Memory for what a reference predicted.
REFERENCE_BYTES = 512 << 20
_NO_BATCH = (
    "batch_size changes nothing here and was left out: a text is run one window of ctx_size tokens at a time,"
    " ubatch_size tokens in one pass"
)
#: However long the text is, so many tokens of each position are told apart.
_FEWEST_TOP = 64


@dataclass(frozen=True)
class Reference:
    """What a model predicts at every scored position of a text, computed once for many candidates.

    Made by `PlanEvaluator.reference`.
    """

    model: str
    """The file."""
    n_vocab: int
    """Tokens in its vocabulary."""
    digest: str
    """Of the text's windows: two models were asked the same where these agree."""
    windows: tuple[Predictions, ...]
    """What it predicts in each window."""


class PlanEvaluator:
    """A model loaded once, and a text cut into windows once, to try many plans on.

        evaluator = PlanEvaluator("model.gguf", "heldout.jsonl", EngineOptions(ctx_size=512))
        for plan in plans:
            print(plan.keep, evaluator.score(plan).kl_mean)

    A plan is in force virtually: the router's values of the experts that it removes become −inf as they are computed,
    and the model computes what the pruned file would compute. Plans are checked as `prune` checks them.
    """

    def __init__(
        self,
        model: PathLike,
        text: Text,
        options: EngineOptions | None = None,
        *,
        max_windows: int | None = None,
        max_tokens: int | None = None,
        reference_bytes: int = REFERENCE_BYTES,
        allow_mismatch: bool = False,
    ) -> None:
        """Load the model, and cut the text.

        Args:
            model: a GGUF file.
            text: `read_evaluation_text`: a text file, JSON Lines, or several files, each a domain.
            options: of the engine; ctx_size is the length of a window. None: windows of 512 tokens, or as many as the
                model was trained with where that is fewer.
            max_windows: of each domain, at most so many windows, the first ones.
            max_tokens: of the whole text, about so many tokens, in windows spread over each domain.
            reference_bytes: memory for what the reference predicted: its log-probabilities of the whole vocabulary at
                every position where they fit, otherwise those of as many of the most probable tokens as do.
            allow_mismatch: try plans of other models as well, where layers and experts are as many.

        Raises:
            UsageError, FormatError, CalibrationError, EngineError: as `read_evaluation_text` and the engine.
            UnsupportedModelError: the model sees the tokens that it should predict.
        """
        self.model = os.fspath(model)
        self.info: ModelInfo = inspect(model)  # what can be checked is checked before the engine sees the file
        options = options or EngineOptions(ctx_size=EVALUATION_CTX_SIZE).within({}, self.info.context_length)
        for name, value in (("max_windows", max_windows), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected at least 1")
        if 0 < options.ctx_size < 4:
            raise UsageError(f"ctx_size is {options.ctx_size}, expected at least 4 tokens in a window")
        text_files(text)
        self._reference_bytes = reference_bytes
        self._allow_mismatch = allow_mismatch
        # one window is one sequence: a larger batch would take memory, and change nothing
        settings = replace(options, batch_size=None, lora=())
        self._session = open_session(model, settings, n_bytes=self.info.n_bytes)
        self._adapters = Adapters(self._session, self.info, options.adapters, allow_mismatch=allow_mismatch)
        self._check_causal()
        self.text: EvaluationText = read_evaluation_text(
            text, SessionTokenizer(self._session), options.ctx_size or self._session.ctx_size, max_windows
        )
        if max_tokens is not None:
            self.text = self.text.thinned(max(1, max_tokens // self.text.ctx_size))
        #: Sentences about the model and the options, of the engine and of ours.
        missing = sentences(self.info.missing_keys, options.given_metadata())
        self.warnings: tuple[str, ...] = (*missing, *self._session.warnings())
        if options.batch_size is not None:
            self.warnings += (_NO_BATCH,)
        #: "model" of the plan or profile that says who takes a removed expert's place, where a token id chooses it.
        self.like: Mapping[str, Any] = {"n_experts": self.info.n_experts}
        self._reference: Reference | None = None
        self._continuations: Continuations | None = None

    # ---- what many candidates are tried with

    def reference(self, progress: ProgressCallback | None = None) -> Reference:
        """What this model predicts with all of its experts; computed at the first call and kept."""
        if self._reference is None:
            self._session.set_kept(None)
            self._adapters.apply_own()
            n_top = self._n_top()
            windows = []
            for window in self._windows(progress):
                found = self._session.predict_top(window, self.text.first_scored, n_top)
                ids = found["ids"] if n_top < self._session.n_vocab else None
                windows.append(Predictions(found["next"], found["best"], ids, found["log_probs"], found["rest"]))
            self._reference = Reference(self.model, self._session.n_vocab, self.text.digest, tuple(windows))
        return self._reference

    def seconds_per_window(self) -> float:
        """How long a window takes; two are run, and the first, which also reads the weights, does not count."""
        self._session.set_kept(None)
        self._adapters.apply_own()
        for window in (self.text.windows * 2)[:2]:
            started = time.perf_counter()
            self._session.predict_top(window, self.text.first_scored, self._n_top())
        return time.perf_counter() - started

    def thin_text(self, n_windows: int) -> None:
        """Go on with about so many windows of the text, spread over it; what was found on all of them is forgotten."""
        self.text = self.text.thinned(n_windows)
        self._reference = self._continuations = None

    def token_scores(
        self,
        plan: PrunePlan | None = None,
        *,
        reference: Reference | None = None,
        progress: ProgressCallback | None = None,
    ) -> TokenScores:
        """What is found at each scored token with the experts that `plan` keeps (None: all), beside `reference` if
        there is one."""
        self._check_reference(reference)
        self._set_plan(plan)
        first = self.text.first_scored
        if reference is None:
            return TokenScores(np.stack([self._session.log_probs(window, first) for window in self._windows(progress)]))
        predicted = [
            self._predict(window, expected)
            for window, expected in zip(self._windows(progress), reference.windows, strict=True)
        ]
        return compare_predictions(predicted, reference.windows)

    def try_experts(self, kept: Mapping[int, Sequence[int]], windows: Sequence[int]) -> TokenScores:
        """What is found in some windows (their numbers) with the experts `kept` by layer, beside this model as it is.

        For a search that tries single experts: their number may differ between layers, which no file could have.
        """
        reference = self.reference()
        self._adapters.apply_own()
        self._set_kept(kept)
        expected = [reference.windows[index] for index in windows]
        return compare_predictions(
            [self._predict(self.text.windows[index], theirs) for index, theirs in zip(windows, expected, strict=True)],
            expected,
        )

    def score(
        self,
        plan: PrunePlan | None = None,
        *,
        reference: Reference | None = None,
        progress: ProgressCallback | None = None,
    ) -> Evaluation:
        """The figures with the experts that `plan` keeps.

        Compared with `reference`; a plan without one is compared with this model as it is, whose predictions are
        computed at the first such call.
        """
        started = time.perf_counter()
        if plan is not None and reference is None:
            check_plan(self.info, plan, allow_mismatch=self._allow_mismatch)
            steps = Steps(progress, 1 if self._reference else 2)
            reference = self._reference or self.reference(steps.next())
        else:
            steps = Steps(progress, 1)
        scores = self.token_scores(plan, reference=reference, progress=steps.next())
        return self._evaluation(plan, scores, reference, time.perf_counter() - started)

    def continuations(
        self,
        plan: PrunePlan | None = None,
        progress: ProgressCallback | None = None,
        *,
        n_prompts: int = N_PROMPTS,
    ) -> Continuations:
        """How the model continues the loop probe's prompts with the experts that `plan` keeps; of all of them,
        computed once."""
        if plan is None and self._continuations is not None:
            return self._continuations
        self._set_plan(plan)
        prompts, new_tokens = choose_prompts(self.text.windows, self.text.ctx_size, n_prompts)

        def report(n_done: int) -> None:
            if progress is not None:
                progress(Progress(n_done * new_tokens, len(prompts) * new_tokens))

        found = continue_prompts(self._session, prompts, new_tokens, report)
        if plan is None:
            self._continuations = found
        return found

    # ---- how

    def _check_causal(self) -> None:
        if self._session.sees_the_future():
            raise UnsupportedModelError(
                f"{self.model}: {self.info.architecture} sees the tokens that follow (a diffusion model), so it is told"
                " what it should predict, and there is nothing that a perplexity could say of it"
            )

    def _n_top(self) -> int:
        n_positions = len(self.text.windows) * self.text.n_scored
        n_vocab = self._session.n_vocab
        if n_positions * n_vocab * 4 <= self._reference_bytes:
            return n_vocab
        return min(n_vocab, max(_FEWEST_TOP, self._reference_bytes // (8 * n_positions)))

    def _predict(self, window: NDArray[np.int32], expected: Predictions) -> Predictions:
        """Of one window, about the tokens that the reference's predictions are about."""
        first = self.text.first_scored
        if expected.ids is None:
            found = self._session.predict_top(window, first, self._session.n_vocab)
        else:
            found = self._session.predict_ids(window, first, expected.ids)
        return Predictions(found["next"], found["best"], expected.ids, found["log_probs"], found["rest"])

    def _windows(self, progress: ProgressCallback | None) -> Iterator[NDArray[np.int32]]:
        total = len(self.text.windows) * self.text.ctx_size
        for index, window in enumerate(self.text.windows):
            yield window
            if progress is not None:
                progress(Progress((index + 1) * self.text.ctx_size, total))

    def _set_plan(self, plan: PrunePlan | None) -> None:
        if plan is None:
            self._adapters.apply(None)
            self._session.set_kept(None)
            return
        check_plan(self.info, plan, allow_mismatch=self._allow_mismatch)
        self._adapters.apply(plan)
        self.like = plan.model
        self._set_kept(plan.layers)

    def _set_kept(self, layers: Mapping[int, Sequence[int]]) -> None:
        keep_only(self._session, self.info, layers, self.like)

    def _check_reference(self, reference: Reference | None) -> None:
        if reference is None:
            return
        if reference.n_vocab != self._session.n_vocab:
            raise MismatchError(
                f"{reference.model} has a vocabulary of {reference.n_vocab:,} tokens, but {self.model} one of"
                f" {self._session.n_vocab:,}"
            )
        if reference.digest != self.text.digest:
            raise MismatchError(
                f"{reference.model} and {self.model} have different tokens for {', '.join(self.text.files)}"
            )

    def _evaluation(
        self, plan: PrunePlan | None, scores: TokenScores, reference: Reference | None, seconds: float
    ) -> Evaluation:
        whole = quality_metrics(scores)
        return Evaluation(
            **{field.name: getattr(whole, field.name) for field in fields(whole)},
            model=self.model,
            text=self.text.files,
            plan=None if plan is None else plan_record(plan),
            reference=None if reference is None else reference.model,
            windows=len(self.text.windows),
            ctx_size=self.text.ctx_size,
            dropped_tokens=self.text.dropped_tokens,
            domains={name: quality_metrics(scores.part(self.text.in_domain(name))) for name in self.text.domains},
            loops=None,
            seconds=seconds,
            warnings=(*self.warnings, *(() if plan is None else plan_warnings(self.info, plan))),
        )


def plan_record(plan: PrunePlan) -> dict[str, Any]:
    """What a result says of the plan that was in force."""
    numbers = {"metric": plan.metric, "keep": plan.keep, "n_experts": plan.n_experts}
    return {**numbers, "experts_sha256": plan.experts_sha256}


class Steps:
    """Divides one progress callback among passes of equal length."""

    def __init__(self, progress: ProgressCallback | None, n_steps: int) -> None:
        self._progress = progress
        self._n_steps = n_steps
        self._n_done = 0

    def next(self) -> ProgressCallback | None:
        """The callback of the next pass; None where there is no listener."""
        progress, index = self._progress, self._n_done
        self._n_done += 1
        if progress is None:
            return None

        def report(step: Progress) -> None:
            total = step.total or step.done
            progress(Progress(index * total + step.done, self._n_steps * total, step.unit))

        return report
