"""generate(): what a model answers to many prompts, as a calibration, with all experts or with those of a plan."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from reap.engine import native
from reap.engine.generation import (
    MOST_SEED,
    TEXT_END,
    Continuation,
    Prompt,
    Sampling,
    continue_batch,
    in_batches,
)
from reap.engine.options import GENERATION_CTX_SIZE, EngineArguments, EngineOptions, shows_engine_options
from reap.engine.session import SessionTokenizer, open_session, open_vocabulary
from reap.errors import CalibrationError, Interrupted, ReapWarning, UsageError
from reap.evaluation.plan_evaluator import plan_record
from reap.evaluation.resume_file import ResumeFile
from reap.evaluation.virtual import keep_only
from reap.files.arguments import divide, shows
from reap.files.atomic import check_outputs, paths_of, write_whole
from reap.files.paths import PathLike
from reap.files.version import version
from reap.gguf.model_info import ModelInfo, inspect
from reap.progress import Progress, ProgressCallback
from reap.pruning.compatibility import check_plan
from reap.scores.plan import PrunePlan
from reap.text.asked import Asked, PromptArguments, Prompts
from reap.text.samples import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack

MOST_NEW_TOKENS = 512
PARALLEL = 8
RESUME_FORM = "reap.answers.resume"


class SamplingArguments(TypedDict, total=False):
    """Keyword arguments that a function hands on to `Sampling`, where they are explained."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


