"""Runs a sweep's candidates in turn, and keeps what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.engine import native
from reap.engine.options import EngineOptions
from reap.errors import Interrupted
from reap.evaluation.candidates import Candidate, Choices
from reap.evaluation.fewer_experts import active_bytes
from reap.evaluation.keep_limits import smallest
from reap.evaluation.plan_evaluator import PlanEvaluator, Reference
from reap.evaluation.quality_metrics import TokenScores, compare_predictions
from reap.evaluation.resume_file import ResumeFile
from reap.evaluation.sweep_rows import Table
from reap.evaluation.sweep_table import Sweep, SweepRow, Target
from reap.files.atomic import RewrittenOutput
from reap.files.version import version
from reap.profiling.interrupts import uninterrupted
from reap.progress import Progress, ProgressCallback
from reap.scores.plan import PrunePlan
from reap.text.overlap import overlap_warnings


class TextEvaluator:
    """A model in the engine, and the text: what `Table` asks."""

    def __init__(self, evaluator: PlanEvaluator, progress: ProgressCallback | None) -> None:
        self.evaluator = evaluator
        self._reference: Reference | None = None  # of the model as it is, while another number of experts is in use
        self.domains = evaluator.text.domain_of
        self._progress = progress
        self._n_done = 0
        self._n_expected = 0

    def expect(self, n_candidates: int) -> None:
        """How many there will be, for the progress; the model as it is counts."""
        self._n_expected = n_candidates

    def token_scores(self, plan: PrunePlan | None) -> TokenScores:
        """The model as if it were pruned; None: as it is."""
        if plan is None and self._reference is None:
            reference = self.evaluator.reference(self._report)
            found = compare_predictions(reference.windows, reference.windows)
        else:
            reference = self._reference or self.evaluator.reference()
            found = self.evaluator.token_scores(plan, reference=reference, progress=self._report)
        self._n_done += 1
        return found

    def reopen(self, load: Callable[[], PlanEvaluator]) -> None:
        """Go on with the model as `load` opens it, beside what the model as it is predicts; the one before goes
        first, so that there is room for it."""
        self._reference = self._reference or self.evaluator.reference()
        del self.evaluator
        self.evaluator = load()

    def tokens(self) -> NDArray[np.int32]:
        """All windows of the text, one after the other."""
        return np.concatenate(self.evaluator.text.windows)

    def record(self) -> dict[str, Any]:
        """What a sweep keeps of the text."""
        text = self.evaluator.text
        return {
            "files": list(text.files),
            "sha256": list(text.file_digests().values()),
            "domains": list(text.domains),
            "tokens": len(text.windows) * text.n_scored,
            "windows": len(text.windows),
            "ctx_size": text.ctx_size,
            "dropped_tokens": text.dropped_tokens,
        }

    def _report(self, step: Progress) -> None:
        if self._progress is not None:
            total = step.total or step.done
            self._progress(
                Progress(self._n_done * total + step.done, max(self._n_expected, self._n_done + 1) * total, step.unit)
            )


@dataclass
class SweepRun:
    """Runs the candidates in turn, and what a limit on the perplexity asks for."""

    choices: Choices
    """Makes the candidates."""
    table: Table
    """Holds what was found."""
    after_each: Callable[[], None] = lambda: None
    """Called when a candidate is in the table."""
    targets: list[Target] = field(default_factory=list)
    """Answers to limits."""
    choice: dict[str, Any] = field(default_factory=dict)
    """What a sweep says of how its candidates were made."""

    def try_all(self, candidates: Iterable[Candidate]) -> None:
        """Add them to the table, one by one."""
        for candidate in candidates:
            self.table.add(candidate)
            self.after_each()

    def try_with(self, used: int, candidates: Iterable[Candidate]) -> None:
        """The whole model and the candidates with fewer experts of each token, as the evaluator now runs them."""
        self.table.add_whole(used)
        self.after_each()
        self.try_all(replace(candidate, used=used) for candidate in candidates)

    def fit_size(self, max_bytes: int, found: dict[str, list[Candidate]]) -> None:
        """The quality of what is the largest within `max_bytes`."""
        for metric, candidates in found.items():
            self.try_all(candidates)
            self._add_target("size", max_bytes, metric, candidates[0].plan.keep)

    def fit_perplexity(self, increase: float) -> None:
        """The smallest keep of each metric whose measured perplexity is at most 1 + `increase` times the model's own;
        of random the first seed decides."""
        most = self.table.rows[0].perplexity * (1 + increase)
        keeps = self.choices.keeps
        for metric in self.choices.metrics:
            # all experts fit by definition
            found = smallest(keeps[:-1], partial(self._is_good, metric, most)) or keeps[-1]
            self.try_all([self.choices.candidate(metric, found)])
            self._add_target("perplexity", increase, metric, found)

    def _is_good(self, metric: str, most: float, keep: int) -> bool:
        self.try_all([self.choices.candidate(metric, keep)])
        return self._row(metric, keep).perplexity <= most

    def _add_target(self, kind: str, limit: float, metric: str, keep: int) -> None:
        row = self._row(metric, keep)
        self.targets.append(
            Target(kind=kind, limit=float(limit), metric=metric, keep=keep, bytes=row.bytes, perplexity=row.perplexity)
        )
        self.after_each()

    def _row(self, metric: str, keep: int) -> SweepRow:
        return self.table.whole(metric, keep, 0 if metric == "random" else None)


class ResultWriter:
    """Makes the table of what a sweep has so far, and keeps it in a file where one was asked for."""

    def __init__(
        self,
        run: SweepRun,
        evaluator: TextEvaluator,
        options: EngineOptions,
        output: RewrittenOutput | None,
        file: ResumeFile | None,
    ) -> None:
        self._run = run
        self._text = evaluator.record()
        self._profile = run.choices.profile
        self._engine = {"reap": version(), "llama_cpp": native.load().__llama_cpp_commit__, "options": options.record()}
        self._info = evaluator.evaluator.info
        self._output = output
        self._file = file
        texts = dict(zip(self._text["files"], self._text["sha256"], strict=True))
        seen = overlap_warnings(texts, evaluator.tokens(), self._profile.calibration)
        self.warnings = (*evaluator.evaluator.warnings, *seen)
        if file is not None:
            info = evaluator.evaluator.info
            model = [info.fingerprint, info.router_fingerprint, info.n_bytes]
            file.check({"model": model, "text": evaluator.evaluator.text.digest, **self._engine})

    def restore(self) -> None:
        """Take what an interrupted sweep left, once the model as it is was run."""
        if self._file is not None and self._file.node is not None:
            self._run.table.restore(self._file.node["state"]["tried"])

    def save(self) -> None:
        """The rows so far; nothing where no file was asked for."""
        if self._output is not None and self._file is not None:
            self._file.save_if_due(self._state())
            self._output.save(self._table(complete=False))

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """On Ctrl-C the rows so far are kept where a file was asked for; Interrupted says so, and has them."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if not self._run.table.tried:
                raise
            n_tried = len(self._run.table.tried)
            kept = "" if self._output is None else f"; {self._output.path} keeps the rows so far"
            if self._file is not None and self._output is not None:
                with uninterrupted():  # by a second Ctrl-C
                    self._output.save(self._table(complete=False))
                    self._file.save(self._state())
                kept += f", and --resume (resume=True) goes on from {self._file.path}"
            error = Interrupted(f"stopped after {n_tried} of the sweep's models{kept}")
            error.result = self._table(complete=False)
            raise error from stop

    def finish(self) -> Sweep:
        """The whole table, which is in the file now, too."""
        table = self._table(complete=True)
        if self._output is not None:
            self._output.save(table)
        if self._file is not None:
            self._file.remove()
        return table

    def _state(self) -> dict[str, Any]:
        return {"tried": self._run.table.state()}

    def _active_bytes(self) -> dict[str, Any]:
        """Bytes of weights that a token reads, by number of experts, where several were tried."""
        numbers = sorted({row.experts_used for row in self._run.table.rows if row.experts_used is not None})
        if not numbers:
            return {}
        named = {
            "own": active_bytes(self._info, None),
            **{str(used): active_bytes(self._info, used) for used in numbers},
        }
        return {"active_bytes": named}

    def _table(self, *, complete: bool) -> Sweep:
        table = self._run.table
        rows = table.rows
        return Sweep(
            rows=tuple(rows),
            verdicts=tuple(table.verdicts()),
            targets=tuple(self._run.targets),
            model={**self._profile.model, "bytes": rows[0].bytes, **self._active_bytes()},
            text=self._text,
            calibration={
                key: self._profile.calibration[key] for key in ("files", "sha256") if key in self._profile.calibration
            },
            choice=self._run.choice,
            engine=self._engine,
            complete=complete,
            warnings=tuple(self.warnings),
        )
