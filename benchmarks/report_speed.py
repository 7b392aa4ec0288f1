"""How large the report of a 60 × 512 profile is, and how long a browser takes to open it.

    python benchmarks/report_speed.py [--runs 7]

Needs Chromium and its driver (Debian: chromium, chromium-driver) and the extra `test`. A run starts a fresh browser:
"first" is its first page, "again" the median of three more. Time is counted from the start of the navigation until
every figure is drawn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import reap

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.browser import browser
from helpers.profiles import large_profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "report.html"
        profile = large_profile()
        reap.report(profile, path, force=True)
        started = time.perf_counter()
        reap.report(profile, path, force=True)
        print(f"{profile.n_layers} layers of {profile.n_experts} experts, {len(profile.domains)} domains")
        print(f"written in {time.perf_counter() - started:.2f} s, {path.stat().st_size / 1e6:.2f} MB")
        first, again = [], []
        for _ in range(runs):
            with browser() as opened:
                first.append(opened.open(path))
                again.append(statistics.median(opened.open(path) for _ in range(3)))
        for name, values in (("first page of a fresh browser", first), ("again", again)):
            print(
                f"{name}: all figures drawn after {statistics.median(values):.0f} ms, {min(values):.0f} to"
                f" {max(values):.0f} in {runs} runs"
            )


if __name__ == "__main__":
    main()
