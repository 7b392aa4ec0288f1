"""Which criterion keeps the right experts: REAP against the others, against chance, and against two mistakes of
published profilers.

    python benchmarks/quality.py --refine 10m --refine-passes 60 --output benchmarks/results/quality.txt --figure
    docs/images/quality.svg python benchmarks/quality.py --model model.gguf --calibration calib.jsonl --heldout code.txt
    prose.txt

Without --model: the embedded model of `reap demo`, its calibration and its three held-out texts. Profiles once;
calibrates on each domain of the calibration and on all of it; keeps 75, 50 and 25 % of the experts by each criterion
and by five random choices; judges each choice, virtually, on each held-out text (each file a domain). Beside them what
REAP would keep if it were computed with two mistakes (benchmarks/trap_scores.py; needs reap-dump-nodes, or --no-traps)
and, with --refine, the choice that `reap plan --refine` finds on the whole calibration.

A rise is that of the perplexity against the model with all experts, on the same tokens; ± is its standard error, of
random the standard deviation over its seeds. The mean is that of ln(ratio) over the domains, so that none counts more
for having more tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from trap_scores import trap_scores

import reap
from reap.engine.options import EngineOptions
from reap.evaluation.paired_difference import paired_difference
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.evaluation.refine import refine
from reap.scores.ranking import select_experts

CRITERIA = ("reap", "reap_l2", "weighted_ean_sum", "ean_sum", "ean_mean", "frequency", "gate_sum")
TRAPS = {"strided": "reap, strided read as packed", "first": "reap, gate before normalisation"}
RANDOM = "random"
REFINED = "refined"
ALL = "all"
CTX_SIZE = 512
SHAPES = "os^vDP*X"


@dataclass(frozen=True)
class Result:
    """One choice of experts, judged: loss less that of the model as it is, by domain, in nats, and its standard
    error."""

    keep: float
    calibrated: str
    name: str
    seed: int
    loss: dict[str, Any]  # domain -> [n_windows, n_scored]
    rise: dict[str, float]
    error: dict[str, float]
    perplexity: dict[str, float]

    @property
    def mean(self) -> float:
        """Over the domains."""
        return float(np.mean(list(self.rise.values())))


@dataclass(frozen=True)
class Case:
    """What to try on whom."""

    model: Path
    calibration: Path
    heldout: list[Path]
    threads: int


class Jury:
    """The model, the held-out text, and the losses with all experts."""

    def __init__(self, case: Case) -> None:
        self.judge = PlanEvaluator(case.model, case.heldout, EngineOptions(ctx_size=CTX_SIZE, threads=case.threads))
        self.domains = self.judge.text.domains or (case.heldout[0].stem,)
        self.whole = self._losses(None)

    def result(self, keep: float, calibrated: str, name: str, plan: Any, seed: int = 0) -> Result:
        """A plan's losses."""
        loss = self._losses(plan)
        differences = {domain: paired_difference(loss[domain], self.whole[domain]) for domain in self.domains}
        return Result(
            keep,
            calibrated,
            name,
            seed,
            loss,
            {domain: found.mean for domain, found in differences.items()},
            {domain: found.stderr for domain, found in differences.items()},
            {domain: math.exp(values.mean()) for domain, values in loss.items()},
        )

    def _losses(self, plan: Any) -> dict[str, Any]:
        text = self.judge.text
        losses = -self.judge.token_scores(plan).log_probs.reshape(len(text.windows), -1)
        if not text.domains:
            return {self.domains[0]: losses}
        return {domain: losses[[name == domain for name in text.domain_of]] for domain in self.domains}


