"""evaluate(): how well a model predicts a text, with all of its experts, virtually pruned, or beside a reference."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.agreement import Figures, Measurement, Predictions, figures, measure
from reap.agreement import perplexity_of as perplexity_of
from reap.engine import EngineOptions, SessionTokenizer, open_session
from reap.errors import MismatchError, UsageError
from reap.heldout import HeldOut, Text, read_heldout, text_files
from reap.inspector import ModelInfo, inspect
from reap.loops import Continuations, LoopFigures, choose_prompts, continue_prompts, loop_figures
from reap.overlap import overlap_warnings
from reap.planner import PrunePlan
from reap.progress import Progress, ProgressCallback
from reap.pruner import check_plan, plan_warnings

#: Memory for what a reference predicted.
REFERENCE_BYTES = 512 << 20
#: However long the text is, so many tokens of each position are told apart.
_FEWEST_TOP = 64


@dataclass(frozen=True, kw_only=True)
class Evaluation(Figures):
    """How well a model predicts a text: the figures of all its scored tokens, and of each domain.

    model, text: files. plan: metric and number of kept experts of the plan in force, None for the model as it is. reference: the file that
    it is compared with. domains: name -> the same figures of that domain's tokens; empty where the text names none. loops: of the
    loop probe, where it was asked for. windows: of ctx_size tokens each. dropped_tokens: what was left of the text, shorter than a
    window. seconds: the call took. warnings: sentences worth reading.
    """

    model: str
    text: tuple[str, ...]
    plan: dict[str, Any] | None
    reference: str | None
    windows: int
    ctx_size: int
    dropped_tokens: int
    domains: dict[str, Figures]
    loops: LoopFigures | None
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def meaning(self) -> str:
        """What the figures say, in sentences."""
        return " ".join((_meaning(self), *_domains_meaning(self.domains), *_loops_meaning(self.loops)))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**asdict(self), "text": list(self.text), "warnings": list(self.warnings), "meaning": self.meaning}


@dataclass(frozen=True)
class Reference:
    """What a model predicts at every scored position of a text, computed once for many candidates. Made by `Judge.reference`.

    model: its file. digest: of the text's windows. windows: one `Predictions` each.
    """

    model: str
    n_vocab: int
    digest: str
    windows: tuple[Predictions, ...]


class Judge:
    """A model loaded once, and a text cut into windows once, to try many plans on.

        judge = Judge("model.gguf", "heldout.jsonl", EngineOptions(ctx_size=512))
        for plan in plans:
            print(plan.keep, judge.score(plan).kl_mean)

    A plan is in force virtually: the router's values of the experts that it removes become −inf as they are computed, and the model
    computes what the pruned file would compute. Plans are checked as `prune` checks them.

    model            a GGUF file
    text             `read_heldout`: a text file, JSON Lines, or several files, each a domain
    options          of the engine; ctx_size is the length of a window (None: windows of 512 tokens)
    max_windows      of each domain, at most so many windows
    reference_bytes  memory for what the reference predicted: its log-probabilities of the whole vocabulary at every position where they
                     fit, otherwise those of as many of the most probable tokens as do

    Raises UsageError, FormatError, CalibrationError (`read_heldout`), EngineError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        text: Text,
        options: EngineOptions | None = None,
        *,
        max_windows: int | None = None,
        reference_bytes: int = REFERENCE_BYTES,
    ) -> None:
        options = options if options is not None else EngineOptions(ctx_size=512)
        if max_windows is not None and max_windows < 1:
            raise UsageError(f"max_windows is {max_windows}, expected at least 1")
        if options.ctx_size < 4:
            raise UsageError(f"ctx_size is {options.ctx_size}, expected at least 4 tokens in a window")
        self.model = os.fspath(model)
        self.info: ModelInfo = inspect(model)  # what can be checked is checked before the engine sees the file
        text_files(text)
        self._reference_bytes = reference_bytes
        self._session = open_session(model, options, n_bytes=self.info.n_bytes)
        self.text: HeldOut = read_heldout(text, SessionTokenizer(self._session), options.ctx_size, max_windows)
        self._reference: Reference | None = None
        self._continuations: Continuations | None = None

    # ---- what many candidates are tried with

    def reference(self, progress: ProgressCallback | None = None) -> Reference:
        """What this model predicts with all of its experts; computed at the first call and kept."""
        if self._reference is None:
            self._session.set_kept(None)
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
        for window in (self.text.windows * 2)[:2]:
            started = time.perf_counter()
            self._session.predict_top(window, self.text.first_scored, self._n_top())
        return time.perf_counter() - started

    def thin_text(self, n_windows: int) -> None:
        """Go on with about so many windows of the text, spread over it; what was found on all of them is forgotten."""
        self.text = self.text.thinned(n_windows)
        self._reference = self._continuations = None

    def measure(
        self, plan: PrunePlan | None = None, *, reference: Reference | None = None, progress: ProgressCallback | None = None
    ) -> Measurement:
        """What is found at each scored token with the experts that `plan` keeps (None: all), beside `reference` if there is one."""
        self._check_reference(reference)
        self._set_plan(plan)
        first = self.text.first_scored
        if reference is None:
            return Measurement(np.concatenate([self._session.log_probs(window, first) for window in self._windows(progress)]))
        predicted = [self._predict(window, expected) for window, expected in zip(self._windows(progress), reference.windows, strict=True)]
        return measure(predicted, reference.windows)

    def try_experts(self, kept: Mapping[int, Sequence[int]], windows: Sequence[int]) -> Measurement:
        """What is found in some windows (their numbers) with the experts `kept` by layer, beside this model as it is.

        For a search that tries single experts: their number may differ between layers, which no file could have.
        """
        reference = self.reference()
        self._set_kept(kept)
        expected = [reference.windows[index] for index in windows]
        return measure([self._predict(self.text.windows[index], theirs) for index, theirs in zip(windows, expected, strict=True)], expected)

    def score(
        self, plan: PrunePlan | None = None, *, reference: Reference | None = None, progress: ProgressCallback | None = None
    ) -> Evaluation:
        """The figures with the experts that `plan` keeps.

        Compared with `reference`; a plan without one is compared with this model as it is, whose predictions are computed at the
        first such call.
        """
        started = time.perf_counter()
        if plan is not None and reference is None:
            check_plan(self.info, plan)
            steps = _Steps(progress, 1 if self._reference else 2)
            reference = self._reference or self.reference(steps.next())
        else:
            steps = _Steps(progress, 1)
        measured = self.measure(plan, reference=reference, progress=steps.next())
        return self._evaluation(plan, measured, reference, time.perf_counter() - started)

    def continuations(self, plan: PrunePlan | None = None, progress: ProgressCallback | None = None) -> Continuations:
        """How the model goes on behind the loop probe's prompts with the experts that `plan` keeps; of all of them, computed once."""
        if plan is None and self._continuations is not None:
            return self._continuations
        self._set_plan(plan)
        prompts, new_tokens = choose_prompts(self.text.windows, self.text.ctx_size)

        def report(n_done: int) -> None:
            if progress is not None:
                progress(Progress(n_done * new_tokens, len(prompts) * new_tokens))

        found = continue_prompts(self._session, prompts, new_tokens, report)
        if plan is None:
            self._continuations = found
        return found

    # ---- how

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
            self._session.set_kept(None)
            return
        check_plan(self.info, plan)
        self._set_kept(plan.layers)

    def _set_kept(self, layers: Mapping[int, Sequence[int]]) -> None:
        n_trunk_layers = self.info.n_layers - self.info.n_prediction_layers  # a prediction block does not run here
        self._session.set_kept({layer: list(kept) for layer, kept in layers.items() if layer < n_trunk_layers})

    def _check_reference(self, reference: Reference | None) -> None:
        if reference is None:
            return
        if reference.n_vocab != self._session.n_vocab:
            raise MismatchError(
                f"{reference.model} has a vocabulary of {reference.n_vocab:,} tokens, but {self.model} one of {self._session.n_vocab:,}"
            )
        if reference.digest != self.text.digest:
            raise MismatchError(f"{reference.model} and {self.model} have different tokens for {', '.join(self.text.files)}")

    def _evaluation(self, plan: PrunePlan | None, measured: Measurement, reference: Reference | None, seconds: float) -> Evaluation:
        whole = figures(measured)
        return Evaluation(
            **{field.name: getattr(whole, field.name) for field in fields(whole)},
            model=self.model,
            text=self.text.files,
            plan=None if plan is None else {"metric": plan.metric, "keep": plan.keep, "n_experts": plan.n_experts},
            reference=None if reference is None else reference.model,
            windows=len(self.text.windows),
            ctx_size=self.text.ctx_size,
            dropped_tokens=self.text.dropped_tokens,
            domains={name: figures(measured.part(self.text.in_domain(name))) for name in self.text.domains},
            loops=None,
            seconds=seconds,
            warnings=() if plan is None else tuple(plan_warnings(self.info, plan)),
        )


