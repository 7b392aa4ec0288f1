"""A transformers model as the run of a profile wants it: batches in, sums out, counted whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reap.errors import EngineError, ReapError, UnsupportedModelError
from reap.hf.memory.expert_hooks import Observer
from reap.hf.memory.modules import MoELayer
from reap.hf.memory.tracker import LayerSums

Int32s = NDArray[np.int32]
# windows share a pass where none is shorter than this part of the longest: the rest of its row is padding
_SHORTEST = 0.5


@dataclass(frozen=True)
class Batch:
    """Windows padded on the right."""

    ids: Tensor
    """int64 [n_windows, longest]."""
    mask: Tensor
    """bool, the same shape: not padding."""
    groups: Tensor
    """int64 [n_windows · longest]: the group that a token is counted in; -1: it is not counted."""

    @property
    def n_groups(self) -> int:
        return int(self.groups.max()) + 1

    @property
    def is_padded(self) -> bool:
        return not bool(self.mask.all())


class ModelSession:
    """Has the part of `reap._core.Session` that a profile uses, with a model that is whole in memory (or offloaded by
    accelerate).

    Attributes:
        batch_size: tokens of one pass, padding not counted; n_sequences: windows that may share one
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[MoELayer], *, batch_size: int, n_sequences: int, pad_token: int
    ) -> None:
        self.batch_size, self.n_sequences = batch_size, n_sequences
        self.n_experts_used = layers[0].n_experts_used
        self.units = 0
        self._layers, self._pad_token = layers, pad_token
        self._body = body_of(model)
        self._observer = Observer(layers, self._receive)
        self._running: Batch | None = None
        self._sums: dict[int, LayerSums] = {}  # of the batch that runs
        self._waiting: dict[int, LayerSums] = {}
        self._done: dict[int, LayerSums] = {}

    # ---- what a run calls

    def profile_batch(self, tokens: Int32s, positions: Int32s, sequences: Int32s, groups: Int32s) -> None:
        """Run windows of like lengths as the rows of one pass; arrays int32 [n_tokens], as `reap._core.Session` takes
        them."""
        with self._translated():
            for batch in self._batches(tokens, sequences, groups):
                self._run(batch)

    def commit(self, n_units: int) -> None:
        """Add what waits to the sums, and `n_units` to `units`."""
        done = _together(self._done, self._waiting)
        # no signal can part what one statement binds
        self._done, self._waiting, self.units = done, {}, self.units + n_units

    def discard(self) -> None:
        """Forget what waits."""
        self._waiting = {}

    def restore(self, group: int, sums: Mapping[str, NDArray[Any]], n_units: int) -> None:
        """Go on from the sums of an earlier run, as `sums` gave them."""
        for row, layer in enumerate(self._layers):
            restored = LayerSums(layer.n_experts, group + 1)
            for name, tensor in restored.tensors.items():
                tensor[group] = torch.as_tensor(sums[name][row])
            self._done[row] = self._done[row].plus(restored) if row in self._done else restored
        self.units = n_units

    @property
    def n_groups(self) -> int:
        return max((sums.n_groups for sums in self._done.values()), default=0)

    def sums(self, group: int) -> dict[str, NDArray[Any]]:
        """As `reap._core.Session.sums`: [n_layers, n_experts], and total_tokens [n_layers]."""
        names = LayerSums(1).tensors
        return {
            name: np.stack([self._done[row].tensors[name][group].cpu().numpy() for row in sorted(self._done)])
            for name in names
        }

    # ---- one batch

    def _batches(self, tokens: Int32s, sequences: Int32s, groups: Int32s) -> Iterator[Batch]:
        rows = [np.flatnonzero(sequences == number) for number in range(int(sequences.max()) + 1)]
        rows.sort(key=len, reverse=True)
        while rows:
            like = rows[: self._fit(rows)]
            yield self._pad([tokens[row] for row in like], [groups[row] for row in like])
            rows = rows[len(like) :]

    def _fit(self, rows: Sequence[NDArray[Any]]) -> int:
        """How many of the first rows, the longest first, make one pass."""
        return next((n for n, row in enumerate(rows) if len(row) < _SHORTEST * len(rows[0])), len(rows))

    def _pad(self, windows: Sequence[Int32s], groups: Sequence[Int32s]) -> Batch:
        shape = (len(windows), max(map(len, windows)))
        ids = torch.full(shape, self._pad_token, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        groups_of = torch.full(shape, -1, dtype=torch.int64)
        for row, (window, group) in enumerate(zip(windows, groups, strict=True)):
            ids[row, : len(window)] = torch.from_numpy(window.astype(np.int64))
            groups_of[row, : len(window)] = torch.from_numpy(group.astype(np.int64))
            mask[row, : len(window)] = True
        return Batch(ids, mask, groups_of.reshape(-1))

    def _run(self, batch: Batch) -> None:
        self._sums = {}
        self._begin(batch)
        with torch.inference_mode(), self._observer.watching():
            self._forward(batch)
        self._collect()

    def _begin(self, batch: Batch) -> None:
        self._running = batch
        self._observer.real = batch.mask.reshape(-1) if batch.is_padded else None

    def _forward(self, batch: Batch) -> None:
        device = _input_device(self._body)
        named = {"attention_mask": batch.mask.long().to(device)} if batch.is_padded else {}
        self._body(input_ids=batch.ids.to(device), use_cache=False, **named)

    def _receive(self, row: int, rows: Tensor, ids: Tensor, gates: Tensor, norms: Tensor) -> None:
        assert self._running is not None
        self.n_experts_used = ids.shape[1]
        n_groups, sums = self._running.n_groups, self._sums.get(row)
        if sums is None or sums.n_groups < n_groups:
            larger = LayerSums(self._layers[row].n_experts, n_groups, norms.device)
            sums = self._sums[row] = larger if sums is None else larger.plus(sums)
        groups = self._running.groups.to(rows.device)[rows]
        counted = torch.nonzero(groups >= 0).reshape(-1)
        if len(counted):
            ids, gates, norms = (values[counted.to(values.device)] for values in (ids, gates, norms))
            sums.add(ids, gates, norms, groups[counted])

    def _collect(self) -> None:
        """What the batch added waits from now on, if it is sound."""
        missing = [layer.name for row, layer in enumerate(self._layers) if row not in self._sums]
        if missing:
            raise UnsupportedModelError(
                f"{', '.join(missing[:3])}: the model runs without these experts, so nothing could be measured"
            )
        for row, sums in self._sums.items():
            if not sums.is_finite():
                raise EngineError(f"{self._layers[row].name}: an expert's output is not a finite number")
        self._waiting = _together(self._waiting, self._sums)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Whatever a model can raise as an EngineError; what waits is discarded."""
        try:
            yield
        except ReapError:
            self.discard()
            raise
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError) as error:
            self.discard()
            detail = " ".join(str(error).split())[:300]
            raise EngineError(f"the model failed: {type(error).__name__}: {detail}") from error


def _together(a: Mapping[int, LayerSums], b: Mapping[int, LayerSums]) -> dict[int, LayerSums]:
    # sums of an earlier run are on the host: what the device holds decides
    return {row: b[row].plus(a[row]) if row in a and row in b else {**a, **b}[row] for row in sorted({*a, *b})}


def body_of(model: nn.Module) -> nn.Module:
    """The model without its output head, which a profile has no use for."""
    body = getattr(model, "base_model", None)
    return body if isinstance(body, nn.Module) else model


def _input_device(model: nn.Module) -> torch.device:
    """Where token ids have to be: the device of the first weight, or, where that is offloaded, the one it will be
    computed on."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
        if any(True for _ in module.parameters(recurse=False)):
            break
    return next((tensor.device for tensor in model.parameters() if tensor.device.type != "meta"), torch.device("cpu"))
