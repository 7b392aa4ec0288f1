"""A wheel's CPU backends against a source build: the same routings and scores, token by token, for every variant that runs here.

    python benchmarks/wheel_variants.py --wheel WHEEL_ENV/bin/python --source SOURCE_ENV/bin/python [--tokens 8192] [--list 20]

Both interpreters have reap installed, one from the wheel, the other built from source for this processor. The embedded model runs in
each, its weights as they are (Q8_0) and decoded to F32, with exact options (F32 cache, no flash attention, one thread), and with a group
for every token, so that each token's experts and their g·‖f‖ are known. First the variant that the wheel chooses by itself, then a copy of
the package with one variant of the CPU backend left in it, for each that this processor can run.

A routing that flips (another set of experts for a token in a layer) changes what the layers above it see, for that token and those
behind it in its window: those are set aside. REAP is compared over what is left. With weights in F32 it must agree to 1e-5. With
quantised weights the engine rounds activations to 8 bits as well, and where another instruction set adds up in another order a value now
and then falls on the other side of a rounding: what that does is printed, the largest difference of an expert and the median.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 256
TOLERANCE = 1e-5  # where nothing is rounded on the way


@dataclass(frozen=True)
class Run:
    """One build's answer: the CPU backend's library, experts [windows, tokens, layers, n_experts] and their g·‖f‖, same shape."""

    library: str
    routed: np.ndarray[Any, np.dtype[np.bool_]]
    gated_norm: np.ndarray[Any, np.dtype[np.float64]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", help="the interpreter of an environment with the wheel")
    parser.add_argument("--source", help="the interpreter of an environment with a build for this processor")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--list", type=int, default=20, metavar="N", help="flipped routings to print for each variant")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), Path(args.child[1]), args.tokens)
        return 0
    if not (args.wheel and args.source):
        parser.error("--wheel and --source are needed")
    (embedded,) = (package_of(args.wheel) / "data").glob("*.gguf")
    with tempfile.TemporaryDirectory() as folder:
        floats = as_floats(embedded, Path(folder) / "floats.gguf")
        print("The embedded model, Q8_0\n")
        compare_all(args, embedded, None)
        print("\nThe same weights in F32\n")
        return compare_all(args, floats, TOLERANCE)


def as_floats(source: Path, target: Path) -> Path:
    """The same model with its weights decoded."""
    import gguf

    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), "qwen3moe")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def compare_all(args: argparse.Namespace, model: Path, tolerance: float | None) -> int:
    """1 where REAP differs by more than the tolerance, in any variant."""
    expected = run(args.source, model, args.tokens)
    print(f"source build: {expected.library}; {expected.routed[..., 0].size:,} routings of {args.tokens:,} tokens")
    chosen = run(args.wheel, model, args.tokens)
    worst = compare(f"the wheel's choice, {chosen.library}", expected, chosen, args.list)
    package = package_of(args.wheel)
    for library in sorted(package.glob("libggml-cpu-*.so")):
        if library.name != chosen.library:
            found = run_alone(args.wheel, package, library, model, args.tokens)
            if found is None:
                print(f"{library.name}: not for this processor")
            else:
                worst = max(worst, compare(library.name, expected, found, args.list))
    if tolerance is not None:
        print(f"largest difference {worst:.1e}, allowed {tolerance:.0e}: {'holds' if worst <= tolerance else 'DOES NOT HOLD'}")
    return int(tolerance is not None and worst > tolerance)


def compare(name: str, expected: Run, found: Run, n_listed: int) -> float:
    """Print where two builds differ; the largest relative difference of REAP apart from flipped routings."""
    flipped = (expected.routed != found.routed).any(axis=-1)
    # what a flip in layer l of token t can reach: the same token and those behind it, in the layers above
    below = np.cumsum(flipped, axis=2) - flipped
    reached = np.maximum.accumulate(below > 0, axis=1) | flipped
    rest = ~reached[..., None]
    a, b = (reap(one, rest) for one in (expected, found))
    both = ~np.isnan(a)
    difference = np.abs(a - b)[both] / a[both]
    same = f"REAP differs by {difference.max():.1e} at most, {np.median(difference):.1e} in the median expert"
    if np.array_equal(expected.gated_norm, found.gated_norm):
        same = "every value is bit for bit the same"
    print(f"{name}: {flipped.sum():,} routings flipped, {reached.sum():,} of {flipped.size:,} set aside; on the rest {same}")
    for window, token, layer in np.argwhere(flipped)[:n_listed]:
        names = [sorted(np.flatnonzero(one.routed[window, token, layer])) for one in (expected, found)]
        left, came = (set(names[i]) - set(names[1 - i]) for i in (0, 1))
        print(f"    window {window}, token {token}, layer {layer}: {text(left)} -> {text(came)}")
    if flipped.sum() > n_listed:
        print(f"    and {flipped.sum() - n_listed:,} more")
    sys.stdout.flush()
    return float(difference.max())


def text(experts: set[int]) -> str:
    return ", ".join(str(int(expert)) for expert in sorted(experts))


def reap(one: Run, rest: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Σ g·‖f‖ / n over the routings of `rest`: [layers, n_experts], NaN where there is none."""
    counts = (one.routed & rest).sum(axis=(0, 1)).astype(float)
    sums = np.where(rest, one.gated_norm, 0.0).sum(axis=(0, 1))
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


