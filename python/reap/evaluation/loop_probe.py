"""Which prompts the loop probe runs: beginnings of the text's windows, or a user's own; and what becomes of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap.engine.generation import TEXT_END, Sampling
from reap.engine.options import GENERATION_CTX_SIZE, EngineArguments, EngineOptions
from reap.engine.session import open_vocabulary
from reap.errors import MismatchError, UsageError
from reap.evaluation.answers import MOST_NEW_TOKENS, PARALLEL, AnswerWriter
from reap.evaluation.loops import N_PROMPTS, Continuations, ToolCallMetrics
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.evaluation.tool_calls import matches, read_calls, require_schemas
from reap.files.paths import PathLike
from reap.gguf.model_info import inspect
from reap.progress import Progress, ProgressCallback
from reap.scores.plan import PrunePlan
from reap.text.asked import Asked, Prompts
from reap.text.samples import Source


@dataclass(frozen=True)
class LoopProbe:
    """What `evaluate` was asked to let the model continue."""

    n_prompts: int
    """Beginnings of windows; 0: none."""
    prompts: Source | None
    """Prompts of the user's; None: there are none."""

    @classmethod
    def of(cls, loops: bool, prompts: int | Source | None) -> LoopProbe:
        """From the arguments of `evaluate`. UsageError."""
        if prompts is None:
            return cls(N_PROMPTS if loops else 0, None)
        if isinstance(prompts, int):
            if isinstance(prompts, bool) or prompts < 1:
                raise UsageError(f"loop_prompts is {prompts!r}, expected at least 1, or a file of prompts")
            return cls(prompts, None)
        return cls(0, prompts)

    @property
    def of_text(self) -> bool:
        """Whether the prompts are the text's."""
        return self.n_prompts > 0

    def continuations(
        self, evaluator: PlanEvaluator, plan: PrunePlan | None, progress: ProgressCallback | None
    ) -> Continuations:
        """Of the beginnings of the text's windows."""
        return evaluator.continuations(plan, progress, n_prompts=self.n_prompts)

    def answers(
        self,
        model: PathLike,
        plan: PrunePlan | None,
        reference: PathLike | None,
        engine: EngineArguments,
        progress: ProgressCallback | None,
    ) -> tuple[Continuations, Continuations | None]:
        """Of the user's prompts: by the model, and by what it is compared with: the reference, or, with a plan, the
        model with all experts."""
        before = digest = None
        if reference is not None:
            writer = self._writer(reference, engine)
            before, digest = self._answers(writer, None, progress), writer.digest()
            del writer  # its weights
        writer = self._writer(model, engine)
        if digest is not None and digest != writer.digest():
            raise MismatchError(f"{reference} and {model} have different tokens for the prompts")
        if reference is None and plan is not None:
            before = self._answers(writer, None, progress)
        return self._answers(writer, plan, progress), before

    def _writer(self, model: PathLike, engine: EngineArguments) -> AnswerWriter:
        given: Mapping[str, Any] = {name: value for name, value in engine.items() if name != "ctx_size"}
        info = inspect(model)
        options = EngineOptions(**{"ctx_size": GENERATION_CTX_SIZE, **given}).within({}, info.context_length)
        assert self.prompts is not None
        asked = list(Prompts(self.prompts, open_vocabulary(model)))
        if any(it.tools for it in asked):
            require_schemas()
        return AnswerWriter(info, asked, options, MOST_NEW_TOKENS, PARALLEL)

    def _answers(
        self, writer: AnswerWriter, plan: PrunePlan | None, progress: ProgressCallback | None
    ) -> Continuations:
        writer.set_plan(plan)
        found = []
        for batch in writer.continuations(Sampling(), 0):
            found += batch
            if progress is not None:
                progress(Progress(len(found), len(writer.asked), "prompts"))
        texts = [writer.answer(index, it.tokens, it.ended).text for index, it in enumerate(found)]
        return Continuations(
            prompt_tokens=max(len(it.tokens) for it in writer.asked),
            new_tokens=max(writer.n_new),
            tokens=tuple(it.tokens for it in found),
            finished=tuple(it.ended == TEXT_END for it in found),
            tool_calls=tool_call_metrics(writer.asked, texts),
        )


def tool_call_metrics(asked: Sequence[Asked], answers: Sequence[str]) -> ToolCallMetrics | None:
    """What became of the tools that prompts carry; None where none does."""
    with_tools = [(it.tools, answer) for it, answer in zip(asked, answers, strict=True) if it.tools]
    if not with_tools:
        return None
    read = [(tools, read_calls(answer)) for tools, answer in with_tools]
    calls = [(tools, call) for tools, found in read for call in found]
    return ToolCallMetrics(
        prompts=len(with_tools),
        called=sum(bool(found) for _, found in read),
        calls=len(calls),
        parsed=sum(call is not None for _, call in calls),
        matched=sum(call is not None and matches(call, tools) for tools, call in calls),
    )
