"""The rows of a sweep as they come, and who wins at each size."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from reap.evaluation.candidates import Candidate, CandidateKey
from reap.evaluation.paired_difference import Difference, Floats, paired_difference
from reap.evaluation.quality_metrics import TokenScores, perplexity_of
from reap.evaluation.sweep_table import BASELINE, CLEAR, SweepRow, Verdict, load_row, row_documents
from reap.files.strict_json import Node
from reap.scores.plan import PrunePlan

MOST_STATE_BYTES = 48 << 20  # of losses in a resume file: base64 makes a third more of them


class CandidateEvaluator(Protocol):
    """Runs candidates over a text."""

    @property
    def domains(self) -> Sequence[str | None]:
        """Of each window; None: none."""

    def token_scores(self, plan: PrunePlan | None) -> TokenScores:
        """The model as if it were pruned, beside the model as it is; None: as it is."""


@dataclass(frozen=True)
class Tried:
    """What is known of a candidate that was run."""

    digest: str
    """Of the experts that it keeps."""
    rows: tuple[SweepRow, ...]
    """Of the whole text, then of each domain."""
    losses: Floats
    """float64 [n_windows, n_scored]: −ln p of each scored token."""


@dataclass
class Table:
    """Rows and verdicts as they come; each candidate is run once."""

    evaluator: CandidateEvaluator
    """What runs them."""
    tried: dict[CandidateKey, Tried] = field(default_factory=dict)
    """The model as it is, then the candidates, in the order in which they were asked for."""
    earlier: dict[CandidateKey, Tried] = field(default_factory=dict)
    """What an interrupted sweep left: taken instead of running a candidate that keeps the same experts."""

    @property
    def rows(self) -> list[SweepRow]:
        """Of all candidates so far."""
        return [row for tried in self.tried.values() for row in tried.rows]

    def add_baseline(self, n_experts: int, n_bytes: int) -> None:
        """The model as it is."""
        key = (BASELINE, None, n_experts, None)
        self.tried[key] = self._try(key, None, n_bytes, self.evaluator.token_scores(None))

    def add_whole(self, used: int) -> None:
        """The model with all of its experts, but with `used` of them for each token, as the evaluator now runs it."""
        row = next(iter(self.tried.values())).rows[0]  # of the model as it is
        key = (BASELINE, None, row.keep, used)
        if key not in self.tried:
            self.tried[key] = self.earlier.get(key) or self._try(
                key, None, row.bytes, self.evaluator.token_scores(None)
            )

    def add(self, candidate: Candidate) -> None:
        """Run a candidate, unless it was run already."""
        key = candidate.key
        if key in self.tried:
            return
        before = self.earlier.get(key)
        if before is not None and before.digest == candidate.digest:
            self.tried[key] = before
            return
        scores = self.evaluator.token_scores(candidate.plan)
        self.tried[key] = self._try(key, candidate.digest, candidate.n_bytes, scores)

    def whole(self, metric: str, keep: int, seed: int | None = None) -> SweepRow:
        """The row of a candidate on the whole text."""
        return self.tried[metric, seed, keep, None].rows[0]

    def verdicts(self) -> list[Verdict]:
        """The best of what was run at each size, on the whole text and on each domain."""
        sizes = sorted({keep for name, _, keep, used in self.tried if name != BASELINE and used is None}, reverse=True)
        found = [self._verdict(keep, domain) for keep in sizes for domain in (None, *self._domains())]
        return [verdict for verdict in found if verdict is not None]

    def _try(self, key: CandidateKey, digest: str | None, n_bytes: int, scores: TokenScores) -> Tried:
        losses = -scores.log_probs
        baseline = next(iter(self.tried.values())).losses if self.tried else losses
        rows = [self._row(key, n_bytes, domain, scores, baseline) for domain in (None, *self._domains())]
        rows[0] = replace(rows[0], experts_sha256=digest)
        return Tried(digest or "", tuple(rows), losses)

    def _row(
        self, key: CandidateKey, n_bytes: int, domain: str | None, scores: TokenScores, baseline: Floats
    ) -> SweepRow:
        windows = self._windows(domain)
        part = scores.part(windows)
        increase = paired_difference(-part.log_probs, baseline[windows])
        perplexity, stderr = perplexity_of(part.log_probs)
        if part.same_top is None:
            raise AssertionError("candidates are compared with the model as it is")
        return SweepRow(
            metric=key[0],
            seed=key[1],
            keep=key[2],
            experts_used=key[3],
            bytes=n_bytes,
            domain=domain,
            tokens=int(part.log_probs.size),
            perplexity=perplexity,
            stderr=stderr,
            kl_mean=max(0.0, float(part.divergence().mean())),
            top1=float(part.same_top.mean()),
            loss_increase=increase.mean,
            loss_increase_stderr=increase.stderr,
        )

    def _domains(self) -> list[str]:
        named = [domain for domain in dict.fromkeys(self.evaluator.domains) if domain is not None]
        return named if len(named) > 1 else []

    def _windows(self, domain: str | None) -> list[int]:
        return [index for index, name in enumerate(self.evaluator.domains) if domain is None or name == domain]

    def _verdict(self, keep: int, domain: str | None) -> Verdict | None:
        windows = self._windows(domain)
        by_metric: dict[str, list[Floats]] = {}
        for (name, _, number, used), tried in self.tried.items():
            if number == keep and name != BASELINE and used is None:
                by_metric.setdefault(name, []).append(tried.losses[windows])
        if len(by_metric) < 2:
            return None
        order = sorted(by_metric, key=lambda name: float(np.mean(by_metric[name])))
        margin = margin_between(by_metric[order[1]], by_metric[order[0]])
        return Verdict(
            keep=keep,
            domain=domain,
            metric=order[0],
            runner_up=order[1],
            margin=margin.mean,
            spread=margin.stderr,
            clear=margin.exceeds(CLEAR),
        )

    # ---- for a resume file

    def state(self) -> list[dict[str, Any]]:
        """What was run, as far as a file can hold it, as JSON types; the model as it is is run again."""
        together = {**self.earlier, **self.tried}
        kept = [it for (name, _, _, used), it in together.items() if name != BASELINE or used is not None]
        most = MOST_STATE_BYTES // max(1, kept[0].losses.nbytes) if kept else 0
        return [
            {
                "digest": it.digest,
                "rows": row_documents(it.rows),
                "losses": base64.b64encode(it.losses.astype("<f8").tobytes()).decode("ascii"),
            }
            for it in kept[:most]
        ]

    def restore(self, node: Node) -> None:
        """Read what `state` wrote, once the model as it is was run. Raises FormatError."""
        shape = next(iter(self.tried.values())).losses.shape
        for index in range(len(node.entries())):
            item = node.entry(index)
            rows = tuple(load_row(item["rows"].entry(row)) for row in range(len(item["rows"].entries())))
            if not rows:
                item["rows"].fail("should have at least one row")
            losses = _read_floats(item["losses"], shape)
            row = rows[0]
            self.earlier[row.metric, row.seed, row.keep, row.experts_used] = Tried(
                item["digest"].string(), rows, losses
            )


def _read_floats(node: Node, shape: tuple[int, ...]) -> Floats:
    try:
        raw = base64.b64decode(node.string().encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        node.fail("is not base64")
    if len(raw) != 8 * math.prod(shape):
        node.fail(f"should be {math.prod(shape)} numbers of 8 bytes, found {len(raw)} bytes")
    return np.frombuffer(raw, dtype="<f8").reshape(shape).astype(np.float64)


def margin_between(worse: Sequence[Floats], better: Sequence[Floats]) -> Difference:
    """Mean loss of one criterion less that of another, each with the losses [n_windows, n_scored] of its seeds.

    The error adds to that of the paired difference of the means over seeds how far the seeds of each scatter.
    """
    paired = paired_difference(np.mean(worse, axis=0), np.mean(better, axis=0))
    scatter = [
        float(np.var([loss.mean() for loss in losses], ddof=1)) / len(losses)
        for losses in (worse, better)
        if len(losses) > 1
    ]
    return Difference(paired.mean, math.sqrt(paired.stderr**2 + sum(scatter)))
