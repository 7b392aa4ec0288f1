"""The same small model profiled by reap and by PyTorch hooks, paired in one run: tokens/s.

    python benchmarks/torch_hooks.py [--repeats 5] [--threads 2] [--pre qwen2]

The model is a random Qwen3-MoE, converted to F32 GGUF. PyTorch computes the norms of the routed experts only (the sum
that REAP needs, one expert at a time over its tokens), or of all experts on every token, as tools that replace the MoE
block do. Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.torch_models import make_tokenizer
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.hf.disk.convert import convert_checkpoint

N_TOKENS, N_LAYERS, N_EXPERTS, N_USED = 512, 6, 64, 8


def build_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=512,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=N_EXPERTS,
        num_experts_per_tok=N_USED,
        moe_intermediate_size=256,
        norm_topk_prob=True,
        max_position_embeddings=1024,
    )
    return Qwen3MoeForCausalLM(config).eval()


class Hooks:
    """Sums g·‖f‖ for each expert from the inputs of the MoE blocks."""

    def __init__(self, model: Qwen3MoeForCausalLM, every_expert: bool) -> None:
        self.sums = torch.zeros(N_LAYERS, N_EXPERTS, dtype=torch.float64)
        self._every = every_expert
        blocks = [layer.mlp for layer in model.model.layers]
        self._handles = [block.register_forward_hook(self._make(i)) for i, block in enumerate(blocks)]

    def _make(self, layer: int) -> Callable[..., None]:
        def hook(block: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            scores = torch.softmax(x @ block.gate.weight.T, dim=-1)
            gates, ids = scores.topk(N_USED, dim=-1)
            gates = gates / gates.sum(dim=-1, keepdim=True)
            for expert in range(N_EXPERTS):
                rows, slots = torch.where(ids == expert)
                tokens = x if self._every else x[rows]
                gate, up = (tokens @ block.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
                norms = (torch.nn.functional.silu(gate) * up @ block.experts.down_proj[expert].T).norm(dim=-1)
                picked = norms[rows] if self._every else norms
                self.sums[layer, expert] += (gates[rows, slots] * picked).sum().double()

        return hook

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pre", default="qwen2")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, N_TOKENS).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/hf")
        make_tokenizer().save_pretrained(f"{folder}/hf")
        gguf = convert_checkpoint(f"{folder}/hf", f"{folder}/m.gguf", outtype="f32", pre=args.pre)
        compare(model, gguf, tokens, args.repeats, args.threads)


def compare(model: Qwen3MoeForCausalLM, gguf: Path, tokens: np.ndarray, repeats: int, threads: int) -> None:
    session = open_session(
        gguf, EngineOptions(ctx_size=N_TOKENS, threads=threads, type_k="f32", type_v="f32", flash_attn="off")
    )
    session.start_profile(list(range(N_LAYERS)), N_EXPERTS)
    zeros, positions = np.zeros(N_TOKENS, np.int32), np.arange(N_TOKENS, dtype=np.int32)
    batch = torch.from_numpy(tokens).long()[None]
    sums: dict[str, torch.Tensor] = {}

    def reap() -> None:
        session.profile_batch(tokens, positions, zeros, zeros)
        session.commit(1)

    def hooked(name: str, every_expert: bool) -> None:
        hooks = Hooks(model, every_expert)
        with torch.inference_mode():
            model(batch)
        hooks.remove()
        sums[name] = hooks.sums

    ways = {
        "reap": reap,
        "torch, routed experts": lambda: hooked("routed", False),
        "torch, all experts": lambda: hooked("all", True),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            if repeat:
                times[name].append(time.perf_counter() - started)
    per_batch = session.sums(0)["gated_norm_sum"] / (repeats + 1)
    used = per_batch > 0
    difference = float(np.abs(per_batch[used] / sums["routed"].numpy()[used] - 1).max())
    print(
        f"{N_LAYERS} layers, {N_EXPERTS} experts, top-{N_USED}, hidden 512, F32, {N_TOKENS} tokens, {threads} threads"
    )
    for name, values in times.items():
        ratio = statistics.median(other / own for other, own in zip(values, times["reap"], strict=True))
        print(f"  {name:24} {N_TOKENS / statistics.median(values):8.0f} tokens/s   {ratio:5.2f} times reap's time")
    print(f"  largest relative difference of the sums: {difference:.1e}")


if __name__ == "__main__":
    main()
