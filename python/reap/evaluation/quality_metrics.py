"""How well a model predicts a text, and how far it agrees with another one there, from what was predicted at each
position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reap.evaluation.paired_difference import Floats, standard_error

#: Where a model gives what the reference holds possible less than a double can tell from nothing.
_SMALLEST = 1e-15


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at the n scored positions of one window. Natural logarithms."""

    next: Floats
    """float64 [n]: ln p of the token that came."""
    best: NDArray[np.int32]
    """int32 [n]: the most probable token."""
    ids: NDArray[np.int32] | None
    """int32 [n, k]: the tokens that log_probs is about; None: the whole vocabulary in its order."""
    log_probs: NDArray[np.float32]
    """float32 [n, k]: ln p of these tokens."""
    rest: Floats
    """float64 [n]: the probability (not its logarithm) of all other tokens together; 0 where there are none."""


@dataclass(frozen=True)
class TokenScores:
    """What was found at each scored token of some windows, all arrays [n_windows, n_scored]."""

    log_probs: Floats
    """float64: ln p of the token that came."""
    reference_log_probs: Floats | None = None
    """float64: the same of the reference; None without one, like all that follow."""
    kl: Floats | None = None
    """float64: KL(reference ‖ model) of the whole distributions, in nats."""
    same_top: NDArray[np.bool_] | None = None
    """bool: whether both hold the same token most probable."""
    rest: Floats | None = None
    """float64: the reference's probability of the tokens that were not told apart; 0 where all of them were."""

    def part(self, windows: NDArray[np.bool_] | Sequence[int] | slice) -> TokenScores:
        """The scores of some of the windows, by a mask or their numbers."""
        arrays = (self.log_probs, self.reference_log_probs, self.kl, self.same_top, self.rest)
        return TokenScores(*(None if array is None else array[windows] for array in arrays))  # type: ignore[arg-type]

    def divergence(self) -> Floats:
        """`kl`, of scores that were compared with a reference."""
        if self.kl is None:
            raise AssertionError("only what was compared with a reference has a divergence")
        return self.kl


@dataclass(frozen=True, kw_only=True)
class QualityMetrics:
    """How well a model predicts a text; what compares it with a reference is None where there is none.

    Errors of comparisons are those of `paired_difference`: they allow for what the tokens of a window have in common.
    """

    tokens: int
    """Scored tokens."""
    perplexity: float
    """exp of the mean negative log-likelihood."""
    stderr: float
    """Standard error of the perplexity, in the same unit, tokens taken for independent, as llama-perplexity does."""
    reference_perplexity: float | None = None
    """The reference's perplexity."""
    perplexity_ratio: float | None = None
    """Perplexity over the reference's."""
    ratio_stderr: float | None = None
    """Standard error of the ratio, from the differences token by token: much smaller than both perplexities' errors."""
    kl_mean: float | None = None
    """Mean of KL(reference ‖ model), in nats."""
    kl_stderr: float | None = None
    """Standard error of that mean."""
    kl_median: float | None = None
    """Median of the divergence, in nats."""
    kl_p90: float | None = None
    """Its 90 % quantile."""
    kl_p95: float | None = None
    """Its 95 % quantile."""
    kl_p99: float | None = None
    """Its 99 % quantile."""
    kl_max: float | None = None
    """The largest divergence at a position."""
    top1: float | None = None
    """Share of positions at which both hold the same token most probable."""
    top1_stderr: float | None = None
    """Standard error of that share, positions taken for independent."""
    halved: float | None = None
    """Share of tokens that are at most half as probable as with the reference."""
    kl_rest: float | None = None
    """Mean probability, by the reference, of the tokens that the divergence lumps together: 0 where it is exact, and
    otherwise it is a little too small (docs/evaluating.md)."""


def compare_predictions(found: Sequence[Predictions], expected: Sequence[Predictions]) -> TokenScores:
    """A model's predictions held against the reference's, window by window.

    `found` is about the tokens that `expected` names.
    """
    return TokenScores(
        log_probs=np.stack([window.next for window in found]),
        reference_log_probs=np.stack([window.next for window in expected]),
        kl=np.stack([divergence(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]),
        same_top=np.stack([ours.best == theirs.best for ours, theirs in zip(found, expected, strict=True)]),
        rest=np.stack([window.rest for window in expected]),
    )


def divergence(found: Predictions, expected: Predictions) -> Floats:
    """KL(expected ‖ found) in nats, float64 [n].

    The tokens that are not told apart count as one, which makes the sum smaller by rest · KL(within the rest), never
    larger.
    """
    log_p = expected.log_probs.astype(np.float64)
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_p) * (log_p - found.log_probs)
    lumped = np.zeros(len(terms))
    some = expected.rest > 0
    rest = expected.rest[some]
    lumped[some] = rest * (np.log(rest) - np.log(np.maximum(found.rest[some], _SMALLEST)))
    terms[np.isneginf(log_p)] = 0.0  # what is impossible weighs nothing
    total: Floats = np.maximum(terms.sum(axis=1) + lumped, 0.0)
    return total


def quality_metrics(scores: TokenScores) -> QualityMetrics:
    """The figures of at least one scored token."""
    perplexity, stderr = perplexity_of(scores.log_probs)
    n_tokens = int(scores.log_probs.size)
    kl, same_top, rest = scores.kl, scores.same_top, scores.rest
    if scores.reference_log_probs is None or kl is None or same_top is None or rest is None:
        return QualityMetrics(tokens=n_tokens, perplexity=perplexity, stderr=stderr)
    gain = scores.log_probs - scores.reference_log_probs
    ratio = _perplexity(gain)
    top1 = float(same_top.mean())
    median, p90, p95, p99, largest = (float(value) for value in np.quantile(kl, [0.5, 0.9, 0.95, 0.99, 1.0]))
    return QualityMetrics(
        tokens=n_tokens,
        perplexity=perplexity,
        stderr=stderr,
        reference_perplexity=_perplexity(scores.reference_log_probs),
        perplexity_ratio=ratio,
        ratio_stderr=ratio * standard_error(gain),
        kl_mean=float(kl.mean()),
        kl_stderr=standard_error(kl),
        kl_median=median,
        kl_p90=p90,
        kl_p95=p95,
        kl_p99=p99,
        kl_max=largest,
        top1=top1,
        top1_stderr=math.sqrt(top1 * (1 - top1) / (n_tokens - 1)) if n_tokens > 1 else math.nan,
        halved=float((gain <= -math.log(2)).mean()),
        kl_rest=float(rest.mean()),
    )


def perplexity_of(log_probs: Floats) -> tuple[float, float]:
    """(perplexity, standard error) of natural log-probabilities of any shape.

    The error is llama-perplexity's: that of the mean of independent tokens, carried through exp; NaN for one token.
    """
    perplexity = _perplexity(log_probs)
    n_tokens = log_probs.size
    error = math.sqrt(float(log_probs.var()) / (n_tokens - 1)) if n_tokens > 1 else math.nan
    return perplexity, perplexity * error


def _perplexity(log_probs: Floats) -> float:
    loss = -float(log_probs.mean())
    return math.exp(loss) if loss < 700 else math.inf
