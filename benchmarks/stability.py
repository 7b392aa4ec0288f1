"""Is the overlap that `Profile.stability` promises kept by another profile of as much text?

    python benchmarks/stability.py [--splits 200] [--model M.gguf --calibration C.jsonl]

Profiles the embedded calibration once, each line apart. Then many times: its lines in a random order, one half (or
quarter, or eighth) a profile that says how much of its choice another one would share, as many other lines that other
one. Prints, for each metric, number kept and amount of text, the mean promise, what was observed on the mean, and how
far a single promise lies from what was observed; then the curve: promises of single layers in bins, and what was
observed of these.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import reap
from reap.scores.records import ARRAYS, add_up
from reap.scores.replicates import Replicates, part_of

METRICS = ("reap", "weighted_ean_sum", "frequency", "ean_mean", "reap_l2", "msan")
KEEPS = (0.75, 0.5, 0.25)
PARTS = (2, 4, 8)
BINS = (0.0, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 1.01)


@dataclass(frozen=True)
class Lines:
    """What each line of a calibration adds to the sums."""

    whole: reap.Profile
    sums: Sequence[dict[str, NDArray[np.float64]]]

    @classmethod
    def measure(cls, model: Path, calibration: Path, ctx_size: int = 512) -> Lines:
        """Each line as a domain of its own, of which a profile holds at most 256."""
        lines = [json.loads(line) for line in calibration.read_text(encoding="utf-8").splitlines() if line][:256]
        apart = [{**line, "domain": f"{number:03}"} for number, line in enumerate(lines)]
        whole = reap.profile(model, apart, ctx_size=ctx_size, threads=1)
        sums = [{name: getattr(part, name) for name in ARRAYS} for part in whole.parts.values()]
        return cls(replace(whole, parts={}), sums)

    def profile(self, numbers: Iterable[int]) -> reap.Profile:
        """A profile of these lines, in the order of the calibration."""
        chosen = [self.sums[number] for number in sorted(numbers)]
        made = reap.Profile.from_sums(layers=self.whole.layers, **add_up(chosen), model=self.whole.model)
        parts = [(part_of(unit), sums) for unit, sums in enumerate(chosen)]
        return replace(made, replicates=Replicates.of(parts))


def promises(
    lines: Lines, metric: str, keep: float, share: int, splits: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """float64 [splits, n_layers] each: promised and observed, of 1/share of the lines and as many others."""
    rng = np.random.default_rng([share, len(metric), round(100 * keep)])
    size = len(lines.sums) // share
    promised, observed = [], []
    for _ in range(splits):
        order = rng.permutation(len(lines.sums)).tolist()
        one, other = lines.profile(order[:size]), lines.profile(order[size : 2 * size])
        promised.append(list(one.stability(keep, metric).layers.values()))
        observed.append([layer.overlap for layer in reap.compare(one, other, keep=keep, metric=metric).layers])
    return np.array(promised), np.array(observed)


def main() -> None:
    data = Path(str(files("reap") / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=next(data.glob("*.gguf")))
    parser.add_argument("--calibration", type=Path, default=data / "calibration.jsonl")
    parser.add_argument("--splits", type=int, default=200)
    args = parser.parse_args()
    lines = Lines.measure(args.model, args.calibration)
    print(f"{len(lines.sums)} lines, {args.splits} splits; per cent of the kept experts", flush=True)
    worst, every = 0.0, []
    for share in PARTS:
        for metric in METRICS:
            for keep in KEEPS:
                promised, observed = promises(lines, metric, keep, share, args.splits)
                every.append((promised.ravel(), observed.ravel()))
                mean = 100 * promised.mean(), 100 * observed.mean()
                apart = 100 * (promised.mean(axis=1) - observed.mean(axis=1))
                worst = max(worst, abs(mean[0] - mean[1]))
                print(
                    f"1/{share} of the lines, {metric:16} keep {keep:.0%}: promised {mean[0]:.1f}, observed"
                    f" {mean[1]:.1f}, difference {mean[0] - mean[1]:+.1f}; of one promise"
                    f" {np.sqrt((apart**2).mean()):.1f}",
                    flush=True,
                )
    print(f"largest difference of the means {worst:.1f} points")
    promised, observed = (np.concatenate(values) for values in zip(*every, strict=True))
    for low, high in pairwise(BINS):
        chosen = (promised >= low) & (promised < high)
        if chosen.sum() >= 20:
            print(
                f"layers promised {100 * low:.0f} to {min(100 * high, 100):.0f}: {chosen.sum():6} of them, promised"
                f" {100 * promised[chosen].mean():.1f}, observed {100 * observed[chosen].mean():.1f}"
            )


if __name__ == "__main__":
    main()
