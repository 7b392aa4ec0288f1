"""Numbers of experts that other engines' kernels take, and what they do with the rest.

Each line was read at the address given with it; engines move on, so a sentence names the engine and the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Kernel(NamedTuple):
    """A router's kernel that is made for certain numbers of experts."""

    engine: str
    """Whose it is."""
    counts: frozenset[int]
    """Numbers of experts that it is made for."""
    otherwise: str
    """What the engine does with other numbers."""
    source: str
    """Where that was read."""
    grouped: bool | None = None
    """True: of routers with groups alone, False: of those without; None: of all."""
    most_in_group: int | None = None
    """Experts that one group may have; None: any number."""

    def takes(self, n_experts: int, n_groups: int) -> bool:
        """Whether it is made for so many experts in so many groups."""
        fits = self.most_in_group is None or n_experts // n_groups <= self.most_in_group
        return fits and n_experts in self.counts


def _powers(most: int) -> frozenset[int]:
    return frozenset(2**power for power in range(most.bit_length()) if 2**power <= most)


#: https://github.com/vllm-project/vllm and https://github.com/sgl-project/sglang, but for the first.
KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "llama.cpp (CUDA)",
        _powers(512) | {288, 576},
        "runs without the fused router, slower",
        "ggml/src/ggml-cuda/topk-moe.cu, ggml_cuda_should_use_topk_moe",
    ),
    Kernel(
        "vLLM (CUDA)",
        _powers(512) | {192, 320, 384, 448, 576},
        "routes with two kernels instead of one, slower",
        "csrc/libtorch_stable/moe/topk_softmax_kernels.cu, topkGatingKernelLauncher",
        grouped=False,
    ),
    Kernel(
        "SGLang (CUDA)",
        _powers(256),
        "routes with two kernels instead of one, slower",
        "sgl-kernel/csrc/moe/moe_topk_softmax_kernels.cu",
        grouped=False,
    ),
    Kernel(
        "SGLang (CUDA)",
        _powers(1024),
        "routes its groups without the fused gate, slower",
        "python/sglang/srt/layers/moe/topk.py, biased_grouped_topk_gpu",
        grouped=True,
        most_in_group=32,
    ),
    Kernel(
        "vLLM and SGLang on AMD, with aiter",
        _powers(1024),
        "may fail: its grouped top-k asks for a power of two",
        "the message 'num_experts must be a power of 2', as reported with 384 experts",
        grouped=True,
    ),
)
#: python/sglang/srt/layers/moe/fused_moe_triton/layer.py asserts that the experts divide; vLLM's determine_expert_map
#: (vllm/model_executor/layers/fused_moe/layer.py) gives the first GPUs one more.
_PARALLEL = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 72)


def kernel_notes(n_experts: int, n_groups: int = 1) -> list[str]:
    """A sentence for each engine in which so many experts run slower, or fail; empty where all have a kernel for it."""
    return list(_notes(n_experts, n_groups))


def _notes(n_experts: int, n_groups: int) -> Iterator[str]:
    for kernel in KERNELS:
        applies = kernel.grouped is None or kernel.grouped == (n_groups > 1)
        if applies and not kernel.takes(n_experts, n_groups):
            yield f"{kernel.engine} {kernel.otherwise}"


def parallel_text(n_experts: int) -> str:
    """Among how many GPUs expert parallelism divides so many experts."""
    found = [str(size) for size in _PARALLEL if n_experts % size == 0]
    among = f"divides among {', '.join(found)} GPUs" if found else "divides among no usual number of GPUs"
    return f"{among}; SGLang refuses others, vLLM gives some GPUs one more"
