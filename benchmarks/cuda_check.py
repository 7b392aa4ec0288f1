"""Is the path through a GPU right, and is it fast? To be run by anyone who has one; this project had none.

    pip install reap-moe-cuda gguf                      # or a build with GGML_CUDA
    python benchmarks/cuda_check.py                     # the first GPU that `reap devices` lists
    python benchmarks/cuda_check.py --device Vulkan0    # any other device
    python benchmarks/cuda_check.py --rpc HOST:PORT     # a device of another machine (`reap rpc-server`)

Correctness, on the embedded model (Q8_0) and on a random one in F32: the same tokens on the processor and on the
device, each token's experts and their g·‖f‖. Devices round in their own way, so routings that are close may flip; they
are counted and listed, and REAP is compared on the rest. What is reap's own on a device, the reduction of outputs to
norms, is compared on the device itself with the outputs read back whole: there it must agree to 1e-5.

Speed: a model with the dimensions of Qwen3-30B-A3B and few layers, the passes in turn: `all` yields every token's
logits, `last` the last token's (what llama-bench times), `profile`. Traffic: what the collector reads from the device,
with the reduction there and without.

Exit code 1 where one of these does not hold: norms agree to 1e-5; at most 2 % of routings flip; the median expert's
REAP agrees to 1 %.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from big_models import QWEN3, write_model
from profile_speed import cpu_name
from routings import WINDOW, compare, measure

import reap
from gguf import GGMLQuantizationType as Type
from reap.engine import native
from reap.engine.devices import check_servers, devices

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.gguf_builder import build_moe

NORMS_AGREE, MOST_FLIPPED, MEDIAN_AGREES = 1e-5, 0.02, 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="as `reap devices` names it")
    parser.add_argument("--rpc", help="HOST:PORT of a server, instead")
    parser.add_argument("--tokens", type=int, default=4096, help="of the comparison")
    parser.add_argument("--layers", type=int, default=4, help="of the model whose speed is measured")
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--list", type=int, default=5, metavar="N", help="flipped routings to print")
    args = parser.parse_args()
    where = choose(args.device, args.rpc)
    if where is None:
        print(
            "there is no GPU here (`reap devices` lists what there is, and says why a backend is not used)",
            file=sys.stderr,
        )
        return 1
    print(
        f"{cpu_name()}, {platform.system()} {platform.release()}, llama.cpp {native.load().__llama_cpp_commit__[:12]};"
        f" {where}"
    )
    with tempfile.TemporaryDirectory() as folder:
        good = check(Path(folder), where, args.tokens, args.list)
        if not args.no_speed:
            for kind in args.types:
                speed(Path(folder), where, kind, args.layers, args.repeats)
    print("everything holds" if good else "SOMETHING DOES NOT HOLD")
    return int(not good)


def choose(name: str | None, rpc: str | None) -> dict[str, list[str]] | None:
    """The options that place a model on a device."""
    if rpc:
        check_servers([rpc])
        return {"rpc": [rpc]}
    gpu = name or next((device.name for device in devices() if device.kind in ("gpu", "igpu")), None)
    return {"devices": [gpu]} if gpu else None


def open_on(model: Path, where: dict[str, list[str]], **changes: Any) -> Any:
    """A session of the native module; `changes` are fields of its options."""
    core = native.load()
    options = core.SessionOptions()
    options.model_path, options.model_bytes = str(model), model.stat().st_size
    for name, value in {**where, **changes}.items():
        setattr(options, name, value)
    return core.Session(options)


# ---- correctness


def check(folder: Path, where: dict[str, list[str]], n_tokens: int, n_listed: int) -> bool:
    (embedded,) = Path(str(files("reap") / "data")).glob("*.gguf")
    random = build_moe(folder / "random.gguf", n_layers=4, n_experts=32, n_used=4, n_embd=256, n_vocab=1024, n_ctx=512)
    good = True
    for name, model in (("embedded model, Q8_0", embedded), ("random model, F32", random)):
        info = reap.inspect(model)
        assert info.n_experts is not None
        exact = {"ctx_size": WINDOW, "ubatch_size": WINDOW, "type_k": "f32", "type_v": "f32", "flash_attn": "off"}
        here, there = open_on(model, {"devices": ["none"]}, **exact), open_on(model, where, **exact, head_on_host=True)
        read_back = open_on(model, where, **exact, head_on_host=True, reduce_on_device=False)
        tokens = tokens_for(here, n_tokens)
        runs = [
            measure("", session, list(info.moe_layers), info.n_experts, tokens) for session in (here, there, read_back)
        ]
        print(f"\n{name}, {n_tokens:,} tokens")
        apart = compare("  on the device, against the processor", runs[0], runs[1], n_listed)
        reduced = compare("  norms reduced there, against outputs read back", runs[2], runs[1], n_listed)
        good &= apart.flipped <= MOST_FLIPPED * apart.total and apart.median <= MEDIAN_AGREES
        good &= reduced.flipped == 0 and reduced.largest <= NORMS_AGREE
        traffic(there, read_back, info.moe_layers, info.n_experts, tokens, int(info.n_experts_used or 1))
    return bool(good)


def tokens_for(session: Any, n_tokens: int) -> np.ndarray[Any, Any]:
    if session.has_tokenizer:
        return np.asarray(session.tokenize((files("reap") / "data" / "calibration.jsonl").read_bytes(), False, False))[
            :n_tokens
        ]
    return np.random.default_rng(5).integers(0, session.n_vocab, n_tokens)


def traffic(there: Any, read_back: Any, layers: Any, n_experts: int, tokens: np.ndarray[Any, Any], n_used: int) -> None:
    """Bytes that the collector reads for a token, layer and expert."""
    found = []
    for session in (there, read_back):
        session.start_profile(list(layers), n_experts)
        before = session.collector_stats()["bytes_read"]
        positions, zeros = np.arange(WINDOW, dtype=np.int32), np.zeros(WINDOW, np.int32)
        session.profile_batch(tokens[:WINDOW].astype(np.int32), positions, zeros, zeros)
        found.append((session.collector_stats()["bytes_read"] - before) / WINDOW / len(layers) / n_used)
    print(f"  read from the device for a token, layer and expert: {found[0]:,.0f} bytes, whole outputs {found[1]:,.0f}")


# ---- speed


def speed(folder: Path, where: dict[str, list[str]], kind: str, n_layers: int, repeats: int) -> None:
    model = write_model(folder / "large.gguf", replace(QWEN3, pattern="A" * n_layers), Type[kind])
    n_tokens = 512
    # as reap.profile opens a model, and as plain inference does
    profiling = open_on(model, where, ctx_size=n_tokens, ubatch_size=n_tokens, head_on_host=True)
    plain = open_on(model, where, ctx_size=n_tokens, ubatch_size=n_tokens)
    profiling.start_profile(list(range(n_layers)), QWEN3.n_experts)
    tokens = np.random.default_rng(1).integers(0, QWEN3.n_vocab, n_tokens).astype(np.int32)
    positions, zeros = np.arange(n_tokens, dtype=np.int32), np.zeros(n_tokens, np.int32)

    def profile() -> None:
        profiling.profile_batch(tokens, positions, zeros, zeros)
        profiling.commit(1)

    works = {
        "all": lambda: plain.forward(tokens, True),
        "last": lambda: plain.forward(tokens, False),
        "profile": profile,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if repeat:  # the first reads weights and allocates
                times[name].append(time.perf_counter() - started)
    rates = ", ".join(f"{name} {n_tokens / statistics.median(values):,.0f}" for name, values in times.items())
    ratios = [
        statistics.median(a / b for a, b in zip(times[name], times["profile"], strict=True)) for name in ("all", "last")
    ]
    print(f"\n{QWEN3.name} {kind}, {n_layers} layers, {n_tokens} tokens a pass, tokens/s: {rates}")
    print(f"  profile against all logits {ratios[0]:.3f}, against the last token's {ratios[1]:.3f}", end="")
    print(
        f" (the bound with {n_layers} layers: about {(n_layers - 1) / n_layers:.2f}; {QWEN3.full_depth} in the real"
        " model)",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