def results(case: Case, profile: Any, jury: Jury, args: argparse.Namespace) -> Iterator[Result]:
    """Every choice, judged."""
    parts = {
        ALL: profile,
        **({name: profile.domain(name) for name in profile.domains} if len(profile.domains) > 1 else {}),
    }
    traps = (
        {}
        if args.no_traps
        else trap_scores(case.model, case.calibration, ctx_size=CTX_SIZE, max_tokens=args.trap_tokens)
    )
    for keep in args.keep:
        for seed in range(args.seeds):  # chance knows no calibration
            yield jury.result(keep, ALL, RANDOM, reap.plan(profile, keep=keep, metric=RANDOM, seed=seed), seed)
        for calibrated, part in parts.items():
            for name in CRITERIA:
                yield jury.result(keep, calibrated, name, reap.plan(part, keep=keep, metric=name))
            for kind, label in TRAPS.items() if traps else ():
                totals = traps[None if calibrated == ALL else calibrated][kind]
                yield jury.result(keep, calibrated, label, mistaken_plan(part, keep, totals))
        if args.refine:
            made = refine(
                case.model,
                profile,
                case.calibration,
                keep=keep,
                seconds=args.refine,
                max_passes=args.refine_passes,
                threads=case.threads,
            )
            done = made.options["refined"]
            print(
                f"# refined at {keep:.0%}: from {done['start']}, {done['experts_exchanged']} experts exchanged in"
                f" {done['passes']} passes",
                flush=True,
            )
            yield jury.result(keep, ALL, REFINED, made)


def mistaken_plan(profile: Any, keep: float, totals: Any) -> Any:
    """The plan that mistaken scores lead to."""
    plan = reap.plan(profile, keep=keep)
    score, counts = totals.score(), totals.counts.astype(np.int64)
    layers = {
        layer: select_experts(score[row], counts[row], plan.keep, profile.n_groups)
        for row, layer in enumerate(profile.layers.tolist())
    }
    return replace(plan, layers=layers)


# ---- the tables


def percent(nats: float) -> str:
    return f"{math.expm1(nats):+.1%}"


def table(found: Sequence[Result], keep: float, calibrated: str, domains: Sequence[str]) -> Iterator[str]:
    """The criteria at one size, the best on the mean first."""
    chosen = [
        result for result in found if result.keep == keep and result.calibrated == calibrated and result.name != RANDOM
    ]
    chance = [result for result in found if result.keep == keep and result.name == RANDOM]
    yield f"\nkeep {keep:.0%}, calibrated on {calibrated}: rise of the perplexity on"
    yield f"{'by':34}" + "".join(f"{domain:>18}" for domain in (*domains, "mean"))
    lines = [(result.mean, line(result, domains)) for result in chosen]
    lines.append((float(np.mean([result.mean for result in chance])), random_line(chance, domains)))
    yield from (text for _, text in sorted(lines))


def line(result: Result, domains: Sequence[str]) -> str:
    cells = "".join(
        f"{f'{percent(result.rise[domain])} ± {math.exp(result.rise[domain]) * result.error[domain]:.1%}':>18}"
        for domain in domains
    )
    return f"{result.name:34}{cells}{percent(result.mean):>18}"


def random_line(chance: Sequence[Result], domains: Sequence[str]) -> str:
    columns = [[result.rise[domain] for result in chance] for domain in domains] + [[result.mean for result in chance]]
    cells = "".join(
        f"{f'{percent(np.mean(values))} ± {math.exp(np.mean(values)) * np.std(values, ddof=1):.1%}':>18}"
        for values in columns
    )
    return f"{f'{RANDOM}, {len(chance)} seeds':34}{cells}"


def against_chance(found: Sequence[Result], keep: float) -> str:
    """Is REAP better than random by more than the spread, on the mean over the domains?"""
    ours = next(result.mean for result in found if (result.keep, result.calibrated, result.name) == (keep, ALL, "reap"))
    chance = np.array([result.mean for result in found if result.keep == keep and result.name == RANDOM])
    spread = float(chance.std(ddof=1))
    verdict = (
        "better than random beyond the spread"
        if chance.mean() - ours > spread
        else "NOT better than random beyond the spread"
    )
    return (
        f"keep {keep:.0%}: reap {percent(ours)}, random {percent(chance.mean())}, spread of its seeds {spread:.3f}"
        f" nats, best seed {percent(chance.min())}: reap is {verdict} ({(chance.mean() - ours) / spread:.1f} times)"
    )


