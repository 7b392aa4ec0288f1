"""The scores that two mistakes of published profilers would give, computed from what the engine itself wrote down.

    python benchmarks/trap_scores.py MODEL CALIBRATION.jsonl [--max-tokens 20000]

Runs `reap-dump-nodes` (tests/tools: llama.cpp alone, none of reap's core) over the calibration and adds up REAP three
times:

right     the chosen experts read through the view's strides, the gate that multiplies the output; must agree with `reap
          profile`
strided   the mistake: `ffn_moe_topk` is a view of the full ranking, n_experts apart; read as if it were packed, it
          gives the whole rankings of the first tokens instead of the choices of all, so that every expert seems to be
          chosen about equally often
first     the mistake: the first `ffn_moe_weights` taken for the gate, before normalisation

and prints how far the mistaken counts and scores are from the right ones. `benchmarks/quality.py` prunes by them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import reap
from reap.engine.options import EngineOptions
from reap.engine.session import SessionTokenizer, open_session
from reap.text.windows import Calibration

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.graph_oracle import GATES, OUTPUTS, Nodes, dump, last
from helpers.llama_tools import find_tool

KINDS = ("right", "strided", "first")
SAMPLES_AT_ONCE = 10  # what is written down is about 50 KB a token


class Totals:
    """counts and sum of g·‖f‖ of each layer and expert, [n_layers, n_experts]; of one domain."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self.counts = np.zeros((n_layers, n_experts))
        self.sums = np.zeros((n_layers, n_experts))

    def add(self, row: int, ids: Any, gates: Any, norms: Any) -> None:
        np.add.at(self.counts[row], ids, 1)
        np.add.at(self.sums[row], ids, gates * norms)

    def score(self) -> Any:
        """The mean, NaN where an expert was never chosen."""
        with np.errstate(invalid="ignore"):
            return self.sums / self.counts


def tokenised(
    model: Path, calibration: Path, ctx_size: int, max_tokens: int | None
) -> Iterator[tuple[str | None, list[int]]]:
    """(domain, token ids) of each window of the calibration."""
    session = open_session(model, EngineOptions(ctx_size=ctx_size, threads=1))
    source = Calibration(str(calibration), ctx_size=ctx_size, max_tokens=max_tokens)
    for window in source.windows(SessionTokenizer(session)):
        yield window.domain, window.tokens.tolist()


def packed(nodes: Nodes, layer: int, shape: tuple[int, int]) -> Any:
    """`ffn_moe_topk` [n_tokens, n_used] read without its strides: the ranking's own memory from its start on."""
    ranking = nodes[f"ffn_moe_argsort-{layer}"].ravel()
    return ranking[: shape[0] * shape[1]].reshape(shape)


def add_sample(totals: dict[str, Totals], nodes: Nodes, layers: Sequence[int], n_tokens: int) -> None:
    for row, layer in enumerate(layers):
        ids = nodes[f"ffn_moe_topk-{layer}"].reshape(n_tokens, -1)
        gates = last(nodes, GATES, layer).reshape(ids.shape).astype(np.float64)
        first = nodes[f"ffn_moe_weights-{layer}"].reshape(ids.shape).astype(np.float64)
        norms = np.linalg.norm(last(nodes, OUTPUTS, layer).reshape(*ids.shape, -1).astype(np.float64), axis=2)
        totals["right"].add(row, ids, gates, norms)
        totals["strided"].add(row, packed(nodes, layer, ids.shape), gates, norms)
        totals["first"].add(row, ids, first, norms)


def trap_scores(
    model: Path, calibration: Path, *, ctx_size: int = 512, max_tokens: int | None = None
) -> dict[str | None, dict[str, Totals]]:
    """domain (None: all) -> kind -> totals. Needs reap-dump-nodes."""
    program = find_tool("reap-dump-nodes")
    if program is None:
        raise SystemExit(
            "reap-dump-nodes is missing: cmake --preset tools && cmake --build build/tools --target reap-llama-tools"
        )
    info = reap.inspect(model)
    samples = list(tokenised(model, calibration, ctx_size, max_tokens))
    domains = [None, *dict.fromkeys(domain for domain, _ in samples if domain is not None)]
    totals = {domain: {kind: Totals(len(info.moe_layers), info.n_experts) for kind in KINDS} for domain in domains}
    with tempfile.TemporaryDirectory() as directory:
        for start in range(0, len(samples), SAMPLES_AT_ONCE):
            part = samples[start : start + SAMPLES_AT_ONCE]
            for (domain, tokens), nodes in zip(
                part, dump(program, model, [ids for _, ids in part], Path(directory)), strict=True
            ):
                for name in {None, domain}:
                    add_sample(totals[name], nodes, info.moe_layers, len(tokens))
    return totals


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's, of two score vectors without ties of note."""
    return float(np.corrcoef(np.argsort(np.argsort(np.nan_to_num(a))), np.argsort(np.argsort(np.nan_to_num(b))))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--ctx-size", type=int, default=512)
    parser.add_argument("--max-tokens", type=int)
    args = parser.parse_args()
    totals = trap_scores(args.model, args.calibration, ctx_size=args.ctx_size, max_tokens=args.max_tokens)[None]
    exact: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": "off", "threads": 1}
    profile = reap.profile(args.model, args.calibration, ctx_size=args.ctx_size, max_tokens=args.max_tokens, **exact)
    right = totals["right"]
    moved = int(np.abs(right.counts - profile.counts).sum()) // 2
    difference = np.nanmax(np.abs(right.score() / profile.score("reap") - 1))
    print(
        f"right: {moved:,} of {int(right.counts.sum()):,} routings unlike reap's own profile; REAP differs by at most"
        f" {difference:.1e}"
    )
    for kind in KINDS[1:]:
        wrong = totals[kind]
        print(
            f"{kind}: "
            + "; ".join(_layer_line(right, wrong, row, int(layer)) for row, layer in enumerate(profile.layers))
        )


def _layer_line(right: Totals, wrong: Totals, row: int, layer: int) -> str:
    counts, truth = wrong.counts[row], right.counts[row]
    correlation = rank_correlation(right.score()[row], wrong.score()[row])
    return (
        f"layer {layer}: counts {counts.min():.0f} to {counts.max():.0f} (truth {truth.min():.0f} to"
        f" {truth.max():.0f}), rank correlation of REAP {correlation:.2f}"
    )


if __name__ == "__main__":
    main()
