"""The Hugging Face half of reap: what works on checkpoints instead of GGUF files. Needs the extra `hf` (torch, transformers).

Importing this package imports neither; each function says what is missing when it is called. Pruning a checkpoint on disk needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap.hf.bridge import compare_with_gguf as compare_with_gguf
    from reap.hf.converter import convert_checkpoint as convert_checkpoint
    from reap.hf.disk_pruner import prune as prune

_MODULE_OF = {"compare_with_gguf": "bridge", "convert_checkpoint": "converter", "prune": "disk_pruner"}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'reap.hf' has no attribute {name!r}")
    value = getattr(import_module(f"reap.hf.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
