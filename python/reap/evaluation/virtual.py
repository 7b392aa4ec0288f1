"""Virtual pruning of a model that is loaded: one way for all that try plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reap.gguf.model_info import ModelInfo
from reap.scores.hash_routing import substitutes_of

if TYPE_CHECKING:
    from reap import _core


def keep_only(
    session: _core.Session, info: ModelInfo, layers: Mapping[int, Sequence[int]], model: Mapping[str, Any]
) -> None:
    """From now on as if each layer had only the experts that `layers` names.

    Args:
        model: of the plan or profile that the choice comes from: it says who takes a removed expert's place in layers
            that choose experts by token id.
    """
    n_trunk_layers = info.n_layers - info.n_prediction_layers  # a prediction block does not run here
    kept = {layer: list(ids) for layer, ids in layers.items() if layer < n_trunk_layers}
    session.set_kept(kept, substitutes_of(model, kept) if info.hash_layers else {})
