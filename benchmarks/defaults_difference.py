"""How far a profile with the default options is from the exact one: an F16 cache and flash attention against an F32
cache without it.

    python benchmarks/defaults_difference.py [--max-tokens 20000]

Runs the two golden models of the tests and, where it is installed, the embedded model of `reap demo`, each twice, and
prints how many routings went to another expert, the largest relative difference of REAP, and how many of the experts
that a plan keeps are the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

import reap

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
EXACT: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
COLUMNS = ("model", "tokens", "routings", "moved", "REAP differs by, at most", "median", "kept the same")


def sources() -> Iterator[tuple[Path, Any]]:
    """Models, and what to profile each on."""
    for path in sorted(GOLDEN.glob("*.gguf")):
        yield path, [{"tokens": tokens} for tokens in json.loads(path.with_suffix(".json").read_text())["samples"]]
    data = Path(str(files("reap") / "data"))
    for path in sorted(data.glob("*.gguf")):
        yield path, data / "calibration.jsonl"


def compare(model: Path, calibration: Any, max_tokens: int) -> tuple[str, ...]:
    """One line of the table."""
    ctx_size = min(512, reap.inspect(model).context_length)
    options: dict[str, Any] = {"ctx_size": ctx_size, "threads": 1, "max_tokens": max_tokens}
    default = reap.profile(model, calibration, **options)
    exact = reap.profile(model, calibration, **options, **EXACT)
    moved = int(np.abs(default.counts - exact.counts).sum()) // 2
    both = (default.counts > 0) & (exact.counts > 0)
    ratio = np.abs(default.score("reap")[both] / exact.score("reap")[both] - 1)
    overlap = reap.compare(default, exact, keep=0.5).overlap
    tokens = f"{default.calibration['tokens']:,}"
    return (
        model.stem,
        tokens,
        f"{exact.counts.sum():,}",
        f"{moved:,}",
        f"{ratio.max():.1e}",
        f"{np.median(ratio):.1e}",
        f"{overlap:.1%}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=20_000, help="of the embedded model's calibration")
    args = parser.parse_args()
    print(
        f"reap {reap.__version__}; moved: routings that went to another expert; kept the same: of the half that a plan"
        " keeps by REAP"
    )
    print(" | ".join(COLUMNS))
    for model, calibration in sources():
        print(" | ".join(compare(model, calibration, args.max_tokens)), flush=True)


if __name__ == "__main__":
    main()
