"""Can `reap plan --refine` make things worse? Many searches, each judged on held-out text beside what it began with.

    python benchmarks/refine_safety.py [--seeds 10] [--passes 6 15] [--keep 0.25] [--ctx-size 128] [--every 3]
    python benchmarks/refine_safety.py --model D/model.gguf --calibration D/calibration.jsonl --heldout D/heldout.jsonl

The first is on the embedded model, the second on another one (benchmarks/small_model.py trains one in minutes). Every
n-th line of the calibration is searched on. For each seed, which divides the windows, and each budget, in passes over
that text and so not in seconds of a machine: what came back, what the windows held out said of it, and how the loss on
held-out text changed beside the best plain criterion (positive: better), with its standard error.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from importlib.resources import files
from pathlib import Path

import reap
from reap.engine.options import EngineOptions
from reap.evaluation.paired_difference import paired_difference
from reap.evaluation.plain_plans import plain_plans
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.evaluation.quality_metrics import TokenScores
from reap.scores.plan import PrunePlan

CHOICE = {"protect": [], "blend": None, "protect_super_experts": False, "seed": 0}


def arguments() -> argparse.Namespace:
    """The command line."""
    data = Path(str(files("reap") / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=next(data.glob("*.gguf")))
    parser.add_argument("--calibration", type=Path, default=data / "calibration.jsonl")
    parser.add_argument("--heldout", type=Path, nargs="+", default=sorted((data / "heldout").iterdir()))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--passes", type=float, nargs="+", default=[6.0, 15.0])
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--ctx-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    engine = {"ctx_size": args.ctx_size, "threads": 1}
    heldout = PlanEvaluator(args.model, args.heldout, EngineOptions(**engine))
    reference = heldout.reference()
    known: dict[str, TokenScores] = {}

    def judged(plan: PrunePlan) -> TokenScores:
        key = repr(plan.layers)
        if key not in known:
            known[key] = heldout.token_scores(plan, reference=reference)
        return known[key]

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        lines = args.calibration.read_text(encoding="utf-8").splitlines(keepends=True)
        text.write_text("".join(lines[:: args.every]), encoding="utf-8")
        profile = reap.profile(args.model, args.calibration, **engine)
        plain = plain_plans(profile, args.keep, None, CHOICE)
        print(f"# {args.model.name}, {args.keep:.0%} of the experts, {len(heldout.text.windows)} windows held out")
        worst, n_worse, n_refined, n = 0.0, 0, 0, 0
        for passes in args.passes:
            for seed in range(args.seeds):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", reap.ReapWarning)
                    made = reap.refine(
                        args.model, profile, text, keep=args.keep, seconds=1e6, max_passes=passes, seed=seed, **engine
                    )
                record = made.options["refined"]
                start = plain[record["best_criterion"]]
                gain = paired_difference(judged(made).log_probs, judged(start).log_probs)
                errors = gain.mean / gain.stderr if gain.stderr else 0.0
                worst, n = min(worst, errors), n + 1
                n_worse += errors < -1
                n_refined += record["result"] == "refined"
                print(
                    f"{passes:g} passes, seed {seed}: {record['best_criterion']} -> {record['result']}"
                    f" ({record['windows']} windows, {record['experts_tried']} tried,"
                    f" {record['experts_exchanged']} exchanged); held out by the search: KL"
                    f" {record['kl_gain']:+.4f} ± {record['kl_gain_stderr']:.4f};"
                    f" held-out text: loss {gain.mean:+.4f} ± {gain.stderr:.4f}",
                    flush=True,
                )
    print(
        f"worse than the start by more than a standard error: {n_worse} of {n}; the worst {worst:+.1f} standard errors;"
        f" {n_refined} of {n} took what was found"
    )


if __name__ == "__main__":
    main()
