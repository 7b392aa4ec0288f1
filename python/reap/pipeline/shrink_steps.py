"""The steps of a shrink, and what makes each what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from reap.engine import native
from reap.errors import FormatError, MismatchError, UsageError
from reap.evaluation.evaluate import evaluate
from reap.evaluation.sweep import sweep
from reap.evaluation.sweep_table import Sweep, SweepRow
from reap.evaluation.sweep_winner import plan_of_row
from reap.files.atomic import write_whole
from reap.files.strict_json import json_bytes
from reap.files.version import version
from reap.gguf.shards import model_paths
from reap.pipeline.job_folder import JobFolder, Step
from reap.pipeline.shrink_options import ShrinkOptions
from reap.pipeline.text_parts import divide_text, write_part
from reap.profiling.gguf import profile
from reap.progress import ProgressCallback
from reap.pruning.gguf import prune
from reap.reporting.card import model_card
from reap.reporting.profile_report import report
from reap.scores.profile import Profile
from reap.text.sources import parts_of

CHOOSE, JUDGE = "text-choose.jsonl", "text-judge.jsonl"
PROFILE, SWEEP, PLAN, EVALUATION, PAGE, CARD = (
    "profile.json", "sweep.json", "plan.json", "evaluation.json", "report.html", "MODEL_CARD.md",
)  # fmt: skip
_CHECKPOINT_SECONDS = 5.0
_Result = TypeVar("_Result")


@dataclass
class ShrinkSteps:
    """Makes the steps of one shrink in its folder."""

    options: ShrinkOptions
    """What was asked for."""
    folder: JobFolder
    """Where it goes."""
    progress: ProgressCallback | None = None
    """Told how far the step that runs is."""

    def all(self) -> tuple[Step, ...]:
        """In the order in which they run."""
        pruned = self.options.pruned_name
        profile_rest, sweep_rest = f"{PROFILE}.resume", f"{SWEEP}.resume"
        return (
            Step("text", (CHOOSE, JUDGE), self._text_identity, self._divide),
            Step("profile", (PROFILE,), self._profile_identity, self._profile, (profile_rest,)),
            Step("sweep", (SWEEP,), self._sweep_identity, self._sweep, (sweep_rest,), self._sweep_is_whole),
            Step("plan", (PLAN,), lambda: self._of(PROFILE, SWEEP), self._plan),
            Step("prune", (pruned,), lambda: self._of(PLAN) | {"model": self._model()}, self._prune),
            Step("evaluate", (EVALUATION,), self._evaluation_identity, self._evaluate),
            Step("page", (PAGE,), lambda: self._of(PROFILE, SWEEP, PLAN, EVALUATION) | self._by(), self._page),
            Step("card", (CARD,), lambda: self._of(pruned, PROFILE, SWEEP, EVALUATION) | self._by(), self._card),
        )

    # ---- what makes a step what it is

    def _of(self, *names: str) -> dict[str, Any]:
        """Digests of files that steps before have left."""
        return {name: self.folder.contents.sha256(self.folder.path / name) for name in names}

    def _model(self) -> list[str]:
        return self.folder.contents.of_files(model_paths(self.options.model))

    def _by(self) -> dict[str, Any]:
        return {"reap": version(), "model": self._model()}

    def _engine(self) -> dict[str, Any]:
        return {
            **self._by(),
            "llama_cpp": native.load().__llama_cpp_commit__,
            "engine": self.options.engine_record(),
        }

    def _text_identity(self) -> dict[str, Any]:
        from reap.text.evaluation_text import text_files

        files = text_files(self.options.text)
        named = [os.path.basename(path) for path in files]
        digests = self.folder.contents.of_files(files)
        size = {"ctx_size": self.options.text_ctx_size, "max_tokens": self.options.max_text_tokens}
        return {**self._by(), "text": [list(pair) for pair in zip(named, digests, strict=True)], **size}

    def _profile_identity(self) -> dict[str, Any]:
        parts = [part for part in parts_of(self.options.calibration) if part.path is not None]
        digests = self.folder.contents.of_files([part.path for part in parts if part.path is not None])
        named = [[part.domain, str(part.path), digest] for part, digest in zip(parts, digests, strict=True)]
        record = self.options.text_record()
        texts = {name: value if _is_json(value) else str(value) for name, value in record.items()}
        template = self.options.texts.get("chat_template")
        if template is not None and os.path.isfile(template):
            texts["chat_template_sha256"] = self.folder.contents.sha256(template)
        return {**self._engine(), "calibration": named, "texts": texts}

    def _sweep_identity(self) -> dict[str, Any]:
        options = self.options
        choice = {**options.plan_record(), **options.goal.record(), "also_keep": list(options.also_keep)}
        return {**self._engine(), **self._of(PROFILE, CHOOSE), "choice": choice}

    def _evaluation_identity(self) -> dict[str, Any]:
        return {**self._engine(), **self._of(self.options.pruned_name, JUDGE), "loops": self.options.loops}

    # ---- what a step does

    def _at(self, name: str) -> str:
        return os.fspath(self.folder.path / name)

    def _divide(self) -> None:
        options = self.options
        parts = divide_text(options.model, options.text, options.text_ctx_size, options.max_text_tokens)
        for part, name in zip(parts, (CHOOSE, JUDGE), strict=True):
            write_part(part, self.folder.path / name)

    def _profile(self) -> None:
        options, rest = self.options, self._at(f"{PROFILE}.resume")
        measured = self._going_on(
            rest,
            lambda: profile(
                options.model,
                options.calibration,
                checkpoint=rest,
                resume=True,
                checkpoint_seconds=_CHECKPOINT_SECONDS,
                progress=self.progress,
                **options.texts,
                **options.engine,
            ),
        )
        measured.save(self._at(PROFILE))

    def _sweep(self) -> None:
        options = self.options
        keep = [*options.also_keep, *([] if options.goal.keep is None else [options.goal.keep])]
        self._going_on(
            self._at(f"{SWEEP}.resume"),
            lambda: sweep(
                options.model,
                self._at(PROFILE),
                self._at(CHOOSE),
                keep=keep or None,
                metric=options.metrics,
                target_size=options.goal.target_size,
                max_ppl_increase=options.goal.max_ppl_increase,
                output=self._at(SWEEP),
                resume=True,
                force=True,  # the folder is this job's
                progress=self.progress,
                **options.plan,
                **{**options.engine, "ctx_size": options.text_ctx_size},
            ),
        )

    def _sweep_is_whole(self) -> bool:
        with suppress(UsageError, FormatError):
            return Sweep.load(self._at(SWEEP)).complete
        return False

    def _going_on(self, rest: str, run: Callable[[], _Result]) -> _Result:
        """What `run` returns; where what an interrupted run left is of another call, from the beginning."""
        try:
            return run()
        except (MismatchError, FormatError) as error:
            if rest not in str(error):
                raise
            os.unlink(rest)
            return run()

    def _plan(self) -> None:
        table = Sweep.load(self._at(SWEEP))
        row = chosen_row(table, self.options)
        plan_of_row(table, row, Profile.load(self._at(PROFILE))).save(self._at(PLAN))

    def _prune(self) -> None:
        output = self._at(self.options.pruned_name)
        prune(self.options.model, output, self._at(PLAN), force=True, progress=self.progress)

    def _evaluate(self) -> None:
        options = self.options
        result = evaluate(
            self._at(options.pruned_name),
            self._at(JUDGE),
            reference=options.model,
            loops=options.loops,
            progress=self.progress,
            **{**options.engine, "ctx_size": options.text_ctx_size},
        )
        document = result.to_dict()
        del document["seconds"]  # the same work leaves the same file
        write_whole(self._at(EVALUATION), json_bytes(_without_gaps(document)), force=True)

    def _page(self) -> None:
        report(
            self._at(PROFILE),
            self._at(PAGE),
            plan=self._at(PLAN),
            sweep=self._at(SWEEP),
            evaluations=[self._at(EVALUATION)],
            model=self.options.model,
            force=True,
        )

    def _card(self) -> None:
        model_card(
            self._at(self.options.pruned_name),
            self._at(CARD),
            source=self.options.model,
            profile=self._at(PROFILE),
            evaluations=[self._at(EVALUATION)],
            sweep=self._at(SWEEP),
            force=True,
        )


def chosen_row(table: Sweep, options: ShrinkOptions) -> SweepRow:
    """What a sweep says is to be made: within the limit or at the size that was asked for, the best criterion.

    A random choice is never made, however well it did. Raises UsageError where nothing was measured.
    """
    known = [row for row in table.select() if row.metric not in ("random", table.baseline.metric)]
    if options.goal.max_ppl_increase is not None or options.goal.target_size is not None:
        allowed = {(target.metric, target.keep) for target in table.targets if target.metric != "random"}
        known = [row for row in known if (row.metric, row.keep) in allowed]
    else:
        keep = _asked_for(options)
        known = [row for row in known if row.keep == keep]
    known = [row for row in known if row.perplexity == row.perplexity]
    if not known:
        raise UsageError("the sweep has no perplexity of what was asked for")
    if options.goal.max_ppl_increase is not None:
        return min(known, key=lambda row: (row.keep, row.perplexity))
    return min(known, key=lambda row: row.perplexity)


def _asked_for(options: ShrinkOptions) -> int:
    from reap.scores.ranking import resolve_keep

    assert options.goal.keep is not None
    return resolve_keep(options.goal.keep, options.info.n_experts, options.info.n_groups)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _without_gaps(value: Any) -> Any:
    """What is not finite is null in a file."""
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, dict):
        return {key: _without_gaps(item) for key, item in value.items()}
    return [_without_gaps(item) for item in value] if isinstance(value, list | tuple) else value
