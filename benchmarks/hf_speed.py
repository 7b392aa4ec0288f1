"""One small model profiled in several ways, in turn, in one run: tokens/s, and how many times as long as
reap.hf.profile.

    python benchmarks/hf_speed.py [--repeats 5] [--threads 2] [--llm-compressor OTHER/bin/python]

A random Qwen3-MoE (6 layers, 64 experts, top-8, width 512, F32), 2 samples of 512 tokens:

- reap.hf      reap.hf.profile on the model in memory, with each implementation of the experts that transformers has for
  this device
- forward      the same forward pass without anything that measures: the bound
- all experts  hooks that run every expert on every token, as tools that replace the MoE block do
- reap, GGUF   the same model converted to GGUF (F32), profiled by the engine
- llm-compressor    its REAP modifier (oneshot, calibration and pruning of half), in a process with another
  transformers; the
                    time between the modifier's start and its end, which it prunes in: see
                    benchmarks/llm_compressor_agreement.py for the environment. Alternating with the others; its own
                    start-up is not counted.

Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import torch_hooks

import reap
from helpers.torch_models import make_tokenizer
from reap import hf

N_SAMPLES, N_TOKENS = 2, 512
IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies an expert for every routing: no choice on a processor

OTHER = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[3]))
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(open(sys.argv[2]))]
class Timed(REAPPruningModifier):
    def on_calibration_start(self, *args, **named):
        Timed.started = time.perf_counter()
        super().on_calibration_start(*args, **named)
    def on_calibration_end(self, *args, **named):
        super().on_calibration_end(*args, **named)
        Timed.seconds = time.perf_counter() - Timed.started
for line in sys.stdin:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
    oneshot(model=model, dataset=Dataset.from_list(rows), recipe=[Timed(sparsity=0.5)], max_seq_length=512,
            num_calibration_samples=len(rows), tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]),
            moe_calibrate_all_experts=False)
    print("SECONDS", Timed.seconds, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llm-compressor", help="the interpreter of an environment that has it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = torch_hooks.build_model()
    draw = np.random.default_rng(0).integers(0, model.config.vocab_size, (N_SAMPLES, N_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/hf")
        make_tokenizer().save_pretrained(f"{folder}/hf")
        Path(folder, "samples.json").write_text(json.dumps(draw.tolist()))
        gguf = hf.convert_checkpoint(f"{folder}/hf", f"{folder}/m.gguf", outtype="f32", pre="qwen2")
        ways = make_ways(model, gguf, draw, args.threads)
        other = None
        if args.llm_compressor:
            command = [args.llm_compressor, "-c", OTHER, f"{folder}/hf", f"{folder}/samples.json", str(args.threads)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            with open(f"{folder}/log", "w") as log:
                other = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
                )
            ways["llm-compressor"] = lambda: ask(other)
        measure(ways, args.repeats, args.threads)
        if other is not None:
            other.communicate(timeout=60)


def ask(child: subprocess.Popen[str]) -> float:
    """One run in the other process; the seconds that it says."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("run\n")
    child.stdin.flush()
    for line in child.stdout:
        if line.startswith("SECONDS"):
            return float(line.split()[1])
    raise SystemExit("llm-compressor ended without a result")


def make_ways(
    model: torch.nn.Module, gguf: Path, draw: np.ndarray, threads: int
) -> dict[str, Callable[[], float | None]]:
    lines = [{"tokens": row.tolist()} for row in draw]
    batch = torch.from_numpy(draw).long()
    profiles: dict[str, reap.Profile] = {}

    def ours(implementation: str) -> None:
        model.set_experts_implementation(implementation)
        profiles[implementation] = hf.profile(model, lines, ctx_size=N_TOKENS, threads=threads)

    def forward(implementation: str) -> None:
        model.set_experts_implementation(implementation)
        with torch.inference_mode():
            for row in batch:
                model.base_model(input_ids=row[None], use_cache=False)

    def all_experts() -> None:
        model.set_experts_implementation("grouped_mm")
        hooks = torch_hooks.Hooks(model, True)
        with torch.inference_mode():
            for row in batch:
                model.base_model(input_ids=row[None], use_cache=False)
        hooks.remove()

    def engine() -> None:
        options = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
        profiles["gguf"] = reap.profile(gguf, lines, ctx_size=N_TOKENS, threads=threads, **options)
        np.testing.assert_allclose(profiles["gguf"].gated_norm_sum, profiles["grouped_mm"].gated_norm_sum, rtol=1e-3)

    ways: dict[str, Callable[[], float | None]] = {}
    for name in IMPLEMENTATIONS:
        ways[f"reap.hf, {name}"] = lambda name=name: ours(name)  # type: ignore[misc]
        ways[f"forward, {name}"] = lambda name=name: forward(name)  # type: ignore[misc]
    ways["all experts"] = all_experts
    ways["reap, GGUF"] = engine
    return ways


def measure(ways: dict[str, Callable[[], float | None]], repeats: int, threads: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, work in ways.items():
            started = time.perf_counter()
            said = work()
            if repeat:
                times[name].append(said if isinstance(said, float) else time.perf_counter() - started)
    base = times["reap.hf, grouped_mm"]
    print(
        f"{N_SAMPLES} x {N_TOKENS} tokens, 6 layers, 64 experts, top-8, width 512, F32, {threads} threads, {repeats}"
        " runs in turn"
    )
    for name, values in times.items():
        ratios = sorted(value / own for value, own in zip(values, base, strict=True))
        print(
            f"  {name:20} {N_SAMPLES * N_TOKENS / statistics.median(values):8.0f} tokens/s  "
            f" {statistics.median(ratios):6.2f} times the time of reap.hf, grouped_mm ({ratios[0]:.2f} to"
            f" {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
