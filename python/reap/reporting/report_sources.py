"""What the sections of a profile's page are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from reap.evaluation.answer_files import AnswerFile
from reap.evaluation.sweep_table import Sweep
from reap.evaluation.sweep_winner import plan_remark
from reap.files.strict_json import Node
from reap.gguf.model_info import ModelInfo
from reap.pruning.sizing import ModelSize
from reap.reporting.judged import Judged
from reap.scores.plan import PrunePlan
from reap.scores.profile import Profile
from reap.scores.stability import Stability, TooFewPartsError
from reap.scores.statistics import (
    Mask,
    kept_mask,
    known_metrics,
)


@dataclass(frozen=True)
class Sources:
    """What the sections are made of."""

    profile: Profile
    """What was measured."""
    plan: PrunePlan
    """The experts to keep."""
    is_example: bool
    """Whether the plan was not given, but is what half of the experts would be."""
    sweep: Sweep | None
    """Quality against size, where it was given."""
    info: ModelInfo | None
    """The model's file, where it was given."""
    size: ModelSize | None
    """Its size before and after the plan, where the file was given."""
    file_name: str | None
    """Name of the profile's file; None: it is in no file."""
    benchmarks: Sequence[Node] = ()
    """What `reap evaluate --tasks --json` printed."""
    answers: Sequence[AnswerFile] = ()
    """Two files of answers, of the whole model and of the pruned one."""
    judged: Judged | None = None
    """The pruned model on text that had no part in the choice, where it was given."""

    @cached_property
    def mask(self) -> Mask:
        return kept_mask(self.profile, self.plan.layers)

    @property
    def remark(self) -> str | None:
        """Where a plan was given that is not the sweep's winner: a sentence that says so."""
        return None if self.sweep is None or self.is_example else plan_remark(self.sweep, self.plan)

    @property
    def removes(self) -> bool:
        return self.plan.keep < self.profile.n_experts

    @cached_property
    def metric(self) -> str:
        """The score that the page cuts: the plan's own, where the profile holds it and it says something."""
        return (
            self.plan.metric
            if self.plan.metric in known_metrics(self.profile) and self.plan.metric != "random"
            else "reap"
        )

    @cached_property
    def stability(self) -> Stability | None:
        """How sure a choice of as many experts by the page's score is; None where the profile cannot say."""
        if self.profile.replicates is None or not self.removes:
            return None
        try:
            return self.profile.stability(self.plan.keep, self.metric)
        except TooFewPartsError:
            return None

    @property
    def layers(self) -> list[str]:
        return [str(layer) for layer in self.profile.layers.tolist()]