def where_reap_is_not_first(found: Sequence[Result], keeps: Sequence[float], domains: Sequence[str]) -> Iterator[str]:
    """Each size, calibration and domain at which another criterion has a lower loss, and how surely."""
    calibrations = list(dict.fromkeys(result.calibrated for result in found))
    cases = [(keep, calibrated, domain) for keep in keeps for calibrated in calibrations for domain in domains]
    first, clear = 0, 0
    lines = []
    for keep, calibrated, domain in cases:
        here = {
            result.name: result
            for result in found
            if result.keep == keep and result.calibrated == calibrated and result.name in CRITERIA
        }
        best = min(here.values(), key=lambda result: result.rise[domain])
        if best.name == "reap":
            first += 1
            continue
        margin = paired_difference(here["reap"].loss[domain], best.loss[domain])
        clear += margin.exceeds(2)
        sure = "clearly" if margin.exceeds(2) else "perhaps"
        lines.append(
            f"  keep {keep:.0%}, calibrated on {calibrated}, judged on {domain}: {best.name} is {sure} better, "
            f"by {math.expm1(margin.mean):.1%} ± {math.exp(margin.mean) * margin.stderr:.1%}"
        )
    yield (
        f"\nreap comes first of {len(CRITERIA)} in {first} of {len(cases)} cases; in {clear} another is better by more"
        " than two "
    )
    yield "standard errors (the first of so many, named on the very text, is a little flattered):"
    yield from lines


def refined_against_criteria(found: Sequence[Result], keeps: Sequence[float], domains: Sequence[str]) -> Iterator[str]:
    """Does the refined plan beat every criterion at its size, on text that it never saw?"""
    for keep in keeps:
        here = {
            result.name: result
            for result in found
            if result.keep == keep and result.calibrated == ALL and result.name != RANDOM
        }
        if REFINED not in here:
            continue
        best = min((result for name, result in here.items() if name in CRITERIA), key=lambda result: result.mean)
        ours = here[REFINED]
        joint = [np.concatenate([result.loss[domain] for domain in domains]) for result in (best, ours)]
        margin = paired_difference(*joint)
        word = "beats" if margin.mean > 0 else "does NOT beat"
        sure = "" if abs(margin.mean) > 2 * margin.stderr else ", which may be chance"
        per_domain = ", ".join(
            f"{domain} {percent(ours.rise[domain])} (best criterion {best_on(here, domain)})" for domain in domains
        )
        yield (
            f"keep {keep:.0%}: refined {word} every criterion on all held-out tokens: {best.name}, the next, is "
            f"{math.expm1(margin.mean):+.2%} ± {math.exp(margin.mean) * margin.stderr:.2%}{sure}; {per_domain}"
        )


def best_on(here: dict[str, Result], domain: str) -> str:
    name = min(CRITERIA, key=lambda name: here[name].rise[domain])
    return f"{name} {percent(here[name].rise[domain])}"


def report(found: Sequence[Result], jury: Jury, case: Case, args: argparse.Namespace, seconds: float) -> Iterator[str]:
    """The whole text."""
    digest = hashlib.sha256(case.model.read_bytes()).hexdigest()[:16]
    yield (
        f"reap {reap.__version__}, {platform.machine()}, {os.cpu_count()} cores, {case.threads} threads,"
        f" {seconds:.0f} s"
    )
    yield (
        f"model {case.model.name} (sha256 {digest}…), calibration {case.calibration.name}, windows of {CTX_SIZE} tokens"
    )
    scored = {domain: jury.whole[domain].size for domain in jury.domains}
    yield "with all experts: " + ", ".join(
        f"{domain} {math.exp(jury.whole[domain].mean()):.2f} ({scored[domain]:,} tokens scored)"
        for domain in jury.domains
    )
    yield ""
    yield from (against_chance(found, keep) for keep in args.keep)
    yield from refined_against_criteria(found, args.keep, jury.domains)
    for keep in args.keep:
        for calibrated in dict.fromkeys(result.calibrated for result in found):
            yield from table(found, keep, calibrated, jury.domains)
    yield from where_reap_is_not_first(found, args.keep, jury.domains)


