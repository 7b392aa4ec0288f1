"""The fit of one layer: what to add to the kept experts' down projections, so that the layer hands on what the whole
model would have.

For each kept expert j the correction Δ_j (of its down projection, [n_embd, n_ff]) minimises, over the tokens that are
routed to it, the squares of r − a·Δ_j·h: h is what enters the down projection, a the gate, r what the other corrections
leave of the difference. Experts take their turn by falling mass, and then once more. Each is a ridge regression, λ as a
share of the mean of the diagonal of G = Σ a² h hᵀ, and is brought to low rank at once, so that those after it mend what
that lost: with G = C·Cᵀ the largest singular values of Cᵀ·Δᵀ are kept.

Arrays keep the type that they come in; what is solved is solved in 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

#: Tokens whose difference is so many times the median one are counted with less: massive activations.
CLIP = 8.0
#: Tried one after the other, as long as each leaves less than the one before.
RIDGES = (0.3, 0.1, 0.03, 0.01, 0.003)
SWEEPS = 2
#: Fewer tokens than that of an expert say nothing about its correction.
FEWEST_TOKENS = 8


@dataclass(frozen=True)
class Tokens:
    """What a layer did to some tokens, and what it should have done."""

    ids: NDArray[np.int32]
    """[n_tokens, n_used]: the selected experts."""
    gates: Floats
    """[n_tokens, n_used]: what their outputs are multiplied by."""
    inputs: Floats
    """[n_tokens, n_used, n_ff]: what enters their down projections."""
    difference: Floats
    """[n_tokens, n_embd]: the hidden states of the whole model after this layer, less those of the pruned one."""

    def part(self, chosen: NDArray[np.bool_]) -> Tokens:
        """Those tokens alone. chosen: [n_tokens]."""
        return Tokens(self.ids[chosen], self.gates[chosen], self.inputs[chosen], self.difference[chosen])

    def first(self, n_tokens: int) -> Tokens:
        """The first of them alone."""
        return self.part(np.arange(len(self.ids)) < n_tokens)


@dataclass(frozen=True)
class Correction:
    """Of one layer, in two factors: what is added to the down projection of expert j is `b[j] @ a[j]`."""

    a: Floats
    """[n_experts, rank, n_ff]"""
    b: Floats
    """[n_experts, n_embd, rank]"""

    def apply(self, tokens: Tokens) -> Floats:
        """What it adds to the hidden states: [n_tokens, n_embd]."""
        added = np.zeros_like(tokens.difference)
        for expert in range(len(self.a)):
            rows, slots = np.nonzero(tokens.ids == expert)
            gated = tokens.gates[rows, slots, None] * tokens.inputs[rows, slots]
            added[rows] += (gated @ self.a[expert].T) @ self.b[expert].T  # a token selects an expert once
        return added


@dataclass(frozen=True)
class _Expert:
    """The tokens of one expert."""

    rows: NDArray[np.intp]
    gated: Floats
    """[n, n_ff]: a·h, by the square root of the token's weight."""
    roots: Floats
    """[n]: those square roots."""
    moments: NDArray[np.float64]
    """[n_ff, n_ff]: Σ a² h hᵀ."""


