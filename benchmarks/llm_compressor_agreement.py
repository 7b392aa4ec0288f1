"""The experts that llm-compressor's REAP modifier keeps, beside those that reap keeps, on the same tiny models and
tokens.

    python benchmarks/llm_compressor_agreement.py --python OTHER/bin/python [--families mixtral,olmoe]

Runs in reap's environment (with the extra `hf`) and starts OTHER/bin/python for llm-compressor, which wants another
transformers:

    python -m venv OTHER && OTHER/bin/pip install torch==2.13.0 && OTHER/bin/pip install llmcompressor==0.14.0.1
    'transformers>=5.15,<5.18'

For each family: of the experts kept, how many both keep. llm-compressor prunes a layer before it looks at the next, so
later layers see what a pruned model sends them; "layer by layer" is reap's tracker and surgery used in that way, and
`reap.plan` is reap's own.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reap
from helpers import checkpoint_models, torch_models
from reap import hf
from reap.hf.memory.expert_hooks import Observer

OTHER = """
import json, sys
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
folder, samples, report, every = sys.argv[1:]
config = AutoConfig.from_pretrained(folder)
auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
model = auto.from_pretrained(folder, dtype="float32")
rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(open(samples))]
oneshot(model=model, dataset=Dataset.from_list(rows), recipe=[REAPPruningModifier(sparsity=0.5, report_path=report)],
        max_seq_length=256, num_calibration_samples=len(rows), tokenizer=AutoTokenizer.from_pretrained(folder),
        moe_calibrate_all_experts=bool(int(every)), shuffle_calibration_samples=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the interpreter of the environment with llm-compressor")
    parser.add_argument("--families", default=",".join(checkpoint_models.FAMILIES))
    parser.add_argument(
        "--all-experts", action="store_true", help="let it run every expert on every token (moe_calibrate_all_experts)"
    )
    args = parser.parse_args()
    for name in args.families.split(","):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name:17}", compare(name, Path(folder), args.python, args.all_experts), flush=True)


def compare(name: str, folder: Path, python: str, every: bool) -> str:
    model = checkpoint_models.build(name)
    checkpoint_models.save(model, folder / "hf")
    samples = [tokens for seed in (7, 8, 9) for tokens in torch_models.samples(seed)]
    (folder / "samples.json").write_text(json.dumps(samples))
    plan = reap.plan(hf.profile(model, [{"tokens": tokens} for tokens in samples], ctx_size=256), keep=0.5)
    command = [
        python,
        "-c",
        OTHER,
        str(folder / "hf"),
        str(folder / "samples.json"),
        str(folder / "report.json"),
        str(int(every)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if not (folder / "report.json").is_file():
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return f"llm-compressor cannot: {' '.join(lines[-1].split())[:150] if lines else done.returncode}"
    report = json.loads((folder / "report.json").read_text())
    theirs = {int(re.search(r"layers\.(\d+)\.", key)[1]): ids for key, ids in report.items()}  # type: ignore[index]
    if sorted(theirs) != sorted(plan.layers):
        return f"llm-compressor pruned the layers {sorted(theirs)} of {sorted(plan.layers)}"
    at_once, in_turn = overlap(plan.layers, theirs), overlap(layer_by_layer(model, samples), theirs)
    return f"kept by both: {in_turn} layer by layer, {at_once} by reap.plan"


def layer_by_layer(model: torch.nn.Module, samples: list[list[int]]) -> dict[int, list[int]]:
    """Measure a layer, prune it, go on to the next."""
    kept = {}
    for name, layer in hf.find_moe_layers(model).items():
        tracker = hf.SaliencyTracker(layer.n_experts)

        def receive(
            _row: int, _tokens: Any, ids: Any, gates: Any, norms: Any, tracker: hf.SaliencyTracker = tracker
        ) -> None:
            by_slot = ids.T.reshape(-1)
            tracker.update(
                ids, gates, {expert: norms.T.reshape(-1)[by_slot == expert] for expert in range(tracker.num_experts)}
            )

        with torch.inference_mode(), Observer([layer], receive).watching():
            for tokens in samples:
                model(input_ids=torch.tensor([tokens]))
        half = layer.n_experts // 2
        retained = tracker.compute_retained_experts(half, half // layer.n_group if layer.n_group > 1 else None, layer)
        kept[layer.index] = hf.prune_moe_layer(model, name, retained)
    return kept


def overlap(ours: Mapping[int, Sequence[int]], theirs: Mapping[int, Sequence[int]]) -> str:
    both = [len(set(kept) & set(theirs[layer])) for layer, kept in ours.items()]
    return f"{sum(both)} of {sum(map(len, ours.values()))}"


if __name__ == "__main__":
    main()
