"""The Hugging Face half of reap: what works on checkpoints instead of GGUF files. Needs the extra `hf` (torch,
transformers).

    profile = reap.hf.profile("Nemotron-3-Nano", "calibration.jsonl", device="cuda", load_in_4bit=True)
    reap.hf.prune("Nemotron-3-Nano", "Nemotron-half", reap.plan(profile, keep=0.5))

Importing this package imports neither; each name says what is missing when it is used. Pruning a checkpoint on disk
needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap.hf.disk.convert import convert_checkpoint as convert_checkpoint
    from reap.hf.disk.match import compare_with_gguf as compare_with_gguf
    from reap.hf.disk.prune import prune as prune
    from reap.hf.memory.modules import MoELayer as MoELayer
    from reap.hf.memory.modules import find_moe_layers as find_moe_layers
    from reap.hf.memory.profile import profile as profile
    from reap.hf.memory.prune import prune_model as prune_model
    from reap.hf.memory.prune import prune_moe_layer as prune_moe_layer
    from reap.hf.memory.tracker import SaliencyTracker as SaliencyTracker

_MODULE_OF = {
    "MoELayer": "memory.modules",
    "SaliencyTracker": "memory.tracker",
    "compare_with_gguf": "disk.match",
    "convert_checkpoint": "disk.convert",
    "find_moe_layers": "memory.modules",
    "profile": "memory.profile",
    "prune": "disk.prune",
    "prune_model": "memory.prune",
    "prune_moe_layer": "memory.prune",
}
# modules that import torch as they are imported
_NEED_TORCH = {"memory.modules", "memory.prune", "memory.tracker"}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'reap.hf' has no attribute {name!r}")
    module = _MODULE_OF[name]
    if module in _NEED_TORCH:
        from reap.hf.dependencies import require_extra

        require_extra(f"reap.hf.{name}", "torch")
    value = getattr(import_module(f"reap.hf.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
