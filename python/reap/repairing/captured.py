"""What a repair is fitted on: the same windows of tokens through the whole model and through the pruned one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from reap.errors import UnsupportedModelError
from reap.repairing.solve import Correction, Tokens

if TYPE_CHECKING:
    from reap import _core

Windows = Sequence[NDArray[np.int32]]
Streams = dict[int, NDArray[np.float32]]
#: How far what a correction does to the hidden states may be from what was computed, as a share.
_LINEAR = 0.05


@dataclass(frozen=True)
class Divided:
    """Windows of a calibration, dealt out before anything is fitted."""

    fitted: Windows
    """Those that corrections are fitted on, the unseen ones included."""
    is_unseen: NDArray[np.bool_]
    """[n_tokens of fitted]: whether λ is chosen on the token, and no correction fitted to it for that."""
    checked: Windows
    """Those that have no part in the fit: whether the whole repair helps is seen on them."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the windows that are fitted."""
        return len(self.is_unseen)


def divide(windows: Windows) -> Divided:
    """Of ten windows one chooses λ, and another one is kept out of the fit."""
    checked = [window for index, window in enumerate(windows) if index % 10 == 4]
    fitted = [(index, window) for index, window in enumerate(windows) if index % 10 != 4]
    is_unseen = np.concatenate([np.full(len(window), index % 10 == 9) for index, window in fitted])
    return Divided([window for _, window in fitted], is_unseen, checked)


def capture_streams(
    session: _core.Session, windows: Windows, layers: Sequence[int], n_embd: int, told: Callable[[int], None]
) -> Streams:
    """Layer -> the hidden states that it hands on, float32 [n_tokens, n_embd]. told: after each window, its tokens."""
    n_tokens = sum(map(len, windows))
    streams = {layer: np.empty((n_tokens, n_embd), np.float32) for layer in layers}
    start = 0
    for window in windows:
        for layer, found in session.capture(window, list(layers), False).items():
            streams[layer][start : start + len(window)] = found["stream"]
        start += len(window)
        told(len(window))
    return streams


def capture_tokens(
    session: _core.Session, windows: Windows, layer: int, whole: NDArray[np.float32], told: Callable[[int], None]
) -> Tokens:
    """What the pruned model does in a layer, beside the hidden states of the whole one, whose place the difference
    takes."""
    ids, gates, inputs, start = [], [], [], 0
    for window in windows:
        found = session.capture(window, [layer], True)[layer]
        ids.append(found["ids"])
        gates.append(np.ones_like(found["gates"]) if found["gate_before"] else found["gates"])
        inputs.append(found["inputs"])
        whole[start : start + len(window)] -= found["stream"]
        start += len(window)
        told(len(window))
    return Tokens(np.concatenate(ids), np.concatenate(gates), np.concatenate(inputs), whole)


def measure_scale(before: Tokens, after: NDArray[np.float32], correction: Correction, layer: int) -> float:
    """What the layer multiplies its experts' outputs by on their way into the hidden states: 1 in most architectures.

    Args:
        before: of one window, captured without the correction; its difference is against `after`.
        after: unused rows apart, the hidden states of the same window with the correction in force, less those without.
        correction: that one.
        layer: for the error.

    Raises UnsupportedModelError where it is no multiple: a layer that norms the sum of its experts, say.
    """
    expected = correction.apply(before).astype(np.float64)
    change = after.astype(np.float64)
    power = float(np.sum(expected * expected))
    scale = float(np.sum(change * expected)) / power if power else 1.0
    missed = float(np.linalg.norm(change - scale * expected)) / (float(np.linalg.norm(change)) or 1.0)
    if power and (missed > _LINEAR or scale <= 0):
        raise UnsupportedModelError(
            f"layer {layer}: a correction of the experts' outputs does not reach the hidden states as it is"
            f" ({missed:.0%} of the change is something else): this architecture changes their sum, and cannot be"
            " repaired so"
        )
    return scale
