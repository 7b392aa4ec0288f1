"""Write tests/golden/: two tiny models as GGUF, and what PyTorch says of them. Run it by hand (needs the extra `hf`):

    PYTHONPATH=tests python tests/helpers/make_golden.py

The numbers come from `oracle.py`, never from reap; the GGUF files come from llama.cpp's converter. `test_golden.py`
compares without PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from helpers import oracle, torch_models
from helpers.sums import COUNTS_AND_SUMS
from reap.hf import convert_checkpoint

DIRECTORY = Path(__file__).parent.parent / "golden"
NAMES = ("qwen3moe", "nemotronh")
LONGEST = 3  # the sample whose logits are kept
POSITIONS = (0, 44, 89)


def make(name: str) -> None:
    model = torch_models.build(name)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = torch_models.save(model, Path(scratch) / f"tiny-random-{name}")
        gguf = convert_checkpoint(
            checkpoint, DIRECTORY / f"{name}.gguf", outtype="f32", pre=torch_models.PRE, force=True
        )
    golden = expectations(model)
    golden["gguf_sha256"] = hashlib.sha256(gguf.read_bytes()).hexdigest()
    (DIRECTORY / f"{name}.json").write_text(dump(golden))
    print(name, gguf.stat().st_size, "bytes")


def expectations(model: Any) -> dict[str, Any]:
    samples = torch_models.samples()
    sums = oracle.measure(model, samples)
    kept = oracle.best_half(sums)
    sliced = oracle.keep_experts(model, kept)
    return {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "samples": samples,
        "layers": {
            layer: {field: getattr(layer_sums, field).tolist() for field in COUNTS_AND_SUMS}
            for layer, layer_sums in sums.items()
        },
        "total_tokens": sum(map(len, samples)),
        "kept": kept,
        "logits_sample": LONGEST,
        "logits_positions": POSITIONS,
        "logits": rows(oracle.logits(model, samples[LONGEST])),
        "logits_pruned": rows(oracle.logits(sliced, samples[LONGEST])),
    }


def rows(logits: Any) -> list[list[float]]:
    return [[float(f"{value:.7g}") for value in logits[position]] for position in POSITIONS]


def dump(golden: dict[str, Any]) -> str:
    """JSON with a line for each entry: a file that a diff can be read of."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for name in NAMES:
        make(name)
