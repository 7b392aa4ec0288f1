"""Profiles for tests, made of random routings so that every sum is consistent."""

from __future__ import annotations

from typing import Any

import numpy as np

from helpers.sums import COUNTS_AND_SUMS
from reap.scores.profile import Profile


def random_sums(
    rng: np.random.Generator, n_layers: int, n_experts: int, tokens: int = 200, used: int = 2
) -> dict[str, Any]:
    """The arrays of `Profile.from_sums` for `tokens` tokens, each routed to `used` of the experts; the last expert is
    never chosen."""
    sums: dict[str, Any] = {name: np.zeros((n_layers, n_experts)) for name in COUNTS_AND_SUMS}
    sums["counts"] = np.zeros((n_layers, n_experts), dtype=np.int64)
    for layer in range(n_layers):
        for _ in range(tokens):
            for expert in rng.choice(n_experts - 1, size=used, replace=False):
                gate, norm = rng.random() + 0.01, rng.gamma(2.0) + 0.01
                sums["counts"][layer, expert] += 1
                sums["gate_sum"][layer, expert] += gate
                sums["norm_sum"][layer, expert] += norm
                sums["gated_norm_sum"][layer, expert] += gate * norm
                sums["gated_norm_sq_sum"][layer, expert] += (gate * norm) ** 2
                sums["norm_sq_sum"][layer, expert] += norm**2
                sums["norm_max"][layer, expert] = max(norm, sums["norm_max"][layer, expert])
    sums["total_tokens"] = np.full(n_layers, tokens)
    return sums


def add_sums(parts: list[dict[str, Any]]) -> dict[str, Any]:
    whole = {name: sum(part[name] for part in parts) for name in (*COUNTS_AND_SUMS, "total_tokens")}
    whole["norm_max"] = np.maximum.reduce([part["norm_max"] for part in parts])
    return whole


def make_profile(
    seed: int = 0,
    *,
    layers: tuple[int, ...] = (1, 3),
    n_experts: int = 8,
    domains: tuple[str, ...] = (),
    model: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
) -> Profile:
    rng = np.random.default_rng(seed)
    parts = {name: random_sums(rng, len(layers), n_experts) for name in domains}
    whole = add_sums(list(parts.values())) if parts else random_sums(rng, len(layers), n_experts)
    described = {
        "name": "tiny",
        "architecture": "qwen3moe",
        "fingerprint": "sha256:" + "0" * 64,
        "n_experts": n_experts,
        "n_experts_used": 2,
    }
    return Profile.from_sums(
        layers=layers,
        **whole,
        model=described | (model or {}),
        calibration=calibration
        or {"files": [f"{seed}.jsonl"], "sha256": [f"{seed:064x}"], "samples": 3, "tokens": 200},
        engine={"reap": "0", "llama_cpp": "test"},
        domains=parts,
    )


def from_scores(scores: list[list[float]], counts: list[list[int]] | None = None, **model: Any) -> Profile:
    """A profile whose metric "reap" is exactly `scores` (where counts are powers of two)."""
    norm = np.array(scores, dtype=np.float64)
    n = np.array(counts, dtype=np.int64) if counts is not None else np.ones(norm.shape, dtype=np.int64)
    norm = np.where(n > 0, norm, 0.0)
    sums = dict(
        gate_sum=n * 1.0, norm_sum=n * norm, gated_norm_sum=n * norm, gated_norm_sq_sum=n * norm**2, norm_max=norm
    )
    sums["norm_sq_sum"] = n * norm**2
    described = {"n_experts": norm.shape[1], "n_experts_used": 1} | model
    return Profile.from_sums(layers=range(norm.shape[0]), total_tokens=n.sum(axis=1), counts=n, **sums, model=described)


def reference_document(n_experts: int = 4) -> dict[str, Any]:
    """What llama-expert-profile writes: layers at the top level, means, no sums."""
    layer = {
        "total_tokens": 10,
        "activation_counts": [4, 3, 2, 0],
        "activation_frequency": [0.4, 0.3, 0.2, 0.0],
        "avg_gate_weight": [0.5, 0.25, 0.75, 0.0],
        "ean_mean": [1.0, 2.0, 3.0, 0.0],
        "reap": [0.5, 0.5, 2.0, 0.0],
        "never_activated": 1,
    }
    assert n_experts == 4
    return {"0": layer, "2": dict(layer, reap=[2.0, 0.5, 0.5, 0.0])}


def large_profile(
    seed: int = 0, *, n_layers: int = 60, n_experts: int = 512, used: int = 10, tokens: int = 200_000
) -> Profile:
    """A profile of the size of the largest models, made up: uneven loads, norms that grow with depth, two domains, one
    outlier."""
    rng = np.random.default_rng(seed)
    parts = {}
    for name, share in (("code", 0.6), ("prose", 0.4)):
        seen = int(tokens * share)
        popularity = rng.dirichlet(np.full(n_experts, 0.7), size=n_layers)
        counts = np.minimum(np.stack([rng.multinomial(seen * used, row) for row in popularity]), seen).astype(np.int64)
        norm = rng.lognormal(0, 0.35, (n_layers, n_experts)) * np.linspace(1, 30, n_layers)[:, None]
        norm[n_layers // 2, 7] *= 200
        gate = rng.beta(2, 12, (n_layers, n_experts))
        mean = gate * norm
        sums: dict[str, Any] = dict(
            counts=counts, gate_sum=counts * gate, norm_sum=counts * norm, gated_norm_sum=counts * mean
        )
        sums |= dict(gated_norm_sq_sum=counts * mean**2 * 1.2, norm_sq_sum=counts * norm**2 * 1.2)
        sums |= dict(norm_max=np.where(counts > 0, norm, 0.0))
        parts[name] = sums | {"total_tokens": np.full(n_layers, seen)}
    model = {
        "name": f"made up, {n_layers} × {n_experts}",
        "architecture": "qwen3next",
        "n_experts": n_experts,
        "n_experts_used": used,
    }
    calibration = {"files": ["made-up.jsonl"], "samples": 1_000, "tokens": tokens}
    layers, whole = range(1, n_layers + 1), add_sums(list(parts.values()))
    return Profile.from_sums(
        layers=layers, **whole, model=model, calibration=calibration, engine={"reap": "0"}, domains=parts
    )
