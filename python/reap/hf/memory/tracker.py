"""Sums over routings, kept on the device that computes: SaliencyTracker, and the sums of a profile's layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.functional import pad

from reap.errors import UsageError
from reap.scores.ranking import select_experts
from reap.scores.records import SUMS


class LayerSums:
    """The sums of one layer, by group of tokens (domain): tensors that stay on `device` until they are read.

    tensors  counts int64, the six sums float64, each [n_groups, n_experts]; total_tokens int64 [n_groups]
    """

    def __init__(self, n_experts: int, n_groups: int = 1, device: torch.device | str = "cpu") -> None:
        self.n_experts, self.n_groups = n_experts, n_groups
        # float64 does not exist on Apple's devices
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.tensors: dict[str, Tensor] = {
            name: torch.zeros((n_groups, n_experts), dtype=torch.float64, device=self.device) for name in SUMS
        }
        self.tensors["counts"] = torch.zeros((n_groups, n_experts), dtype=torch.int64, device=self.device)
        self.tensors["total_tokens"] = torch.zeros(n_groups, dtype=torch.int64, device=self.device)

    def add(self, ids: Tensor, gates: Tensor, norms: Tensor, groups: Tensor | None = None) -> None:
        """Count the routings of some tokens. ids, gates, norms: [n_tokens, n_used]; groups: [n_tokens], all 0 by
        default."""
        ids = ids.to(self.device, torch.int64)
        gates, norms = (values.to(self.device, torch.float64) for values in (gates, norms))
        groups = (
            torch.zeros(len(ids), dtype=torch.int64, device=self.device) if groups is None else groups.to(self.device)
        )
        self.tensors["total_tokens"] += torch.bincount(groups, minlength=self.n_groups)
        places = (groups[:, None] * self.n_experts + ids).reshape(-1)
        self._at("counts").index_add_(0, places, torch.ones_like(places))
        gated = gates * norms
        for name, values in (
            ("gate_sum", gates),
            ("norm_sum", norms),
            ("gated_norm_sum", gated),
            ("gated_norm_sq_sum", gated**2),
            ("norm_sq_sum", norms**2),
        ):
            self._at(name).index_add_(0, places, values.reshape(-1))
        self._at("norm_max").scatter_reduce_(0, places, norms.reshape(-1), "amax")

    def plus(self, other: LayerSums) -> LayerSums:
        """Both together, as a new object with the groups of both."""
        result = LayerSums(self.n_experts, 0, self.device)
        result.n_groups = max(self.n_groups, other.n_groups)
        for name in self.tensors:
            mine, theirs = (_with_groups(sums.tensors[name].to(self.device), result.n_groups) for sums in (self, other))
            result.tensors[name] = torch.maximum(mine, theirs) if name == "norm_max" else mine + theirs
        return result

    def is_finite(self) -> bool:
        """Whether no sum is infinite or not a number. Waits for the device."""
        squares = self.tensors["gated_norm_sq_sum"], self.tensors["norm_sq_sum"]
        return bool(torch.isfinite(squares[0]).all() & torch.isfinite(squares[1]).all())

    def _at(self, name: str) -> Tensor:
        return self.tensors[name].view(-1)


def _with_groups(tensor: Tensor, n_groups: int) -> Tensor:
    missing = n_groups - len(tensor)
    return pad(tensor, (*[0, 0] * (tensor.dim() - 1), 0, missing)) if missing else tensor


class SaliencyTracker:
    """REAP's saliency of one layer's experts: the mean of g·‖f‖ over the tokens routed to an expert (Lasby et al. 2025,
    eq. 9).

    The interface is that of llm-compressor's tracker. Sums are float64 and live on the device of the first update's
    norms; they come to the host as a property or `compute_retained_experts` reads them.
    """

    def __init__(self, num_experts: int) -> None:
        if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
            raise UsageError(f"num_experts should be a whole number from 1 on, found {num_experts!r}")
        self.num_experts = num_experts
        self._sums: LayerSums | None = None
        self._is_reduced = False

    def update(
        self,
        topk_indices: Tensor,
        topk_weights: Tensor,
        expert_norms: Mapping[int, Tensor],
        *,
        every_token: bool = False,
    ) -> None:
        """Add the routings of a batch.

        Args:
            topk_indices: int [num_tokens, top_k]: the experts of each token
            topk_weights: float [num_tokens, top_k]: the gate that multiplies the expert's output
            expert_norms: expert -> float [num_routed_tokens]: ‖f‖ of the tokens routed to it, in the order in which
                transformers' and llm-compressor's experts see them: all tokens that chose it first, then those that
                chose it second, and so on, each in the order of the tokens (`torch.where(topk_indices.T == expert)`).
                With `every_token`: float [num_tokens], of all tokens in their order. Experts without tokens may be left
                out.

        UsageError where shapes or numbers do not belong together; nothing is added then.
        """
        if self._is_reduced:
            raise UsageError("the tracker holds the sums of all ranks already; begin a new one for further batches")
        if topk_indices.dim() != 2 or topk_indices.shape != topk_weights.shape:
            found = f"{list(topk_indices.shape)} and {list(topk_weights.shape)}"
            raise UsageError(f"topk_indices and topk_weights should both be [num_tokens, top_k], found {found}")
        device = next((norms.device for norms in expert_norms.values()), topk_weights.device)
        with torch.no_grad():
            ids = topk_indices.to(device, torch.int64)
            norms = gather_norms(ids, expert_norms, self.num_experts, every_token=every_token)
            if self._sums is None:
                self._sums = LayerSums(self.num_experts, device=device)
            self._sums.add(ids, topk_weights, norms)

    @property
    def counts(self) -> Tensor:
        """int64 [num_experts], on the host: tokens routed to each expert."""
        return self._read("counts", torch.int64)

    @property
    def sum_saliency(self) -> Tensor:
        """float64 [num_experts], on the host: sum of g·‖f‖."""
        return self._read("gated_norm_sum", torch.float64)

    @property
    def mean_saliency(self) -> Tensor:
        """float64 [num_experts], on the host: sum_saliency / counts; NaN for an expert that no token was routed to."""
        return self.sum_saliency / self.counts  # 0 / 0 is NaN

    @property
    def total_count(self) -> int:
        """Routings counted so far."""
        return int(self.counts.sum())

    def reduce_saliency_stats(self, device: torch.device | str | None = None, group: Any = None) -> None:
        """Replace the sums by those over all ranks of `group` (torch.distributed), on each rank; nothing to do outside
        of it.

        Every rank has to call it, one without any update too; `device` is where such a one keeps its zeros. Further
        updates are refused.
        """
        if self._is_reduced or not (distributed.is_available() and distributed.is_initialized()):
            return
        sums = self._sums or LayerSums(self.num_experts, device=device or _device_of(group))
        carrier = torch.device("cpu") if distributed.get_backend(group) == "gloo" else sums.device
        for name, tensor in sums.tensors.items():
            moved = tensor.to(carrier).contiguous()
            distributed.all_reduce(
                moved, distributed.ReduceOp.MAX if name == "norm_max" else distributed.ReduceOp.SUM, group=group
            )
            sums.tensors[name] = moved.to(sums.device)
        self._sums, self._is_reduced = sums, True

    def compute_retained_experts(
        self,
        n_experts_to_drop: int,
        n_experts_to_drop_per_group: int | None = None,
        moe_attrs: Any = None,
        *,
        n_groups: int | None = None,
    ) -> Tensor:
        """The experts that stay when the least salient go: int32 [num_experts - dropped], ascending.

        With a grouped router give `n_experts_to_drop_per_group`, which then decides, and the number of groups:
        `n_groups`, or an object with `n_group` (llm-compressor's MoeModelAttrs, a configuration, a MoELayer); by
        default n_experts_to_drop divided by n_experts_to_drop_per_group. Experts without tokens go first; ties are
        decided by count, then by number. UsageError for numbers that cannot be.
        """
        groups = 1
        if n_experts_to_drop_per_group is not None:
            groups = (
                n_groups
                or getattr(moe_attrs, "n_group", None)
                or n_experts_to_drop // max(n_experts_to_drop_per_group, 1)
            )
            if groups < 1 or self.num_experts % groups:
                raise UsageError(f"{self.num_experts} experts cannot be shared equally by {groups} groups")
            n_experts_to_drop = n_experts_to_drop_per_group * groups
        if not 0 <= n_experts_to_drop < self.num_experts:
            raise UsageError(
                f"{n_experts_to_drop} of {self.num_experts} experts cannot be dropped: at least one has to stay"
            )
        score, counts = self.mean_saliency.numpy(), self.counts.numpy()
        kept = select_experts(score, counts, self.num_experts - n_experts_to_drop, groups)
        return torch.from_numpy(np.array(kept, dtype=np.int32))

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        if self._sums is None:
            return torch.zeros(self.num_experts, dtype=dtype)
        return self._sums.tensors[name][0].cpu()


def gather_norms(
    ids: Tensor, expert_norms: Mapping[int, Tensor], num_experts: int, *, every_token: bool, may_lack: bool = False
) -> Tensor:
    """The norm of each routing: float64 [num_tokens, top_k].

    Args:
        ids: int64 [num_tokens, top_k]: the experts of each token
        expert_norms: expert -> norms of the tokens routed to it, in the order of `SaliencyTracker.update`, or, with
            `every_token`, of all tokens
        may_lack: an expert without norms has norms of 0

    Raises:
        UsageError: shapes or numbers do not belong together.
    """
    # Slots outside, tokens inside: the order of the rows that an expert sees. One transfer tells all counts.
    by_slot = ids.T.reshape(-1)
    if by_slot.numel() and not bool(((by_slot >= 0) & (by_slot < num_experts)).all()):
        raise UsageError(f"topk_indices name experts outside of 0 to {num_experts - 1}")
    counts = torch.bincount(by_slot, minlength=num_experts).tolist()
    norms = torch.zeros(
        by_slot.shape, dtype=LayerSums(1, device=ids.device).tensors["norm_sum"].dtype, device=ids.device
    )
    for expert, count in enumerate(counts):
        given = expert_norms.get(expert)
        expected = len(ids) if every_token else count
        if given is None:
            if count and not may_lack:
                raise UsageError(f"expert {expert} has no norms, but {count} tokens are routed to it")
            continue
        if given.shape != (expected,):
            raise UsageError(f"expert {expert} has norms of shape {list(given.shape)}, expected [{expected}]")
        places = torch.where(by_slot == expert)[0]
        norms[places] = (given[places % len(ids)] if every_token else given).to(norms.device, norms.dtype)
    return norms.reshape(ids.shape[1], ids.shape[0]).T


def _device_of(group: Any) -> torch.device:
    return torch.device("cuda") if distributed.get_backend(group) == "nccl" else torch.device("cpu")
