"""How well a model predicts a text, and how far it agrees with another one there: the figures, from what was predicted
at each position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: Where a model gives what the reference holds possible less than a double can tell from nothing.
_SMALLEST = 1e-15


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at the n scored positions of one window. Natural logarithms.

    next: float64 [n], of the token that came. best: int32 [n], the most probable token. ids: int32 [n, k], the tokens
    that log_probs is about; None: the whole vocabulary in its order. log_probs: float32 [n, k]. rest: float64 [n], the
    probability (no logarithm) of all other tokens together; 0 where there are none.
    """

    next: Floats
    best: NDArray[np.int32]
    ids: NDArray[np.int32] | None
    log_probs: NDArray[np.float32]
    rest: Floats


@dataclass(frozen=True)
class Measurement:
    """What was found at each scored token of a text, all arrays [n_tokens], in the order of the text's windows.

    log_probs: float64, ln p of the token that came. With a reference (None without): reference_log_probs, the same of
    the reference; kl: float64, KL(reference ‖ model) of the whole distributions, in nats; same_top: bool, whether both
    hold the same token most probable; rest: float64, the reference's probability of the tokens that were not told
    apart, 0 where all of them were.
    """

    log_probs: Floats
    reference_log_probs: Floats | None = None
    kl: Floats | None = None
    same_top: NDArray[np.bool_] | None = None
    rest: Floats | None = None

    def part(self, chosen: NDArray[np.bool_] | slice) -> Measurement:
        """The same of some of the tokens."""
        arrays = (self.log_probs, self.reference_log_probs, self.kl, self.same_top, self.rest)
        return Measurement(*(None if array is None else array[chosen] for array in arrays))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class QualityMetrics:
    """How well a model predicts `tokens` tokens; what compares it with a reference is None where there is none.

    perplexity: exp of the mean negative log-likelihood; stderr: its standard error, in the same unit.
    reference_perplexity: the reference's. perplexity_ratio: of the two, with its standard error ratio_stderr, which is
    that of the differences token by token, and so much smaller than those of the two perplexities. kl_mean: mean of
    KL(reference ‖ model) in nats, with kl_stderr; kl_median, kl_p90, kl_p95, kl_p99, kl_max: its quantiles. top1: share
    of positions at which both hold the same token most probable, with top1_stderr. halved: share of tokens that are at
    most half as probable as with the reference. kl_rest: mean probability, by the reference, of the tokens that the
    divergence lumps together: 0 where it is exact, and otherwise it is a little too small (docs/evaluating.md).
    """

    tokens: int
    perplexity: float
    stderr: float
    reference_perplexity: float | None = None
    perplexity_ratio: float | None = None
    ratio_stderr: float | None = None
    kl_mean: float | None = None
    kl_stderr: float | None = None
    kl_median: float | None = None
    kl_p90: float | None = None
    kl_p95: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    top1_stderr: float | None = None
    halved: float | None = None
    kl_rest: float | None = None


def measure(found: Sequence[Predictions], expected: Sequence[Predictions]) -> Measurement:
    """A model's predictions held against the reference's, window by window; `found` is about the tokens that `expected`
    names."""
    return Measurement(
        log_probs=np.concatenate([window.next for window in found]),
        reference_log_probs=np.concatenate([window.next for window in expected]),
        kl=np.concatenate([divergence(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]),
        same_top=np.concatenate([ours.best == theirs.best for ours, theirs in zip(found, expected, strict=True)]),
        rest=np.concatenate([window.rest for window in expected]),
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


def figures(measured: Measurement) -> QualityMetrics:
    """The figures of a measurement of at least one token."""
    perplexity, stderr = perplexity_of(measured.log_probs)
    n_tokens = len(measured.log_probs)
    if (
        measured.reference_log_probs is None
        or measured.kl is None
        or measured.same_top is None
        or measured.rest is None
    ):
        return QualityMetrics(tokens=n_tokens, perplexity=perplexity, stderr=stderr)
    ratio, ratio_stderr = perplexity_of(measured.log_probs - measured.reference_log_probs)
    top1 = float(measured.same_top.mean())
    median, p90, p95, p99, largest = (float(value) for value in np.quantile(measured.kl, [0.5, 0.9, 0.95, 0.99, 1.0]))
    return QualityMetrics(
        tokens=n_tokens,
        perplexity=perplexity,
        stderr=stderr,
        reference_perplexity=perplexity_of(measured.reference_log_probs)[0],
        perplexity_ratio=ratio,
        ratio_stderr=ratio_stderr,
        kl_mean=float(measured.kl.mean()),
        kl_stderr=_standard_error(measured.kl),
        kl_median=median,
        kl_p90=p90,
        kl_p95=p95,
        kl_p99=p99,
        kl_max=largest,
        top1=top1,
        top1_stderr=math.sqrt(top1 * (1 - top1) / (n_tokens - 1)) if n_tokens > 1 else math.nan,
        halved=float((measured.log_probs - measured.reference_log_probs <= -math.log(2)).mean()),
        kl_rest=float(measured.rest.mean()),
    )


def perplexity_of(log_probs: Floats) -> tuple[float, float]:
    """(perplexity, standard error) of natural log-probabilities [n]; the error is that of the mean, carried through
    exp."""
    loss = -float(log_probs.mean())
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return perplexity, perplexity * _standard_error(log_probs)


def _standard_error(values: Floats) -> float:
    """Of the mean; NaN for a single value."""
    return math.sqrt(float(values.var()) / (len(values) - 1)) if len(values) > 1 else math.nan
