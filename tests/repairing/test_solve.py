"""The fit of one layer, held against numpy's own least squares."""

from __future__ import annotations

import numpy as np
import pytest

from reap.repairing.solve import Correction, LayerProblem, Tokens, fit_layer, lower_rank, share_left, token_weights

N_TOKENS, N_EXPERTS, N_USED, N_FF, N_EMBD = 400, 5, 2, 6, 9


def some_tokens(seed: int = 0, truth: np.ndarray | None = None, noise: float = 0.0) -> Tokens:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((N_TOKENS, N_EXPERTS)), axis=1)[:, :N_USED].astype(np.int32)
    gates = rng.random((N_TOKENS, N_USED))
    inputs = rng.normal(size=(N_TOKENS, N_USED, N_FF))
    difference = noise * rng.normal(size=(N_TOKENS, N_EMBD))
    if truth is not None:
        difference += np.einsum("tk,tkf,tkfd->td", gates, inputs, truth[ids])
    return Tokens(ids, gates, inputs, difference)


def design(tokens: Tokens) -> np.ndarray:
    """[n_tokens, n_experts * n_ff]: a·h at the place of its expert."""
    matrix = np.zeros((N_TOKENS, N_EXPERTS, N_FF))
    for token in range(N_TOKENS):
        for slot in range(N_USED):
            matrix[token, tokens.ids[token, slot]] += tokens.gates[token, slot] * tokens.inputs[token, slot]
    return matrix.reshape(N_TOKENS, -1)


def test_many_sweeps_are_the_joint_least_squares() -> None:
    tokens = some_tokens(1, noise=1.0)
    found = LayerProblem(tokens, N_EXPERTS).solve(N_FF, 1e-13, sweeps=200)
    weights = np.sqrt(token_weights(tokens.difference))[:, None]
    dense, *_ = np.linalg.lstsq(design(tokens) * weights, tokens.difference * weights, rcond=None)
    expected = dense.reshape(N_EXPERTS, N_FF, N_EMBD)
    np.testing.assert_allclose(np.einsum("erf,edr->efd", found.a, found.b), expected, atol=1e-8)


def test_one_expert_is_a_ridge_regression() -> None:
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(50, 1, N_FF))
    gates = rng.random((50, 1))
    difference = rng.normal(size=(50, N_EMBD))
    tokens = Tokens(np.zeros((50, 1), np.int32), gates, inputs, difference)
    found = LayerProblem(tokens, 1).solve(N_FF, 0.3, sweeps=1)
    x = gates * inputs[:, 0]
    moments = x.T @ x
    expected = np.linalg.solve(moments + 0.3 * np.trace(moments) / N_FF * np.eye(N_FF), x.T @ difference)
    np.testing.assert_allclose(found.b[0] @ found.a[0], expected.T, atol=1e-10)


def test_what_it_adds_is_what_it_was_fitted_to() -> None:
    truth = np.random.default_rng(3).normal(size=(N_EXPERTS, N_FF, N_EMBD))
    tokens = some_tokens(3, truth)
    found = LayerProblem(tokens, N_EXPERTS).solve(N_FF, 1e-12, sweeps=100)
    np.testing.assert_allclose(found.apply(tokens), tokens.difference, atol=1e-5)
    assert share_left(tokens, found.apply(tokens), np.ones(N_TOKENS)) < 1e-10


def test_low_rank_is_the_best_in_its_metric() -> None:
    """No product of two factors is nearer in the metric than the truncated singular values (Eckart and Young)."""
    rng = np.random.default_rng(4)
    root = np.linalg.cholesky(np.cov(rng.normal(size=(N_FF, 100))))
    delta = rng.normal(size=(N_FF, N_EMBD))
    a, b = lower_rank(delta, root, 2)
    left, sizes, right = np.linalg.svd(root.T @ delta)
    best = np.linalg.solve(root.T, left[:, :2] * sizes[:2]) @ right[:2]
    np.testing.assert_allclose((b @ a).T, best, atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0))


def test_noise_gets_no_correction() -> None:
    tokens = some_tokens(5, noise=1.0)
    found = fit_layer(tokens, np.arange(N_TOKENS) % 2 == 0, N_EXPERTS, N_FF, ridges=(1e-6,))
    assert found.correction is None
    assert found.left == 1.0


def test_a_large_ridge_is_chosen_where_there_is_much_noise() -> None:
    truth = np.random.default_rng(6).normal(size=(N_EXPERTS, N_FF, N_EMBD))
    unseen = np.arange(N_TOKENS) % 2 == 0
    quiet = fit_layer(some_tokens(6, truth, 0.01), unseen, N_EXPERTS, N_FF)
    noisy = fit_layer(some_tokens(6, truth, 6.0), unseen, N_EXPERTS, N_FF)
    assert quiet.correction is not None
    assert noisy.correction is not None
    assert quiet.ridge < noisy.ridge
    assert quiet.left < noisy.left < 1


def test_a_token_of_massive_activation_counts_less() -> None:
    difference = np.ones((100, N_EMBD))
    difference[7] *= 1000
    weights = token_weights(difference)
    assert weights[7] == pytest.approx((8 / 1000) ** 2)
    assert np.all(np.delete(weights, 7) == 1)


def test_an_expert_with_hardly_a_token_is_left_alone() -> None:
    tokens = some_tokens(8, noise=1.0)
    rare = Tokens(np.where(tokens.ids == 4, 3, tokens.ids), tokens.gates, tokens.inputs, tokens.difference)
    found: Correction = LayerProblem(rare.first(60), N_EXPERTS).solve(2, 0.1)
    assert not found.a[4].any()
    assert not found.b[4].any()
    assert found.a[0].any()
