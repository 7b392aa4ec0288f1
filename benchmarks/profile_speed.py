"""Profile speed against plain forward passes of the same engine, on models with the dimensions of real ones and few
layers.

    python benchmarks/profile_speed.py [--models qwen3 nemotron] [--types Q8_0 Q4_K] [--threads 2 1] [--repeats 5]
    [--no-repack]

One run, one session for each model and thread count, the passes in turn: `all` yields every token's logits, `last` the
last token's (what llama-bench times), `profile` stops after the last MoE layer. Ratios are of medians of paired passes;
above 1 the profile is faster. `all` computes all layers and the head; `last` skips the head and nearly all of the last
feed-forward block, which a profile needs: with L layers the bound of the ratio to `last` is about (L - 1) / L, so both
ratios are also given for the real model's depth, from the measured time of a layer, of the head, and of what `last`
skips.

Memory is the peak resident size of a process that only profiles, beside one that only runs `all`, with the same
context.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from big_models import NEMOTRON, QWEN3, Dimensions, write_model

from gguf import GGMLQuantizationType as Type
from reap.engine import native

MODELS = {"qwen3": QWEN3, "nemotron": NEMOTRON}
N_TOKENS = 512
N_SHORT = 16


def main() -> None:
    args = parse_arguments()
    engine = native.load().__llama_cpp_commit__[:9]
    print(f"{cpu_name()}, {platform.system()} {platform.release()}, engine {engine}, {N_TOKENS} tokens a pass")
    for model in args.models:
        for kind in args.types:
            with tempfile.TemporaryDirectory(dir=args.dir) as folder:
                path = write_model(Path(folder) / "m.gguf", MODELS[model], Type[kind])
                print(
                    f"\n{MODELS[model].name} {kind}, layers {MODELS[model].pattern},"
                    f" {path.stat().st_size / 1e9:.2f} GB",
                    flush=True,
                )
                for threads in args.threads:
                    compare(path, MODELS[model], threads, args.repeats, not args.no_repack)
                compare_memory(path, MODELS[model])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K"])
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--no-repack", action="store_true", help="the CPU backend's plain kernels, as on a processor without AMX"
    )
    parser.add_argument("--dir", help="where the models are written (default: the temporary folder)")
    return parser.parse_args()


class Passes:
    """The passes over one session."""

    def __init__(self, path: Path, d: Dimensions, threads: int, repack: bool = True) -> None:
        core = native.load()
        options = core.SessionOptions()
        options.model_path, options.ctx_size, options.ubatch_size = str(path), N_TOKENS, N_TOKENS
        options.threads, options.n_sequences, options.repack = threads, N_SHORT, repack
        self.session = core.Session(options)
        self.layers = [layer for layer, letter in enumerate(d.pattern) if letter in "AE"]
        self.session.start_profile(self.layers, d.n_experts)
        self.tokens = np.random.default_rng(1).integers(0, d.n_vocab, N_TOKENS).astype(np.int32)
        self.zeros = np.zeros(N_TOKENS, np.int32)
        self.shared = self.session.n_sequences == N_SHORT

    def all(self) -> None:
        self.session.forward(self.tokens, True)

    def last(self) -> None:
        self.session.forward(self.tokens, False)

    def profile(self) -> None:
        self.session.profile_batch(self.tokens, np.arange(N_TOKENS, dtype=np.int32), self.zeros, self.zeros)
        self.session.commit(1)

    def short_alone(self) -> None:
        for part in np.split(self.tokens, N_SHORT):
            n = len(part)
            self.session.profile_batch(part, np.arange(n, dtype=np.int32), self.zeros[:n], self.zeros[:n])
        self.session.commit(N_SHORT)

    def short_together(self) -> None:
        positions = np.tile(np.arange(N_TOKENS // N_SHORT, dtype=np.int32), N_SHORT)
        sequences = np.repeat(np.arange(N_SHORT, dtype=np.int32), N_TOKENS // N_SHORT)
        self.session.profile_batch(self.tokens, positions, sequences, self.zeros)
        self.session.commit(N_SHORT)


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(path: Path, d: Dimensions, threads: int, repeats: int, repack: bool) -> None:
    passes = Passes(path, d, threads, repack)
    works = [
        passes.all,
        passes.last,
        passes.profile,
        passes.short_alone,
        *([passes.short_together] if passes.shared else []),
    ]
    for work in works[:3]:
        work()  # weights are read, buffers allocated
    times: dict[str, list[float]] = {work.__name__: [] for work in works}
    before = passes.session.collector_stats()["seconds"]
    in_callback = []
    for _ in range(repeats):
        for work in works:
            before = passes.session.collector_stats()["seconds"]
            times[work.__name__].append(seconds(work))
            if work == passes.profile:
                in_callback.append((passes.session.collector_stats()["seconds"] - before) / times["profile"][-1])
    report(d, threads, times, statistics.median(in_callback))


def report(d: Dimensions, threads: int, times: dict[str, list[float]], share: float) -> None:
    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    median = {name: statistics.median(values) for name, values in times.items()}
    n_layers = sum(letter in "AE" for letter in d.pattern)
    layer = median["profile"] / n_layers
    head = max(0.0, median["all"] - median["profile"])
    skipped = max(0.0, median["profile"] - median["last"])
    full = d.full_depth * layer
    rates = ", ".join(f"{name} {N_TOKENS / value:.0f}" for name, value in median.items())
    print(f"  {threads} thread{'s' if threads > 1 else ''}: tokens/s: {rates}")
    print(
        f"    profile against all logits {ratio('all', 'profile'):.3f}, against the last token's"
        f" {ratio('last', 'profile'):.3f}",
        end="",
    )
    print(
        f" (bound with {n_layers} layers of experts: about {(n_layers - 1) / n_layers:.2f}); callback {share:.2%} of"
        " the time"
    )
    print(
        f"    a layer {layer * 1e3:.0f} ms, head {head * 1e3:.0f} ms, skipped by `last` {skipped * 1e3:.0f} ms", end=""
    )
    print(f" -> with {d.full_depth} layers: all {(full + head) / full:.3f}, last {(full - skipped) / full:.3f}")
    if "short_together" in median:
        gain = ratio("short_alone", "short_together")
        print(
            f"    {N_SHORT} samples of {N_TOKENS // N_SHORT} tokens in one batch: {gain:.2f} times as fast as one"
            " by one"
        )
    sys.stdout.flush()


CHILD = """
import resource, sys
sys.path.insert(0, sys.argv[3])
from profile_speed import MODELS, Passes
from pathlib import Path
passes = Passes(Path(sys.argv[1]), next(d for d in MODELS.values() if d.name == sys.argv[2]), 2)
for _ in range(2):
    getattr(passes, sys.argv[4])()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def compare_memory(path: Path, d: Dimensions) -> None:
    peaks = {}
    for work in ("all", "profile"):
        command = [sys.executable, "-c", CHILD, str(path), d.name, str(Path(__file__).parent), work]
        peaks[work] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024
    profiling, plain = peaks["profile"], peaks["all"]
    print(f"  peak memory: {profiling:,.0f} MB profiling, {plain:,.0f} MB for all logits: {profiling - plain:+,.0f} MB")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
