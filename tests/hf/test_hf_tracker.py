"""SaliencyTracker against a loop over routings, and over two processes."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_hf_profile import needs  # noqa: F401  (a fixture)

from reap import hf
from reap.errors import UsageError

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def make_batch(seed: int, n_tokens: int = 40, n_experts: int = 8, top_k: int = 3) -> tuple[Any, Any, Any]:
    """ids and gates [n_tokens, top_k], norms of every expert for every token [n_tokens, n_experts]; the last expert is
    never chosen."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(n_experts - 1, generator=generator)[:top_k] for _ in range(n_tokens)])
    return (
        ids,
        torch.rand(n_tokens, top_k, generator=generator),
        torch.rand(n_tokens, n_experts, generator=generator) * 10,
    )


def routed(ids: Any, norms: Any) -> dict[int, Any]:
    """As a loop over experts sees them: those that chose it first, then those that chose it second, and so on."""
    found: dict[int, list[Any]] = {}
    for slot in range(ids.shape[1]):
        for token in range(ids.shape[0]):
            expert = int(ids[token, slot])
            found.setdefault(expert, []).append(norms[token, expert])
    import torch

    return {expert: torch.stack(values) for expert, values in found.items()}


def by_hand(batches: list[tuple[Any, Any, Any]], n_experts: int = 8) -> tuple[list[float], list[int]]:
    sums, counts = [0.0] * n_experts, [0] * n_experts
    for ids, gates, norms in batches:
        for token in range(ids.shape[0]):
            for slot in range(ids.shape[1]):
                expert = int(ids[token, slot])
                sums[expert] += float(gates[token, slot].double() * norms[token, expert].double())
                counts[expert] += 1
    return sums, counts


def make_tracker(batches: list[tuple[Any, Any, Any]], every_token: bool = False) -> Any:
    tracker = hf.SaliencyTracker(8)
    for ids, gates, norms in batches:
        given = {expert: norms[:, expert] for expert in range(8)} if every_token else routed(ids, norms)
        tracker.update(ids, gates, given, every_token=every_token)
    return tracker


@pytest.mark.parametrize("every_token", [False, True])
def test_the_sums(every_token: bool) -> None:
    batches = [make_batch(seed) for seed in (1, 2, 3)]
    tracker = make_tracker(batches, every_token)
    sums, counts = by_hand(batches)
    assert tracker.total_count == sum(counts) == 360
    assert tracker.counts.tolist() == counts
    assert tracker.sum_saliency.tolist() == pytest.approx(sums, rel=1e-14)
    means = tracker.mean_saliency.tolist()
    assert means[:7] == pytest.approx([s / n for s, n in zip(sums[:7], counts[:7], strict=True)], rel=1e-14)
    assert math.isnan(means[7])


def test_an_empty_tracker() -> None:
    tracker = hf.SaliencyTracker(3)
    assert (tracker.total_count, tracker.counts.tolist(), tracker.sum_saliency.tolist()) == (0, [0, 0, 0], [0, 0, 0])
    assert all(math.isnan(value) for value in tracker.mean_saliency)


def test_sums_stay_on_the_device_of_the_norms() -> None:
    """A device without data shows it: nothing is read until it is asked for."""
    import torch

    tracker = hf.SaliencyTracker(4)
    tracker.update(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), {0: torch.ones(1), 1: torch.ones(1)})
    assert tracker._sums.tensors["gated_norm_sum"].dtype == torch.float64
    assert tracker._sums.device == torch.device("cpu")
    assert tracker.mean_saliency.device.type == "cpu"


def test_who_is_retained() -> None:
    import torch

    tracker = hf.SaliencyTracker(6)
    ids = torch.tensor([[0, 1], [2, 3], [0, 2]])
    gates = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    # means: 0 -> 2, 1 -> 0, 2 -> 5, 3 -> 2, and 4, 5 never chosen
    tracker.update(
        ids,
        gates,
        {0: torch.tensor([1.0, 3.0]), 1: torch.tensor([0.0]), 2: torch.tensor([5.0, 5.0]), 3: torch.tensor([2.0])},
    )
    assert tracker.mean_saliency.tolist()[:4] == [2, 0, 5, 2]
    assert tracker.compute_retained_experts(2).tolist() == [0, 1, 2, 3]  # a score of zero stays before none
    assert tracker.compute_retained_experts(4).tolist() == [0, 2]  # of equals the one with more tokens
    assert tracker.compute_retained_experts(5).tolist() == [2]
    assert tracker.compute_retained_experts(0).tolist() == [0, 1, 2, 3, 4, 5]
    assert tracker.compute_retained_experts(2, 1).tolist() == [0, 2, 3, 4]  # two groups of three
    assert tracker.compute_retained_experts(3, 1, n_groups=3).tolist() == [0, 2, 4]

    class Attributes:
        n_group, group_size = 3, 2

    assert tracker.compute_retained_experts(3, 1, Attributes()).tolist() == [0, 2, 4]
    assert tracker.compute_retained_experts(3, 1, Attributes()).dtype == torch.int32
    for arguments in ((6,), (-1,), (6, 2, Attributes()), (4, 1)):
        with pytest.raises(UsageError):
            tracker.compute_retained_experts(*arguments)


def test_what_does_not_belong_together() -> None:
    import torch

    tracker = hf.SaliencyTracker(2)
    ids, gates = torch.tensor([[0], [0]]), torch.ones(2, 1)
    for call, message in (
        ((ids, gates, {0: torch.ones(3)}), r"expert 0 has norms of shape \[3\], expected \[2\]"),
        ((ids, gates, {}), "expert 0 has no norms, but 2 tokens are routed to it"),
        ((ids + 2, gates, {0: torch.ones(2)}), "name experts outside of 0 to 1"),
        ((ids, gates[:1], {0: torch.ones(2)}), r"should both be \[num_tokens, top_k\], found \[2, 1\] and \[1, 1\]"),
    ):
        with pytest.raises(UsageError, match=message):
            tracker.update(*call)
    assert tracker.total_count == 0
    with pytest.raises(UsageError, match="num_experts should be"):
        hf.SaliencyTracker(0)


RANK = """
import os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
import torch, torch.distributed as dist
from reap import hf
from test_hf_tracker import make_batch, make_tracker, by_hand
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[3]}", rank=rank, world_size=2)
idle = hf.SaliencyTracker(8) if rank else make_tracker([make_batch(9)])
tracker = make_tracker([make_batch(1), make_batch(2)] if rank == 0 else [make_batch(3)])
tracker.reduce_saliency_stats()
idle.reduce_saliency_stats(torch.device("cpu"))
tracker.reduce_saliency_stats()
sums, counts = by_hand([make_batch(seed) for seed in (1, 2, 3)])
assert tracker.counts.tolist() == counts, counts
assert torch.allclose(tracker.sum_saliency, torch.tensor(sums, dtype=torch.float64), rtol=1e-14)
assert idle.counts.tolist() == by_hand([make_batch(9)])[1]
try:
    tracker.update(*make_batch(4)[:2], {})
except Exception as error:
    print(type(error).__name__, tracker.compute_retained_experts(4).tolist())
dist.destroy_process_group()
"""


def test_two_processes_have_the_sums_of_both(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    here = str(Path(__file__).parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), here, str(rank), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert said[0][0].startswith("UsageError [")
