"""Profile speed of an installed wheel against a source build on the same machine: two processes, one pass each in turn.

    python benchmarks/wheel_speed.py --wheel WHEEL_ENV/bin/python --source SOURCE_ENV/bin/python [--repeats 9]
    [--threads 2 1]

Both interpreters have reap installed, one from the wheel, the other built from source for this processor. A model with
the dimensions of Qwen3-30B-A3B and few layers is profiled, 512 tokens a pass. The ratio is the median of paired passes,
wheel over source in tokens a second.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

N_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", required=True, help="the interpreter of an environment with the wheel")
    parser.add_argument(
        "--source", required=True, help="the interpreter of an environment with a build for this processor"
    )
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K"])
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    from dataclasses import replace

    from big_models import QWEN3, write_model
    from profile_speed import cpu_name

    from gguf import GGMLQuantizationType as Type

    print(f"{cpu_name()}, {N_TOKENS} tokens a pass, {args.layers} layers with the dimensions of {QWEN3.name}")
    for kind in args.types:
        with tempfile.TemporaryDirectory() as folder:
            model = write_model(Path(folder) / "m.gguf", replace(QWEN3, pattern="A" * args.layers), Type[kind])
            for threads in args.threads:
                compare({"wheel": args.wheel, "source": args.source}, model, kind, threads, args.repeats)


def compare(interpreters: dict[str, str], model: Path, kind: str, threads: int, repeats: int) -> None:
    children = {}
    for name, python in interpreters.items():
        command = [python, "-c", CHILD, str(model), str(threads), str(N_TOKENS)]
        children[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        libraries = {name: read_line(process) for name, process in children.items()}
        times: dict[str, list[float]] = {name: [] for name in children}
        for repeat in range(repeats):
            order = list(children) if repeat % 2 else list(reversed(children))
            for name in order:
                times[name].append(one_pass(children[name]))
    finally:
        for process in children.values():
            process.kill()
            process.wait()
    ratio = statistics.median(source / wheel for source, wheel in zip(times["source"], times["wheel"], strict=True))
    rates = ", ".join(
        f"{name} {N_TOKENS / statistics.median(values):.0f} tokens/s ({libraries[name]})"
        for name, values in times.items()
    )
    print(
        f"{kind}, {threads} thread{'s' if threads > 1 else ''}: {rates}: the wheel runs at {ratio:.3f} of the source"
        " build",
        flush=True,
    )


def one_pass(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(read_line(process))


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        sys.exit("a child process ended early")
    return line


CHILD = """
import sys, time
import numpy as np
from reap import inspect
from reap.engine.devices import backends
from reap.engine.options import EngineOptions
from reap.engine.session import open_session

model, threads, n_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
info = inspect(model)
session = open_session(model, EngineOptions(ctx_size=n_tokens, threads=threads))
tokens = np.random.default_rng(1).integers(0, session.n_vocab, n_tokens).astype(np.int32)
positions, zeros = np.arange(n_tokens, dtype=np.int32), np.zeros(n_tokens, np.int32)
session.start_profile(list(info.moe_layers), info.n_experts)

def run():
    session.profile_batch(tokens, positions, zeros, zeros)
    session.commit(1)

run()
print(next(backend.library for backend in backends() if backend.name == "CPU"), flush=True)
for line in sys.stdin:
    started = time.perf_counter()
    run()
    print(time.perf_counter() - started, flush=True)
"""


if __name__ == "__main__":
    main()
