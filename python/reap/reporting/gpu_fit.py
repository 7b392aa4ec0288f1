"""Which memory a model's weights fit into. Imports nothing of reap's but words."""

from __future__ import annotations

from dataclasses import dataclass

from reap.files.formatting import bytes_text

GIB = 1 << 30
#: What accelerators are sold with; their GB are 2^30 bytes.
MEMORY_GB = (8, 12, 16, 24, 32, 48, 80)
# what the weights should leave free for the KV cache and the compute buffers
_HEADROOM = 0.1


@dataclass(frozen=True)
class Fit:
    """Whether weights go into a memory."""

    gb: int
    """Size of the memory, in units of 2^30 bytes."""
    bytes_left: int
    """For the cache and the buffers; negative where the weights do not fit."""

    @property
    def verdict(self) -> str:
        """ "fits" with a tenth of the memory to spare, "tight" with less, "too large"."""
        if self.bytes_left < 0:
            return "too large"
        return "fits" if self.bytes_left >= _HEADROOM * self.gb * GIB else "tight"


def fits(n_bytes: int) -> tuple[Fit, ...]:
    """For each of MEMORY_GB, whether weights of `n_bytes` go in whole."""
    return tuple(Fit(gb, gb * GIB - n_bytes) for gb in MEMORY_GB)


def describe_fit(n_bytes: int) -> str:
    """In words: the smallest memory that weights of `n_bytes` fit into, and what that leaves."""
    roomy = next((fit for fit in fits(n_bytes) if fit.verdict == "fits"), None)
    tight = next((fit for fit in fits(n_bytes) if fit.verdict == "tight"), None)
    if roomy is None:
        return f"{tight.gb} GB, tightly" if tight else f"no less than {-(-n_bytes // GIB)} GB"
    text = f"{roomy.gb} GB, leaving {bytes_text(roomy.bytes_left)} for cache and buffers"
    return f"{text}; {tight.gb} GB tightly" if tight else text
