"""A wheel's CPU backends against a source build: the same routings and scores, token by token, for every variant that
runs here.

    python benchmarks/wheel_variants.py --wheel WHEEL_ENV/bin/python --source SOURCE_ENV/bin/python [--tokens 8192]
    [--list 20]

Both interpreters have reap installed, one from the wheel, the other built from source for this processor. The embedded
model runs in each, its weights as they are (Q8_0) and decoded to F32, with exact options (F32 cache, no flash
attention, one thread), and with a group for every token, so that each token's experts and their g·‖f‖ are known. First
the variant that the wheel chooses by itself, then a copy of the package with one variant of the CPU backend left in it,
for each that this processor can run.

A routing that flips (another set of experts for a token in a layer) changes what the layers above it see, for that
token and those after it in its window: those are set aside. REAP is compared over what is left. With weights in F32 it
must agree to 1e-5. With quantised weights the engine rounds activations to 8 bits as well, and where another
instruction set adds up in another order a value now and then falls on the other side of a rounding: what that does is
printed, the largest difference of an expert and the median.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from routings import WINDOW, Run, compare, measure

TOLERANCE = 1e-5  # where nothing is rounded on the way


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
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
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
    print(f"source build: {expected.label}; {expected.routed[..., 0].size:,} routings of {args.tokens:,} tokens")
    chosen = run(args.wheel, model, args.tokens)
    worst = compare(f"the wheel's choice, {chosen.label}", expected, chosen, args.list).largest
    package = package_of(args.wheel)
    for library in sorted(package.glob("libggml-cpu-*.so")):
        if library.name != chosen.label:
            found = run_alone(args.wheel, package, library, model, args.tokens)
            if found is None:
                print(f"{library.name}: not for this processor")
            else:
                worst = max(worst, compare(library.name, expected, found, args.list).largest)
    if tolerance is not None:
        print(
            f"largest difference {worst:.1e}, allowed {tolerance:.0e}:"
            f" {'holds' if worst <= tolerance else 'DOES NOT HOLD'}"
        )
    return int(tolerance is not None and worst > tolerance)


# ---- running


def run(python: str, model: Path, n_tokens: int, path: str | None = None) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "routings.npz"
        environment = {**os.environ, **({"PYTHONPATH": path} if path else {})}
        command = [python, __file__, "--child", str(model), str(out), "--tokens", str(n_tokens)]
        subprocess.run(command, check=True, env=environment, stderr=None if path is None else subprocess.DEVNULL)
        with np.load(out) as arrays:
            return Run(str(arrays["label"]), arrays["routed"], arrays["gated_norm"])


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
    from reap.engine.devices import backends
    from reap.engine.options import EngineOptions
    from reap.engine.session import open_session

    info = inspect_model(model)
    options = EngineOptions(ctx_size=WINDOW, type_k="f32", type_v="f32", flash_attn="off", threads=1, devices=("none",))
    session = open_session(model, options)
    text = (files("reap") / "data" / "calibration.jsonl").read_bytes()
    tokens = np.asarray(session.tokenize(text, False, False))[:n_tokens]
    assert info.n_experts is not None
    library = next(backend.library for backend in backends() if backend.name == "CPU")
    measured = measure(library, session, list(info.moe_layers), info.n_experts, tokens)
    np.savez(out, label=measured.label, routed=measured.routed, gated_norm=measured.gated_norm)


if __name__ == "__main__":
    sys.exit(main())
