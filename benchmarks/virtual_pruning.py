"""What evaluating a plan virtually costs, how near it is to the pruned file, and what less memory for the reference
does.

    python benchmarks/virtual_pruning.py [--windows 8] [--rounds 9]

On the embedded model, one thread, with half and with a quarter of its experts by REAP. The paired times of one window
of 512 tokens: with all experts, virtually pruned, and virtually pruned with the divergence from the reference; medians
and ranges of the ratios.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import reap
from reap.engine.options import EngineOptions
from reap.evaluation.plan_evaluator import PlanEvaluator

DATA = Path(str(files("reap") / "data"))
TEXTS = [DATA / "heldout" / f"{domain}.txt" for domain in ("c", "english", "python")]
OPTIONS = EngineOptions(ctx_size=512, threads=1)
TOKENS_KEPT = (2048, 512, 256, 128, 64)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def show_speed(judge: PlanEvaluator, plan: reap.PrunePlan, rounds: int) -> None:
    """Ratios of paired runs over the text."""
    reference = judge.reference()
    judge.token_scores(plan)  # the survey
    runs = [
        (
            seconds(judge.token_scores),
            seconds(lambda: judge.token_scores(plan)),
            seconds(lambda: judge.token_scores(plan, reference=reference)),
        )
        for _ in range(rounds)
    ]
    n_windows = len(judge.text.windows)
    print(
        f"all experts: {statistics.median(run[0] for run in runs) / n_windows * 1e3:.1f} ms a window of"
        f" {judge.text.ctx_size} tokens"
    )
    for index, what in ((1, "virtually pruned"), (2, "virtually pruned, with the divergence")):
        ratios = sorted(run[index] / run[0] for run in runs)
        print(f"{what}: {statistics.median(ratios):.3f} of that ({ratios[0]:.3f} to {ratios[-1]:.3f}, {rounds} rounds)")


def show_nearness(model: Path, plan: reap.PrunePlan, directory: Path) -> None:
    """The figures virtually and from the file."""
    small = directory / f"{plan.keep}.gguf"
    reap.prune(model, small, plan)
    virtual = reap.evaluate(model, TEXTS, plan=plan, threads=1)
    physical = reap.evaluate(small, TEXTS, reference=model, threads=1)
    for name, found in (("virtually", virtual), ("from the file", physical)):
        print(
            f"{plan.keep} experts, {name}: perplexity {found.perplexity:.5f}, kl_mean {found.kl_mean:.5f}, top1"
            f" {found.top1:.4f}"
        )


def show_memory(model: Path, plan: reap.PrunePlan, windows: int) -> None:
    """The same figures with less and less kept of the reference."""
    print("tokens kept | kl_rest | kl_mean")
    n_positions = windows * len(TEXTS) * (OPTIONS.ctx_size // 2 - 1)
    for n_kept in TOKENS_KEPT:
        judge = PlanEvaluator(model, TEXTS, OPTIONS, max_windows=windows, reference_bytes=8 * n_kept * n_positions)
        found = judge.score(plan)
        print(f"{judge.reference().windows[0].log_probs.shape[1]} | {found.kl_rest:.3f} | {found.kl_mean:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="of each of the three domains, for speed and memory")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"reap {reap.__version__}, {platform.machine()}")
    model = next(DATA.glob("*.gguf"))
    profile = reap.profile(model, DATA / "calibration.jsonl", ctx_size=512, max_tokens=20_000, threads=1)
    half, quarter = reap.plan(profile, keep=0.5), reap.plan(profile, keep=0.25)
    show_speed(PlanEvaluator(model, TEXTS, OPTIONS, max_windows=args.windows), half, args.rounds)
    with tempfile.TemporaryDirectory() as directory:
        for plan in (half, quarter):
            show_nearness(model, plan, Path(directory))
    show_memory(model, half, args.windows)


if __name__ == "__main__":
    main()
