"""How a model is run: the engine's options as users give them, checked, and the session they open.

What can be checked is checked here, before llama.cpp sees it: it aborts the process where it meets what it did not
expect.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from reap.errors import UsageError

if TYPE_CHECKING:
    pass


FLASH_ATTENTION = ("auto", "on", "off")
DEFAULT_UBATCH = 512


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options that go through to llama.cpp, with its own names.

    ctx_size: tokens of one sequence; 0: what the model was trained with. batch_size: tokens of one decode (None:
    ubatch_size). ubatch_size: tokens of one pass through the graph. threads: None: the cores that this process may use.
    gpu_layers: negative: all. devices: names as `reap devices` prints them; None: all there are. override_tensors:
    (regular expression, buffer type). rpc: "host:port" of servers. type_k, type_v: types of the KV cache. flash_attn:
    "auto", "on" or "off".
    """

    ctx_size: int = 2048
    batch_size: int | None = None
    ubatch_size: int = DEFAULT_UBATCH
    threads: int | None = None
    gpu_layers: int = -1
    devices: Sequence[str] | None = None
    override_tensors: Sequence[tuple[str, str]] = ()
    rpc: Sequence[str] = ()
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: str = "auto"

    def __post_init__(self) -> None:
        for name in ("ctx_size", "batch_size", "ubatch_size", "threads"):
            value = getattr(self, name)
            least = 0 if name == "ctx_size" else 1
            if value is not None and (type(value) is not int or not least <= value < 2**31):
                raise UsageError(f"{name} is {value!r}, expected a whole number of at least {least}")
        if self.batch_size is not None and self.batch_size < self.ubatch_size:
            raise UsageError(f"batch_size is {self.batch_size}, less than ubatch_size, which is {self.ubatch_size}")
        if self.flash_attn not in FLASH_ATTENTION:
            raise UsageError(f"flash_attn is {self.flash_attn!r}, expected one of {', '.join(FLASH_ATTENTION)}")

    def record(self) -> dict[str, Any]:
        """What a profile keeps of them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def usable_cores() -> int:
    """Cores that this process may use, as the scheduler sees it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
