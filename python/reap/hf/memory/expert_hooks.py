"""What each expert answers, and the gate its answer is multiplied with, while a model runs.

Experts that share tensors (transformers' own) are called as experts(hidden [n, d], ids [n, k], gates [n, k]) and return
the gated sum. Such a call is replaced by one in which every routing is a token of its own, with a gate of one: what
comes back are the outputs f themselves, computed once, by the implementation that the model has chosen (eager, grouped
or batched products), biases and scales included. Their norms are taken, and the sum of gate times f goes on to the
model.

Experts that are a list of modules are called by code that cannot be known in advance. So the block runs a second time
with experts
that return unit vectors instead of answers: the coordinates of its output then say which row was which token's, and by
what number it was multiplied. Nothing but the router is computed for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reap.errors import EngineError, UnsupportedModelError
from reap.hf.memory.modules import MoELayer
from reap.hf.memory.offloading import read_tensor

# receives the routings of some tokens: layer's row, tokens [n], ids, gates, norms [n, k]
Receiver = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]

# how far the replaced call may be from the original one, relative to its largest value
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
_PROVED_TOKENS = 4
# blocks whose class is called so multiply the sum that their experts return by routed_scaling_factor
_FACTOR_BEHIND = ("Beam", "Laguna", "MiniMaxM3VL", "Step3p7")


class Observer:
    """Watches the layers of a model while `watching`; `real` says, before each forward pass, which rows of a batch are
    tokens.

    real  bool [n_rows] or None (all): rows that are not padding. No expert runs on the others.
    """

    def __init__(self, layers: Sequence[MoELayer], receive: Receiver) -> None:
        self.real: Tensor | None = None
        self._watches: list[_ListWatch | _FusedWatch] = [
            (_ListWatch if layer.is_list else _FusedWatch)(self, row, layer, receive)
            for row, layer in enumerate(layers)
        ]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put the hooks in place; they are gone afterwards, whatever happens."""
        try:
            for watch in self._watches:
                watch.attach()
            yield
        finally:
            for watch in self._watches:
                watch.detach()

    def rows(self, n_rows: int, layer: MoELayer, device: torch.device) -> Tensor:
        """int64: which rows of a call are tokens."""
        if self.real is None:
            return torch.arange(n_rows, device=device)
        if len(self.real) != n_rows:
            raise UnsupportedModelError(
                f"{layer.name}: its experts were called with {n_rows} rows for a batch of {len(self.real)}"
            )
        return torch.nonzero(self.real.to(device)).reshape(-1)


class _Replaced:
    """A module whose forward is replaced for a while; hooks, and what others have put around the forward, stay in
    place."""

    def __init__(self, module: nn.Module, replacement: Callable[..., Any]) -> None:
        self._module, self._replacement = module, replacement
        self._own: Any = None
        self.original: Callable[..., Any] = module.forward

    def attach(self) -> None:
        self._own = self._module.__dict__.get("forward")  # accelerate puts its own there
        self.original = self._module.forward
        self._module.__dict__["forward"] = self._replacement

    def detach(self) -> None:
        if self._module.__dict__.get("forward") is not self._replacement:
            return
        if self._own is None:
            del self._module.__dict__["forward"]
        else:
            self._module.__dict__["forward"] = self._own


