"""What a search for better experts should measure: the surprise at the token that came, or the divergence from the
whole model?

    python benchmarks/refine_noise.py [--moves 40]

Half of the embedded model's experts are gone. One expert at a time goes or comes back, and both losses are measured on
a quarter of the calibration text. Prints how many standard errors (of paired differences) the change is from nothing,
by either measure, and the medians: twice as many mean that a quarter of the text does.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import numpy as np

import reap
from reap.engine.options import EngineOptions
from reap.evaluation.paired_difference import paired_difference
from reap.evaluation.plan_evaluator import PlanEvaluator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=40)
    args = parser.parse_args()
    data = Path(str(files("reap") / "data"))
    model, text = next(data.glob("*.gguf")), data / "calibration.jsonl"
    profile = reap.profile(model, text, ctx_size=512, threads=1)
    plan = reap.plan(profile, keep=0.5, metric="weighted_ean_sum")
    judge = PlanEvaluator(model, text, EngineOptions(ctx_size=512, threads=1))
    windows = range(0, len(judge.text.windows), 4)
    rng = np.random.default_rng(0)

    def losses(kept: dict[int, tuple[int, ...]]) -> list[np.ndarray]:
        found = judge.try_experts(kept, windows)
        assert found.kl is not None
        return [values.reshape(len(windows), -1) for values in (-found.log_probs, found.kl)]

    before = losses(plan.layers)
    surely = []
    for _ in range(args.moves):
        layer = int(rng.choice(list(plan.layers)))
        expert = int(rng.integers(plan.n_experts))
        kept = tuple(sorted(set(plan.layers[layer]) ^ {expert}))
        changes = [
            paired_difference(after, first)
            for after, first in zip(losses({**plan.layers, layer: kept}), before, strict=True)
        ]
        surely.append([abs(change.mean) / change.stderr if change.stderr else 0.0 for change in changes])
        move = "goes" if expert in plan.layers[layer] else "comes back"
        shown = ", ".join(
            f"{name} {change.mean:+.5f} ± {change.stderr:.5f}"
            for name, change in zip(("−ln p", "KL"), changes, strict=True)
        )
        print(f"layer {layer}, expert {expert:2} {move}: {shown}", flush=True)
    medians = np.median(surely, axis=0)
    print(f"median distance from nothing, in standard errors: −ln p {medians[0]:.1f}, KL {medians[1]:.1f}")


if __name__ == "__main__":
    main()