# ---- the figure


def draw(found: Sequence[Result], keeps: Sequence[float], domains: Sequence[str], model: str, target: Path) -> None:
    """Rise of the perplexity by criterion, a panel for each size; a shape for each domain, and a bar for the mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "reap", "font.family": "sans-serif", "font.size": 9})
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(1, len(keeps), figsize=(3.4 * len(keeps), 4.4), sharey=True, squeeze=False)
    names = [
        name for name in (REFINED, *CRITERIA, *TRAPS.values(), RANDOM) if any(result.name == name for result in found)
    ]
    for panel, keep in zip(axes[0], keeps, strict=True):
        for row, name in enumerate(names):
            here = [
                result for result in found if result.keep == keep and result.calibrated == ALL and result.name == name
            ]
            mean = float(np.mean([result.mean for result in here]))
            wrong = name in TRAPS.values() or name == RANDOM
            panel.barh(
                row,
                math.expm1(mean),
                height=0.62,
                color="#c9c9c9" if wrong else "#9ec1e8",
                edgecolor="#333333",
                hatch="///" if wrong else "",
            )
            if len(here) > 1:
                panel.errorbar(
                    math.expm1(mean),
                    row,
                    xerr=math.exp(mean) * np.std([result.mean for result in here], ddof=1),
                    color="black",
                    capsize=4,
                )
            for shape, domain in zip(SHAPES, domains, strict=False):
                value = math.expm1(float(np.mean([result.rise[domain] for result in here])))
                panel.plot(
                    value,
                    row,
                    shape,
                    color="white",
                    markeredgecolor="black",
                    markersize=5.5,
                    label=domain if not row else None,
                )
        panel.set_title(f"{keep:.0%} of the experts kept")
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.set_xlim(left=min(0.0, panel.get_xlim()[0]))
        panel.grid(axis="x", color="#dddddd", zorder=0)
        panel.set_axisbelow(True)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.supxlabel(
        "rise of the perplexity on held-out text: bar, mean over domains; line on random, spread of its seeds"
    )
    figure.suptitle(f"{model}, calibrated on all domains: less is better")
    axes[0][-1].legend(loc="upper right", title="judged on", framealpha=1.0)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, facecolor="white", metadata={"Date": None} if target.suffix == ".svg" else None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--heldout", type=Path, nargs="+")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-traps", action="store_true", help="without the two mistakes, which need reap-dump-nodes")
    parser.add_argument("--trap-tokens", type=int, help="calibration tokens for the two mistakes; all by default")
    parser.add_argument("--refine", type=seconds_of, help="time for `reap plan --refine` at each size")
    parser.add_argument(
        "--refine-passes", type=float, help="at most so many passes, which make it independent of the machine's speed"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.model and not (args.calibration and args.heldout):
        parser.error("--model needs --calibration and --heldout")
    return args


def seconds_of(text: str) -> float:
    """90, 90s, 10m, 1h."""
    return float(text.rstrip("smh")) * {"s": 1, "m": 60, "h": 3600}.get(text[-1], 1)


def main() -> None:
    args = parse_arguments()
    started = time.perf_counter()
    data = Path(str(files("reap") / "data"))
    case = Case(
        args.model or next(data.glob("*.gguf")),
        args.calibration or data / "calibration.jsonl",
        args.heldout or sorted((data / "heldout").glob("*.txt")),
        args.threads,
    )
    profile = reap.profile(case.model, case.calibration, ctx_size=CTX_SIZE, threads=case.threads)
    jury = Jury(case)
    found = []
    for result in results(case, profile, jury, args):
        found.append(result)
        print(f"# {result.keep:.0%} {result.calibrated} {result.name} {percent(result.mean)}", flush=True)
    text = "\n".join(report(found, jury, case, args, time.perf_counter() - started)) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    if args.figure:
        draw(found, args.keep, jury.domains, str(profile.model.get("name") or case.model.stem), args.figure)


if __name__ == "__main__":
    main()