class _FusedWatch:
    """Experts that share tensors."""

    def __init__(self, observer: Observer, row: int, layer: MoELayer, receive: Receiver) -> None:
        self._observer, self._row, self._layer, self._receive = observer, row, layer, receive
        self._replaced = _Replaced(layer.experts, self._forward)
        self._is_proved = False

    def attach(self) -> None:
        self._replaced.attach()

    def detach(self) -> None:
        self._replaced.detach()

    def _forward(self, *arguments: Any, **named: Any) -> Tensor:
        hidden, ids, gates = self._read_call([*arguments, *named.values()])
        rows = self._observer.rows(len(hidden), self._layer, hidden.device)
        is_whole = len(rows) == len(hidden)
        part = (hidden, ids, gates) if is_whole else (hidden[rows], ids[rows], gates[rows])
        combined = self._run(rows, *part)
        if is_whole:
            return combined
        return torch.zeros_like(hidden, dtype=combined.dtype).index_copy_(0, rows, combined)

    def _run(self, rows: Tensor, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        n_tokens, n_used = ids.shape
        if not n_tokens:
            return torch.zeros_like(hidden)
        outputs = self._replaced.original(
            hidden.repeat_interleave(n_used, dim=0), ids.reshape(-1, 1), torch.ones_like(gates).reshape(-1, 1)
        ).reshape(n_tokens, n_used, -1)
        combined: Tensor = (
            (outputs * gates.unsqueeze(-1).to(torch.promote_types(outputs.dtype, gates.dtype)))
            .sum(dim=1)
            .to(outputs.dtype)
        )
        if not self._is_proved:
            self._prove(hidden, ids, gates, combined)
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.promote_types(outputs.dtype, torch.float32))
        self._receive(self._row, rows, ids, *self._scaled(ids, gates, norms))
        return combined

    def _scaled(self, ids: Tensor, gates: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """The odd ones: a factor that the block applies after its experts, and a scale of each expert that is not the
        gate's."""
        block = self._layer.block
        if type(block).__name__.startswith(_FACTOR_BEHIND):
            gates = gates * float(getattr(block, "routed_scaling_factor", 1.0))
        if getattr(self._layer.router, "per_expert_scale", None) is None:
            return gates, norms
        # Gemma-4's router multiplies its gates by what a GGUF file has as a scale of the experts: it belongs to f
        scale = read_tensor(self._layer.router, "per_expert_scale").to(ids.device)[ids]
        return gates / torch.where(scale == 0, 1, scale), norms * scale.abs()

    def _prove(self, hidden: Tensor, ids: Tensor, gates: Tensor, combined: Tensor) -> None:
        """The gate multiplies the output: the original call gives the same sum, and twice of it for twice the gates."""
        few = slice(0, _PROVED_TOKENS)
        expected = combined[few].double()
        for factor in (1, 2):
            found = self._replaced.original(hidden[few], ids[few], gates[few] * factor).double()
            error = float((found - factor * expected).abs().max())
            scale = float(found.abs().max())
            if error > _TOLERANCE.get(hidden.dtype, 0.1) * scale:  # NaN passes: it is reported as what it is
                raise UnsupportedModelError(
                    f"{self._layer.name}: its experts' output is not the sum of gate times output (off by {error:.2g}"
                    f" of {scale:.2g}), so what each contributes cannot be told"
                )
        self._is_proved = True

    def _read_call(self, values: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) == len(values) == 3:
            hidden, ids, gates = tensors
            fits = (
                hidden.dim() == 2
                and ids.shape == gates.shape == (len(hidden), ids.shape[-1])
                and not ids.is_floating_point()
            )
            if fits and gates.is_floating_point():
                return hidden, ids, gates
        found = ", ".join(
            str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__ for value in values
        )
        raise UnsupportedModelError(
            f"{self._layer.name}: its experts are called with ({found}), where (tokens, their experts, the gates) was"
            " expected"
        )


class _ListWatch:
    """Experts that are a list of modules. The block runs part by part, each part twice: with the experts, and with unit
    vectors."""

    def __init__(self, observer: Observer, row: int, layer: MoELayer, receive: Receiver) -> None:
        self._observer, self._row, self._layer, self._receive = observer, row, layer, receive
        experts = [child for name, child in layer.experts.named_children() if name.isdigit()]
        others = [
            child for name, child in layer.block.named_children() if name not in (layer.router_name, layer.experts_name)
        ]
        self._experts = [_Replaced(module, self._make_expert(index)) for index, module in enumerate(experts)]
        self._others = [_Replaced(module, self._make_other(index)) for index, module in enumerate(others)]
        self._block = _Replaced(layer.block, self._forward)
        self._is_probing = False
        self._norms: list[list[Tensor]] = []  # expert -> norms of its rows, one tensor a call
        self._columns: list[tuple[int, int]] = []  # of a probe: coordinate -> expert, row among all of its rows
        self._rows: list[int] = []  # of a probe: rows seen by each expert

    def attach(self) -> None:
        for replaced in (*self._experts, *self._others, self._block):
            replaced.attach()

    def detach(self) -> None:
        for replaced in (*self._experts, *self._others, self._block):
            replaced.detach()

    def _forward(self, *arguments: Any, **named: Any) -> Any:
        if len(arguments) + len(named) != 1:
            raise UnsupportedModelError(f"{self._layer.name}: the block is called with more than the hidden states")
        (hidden,) = (*arguments, *named.values())
        tokens = hidden.reshape(-1, hidden.shape[-1])
        rows = self._observer.rows(len(tokens), self._layer, hidden.device)
        size = max(1, tokens.shape[-1] // (self._layer.n_experts_used or 1))
        outputs: list[Any] = []
        start = 0
        while start < len(rows):
            part = rows[start : start + size]
            try:
                outputs.append(self._run_part(part, tokens[part]))
            except _ProbeTooLarge:
                if size == 1:
                    raise UnsupportedModelError(
                        f"{self._layer.name}: a token calls more experts than the model is wide"
                    ) from None
                size = size // 2
                continue
            start += size
        return _join(outputs, rows, hidden)

    def _run_part(self, rows: Tensor, tokens: Tensor) -> Any:
        found = self._probe(tokens)
        self._norms = [[] for _ in self._experts]
        output = self._block.original(tokens[None])
        if found is not None:
            token, expert, gate, number = found
            norms = [torch.cat(parts) if parts else gate.new_zeros(0) for parts in self._norms]
            norm = torch.stack([norms[e][n] for e, n in zip(expert.tolist(), number.tolist(), strict=True)])
            self._send(rows, token, expert, gate, norm)
        return output

    def _make_expert(self, index: int) -> Callable[..., Any]:
        def forward(hidden: Tensor, *rest: Any, **named: Any) -> Any:
            if self._is_probing:
                return self._unit_vectors(index, hidden)
            output = self._experts[index].original(hidden, *rest, **named)
            flat = output.reshape(-1, output.shape[-1])
            self._norms[index].append(
                torch.linalg.vector_norm(flat, dim=-1, dtype=torch.promote_types(flat.dtype, torch.float32))
            )
            return output

        return forward

    def _make_other(self, index: int) -> Callable[..., Any]:
        """Shared experts and the like: silent while a probe runs, so that the block's output is that of the routed
        ones."""

        def forward(*arguments: Any, **named: Any) -> Any:
            output = self._others[index].original(*arguments, **named)
            return torch.zeros_like(output) if self._is_probing and isinstance(output, Tensor) else output

        return forward

    def _unit_vectors(self, expert: int, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        # some blocks call an expert without tokens with a row of zeros: no routing
        real = (
            torch.nonzero(flat.abs().amax(dim=-1) > 0).reshape(-1) if len(flat) else torch.zeros(0, dtype=torch.int64)
        )
        start = len(self._columns)
        if start + len(real) > hidden.shape[-1]:
            raise _ProbeTooLarge
        vectors = torch.zeros_like(flat)
        vectors[real, start + torch.arange(len(real), device=real.device)] = 1
        self._columns += [(expert, self._rows[expert] + row) for row in real.tolist()]
        self._rows[expert] += len(flat)
        return vectors.reshape(hidden.shape)

    def _probe(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Token, expert, gate and row among the expert's rows, of each routing."""
        self._columns, self._rows, self._is_probing = [], [0] * len(self._experts), True
        try:
            output = _first(self._block.original(tokens[None])).reshape(len(tokens), -1)[:, : len(self._columns)]
        finally:
            self._is_probing = False
        token, column = torch.nonzero(output, as_tuple=True)
        if int(torch.bincount(column, minlength=1).max()) > 1:
            raise UnsupportedModelError(
                f"{self._layer.name}: the output of its experts is changed before it is summed up"
            )
        pairs = torch.tensor(self._columns, dtype=torch.int64).reshape(-1, 2)[column.cpu()]
        return token.cpu(), pairs[:, 0], output[token, column], pairs[:, 1]

    def _send(self, rows: Tensor, token: Tensor, expert: Tensor, gate: Tensor, norm: Tensor) -> None:
        used = torch.bincount(token, minlength=len(rows))
        if int(used.min()) != int(used.max()):
            raise EngineError(
                f"{self._layer.name}: tokens have {int(used.min())} to {int(used.max())} experts, where one number was"
                " expected"
            )
        order = torch.argsort(token, stable=True)
        ids, gates, norms = (values[order.to(values.device)].reshape(len(rows), -1) for values in (expert, gate, norm))
        self._receive(self._row, rows, ids, gates, norms)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _join(outputs: list[Any], rows: Tensor, hidden: Tensor) -> Any:
    """The parts' outputs as the block's: rows that were left out are zero; what comes after the first output is put
    together by tokens."""
    if not outputs:
        raise EngineError("a batch without tokens")
    joined = torch.cat([_first(output).reshape(-1, hidden.shape[-1]) for output in outputs])
    whole = (
        torch.zeros_like(joined[:1])
        .expand(hidden.numel() // hidden.shape[-1], -1)
        .contiguous()
        .index_copy_(0, rows, joined)
    )
    whole = whole.reshape(hidden.shape)
    if not isinstance(outputs[0], tuple):
        return whole
    rest = [
        torch.cat(values) if isinstance(values[0], Tensor) and values[0].dim() else values[0]
        for values in zip(*outputs, strict=True)
    ]
    return (whole, *rest[1:])


class _ProbeTooLarge(Exception):
    """More routings than coordinates: a smaller part has to be tried."""
