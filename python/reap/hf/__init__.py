"""The Hugging Face half of reap: what works on checkpoints instead of GGUF files. Needs the extra `hf` (torch, transformers).

    profile = reap.hf.profile("Nemotron-3-Nano", "calibration.jsonl", device="cuda", load_in_4bit=True)
    reap.hf.prune("Nemotron-3-Nano", "Nemotron-half", reap.plan(profile, keep=0.5))

Importing this package imports neither; each name says what is missing when it is used. Pruning a checkpoint on disk needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap.hf.bridge import compare_with_gguf as compare_with_gguf
    from reap.hf.converter import convert_checkpoint as convert_checkpoint
    from reap.hf.disk_pruner import prune as prune
    from reap.hf.profiling import profile as profile
    from reap.hf.structure import MoELayer as MoELayer
    from reap.hf.structure import find_moe_layers as find_moe_layers
    from reap.hf.surgery import prune_model as prune_model
    from reap.hf.surgery import prune_moe_layer as prune_moe_layer
    from reap.hf.tracker import SaliencyTracker as SaliencyTracker

_MODULE_OF = {
    "MoELayer": "structure",
    "SaliencyTracker": "tracker",
    "compare_with_gguf": "bridge",
    "convert_checkpoint": "converter",
    "find_moe_layers": "structure",
    "profile": "profiling",
    "prune": "disk_pruner",
    "prune_model": "surgery",
    "prune_moe_layer": "surgery",
}
# modules that import torch as they are imported
_NEED_TORCH = {"structure", "surgery", "tracker"}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'reap.hf' has no attribute {name!r}")
    module = _MODULE_OF[name]
    if module in _NEED_TORCH:
        from reap.hf.extra import require_extra

        require_extra(f"reap.hf.{name}", "torch")
    value = getattr(import_module(f"reap.hf.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