# ---- running


def run(python: str, model: Path, n_tokens: int, path: str | None = None) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "routings.npz"
        environment = {**os.environ, **({"PYTHONPATH": path} if path else {})}
        command = [python, __file__, "--child", str(model), str(out), "--tokens", str(n_tokens)]
        subprocess.run(command, check=True, env=environment, stderr=None if path is None else subprocess.DEVNULL)
        with np.load(out) as arrays:
            return Run(str(arrays["library"]), arrays["routed"], arrays["gated_norm"])


def package_of(python: str) -> Path:
    command = [python, "-c", "import json, reap; print(json.dumps(reap.__file__))"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tempfile.gettempdir())
    return Path(json.loads(result.stdout)).parent


def run_alone(python: str, package: Path, library: Path, model: Path, n_tokens: int) -> Run | None:
    """With one variant in the package; None where it does not run on this processor."""
    with tempfile.TemporaryDirectory() as folder:
        others = [path.name for path in package.glob("libggml-cpu*.so") if path != library]
        shutil.copytree(package, Path(folder) / "reap", ignore=shutil.ignore_patterns("__pycache__", *others))
        try:
            return run(python, model, n_tokens, folder)
        except subprocess.CalledProcessError as error:
            if error.returncode < 0:
                raise
            return None


def child(model: Path, out: Path, n_tokens: int) -> None:
    """In the interpreter that is measured."""
    from importlib.resources import files

    from reap import inspect as inspect_model
    from reap.engine import EngineOptions, backends, open_session

    info = inspect_model(model)
    options = EngineOptions(ctx_size=WINDOW, type_k="f32", type_v="f32", flash_attn="off", threads=1, devices=("none",))
    session = open_session(model, options)
    text = (files("reap") / "data" / "calibration.jsonl").read_bytes()
    tokens = np.asarray(session.tokenize(text, False, False))[:n_tokens]
    layers, n_experts = list(info.moe_layers), info.n_experts
    assert n_experts is not None
    positions, zeros = np.arange(WINDOW, dtype=np.int32), np.zeros(WINDOW, np.int32)
    counts, sums = [], []
    for window in np.split(tokens[: len(tokens) // WINDOW * WINDOW], len(tokens) // WINDOW):
        session.start_profile(layers, n_experts)
        session.profile_batch(window, positions, zeros, positions)  # the last: each token is a group of its own
        session.commit(1)
        groups = [session.sums(token) for token in range(WINDOW)]
        counts.append([group["counts"] for group in groups])
        sums.append([group["gated_norm_sum"] for group in groups])
    library = next(backend.library for backend in backends() if backend.name == "CPU")
    np.savez(out, library=library, routed=np.asarray(counts) > 0, gated_norm=np.asarray(sums))


if __name__ == "__main__":
    sys.exit(main())
