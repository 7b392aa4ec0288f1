"""Coverage-guided fuzzing of everything that reads a stranger's file: GGUF models and splits, importance matrices,
plans, profiles, sweeps, resume files, safetensors headers and indexes, chat templates, calibration lines with messages.

    pip install atheris
    python benchmarks/fuzz.py [--runs 1000000] [--targets gguf,split,template] [--corpus DIR]

Each input may end in a `ReapError` or in success, within a second and 200 MB; anything else is a crash, kept as
`crash-*` in the corpus folder. What opens is used as a user would use it (fuzz_targets.py): inspected, planned for,
pruned as a dry run, rendered. The runs are shared out among the targets, which run one after the other; a summary of
inputs, seconds, slowest input and peak memory comes last.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from fuzz_targets import TARGETS

PACKAGE = Path(__file__).resolve().parent.parent / "python"
MAX_INPUT_BYTES = 16_384
TIMEOUT_SECONDS = 1
# of the whole process, the interpreter, numpy and the fuzzer's own tables included
MEMORY_LIMIT_MB = 200


# ---- one target in this process


def fuzz(target: str, arguments: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    # an editable install brings a loader of its own, which atheris cannot look through
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
    sys.path.insert(0, str(PACKAGE))
    with atheris.instrument_imports(include=["reap"]):
        pass
    from reap.errors import ReapError

    warnings.simplefilter("ignore")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    made = TARGETS[target]
    made.prepare(directory)
    path, output = directory / made.name, directory / "output"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            made.use(path, output)
        except ReapError:
            return

    for seed in sorted(Path(arguments[-1]).glob("seed*")):
        one(seed.read_bytes())  # what is imported late must not count as the first input's time
    mutator = {} if made.mutate is None else {"custom_mutator": made.mutate}
    atheris.Setup([sys.argv[0], *arguments], one, **mutator)
    atheris.Fuzz()


# ---- all targets, one after the other


def run_target(target: str, runs: int, corpus: Path, seconds: int) -> dict[str, Any]:
    """What libFuzzer says of it in the end."""
    folder = corpus / target
    folder.mkdir(parents=True, exist_ok=True)
    TARGETS[target].seed(folder)
    words = folder.with_suffix(".dict")
    tokens = TARGETS[target].tokens
    words.write_text("".join('"' + re.sub(r'(["\\])', r"\\\1", token) + '"\n' for token in tokens), encoding="utf-8")
    options = [
        f"-runs={runs}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={TIMEOUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_LIMIT_MB}",
    ]
    options += [
        f"-dict={words}",
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
        "-verbosity=0",
        f"-max_total_time={seconds}",
    ]
    command = [sys.executable, __file__, "--one", target, *options, str(folder)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    figures: dict[str, Any] = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr)}
    figures |= {"seconds": time.perf_counter() - started, "exit": done.returncode, "log": done.stderr + done.stdout}
    return figures


def main() -> int:
    """Exit code 1 where a target crashed, hung or grew."""
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs, all targets together")
    parser.add_argument("--seconds", type=int, default=0, help="most time for one target; 0: no limit")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--corpus", type=Path, help="where inputs are kept from run to run; forgotten otherwise")
    options = parser.parse_args()
    targets = options.targets.split(",")
    whole = sum(TARGETS[target].share for target in targets)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, total, failed = options.corpus or Path(scratch), 0, False
        print(
            f"{'target':10} {'inputs':>10} {'seconds':>8} {'per second':>10} {'slowest s':>9} {'peak MB':>8}",
            flush=True,
        )
        for target in targets:
            figures = run_target(target, round(options.runs * TARGETS[target].share / whole), corpus, options.seconds)
            inputs, seconds = figures.get("number_of_executed_units", 0), figures["seconds"]
            total += inputs
            slowest, peak = figures.get("slowest_unit_time_sec", "?"), figures.get("peak_rss_mb", "?")
            print(
                f"{target:10} {inputs:10,} {seconds:8.0f} {inputs / seconds:10,.0f} {slowest:>9} {peak:>8}", flush=True
            )
            if figures["exit"]:
                failed = True
                print(figures["log"][-3000:], file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print(f"{total:,} inputs in all; the largest process took {peak} MB; {'FAILED' if failed else 'no crash, no hang'}")
    print(f"on {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
