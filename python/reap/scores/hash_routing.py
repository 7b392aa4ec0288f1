"""Layers whose experts are chosen by token id (`ffn_gate_tid2eid`, DeepSeek-V4's first ones): who takes a removed
expert's place.

The table names as many experts for every token, so a removed one needs a successor, and no token may get an expert
twice. Successors are ranked by a measurement: how alike the router's values of two experts run over the tokens of the
calibration (their correlation). The router weighs the experts in such a layer, whoever chose them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap.errors import FormatError, MismatchError

#: Of a profile's "model" and a plan's: layer -> {"tokens": ..., "alike": ...}.
HASH_ROUTING = "hash_routing"
Ranking = NDArray[np.int64]
Substitutes = dict[int, dict[int, list[int]]]


def rank_alike(n_tokens: int, values: NDArray[np.float64], products: NDArray[np.float64]) -> Ranking:
    """int64 [n_experts, n_experts - 1]: for each expert all others, most alike first; ties go to the lower id.

    Args:
        n_tokens: that were measured.
        values: float64 [n_experts], Σ v of each expert's router value.
        products: float64 [n_experts, n_experts], Σ v·w of each pair's.
    """
    n_experts = len(values)
    means = values / max(n_tokens, 1)
    covariance = products / max(n_tokens, 1) - np.outer(means, means)
    deviations = np.sqrt(np.maximum(np.diag(covariance), 0))
    scale = np.outer(deviations, deviations)
    correlation = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    np.fill_diagonal(correlation, np.inf)
    order = np.argsort(-correlation, axis=1, kind="stable")
    assert (order[:, 0] == np.arange(n_experts)).all()
    return order[:, 1:]


def to_record(measured: Mapping[int, tuple[int, NDArray[np.float64], NDArray[np.float64]]]) -> dict[str, Any]:
    """What a profile keeps, as JSON types. measured: layer -> (tokens, Σ v, Σ v·w)."""
    return {
        str(layer): {
            "tokens": int(n_tokens),
            "alike": base64.b64encode(rank_alike(n_tokens, values, products).astype("<u2").tobytes()).decode("ascii"),
        }
        for layer, (n_tokens, values, products) in sorted(measured.items())
    }


def read_record(model: Mapping[str, Any]) -> dict[int, Ranking]:
    """Layer -> `rank_alike` of a profile's or a plan's "model"; empty where it has no such layers. FormatError where it
    is not what `to_record` makes."""
    found = {}
    record = model.get(HASH_ROUTING) or {}
    if not isinstance(record, Mapping):
        raise FormatError(f"model: {HASH_ROUTING} should be an object, found {type(record).__name__}")
    n_experts = int(model["n_experts"])
    for key, entry in record.items():
        try:
            raw = base64.b64decode(entry["alike"], validate=True)
            ranking = np.frombuffer(raw, dtype="<u2").astype(np.int64).reshape(n_experts, n_experts - 1)
            layer = int(key)
        except (TypeError, KeyError, ValueError, binascii.Error):
            ranking, layer = np.empty((0, 0), dtype=np.int64), 0
        everyone = np.sort(np.column_stack([np.arange(len(ranking)), ranking]), axis=1)
        if ranking.shape[0] != n_experts or (everyone != np.arange(n_experts)).any():
            what = f"does not rank the other experts of each of {n_experts}"
            raise FormatError(f"model: {HASH_ROUTING} of layer {key} {what}")
        found[layer] = ranking
    return found


def tokens_of(record: Mapping[str, Any]) -> int:
    """How many tokens a profile's record was measured on."""
    return min((int(entry["tokens"]) for entry in record.values()), default=0)


def substitutes_of(model: Mapping[str, Any], layers: Mapping[int, Sequence[int]]) -> Substitutes:
    """Layer -> removed expert -> the kept ones that take its place, best first: as many as a token has experts, so that
    one is always left that the token does not have.

    Args:
        model: of a profile or a plan, with `HASH_ROUTING` where the model has such layers.
        layers: layer -> ids that are kept.
    """
    n_used = int(model.get("n_experts_used") or 1)
    found: Substitutes = {}
    for layer, ranking in read_record(model).items():
        kept = np.zeros(len(ranking), dtype=bool)
        kept[list(layers.get(layer, ()))] = True
        if layer in layers:
            removed = np.flatnonzero(~kept).tolist()
            found[layer] = {expert: ranking[expert][kept[ranking[expert]]][:n_used].tolist() for expert in removed}
    return found


def require_substitutes(substitutes: Substitutes, hash_layers: Sequence[int]) -> None:
    """MismatchError where a plan says nothing about layers whose experts are chosen by token id."""
    missing = [layer for layer in hash_layers if layer not in substitutes]
    if missing:
        raise MismatchError(
            f"the experts of the layers {', '.join(map(str, missing))} are chosen by token id (ffn_gate_tid2eid), and"
            " the plan does not say which expert takes the place of a removed one; plan from a profile of the GGUF file"
            " that this version of reap made"
        )


def rewrite_table(table: NDArray[np.int32], kept: Sequence[int], substitutes: Mapping[int, Sequence[int]]) -> Any:
    """int32, the shape of `table`: each removed id replaced by the first of its substitutes that its row does not have,
    then all ids renumbered as they are in `kept`. Where the source names an expert twice for a token (padding rows of
    zeros do), the second gives way to the first expert that the row does not have: such a row crashes CUDA kernels.

    Args:
        table: int32 [n_tokens, n_used], expert ids of each token.
        kept: ids that stay, ascending.
        substitutes: of the layer, as `substitutes_of` gives them.

    Raises:
        FormatError: the table names an expert that is not there, or too few stay for a row.
    """
    n_experts = len(kept) + len(substitutes)
    ordered = np.sort(table, axis=1)
    if table.size and (ordered[:, 0].min() < 0 or ordered[:, -1].max() >= n_experts):
        raise FormatError(f"a table of expert ids names an expert that is not among the {n_experts}")
    rows = table.astype(np.int64)
    n_used = rows.shape[1]
    candidates = np.full((n_experts, n_used), -1, dtype=np.int64)
    for expert, others in substitutes.items():
        candidates[expert, : len(others)] = others[:n_used]
    is_removed = np.isin(np.arange(n_experts), list(substitutes))
    for column in range(n_used):
        at = np.flatnonzero(is_removed[rows[:, column]])
        offered = candidates[rows[at, column]]
        is_free = (offered >= 0) & ~(offered[:, :, None] == rows[at][:, None, :]).any(axis=2)
        rows[at, column] = offered[np.arange(len(at)), is_free.argmax(axis=1)]
    numbers = np.full(n_experts, -1, dtype=np.int64)
    numbers[list(kept)] = np.arange(len(kept))
    written = numbers[rows]
    if len(kept) < n_used or (written.size and written.min() < 0):
        raise FormatError(f"a table gives a token {n_used} experts, more than can be chosen of {len(kept)}")
    for row_number in np.flatnonzero((np.diff(np.sort(written, axis=1), axis=1) == 0).any(axis=1)):
        row = written[row_number]
        repeats = [place for place in range(1, n_used) if row[place] in row[:place]]
        row[repeats] = [number for number in range(n_used) if number not in row][: len(repeats)]
    return written.astype(np.int32)