class Arguments(EngineArguments, SamplingArguments, PromptArguments, total=False):
    """How a model is run (`EngineOptions`), tokens are chosen (`Sampling`) and prompts are read (`Prompts`)."""


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt."""

    line: dict[str, Any]
    """The prompt's line with the answer in it, as a line of a calibration."""
    text: str
    """The answer; U+FFFD for what is not UTF-8."""
    tokens: tuple[int, ...]
    """Its token ids, the one that ended it included."""
    ended: str
    """ "text": by a token that ends a text; "length": there was no room for more."""
    prompt: str
    """The first 16 hex digits of the SHA-256 of the prompt's token ids: two models were asked the same where it is."""

    def to_dict(self, **more: Any) -> dict[str, Any]:
        """A line of JSON Lines; `more`: who answered, and how."""
        mine = {"prompt": self.prompt, "answer": self.text, "ended": self.ended, "tokens": list(self.tokens)}
        return {**self.line, "reap": {**more, **mine}}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What `generate` found."""

    model: str
    """The file."""
    plan: dict[str, Any] | None
    """Metric and number of kept experts of the plan in force; None: all experts."""
    answers: tuple[Answer, ...]
    """In the order of the prompts."""
    sampling: Sampling
    """How tokens were chosen."""
    seed: int
    """What the draws come from."""
    seconds: float
    """The call took."""
    warnings: tuple[str, ...] = ()
    """Sentences worth reading."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Why prompts were left out -> how many."""

    @property
    def by(self) -> str:
        """The model and its plan, in words."""
        plan = (
            "" if self.plan is None else f", {self.plan['keep']} of {self.plan['n_experts']} by {self.plan['metric']}"
        )
        return Path(self.model).name + plan

    def to_jsonl(self) -> bytes:
        """A calibration file: one line a prompt, with its answer."""
        how = sampling_record(self.sampling)
        lines = (json.dumps(it.to_dict(by=self.by, sampling=how), ensure_ascii=False) + "\n" for it in self.answers)
        return "".join(lines).encode("utf-8", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        """What was done, as JSON types, without the answers."""
        return {
            "model": self.model,
            "plan": self.plan,
            "prompts": len(self.answers),
            "skipped": self.skipped,
            "new_tokens": sum(len(it.tokens) for it in self.answers),
            "ended": dict(Counter(it.ended for it in self.answers)),
            "sampling": sampling_record(self.sampling),
            "seed": self.seed,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }


@shows((SamplingArguments, Sampling), (PromptArguments, Prompts))
@shows_engine_options(ctx_size=GENERATION_CTX_SIZE)
def generate(
    model: PathLike,
    prompts: Source,
    output: PathLike | None = None,
    *,
    plan: PrunePlan | PathLike | None = None,
    max_new_tokens: int = MOST_NEW_TOKENS,
    seed: int = 0,
    parallel: int = PARALLEL,
    resume: bool = False,
    allow_mismatch: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
    **options: Unpack[Arguments],
) -> Answers:
    """Let a model answer prompts, with llama.cpp's samplers.

    Args:
        model: a GGUF file.
        prompts: in any shape that a calibration has. A conversation is asked up to its last user turn, a pair its
            first half, both with the model's chat template; a text, or token ids, are gone on with.
        output: a file to write, JSON Lines: each line a prompt's, with the answer in it, so that the file is a
            calibration; the key "reap" holds the answer by itself. While the call runs, OUTPUT.resume keeps what is
            done.
        plan: a PrunePlan or the path of one, in force virtually.
        max_new_tokens: of one answer; fewer where the context has no room for them.
        seed: each prompt has draws of its own, from this and its number, so that an answer does not depend on others.
        parallel: prompts that share a batch. Which do depends on the prompts alone, so that a resumed run has the same.
        resume: go on from OUTPUT.resume, and replace the output.
        allow_mismatch: go on with a plan that was made of another model.
        force: replace an output that exists.
        progress: called with prompts.
        options: `Sampling`'s (temperature is 0 where none is given: the most probable token each time), `Prompts`' and
            the engine's. ctx_size is 4096 where none is given, or what the model was trained with where that is less.

    Raises:
        UsageError: an option, a file that is not there or may not be replaced.
        MismatchError: a plan of another model, a resume file of another run.
        CalibrationError: a prompt that cannot be read or asked.
        UnsupportedModelError: the experts cannot be removed virtually; the model does not continue texts.
        FormatError, EngineError, OutputError: the model's file, the engine, the output.
        Interrupted: Ctrl-C, once what is done is kept.
    """
    started = time.perf_counter()
    for_engine, for_sampling, for_prompts = divide(
        "generate", options, EngineArguments, SamplingArguments, PromptArguments
    )
    sampling = Sampling(**for_sampling)
    engine = EngineOptions.of(for_engine, ctx_size=GENERATION_CTX_SIZE)
    _check(max_new_tokens, seed, parallel)
    the_plan = None if plan is None else PrunePlan.of(plan)
    file = None if output is None else ResumeFile(output, RESUME_FORM, resume=resume)
    force = force or (file is not None and file.node is not None)  # --resume replaces what it goes on from
    if output is not None:
        check_outputs([output], [model, *paths_of(prompts, plan)], force=force)
    info = inspect(model)
    engine = engine.within(for_engine, info.context_length)
    if the_plan is not None:
        check_plan(info, the_plan, allow_mismatch=allow_mismatch)
    source = Prompts(prompts, open_vocabulary(model), now=_moment(file), **for_prompts)
    writer = AnswerWriter(info, list(source), engine, max_new_tokens, parallel)
    for warning in writer.warnings:
        warnings.warn(warning, ReapWarning, stacklevel=2)
    run = _Run(writer, sampling, seed, file, source.now)
    if file is not None:
        run.restore(the_plan, file)
    found = run.answers(the_plan, progress)
    result = Answers(
        model=os.fspath(model),
        plan=None if the_plan is None else plan_record(the_plan),
        answers=tuple(found),
        sampling=sampling,
        seed=seed,
        seconds=time.perf_counter() - started,
        warnings=writer.warnings,
        skipped={**writer.skipped, **({"bad line": source.bad_lines} if source.bad_lines else {})},
    )
    if output is not None and file is not None:
        write_whole(output, result.to_jsonl(), force=force)
        file.remove()
    return result


def sampling_record(sampling: Sampling) -> dict[str, Any]:
    """How tokens were chosen, as JSON types."""
    return {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}


def _check(max_new_tokens: int, seed: int, parallel: int) -> None:
    for name, value, least, most in (
        ("max_new_tokens", max_new_tokens, 1, 2**31 - 1),
        ("seed", seed, 0, 2**63 - 1),
        ("parallel", parallel, 1, 256),
    ):
        if type(value) is not int or not least <= value <= most:
            raise UsageError(f"{name} is {value!r}, expected a whole number from {least} to {most}")


def _moment(file: ResumeFile | None) -> datetime:
    """What the chat template is told: of a run that goes on, when it began."""
    if file is not None and file.node is not None:
        return datetime.fromisoformat(file.node["state"]["now"].string())
    return datetime.now().replace(microsecond=0)


class AnswerWriter:
    """A model loaded once, and prompts that it is to answer, with all experts and with those of plans."""

    def __init__(
        self, info: ModelInfo, asked: Sequence[Asked], options: EngineOptions, max_new_tokens: int, parallel: int
    ) -> None:
        self.info = info
        ctx_size = options.ctx_size or info.context_length
        self.skipped: Counter[str] = Counter()
        self.asked: list[Asked] = []
        self.n_new: list[int] = []
        for it in asked:
            room = ctx_size - len(it.tokens)
            if room < 1:
                self.skipped["longer than the context"] += 1
                continue
            self.asked.append(it)
            self.n_new.append(min(max_new_tokens, room))
        if not self.asked:
            raise CalibrationError(f"no prompt fits a context of {ctx_size} tokens")
        self._sizes = [len(it.tokens) + n for it, n in zip(self.asked, self.n_new, strict=True)]
        self._cache = min(parallel, len(self.asked)) * max(self._sizes)
        self._parallel = parallel
        self.session = open_session(
            info.path, options, n_sequences=min(parallel, len(self.asked)), cache_size=self._cache, n_bytes=info.n_bytes
        )
        self._tokenizer = SessionTokenizer(self.session)
        #: Of the engine, and about prompts that were left out.
        self.warnings: tuple[str, ...] = tuple(self.session.warnings())
        if self.skipped:
            n = self.skipped.total()
            self.warnings += (f"{n:,} of {len(asked):,} prompts are longer than the context of {ctx_size} tokens",)

    def set_plan(self, plan: PrunePlan | None) -> None:
        """From now on only the experts that `plan` keeps; None: all of them."""
        if plan is None:
            return self.session.set_kept(None)
        keep_only(self.session, self.info, plan.layers, plan.model)

    def digest(self) -> str:
        """Of all prompts and how many tokens may follow each."""
        digest = hashlib.sha256()
        for it, n_new in zip(self.asked, self.n_new, strict=True):
            digest.update(f"{n_new}:{it.tokens};".encode())
        return digest.hexdigest()

    def continuations(self, sampling: Sampling, seed: int, n_done: int = 0) -> Iterator[list[Continuation]]:
        """Of the prompts from number n_done on, batch by batch. Batches are those of a run from the beginning."""
        for batch in in_batches(self._sizes, n_sequences=self._parallel, n_tokens=self._cache):
            if batch.stop <= n_done:
                continue
            if self.session.n_sequences < len(batch):  # a recurrent model takes one at a time
                for index in batch:
                    if index >= n_done:
                        yield continue_batch(self.session, [self._prompt(index, seed)], sampling)
                continue
            found = continue_batch(self.session, [self._prompt(index, seed) for index in batch], sampling)
            yield found[max(0, n_done - batch.start) :]

    def _prompt(self, index: int, seed: int) -> Prompt:
        return Prompt(self.asked[index].tokens, self.n_new[index], _seed_of(seed, index))

    def answer(self, index: int, tokens: tuple[int, ...], ended: str) -> Answer:
        """An answer from its token ids."""
        written = tokens[:-1] if ended == TEXT_END else tokens
        text = b"".join(map(self._tokenizer.token_text, written)).decode("utf-8", "replace")
        asked = self.asked[index]
        prompt = hashlib.sha256(repr(asked.tokens).encode()).hexdigest()[:16]
        return Answer(asked.answered(text, tokens), text, tokens, ended, prompt)


def _seed_of(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % MOST_SEED  # the last one means "any" to the engine


class _Run:
    """One run over all prompts, which a resume file keeps."""

    def __init__(
        self, writer: AnswerWriter, sampling: Sampling, seed: int, file: ResumeFile | None, now: datetime
    ) -> None:
        self._writer = writer
        self._sampling = sampling
        self._seed = seed
        self._file = file
        self._now = now
        self._done: list[tuple[tuple[int, ...], str]] = []

    def restore(self, plan: PrunePlan | None, file: ResumeFile) -> None:
        """Take what an interrupted run left. MismatchError where it is of another run."""
        info = self._writer.info
        file.check(
            {
                "model": [info.fingerprint, info.router_fingerprint, info.n_bytes],
                "plan": None if plan is None else {str(layer): list(kept) for layer, kept in plan.layers.items()},
                "prompts": self._writer.digest(),
                "sampling": {
                    name: getattr(self._sampling, name) for name in sorted(SamplingArguments.__optional_keys__)
                },
                "seed": self._seed,
                "sequences": self._writer.session.n_sequences,
                "reap": version(),
                "llama_cpp": native.load().__llama_cpp_commit__,
            }
        )
        if file.node is None:
            return
        answers = file.node["state"]["answers"]
        for index in range(len(answers.entries())):
            entry = answers.entry(index)
            self._done.append((tuple(entry["tokens"].integers().tolist()), entry["ended"].string()))

    def answers(self, plan: PrunePlan | None, progress: ProgressCallback | None) -> list[Answer]:
        """All of them; of those that were kept none is asked again."""
        writer, total = self._writer, len(self._writer.asked)
        writer.set_plan(plan)
        with self._keeping():
            for found in writer.continuations(self._sampling, self._seed, len(self._done)):
                self._done += [(it.tokens, it.ended) for it in found]
                if self._file is not None:
                    self._file.save_if_due(self._state())
                if progress is not None:
                    progress(Progress(len(self._done), total, "prompts"))
        return [writer.answer(index, *kept) for index, kept in enumerate(self._done)]

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Whatever ends the run, what is done is kept where a file was asked for."""
        try:
            yield
        except BaseException as stop:
            if self._file is None or not self._done:
                raise
            self._file.save(self._state())
            if not isinstance(stop, KeyboardInterrupt):
                raise
            raise Interrupted(
                f"stopped after {len(self._done):,} of {len(self._writer.asked):,} prompts; {self._file.path} keeps the"
                " answers, and --resume (resume=True) goes on from it"
            ) from stop

    def _state(self) -> dict[str, Any]:
        return {
            "now": self._now.isoformat(),
            "answers": [{"tokens": list(tokens), "ended": ended} for tokens, ended in self._done],
        }
