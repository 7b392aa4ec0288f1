"""The figures against distributions written out by hand, and what lumping the improbable tokens costs."""

from __future__ import annotations

import numpy as np
import pytest

from reap.evaluation.paired_difference import paired_difference
from reap.evaluation.quality_metrics import (
    Predictions,
    QualityMetrics,
    TokenScores,
    compare_predictions,
    divergence,
    perplexity_of,
    quality_metrics,
)

N_POSITIONS, N_VOCAB = 40, 50


def distributions(seed: int, spread: float = 2.0) -> np.ndarray:
    """float64 [n, n_vocab]: probabilities."""
    logits = np.random.default_rng(seed).normal(0, spread, (N_POSITIONS, N_VOCAB))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def predictions(probabilities: np.ndarray, ids: np.ndarray | None = None) -> Predictions:
    chosen = probabilities if ids is None else np.take_along_axis(probabilities, ids, axis=1)
    rest = np.zeros(N_POSITIONS) if ids is None else 1 - chosen.sum(axis=1)
    came = probabilities[np.arange(N_POSITIONS), 7]
    with np.errstate(divide="ignore"):
        return Predictions(
            np.log(came), probabilities.argmax(axis=1).astype(np.int32), ids, np.log(chosen).astype(np.float32), rest
        )


def naive_divergence(p: np.ndarray, q: np.ndarray) -> list[float]:
    return [
        sum(a * np.log(a / b) for a, b in zip(row_p, row_q, strict=True) if a > 0)
        for row_p, row_q in zip(p, q, strict=True)
    ]


def test_divergence_of_whole_distributions() -> None:
    p, q = distributions(1), distributions(2)
    np.testing.assert_allclose(divergence(predictions(q), predictions(p)), naive_divergence(p, q), rtol=1e-5)
    assert divergence(predictions(p), predictions(p)).max() == 0


@pytest.mark.parametrize("k", [5, 20, 49])
def test_tokens_that_are_not_told_apart_count_as_one(k: int) -> None:
    """The sum is too small by rest · KL(within the rest), exactly, and never too large."""
    p, q = distributions(1), distributions(2)
    ids = np.argsort(-p, axis=1)[:, :k].astype(np.int32)
    found = divergence(predictions(q, ids), predictions(p, ids))
    others = np.argsort(-p, axis=1)[:, k:]
    tail_p, tail_q = np.take_along_axis(p, others, axis=1), np.take_along_axis(q, others, axis=1)
    rest = tail_p.sum(axis=1)
    missing = rest * naive_divergence(tail_p / rest[:, None], tail_q / tail_q.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found + missing, naive_divergence(p, q), rtol=1e-4)
    assert (missing >= 0).all()


def test_what_is_impossible() -> None:
    p, q = distributions(1), distributions(2)
    p[:, 3] = 0  # the reference gives it nothing: it weighs nothing, whatever the model gives it
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(divergence(predictions(q), predictions(p)), naive_divergence(p, q), rtol=1e-5)
    q[:, 4] = 0  # the model gives nothing to what the reference holds possible
    assert np.isposinf(divergence(predictions(q), predictions(p))).all()


def test_a_rest_that_rounding_left_empty() -> None:
    p, q = distributions(1), distributions(2)
    ids = np.tile(np.arange(N_VOCAB - 1, dtype=np.int32), (N_POSITIONS, 1))
    found = predictions(q, ids)
    empty = Predictions(found.next, found.best, found.ids, found.log_probs, np.zeros(N_POSITIONS))
    assert np.isfinite(divergence(empty, predictions(p, ids))).all()


def test_all_figures() -> None:
    p, q = distributions(1), distributions(2, 1.0)
    q[:20] = p[:20]
    measured = compare_predictions([predictions(q)], [predictions(p)])
    found = quality_metrics(measured)
    kl = np.array(naive_divergence(p, q))
    change = np.log(q[:, 7] / p[:, 7])
    assert found.tokens == N_POSITIONS
    assert found.perplexity == pytest.approx(np.exp(-np.log(q[:, 7]).mean()))
    assert found.reference_perplexity == pytest.approx(np.exp(-np.log(p[:, 7]).mean()))
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.reference_perplexity)
    assert found.ratio_stderr == pytest.approx(found.perplexity_ratio * change.std(ddof=1) / np.sqrt(N_POSITIONS))
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-5)
    assert found.kl_stderr == pytest.approx(kl.std(ddof=1) / np.sqrt(N_POSITIONS), rel=1e-5)
    quantiles = [found.kl_median, found.kl_p90, found.kl_p95, found.kl_p99, found.kl_max]
    np.testing.assert_allclose(quantiles, np.quantile(kl, [0.5, 0.9, 0.95, 0.99, 1]), rtol=1e-5, atol=1e-9)
    assert found.top1 == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    assert 0.5 <= found.top1 < 1
    assert found.halved == pytest.approx((q[:, 7] <= p[:, 7] / 2).mean())
    assert 0 < found.halved < 0.5
    assert found.kl_rest == 0


def test_parts_are_those_windows() -> None:
    model, reference = [[predictions(distributions(seed)) for seed in seeds] for seeds in ((2, 4, 6), (1, 3, 5))]
    scores = compare_predictions(model, reference)
    found = quality_metrics(scores.part(np.array([True, False, True])))
    assert found == quality_metrics(compare_predictions([model[0], model[2]], [reference[0], reference[2]]))
    assert found.tokens == 2 * N_POSITIONS
    assert found.kl_mean == pytest.approx(scores.divergence()[[0, 2]].mean())


def test_tokens_of_a_window_that_go_together_make_a_comparison_less_sure() -> None:
    """evaluate and sweep have one rule for errors: that of paired_difference."""
    rng = np.random.default_rng(0)
    reference = rng.normal(-3, 1, (12, 50))
    found = reference + rng.normal(-0.2, 0.3, (12, 1))
    scores = TokenScores(found, reference, found**2, np.ones(found.shape, dtype=np.bool_), np.zeros(found.shape))
    metrics = quality_metrics(scores)
    rule = paired_difference(-found, -reference)
    assert metrics.ratio_stderr == pytest.approx(metrics.perplexity_ratio * rule.stderr)
    assert rule.stderr == pytest.approx((found - reference)[:, 0].std(ddof=1) / np.sqrt(12))
    assert metrics.kl_stderr == pytest.approx(paired_difference(found**2, np.zeros(found.shape)).stderr)


def test_without_a_reference() -> None:
    found = quality_metrics(TokenScores(np.log(np.array([[0.5, 0.25]]))))
    assert found == QualityMetrics(tokens=2, perplexity=found.perplexity, stderr=found.stderr)
    assert found.perplexity == pytest.approx(8**0.5)


def test_perplexity_of_known_probabilities() -> None:
    perplexity, stderr = perplexity_of(np.log(np.array([0.5, 0.5, 0.5])))
    assert perplexity == pytest.approx(2.0)
    assert stderr == pytest.approx(0.0, abs=1e-7)
    assert np.isnan(perplexity_of(np.log(np.array([0.25])))[1])
    assert perplexity_of(np.full(3, -800.0))[0] == np.inf
