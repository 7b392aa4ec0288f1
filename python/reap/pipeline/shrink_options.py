"""What a shrink was asked for: checked, sorted, and as it makes a step what it is."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from reap.engine.options import EVALUATION_CTX_SIZE, PROFILE_CTX_SIZE, EngineArguments, EngineOptions
from reap.errors import UsageError
from reap.evaluation.keep_limits import parse_increase
from reap.evaluation.plan_options import ChoiceArguments as SharedArguments
from reap.evaluation.plan_options import PlanArguments, split_options
from reap.files.arguments import divide
from reap.files.paths import PathLike
from reap.gguf.model_info import ModelInfo, require_moe
from reap.gguf.model_info import inspect as describe
from reap.gguf.shards import model_paths, shard_stem
from reap.pruning.gguf import parse_size
from reap.scores.profile import METRICS
from reap.scores.ranking import Keep, resolve_keep
from reap.text.evaluation_text import Text, text_files
from reap.text.sources import Source, parts_of
from reap.text.windows import Calibration, TextArguments

if TYPE_CHECKING:
    pass

#: The criteria that are compared where none are named; random is there to show what a choice is worth.
DEFAULT_METRICS = ("reap", "weighted_ean_sum", "frequency", "random")


class SelectionArguments(PlanArguments, total=False):
    """How the experts are chosen, and on how much text.

    metric: the criteria to compare. also_keep: sizes to try beside the one that is asked for, for the page.
    max_text_tokens: of the held-out text, in windows spread over each domain. loops: let the pruned model continue
    prompts as well. The others are those of `reap.plan`.
    """

    metric: str | Sequence[str] | None
    also_keep: Keep | Sequence[Keep]
    max_text_tokens: int | None
    loops: bool


class ShrinkArguments(SelectionArguments, TextArguments, EngineArguments, total=False):
    """Of the choice, of the calibration (`Calibration`) and of the engine (`EngineOptions`)."""


@dataclass(frozen=True)
class Goal:
    """How small the model is to become: one of the three."""

    keep: Keep | None
    """A number of experts or a fraction of them."""
    target_size: int | None
    """Bytes that its file may have."""
    max_ppl_increase: float | None
    """By which share the perplexity may rise."""

    @classmethod
    def of(cls, keep: Keep | None, target_size: int | str | None, max_ppl_increase: float | str | None) -> Goal:
        """UsageError where not exactly one is given, or one that cannot be."""
        given = {"keep": keep, "target_size": target_size, "max_ppl_increase": max_ppl_increase}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            flags = "--keep, --target-size or --max-ppl-increase (keep=, target_size=, max_ppl_increase=)"
            raise UsageError(f"how small is it to become? Give one of {flags}, found {' and '.join(named) or 'none'}")
        return cls(
            keep,
            None if target_size is None else parse_size(target_size),
            None if max_ppl_increase is None else parse_increase(max_ppl_increase),
        )

    def record(self) -> dict[str, Any]:
        """As JSON types."""
        keep = None if self.keep is None else self.keep if isinstance(self.keep, int) else float(self.keep)
        return {"keep": keep, "target_size": self.target_size, "max_ppl_increase": self.max_ppl_increase}


@dataclass(frozen=True)
class ShrinkOptions:
    """All that a shrink was given. Made by `of`."""

    model: Path
    """The GGUF file, the first one where it is split."""
    info: ModelInfo
    """What its header says."""
    calibration: Source
    """What is profiled."""
    text: Text
    """Held-out text."""
    goal: Goal
    """How small."""
    metrics: tuple[str, ...]
    """Criteria to compare."""
    also_keep: tuple[int, ...]
    """Sizes to try beside the one asked for."""
    max_text_tokens: int | None
    """Of the held-out text."""
    loops: bool
    """Whether to run the loop probe."""
    plan: dict[str, Any]
    """Options of `reap.plan`."""
    texts: dict[str, Any]
    """Options of the calibration."""
    engine: dict[str, Any]
    """Options of the engine, as given."""

    @classmethod
    def of(cls, model: PathLike, calibration: Source, text: Text, goal: Goal, options: dict[str, Any]) -> ShrinkOptions:
        """Check what can be checked before anything runs. Raises what the steps would raise."""
        engine, texts, choice = divide("shrink", options, EngineArguments, TextArguments, SelectionArguments)
        plan = {name: choice.pop(name) for name in PlanArguments.__optional_keys__ if name in choice}
        if "protect" in plan and not isinstance(plan["protect"], str):
            plan["protect"] = list(plan["protect"])  # an iterator would be empty for the second step
        info = describe(model)
        require_moe(info)
        EngineOptions.of(engine, ctx_size=PROFILE_CTX_SIZE)
        if goal.keep is not None:
            resolve_keep(goal.keep, info.n_experts, info.n_groups, info.record())
        made = cls(
            Path(model), info, calibration, text, goal, _metrics(choice.get("metric")),
            tuple(resolve_keep(keep, info.n_experts, info.n_groups) for keep in _listed(choice.get("also_keep", ()))),
            choice.get("max_text_tokens"), bool(choice.get("loops", False)), plan, texts, engine,
        )  # fmt: skip
        made.check_texts()
        Calibration(calibration, ctx_size=PROFILE_CTX_SIZE, **texts)  # its options, before a step runs for nothing
        return made

    def check_texts(self) -> None:
        """UsageError for texts that cannot be told apart from others, or serve two ends."""
        parts = parts_of(self.calibration)
        if any(part.path is None for part in parts):
            raise UsageError("the calibration of a shrink should be of files, so that it is known whether they changed")
        if any(part.path == "-" for part in parts):
            raise UsageError("standard input (-) cannot be read again when a shrink goes on; give a file")
        text_files([part.path for part in parts if part.path is not None])  # each can be opened
        held_out = {os.path.realpath(path) for path in text_files(self.text)}
        if same := next((part.path for part in parts if part.path and os.path.realpath(part.path) in held_out), None):
            raise UsageError(
                f"{same}: is the calibration and the text as well; on text that its experts were chosen by a pruned"
                " model looks better than it is"
            )
        if self.max_text_tokens is not None and (type(self.max_text_tokens) is not int or self.max_text_tokens < 1):
            raise UsageError(f"max_text_tokens is {self.max_text_tokens!r}, expected a whole number of at least 1")

    @property
    def inputs(self) -> list[Path]:
        """Every file that is read."""
        template = self.texts.get("chat_template")
        named = [template] if template is not None and os.path.isfile(template) else []
        calibration = [part.path for part in parts_of(self.calibration) if part.path is not None]
        return [*model_paths(self.model), *map(Path, (*calibration, *text_files(self.text), *named))]

    @property
    def pruned_name(self) -> str:
        """The name of the new file: the model's own, with -pruned to it."""
        split = shard_stem(self.model)
        stem = self.model.name.removesuffix(".gguf") if split is None else split[0].name
        return f"{stem}-pruned.gguf"

    @property
    def text_ctx_size(self) -> int:
        """Tokens of a window of the held-out text."""
        options = EngineOptions.of(self._typed_engine(), ctx_size=EVALUATION_CTX_SIZE)
        return options.within(self._typed_engine(), self.info.context_length).ctx_size or self.info.context_length

    def engine_record(self) -> dict[str, Any]:
        """The engine's options as JSON types, with what holds where nothing is given."""
        record = EngineOptions.of(self._typed_engine(), ctx_size=PROFILE_CTX_SIZE).record()
        return {**record, "ctx_size": self.engine.get("ctx_size")}

    def plan_record(self) -> dict[str, Any]:
        """The options of the choice as JSON types."""
        options = split_options(cast(SharedArguments, self.plan)).plan
        protect = options["protect"]
        listed = (
            [protect] if isinstance(protect, str) else [list(it) if isinstance(it, tuple) else it for it in protect]
        )
        return {**options, "protect": listed, "metrics": list(self.metrics)}

    def text_record(self) -> dict[str, Any]:
        """The options of the calibration, with what holds where nothing is given."""
        known = inspect.signature(Calibration).parameters
        return {name: known[name].default for name in sorted(TextArguments.__optional_keys__)} | self.texts

    def _typed_engine(self) -> EngineArguments:
        made: EngineArguments = {}
        made.update(self.engine)  # type: ignore[typeddict-item]  # its names were checked by `of`
        return made


def _listed(keeps: Keep | Sequence[Keep]) -> list[Keep]:
    return list(keeps) if isinstance(keeps, Sequence) else [keeps]


def _metrics(metric: str | Sequence[str] | None) -> tuple[str, ...]:
    names = DEFAULT_METRICS if not metric else (metric,) if isinstance(metric, str) else tuple(dict.fromkeys(metric))
    if unknown := [name for name in names if name not in METRICS]:
        raise UsageError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
    if set(names) == {"random"}:
        raise UsageError("a random choice is what criteria are compared with; name a criterion as well")
    return names


def shows_shrink_options(function: Any) -> Any:
    """Let the signature of `shrink` name the options of the choice with their defaults."""
    own = inspect.signature(function)
    defaults = {
        "metric": None, "also_keep": (), "max_text_tokens": None, "loops": False, "protect": (), "blend": "sum",
        "protect_super_experts": False, "seed": 0,
    }  # fmt: skip
    kind = inspect.Parameter.KEYWORD_ONLY
    shown = [it for it in own.parameters.values() if it.kind is not inspect.Parameter.VAR_KEYWORD]
    shown += [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
    rest = [it for it in own.parameters.values() if it.kind is inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = own.replace(parameters=[*shown, *rest])
    return function