class LayerProblem:
    """One layer's tokens, gathered by expert once, to be fitted with several λ."""

    def __init__(self, tokens: Tokens, n_experts: int) -> None:
        self.tokens = tokens
        self.n_experts = n_experts
        self.weights = token_weights(tokens.difference)
        self._experts = [self._gather(expert) for expert in range(n_experts)]
        usable = [number for number in range(n_experts) if len(self._experts[number].rows) >= FEWEST_TOKENS]
        self._order = sorted(usable, key=lambda number: -float(np.trace(self._experts[number].moments)))

    def _gather(self, expert: int) -> _Expert:
        rows, slots = np.nonzero(self.tokens.ids == expert)
        roots = np.sqrt(self.weights[rows])
        gated = (roots * self.tokens.gates[rows, slots])[:, None] * self.tokens.inputs[rows, slots]
        return _Expert(rows, gated, roots, (gated.T @ gated).astype(np.float64))

    def solve(self, rank: int, ridge: float, *, sweeps: int = SWEEPS) -> Correction:
        """The corrections of all experts.

        Args:
            rank: of each of them; n_ff or more: whatever rank they have.
            ridge: λ, as a share of the mean of the diagonal of an expert's second moments.
            sweeps: how often each expert has its turn.
        """
        difference = self.tokens.difference
        n_ff, n_embd = self.tokens.inputs.shape[2], difference.shape[1]
        rank = min(rank, n_ff)
        a = np.zeros((self.n_experts, rank, n_ff), difference.dtype)
        b = np.zeros((self.n_experts, n_embd, rank), difference.dtype)
        ridged = {number: with_ridge(self._experts[number].moments, ridge) for number in self._order}
        roots = {number: np.linalg.cholesky(moments) for number, moments in ridged.items()}
        left = difference.copy()
        for _ in range(sweeps):
            for number in self._order:
                expert = self._experts[number]
                before = (expert.gated @ a[number].T) @ b[number].T
                target = expert.roots[:, None] * left[expert.rows] + before
                delta = np.linalg.solve(ridged[number], (expert.gated.T @ target).astype(np.float64))
                a[number], b[number] = lower_rank(delta, roots[number], rank)
                after = (expert.gated @ a[number].T) @ b[number].T
                left[expert.rows] -= (after - before) / expert.roots[:, None]
        return Correction(a, b)


def lower_rank(delta: Floats, root: Floats, rank: int) -> tuple[Floats, Floats]:
    """The factors a [rank, n_ff] and b [n_embd, rank] whose product, turned over, is nearest to `delta` [n_ff, n_embd]
    in the metric root·rootᵀ."""
    turned = root.T @ delta
    _, vectors = np.linalg.eigh(turned @ turned.T)
    largest = vectors[:, ::-1][:, :rank]
    a, b = np.linalg.solve(root.T, largest).T, (largest.T @ turned).T
    sizes = np.sqrt(np.maximum(np.linalg.norm(b, axis=0), 1e-30) / np.maximum(np.linalg.norm(a, axis=1), 1e-30))
    return a * sizes[:, None], b / sizes  # of like size, which 16 bits hold best


def with_ridge(moments: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """Second moments with λ times the mean of their diagonal on it."""
    size = len(moments)
    mean = float(np.trace(moments)) / size or 1.0
    return moments + ridge * mean * np.eye(size)


def token_weights(difference: Floats) -> Floats:
    """[n_tokens]: 1, and less for tokens whose difference is over CLIP times the median one."""
    sizes = np.linalg.norm(difference, axis=1)
    most = CLIP * float(np.median(sizes)) or 1.0
    return np.asarray(np.minimum(1.0, most / np.maximum(sizes, most)) ** 2, difference.dtype)


def share_left(tokens: Tokens, added: Floats, weights: Floats) -> float:
    """What is left of the difference when `added` is there: the ratio of the weighted sums of squares."""
    before, after = (
        float(np.sum(weights * np.einsum("td,td->t", part, part), dtype=np.float64))
        for part in (tokens.difference, tokens.difference - added)
    )
    return after / before if before else 1.0


@dataclass(frozen=True)
class LayerFit:
    """What came out for one layer."""

    correction: Correction | None
    """None: it did not help on the tokens that the fit had not seen."""
    ridge: float
    """λ, chosen on these tokens."""
    left: float
    """The share of the squared difference that is left on them, 1 where there is no correction."""


def fit_layer(
    tokens: Tokens,
    unseen: NDArray[np.bool_],
    n_experts: int,
    rank: int,
    *,
    ridges: Sequence[float] = RIDGES,
    sweeps: int = SWEEPS,
) -> LayerFit:
    """Fit one layer: λ is chosen by what is left on the tokens of `unseen` ([n_tokens]) when the others are fitted, and
    all are fitted with it then. No correction where none of them helps."""
    judged, problem = tokens.part(unseen), LayerProblem(tokens.part(~unseen), n_experts)
    weights = token_weights(judged.difference)
    best, best_left = 0.0, 1.0
    for ridge in ridges:
        left = share_left(judged, problem.solve(rank, ridge, sweeps=sweeps).apply(judged), weights)
        if left >= best_left and best:
            break
        if left < best_left:
            best, best_left = ridge, left
    del problem
    if not best:
        return LayerFit(None, 0.0, 1.0)
    return LayerFit(LayerProblem(tokens, n_experts).solve(rank, best, sweeps=sweeps), best, best_left)
