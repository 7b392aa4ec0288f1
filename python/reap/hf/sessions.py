"""A transformers model as the run of a profile wants it: batches in, sums out, counted whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reap.errors import EngineError, ReapError, UnsupportedModelError
from reap.hf.observing import Observer
from reap.hf.structure import MoELayer
from reap.hf.tracker import LayerSums

Int32s = NDArray[np.int32]


class ModelSession:
    """Has the part of `reap._core.Session` that a profile uses, with a model that is whole in memory (or offloaded by accelerate).

    batch_size   tokens of one forward pass, padding included; n_sequences: windows that may share one
    """

    def __init__(self, model: nn.Module, layers: Sequence[MoELayer], *, batch_size: int, n_sequences: int, pad_token: int) -> None:
        self.batch_size, self.n_sequences = batch_size, n_sequences
        self.units = 0
        self._model, self._layers, self._pad_token = model, layers, pad_token
        self._body = body_of(model)
        self._device = _input_device(model)
        self._observer = Observer(layers, self._receive)
        self._groups = torch.zeros(0, dtype=torch.int64)
        self._n_groups = 1
        self._batch: dict[int, LayerSums] = {}
        self._waiting: dict[int, LayerSums] = {}
        self._done: dict[int, LayerSums] = {}
        self.n_experts_used = layers[0].n_experts_used

    # ---- what a run calls

    def profile_batch(self, tokens: Int32s, positions: Int32s, sequences: Int32s, groups: Int32s) -> None:
        """Run windows as the rows of one batch, padded on the right; arrays int32 [n_tokens], as `reap._core.Session` takes them."""
        rows = [np.flatnonzero(sequences == number) for number in range(int(sequences.max()) + 1)]
        try:
            self._run([tokens[row] for row in rows], [groups[row] for row in rows])
        except ReapError:
            self.discard()
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
            self.discard()
            detail = " ".join(str(error).split())[:300]
            raise EngineError(f"the model failed: {type(error).__name__}: {detail}") from error

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
            restored = LayerSums(layer.n_experts, group + 1, self._sums_device(layer))
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
        return {name: np.stack([self._done[row].tensors[name][group].cpu().numpy() for row in sorted(self._done)]) for name in names}

    # ---- one batch

    def _run(self, windows: Sequence[Int32s], groups: Sequence[Int32s]) -> None:
        ids, mask, flat_groups = self._pad(windows, groups)
        is_padded = not bool(mask.all())
        self._groups = flat_groups
        self._n_groups = int(flat_groups.max()) + 1
        self._batch = {}
        self._observer.real = mask.reshape(-1) if is_padded else None
        named = {"attention_mask": mask.long().to(self._device)} if is_padded else {}
        with torch.inference_mode(), self._observer.watching():
            self._body(input_ids=ids.to(self._device), use_cache=False, **named)
        self._check()
        self._waiting = _together(self._waiting, self._batch)

    def _pad(self, windows: Sequence[Int32s], groups: Sequence[Int32s]) -> tuple[Tensor, Tensor, Tensor]:
        """ids and mask [n_windows, longest], groups [n_windows · longest], -1 where nothing is counted."""
        shape = (len(windows), max(map(len, windows)))
        ids = torch.full(shape, self._pad_token, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        groups_of = torch.full(shape, -1, dtype=torch.int64)
        for row, (window, group) in enumerate(zip(windows, groups, strict=True)):
            ids[row, : len(window)] = torch.from_numpy(window.astype(np.int64))
            groups_of[row, : len(window)] = torch.from_numpy(group.astype(np.int64))
            mask[row, : len(window)] = True
        return ids, mask, groups_of.reshape(-1)

    def _receive(self, row: int, rows: Tensor, ids: Tensor, gates: Tensor, norms: Tensor) -> None:
        layer = self._layers[row]
        self.n_experts_used = ids.shape[1]
        sums = self._batch.get(row)
        if sums is None:
            sums = self._batch[row] = LayerSums(layer.n_experts, self._n_groups, self._sums_device(layer, norms))
        groups = self._groups.to(rows.device)[rows]
        counted = torch.nonzero(groups >= 0).reshape(-1)
        if len(counted):
            ids, gates, norms = (values[counted.to(values.device)] for values in (ids, gates, norms))
            sums.add(ids, gates, norms, groups[counted])

    def _check(self) -> None:
        missing = [layer.name for row, layer in enumerate(self._layers) if row not in self._batch]
        if missing:
            raise UnsupportedModelError(f"{', '.join(missing[:3])}: the model runs without these experts, so nothing could be measured")
        for row, sums in self._batch.items():
            if not sums.is_finite():
                raise EngineError(f"{self._layers[row].name}: an expert's output is not a finite number")

    def _sums_device(self, layer: MoELayer, norms: Tensor | None = None) -> torch.device:
        return norms.device if norms is not None else torch.device("cpu")


def _together(a: Mapping[int, LayerSums], b: Mapping[int, LayerSums]) -> dict[int, LayerSums]:
    # sums of an earlier run are on the host: what the device holds decides
    return {row: b[row].plus(a[row]) if row in a and row in b else {**a, **b}[row] for row in sorted({*a, *b})}


def body_of(model: nn.Module) -> nn.Module:
    """The model without its output head, which a profile has no use for."""
    body = getattr(model, "base_model", None)
    return body if isinstance(body, nn.Module) else model


def _input_device(model: nn.Module) -> torch.device:
    """Where token ids have to be: the device of the first weight, or, where that is offloaded, the one it will be computed on."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((tensor.device for tensor in model.parameters() if tensor.device.type != "meta"), torch.device("cpu"))
