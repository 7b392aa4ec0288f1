"""In which engines a number of experts is fast, slow or fails."""

from __future__ import annotations

import pytest

from reap.scores.engine_counts import KERNELS, kernel_notes, parallel_text
from reap.scores.plan import fused_router_counts


@pytest.mark.parametrize(
    ("n_experts", "n_groups", "slow"),
    [
        (128, 1, []),
        (96, 1, ["llama.cpp (CUDA)", "vLLM (CUDA)", "SGLang (CUDA)"]),
        (192, 1, ["llama.cpp (CUDA)", "SGLang (CUDA)"]),
        (288, 1, ["vLLM (CUDA)", "SGLang (CUDA)"]),
        (512, 1, ["SGLang (CUDA)"]),
        (256, 8, []),
        (128, 2, ["SGLang (CUDA)"]),
        (192, 8, ["llama.cpp (CUDA)", "SGLang (CUDA)", "vLLM and SGLang on AMD, with aiter"]),
    ],
)
def test_who_has_no_kernel_for_a_count(n_experts: int, n_groups: int, slow: list[str]) -> None:
    notes = kernel_notes(n_experts, n_groups)
    assert len(notes) == len(slow)
    for note, engine in zip(notes, slow, strict=True):
        assert note.startswith(engine)


def test_the_table_agrees_with_the_plan_s_own_warning() -> None:
    assert sorted(KERNELS[0].counts) == list(fused_router_counts(576))


def test_every_line_has_a_source() -> None:
    assert all(kernel.source for kernel in KERNELS)


def test_expert_parallelism() -> None:
    assert parallel_text(64).startswith("divides among 2, 4, 8, 16, 32, 64 GPUs;")
    assert parallel_text(103).startswith("divides among no usual number of GPUs;")