def evaluate(
    model: str | os.PathLike[str],
    text: Text,
    *,
    reference: str | os.PathLike[str] | None = None,
    plan: PrunePlan | str | os.PathLike[str] | None = None,
    loops: bool = False,
    ctx_size: int = 512,
    batch_size: int | None = None,
    ubatch_size: int = 512,
    threads: int | None = None,
    gpu_layers: int = -1,
    devices: Sequence[str] | None = None,
    override_tensors: Sequence[tuple[str, str]] = (),
    rpc: Sequence[str] = (),
    type_k: str = "f16",
    type_v: str = "f16",
    flash_attn: str = "auto",
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """How well `model` (a GGUF file) predicts `text`: perplexity, comparable with what llama-perplexity prints, and agreement.

    text       `read_heldout`: a text file, JSON Lines with domains, or several files, each a domain. It is tokenised whole (special
               tokens in it are not parsed) and cut into windows of `ctx_size`; the first token of each is replaced by BOS where the model
               adds one; of each window the positions ctx_size/2 + 1 to ctx_size - 1 are scored; what is left at the end is dropped
    reference  a GGUF file with the same tokenizer, the model before pruning say: KL divergence, agreement on the most probable token, and
               tokens whose probability fell by half are of this one
    plan       a PrunePlan or the path of one: its experts are removed virtually, no file is written. Without `reference` the model
               as it is is the reference, and its weights are loaded once
    loops      continue a few prompts from the text as well, and say how much of that is repetition

    Raises:
        UsageError: an option, a file that is not there, a plan that no such model can follow. MismatchError: a plan of another model, a
        reference with other tokens. FormatError: a damaged file. UnsupportedModelError: the experts cannot be removed, or not virtually.
        CalibrationError: the text cannot be used, or a domain is shorter than one window.
        EngineError: llama.cpp failed. KeyboardInterrupt: Ctrl-C.
    """
    started = time.perf_counter()
    options = EngineOptions(
        ctx_size=ctx_size,
        batch_size=batch_size,
        ubatch_size=ubatch_size,
        threads=threads,
        gpu_layers=gpu_layers,
        devices=devices,
        override_tensors=override_tensors,
        rpc=rpc,
        type_k=type_k,
        type_v=type_v,
        flash_attn=flash_attn,
    )
    the_plan = plan if plan is None or isinstance(plan, PrunePlan) else PrunePlan.load(plan)
    info = inspect(model)  # before a reference is run for nothing
    if the_plan is not None:
        check_plan(info, the_plan)
    has_other = reference is not None and not (the_plan is not None and os.path.realpath(reference) == os.path.realpath(model))
    is_compared = has_other or the_plan is not None
    steps = _Steps(progress, (1 + is_compared) * (1 + loops))

    def examine(judge: Judge) -> tuple[Reference, Continuations | None]:
        return judge.reference(steps.next()), judge.continuations(None, steps.next()) if loops else None

    expected, before = examine(Judge(reference, text, options)) if has_other and reference is not None else (None, None)
    judge = Judge(model, text, options)  # the reference's weights are gone by now
    if the_plan is not None and expected is None:
        expected, before = examine(judge)
    result = judge.score(the_plan, reference=expected, progress=steps.next())
    found = judge.continuations(the_plan, steps.next()) if loops else None
    seen_before = overlap_warnings(judge.text.file_digests(), (), the_plan.calibration) if the_plan is not None else []
    return replace(
        result,
        loops=loop_figures(found, before) if found else None,
        warnings=(*result.warnings, *seen_before),
        seconds=time.perf_counter() - started,
    )


class _Steps:
    """Divides one progress callback among passes of equal length."""

    def __init__(self, progress: ProgressCallback | None, n_steps: int) -> None:
        self._progress = progress
        self._n_steps = n_steps
        self._n_done = 0

    def next(self) -> ProgressCallback | None:
        """The callback of the next pass; None where nobody listens."""
        progress, index = self._progress, self._n_done
        self._n_done += 1
        if progress is None:
            return None

        def report(step: Progress) -> None:
            total = step.total or step.done
            progress(Progress(index * total + step.done, self._n_steps * total, step.unit))

        return report


# ---- the figures in words


def _meaning(result: Evaluation) -> str:
    experts = "" if result.plan is None else f" with {result.plan['keep']} of {result.plan['n_experts']} experts a layer"
    if result.perplexity_ratio is None or result.kl_mean is None or result.top1 is None or result.halved is None:
        return (
            f"The model{experts} predicts a token of this text as if it chose among {result.perplexity:.4g} equally probable ones "
            f"(± {result.stderr:.2g}); compare that only with figures of the same text, tokenizer and window length."
        )
    change = (result.perplexity_ratio - 1) * 100
    return (
        f"Beside the reference, the model{experts} has a perplexity {abs(change):.3g} % {'higher' if change >= 0 else 'lower'} "
        f"(± {(result.ratio_stderr or 0) * 100:.2g} %): {result.perplexity:.4g} instead of {result.reference_perplexity:.4g}. "
        f"Both hold the same token most probable at {result.top1:.1%} of the positions; {result.halved:.1%} of the tokens are at most "
        f"half as probable as before; the divergence is {result.kl_mean:.3g} nats a token (0: the same predictions), and above "
        f"{result.kl_p99:.3g} at one in a hundred."
    )


def _domains_meaning(domains: dict[str, Figures]) -> Iterator[str]:
    compared = {name: found.perplexity_ratio for name, found in domains.items() if found.perplexity_ratio is not None}
    if len(compared) > 1:
        worst = max(compared, key=lambda name: compared[name])
        yield f'"{worst}" loses most: its perplexity is {(compared[worst] - 1) * 100:+.3g} %.'


def _loops_meaning(loops: LoopFigures | None) -> Iterator[str]:
    if loops is None:
        return
    text = f"Left to itself, the model ends {loops.looping:.0%} of {loops.prompts} continuations in a loop"
    if loops.reference_looping is not None:
        text += f" (the reference {loops.reference_looping:.0%})"
    text += f", and {loops.repeated:.0%} of its 4-grams are repetitions"
    if loops.reference_repeated is not None:
        text += f" (the reference {loops.reference_repeated:.0%})"
    yield text + "."
