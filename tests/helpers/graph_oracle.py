"""Adds up what experts contribute from the values that `reap-dump-nodes` wrote down, and checks that those values are
what they seem.

Knows nothing of reap. Per layer and sample: the last `ffn_moe_topk` are the selected experts, the last gate is the one
that multiplies the expert's output (`ffn_moe_weighted` must be their product), the last output is W·a of the selected
expert, with its scale and bias, computed again here from the file's own weights in float64.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf import GGUFReader
from helpers.sums import COUNTS_AND_SUMS

Floats = NDArray[np.float64]
Nodes = dict[str, Any]  # name -> the values of the first node of that name, outermost axis first

GATES = ("ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm", "ffn_moe_weights_scaled")
OUTPUTS = ("ffn_moe_down", "ffn_moe_down_scaled", "ffn_moe_down_biased")
# what the experts' last matrix is multiplied with, whatever the family calls it
ACTIVATIONS = tuple(
    f"ffn_moe_{name}"
    for name in ("silu", "swiglu", "swiglu_limited", "swiglu_oai", "situ", "geglu", "gelu", "reglu", "relu", "relu_sqr")
)
# what the experts are selected by, the last one that a family has
SCORES = ("ffn_moe_probs", "ffn_moe_probs_biased", "ffn_moe_probs_masked")


def dump(
    program: Path,
    model: Path,
    samples: Sequence[Sequence[int]],
    directory: Path,
    *,
    prediction: bool = False,
    removed: Mapping[int, Iterable[int]] | None = None,
) -> list[Nodes]:
    """Run every sample on its own; the nodes of each. `prediction`: the multi-token-prediction block as well.
    `removed`: layer -> experts that are never to be selected."""
    text, out = directory / "samples.txt", directory / "nodes.bin"
    text.write_text("".join(" ".join(map(str, tokens)) + "\n" for tokens in samples), encoding="utf-8")
    removals = [f"{layer}:{','.join(map(str, experts))}" for layer, experts in (removed or {}).items()]
    command = [str(program), *(["--prediction"] if prediction else []), str(model), str(text), str(out), *removals]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"{program.name} ended with {done.returncode}: {done.stderr[-1000:]}")
    nodes = read_nodes(out, len(samples))
    out.unlink()
    return nodes


def read_nodes(path: Path, n_samples: int) -> list[Nodes]:
    """The records of a file, by sample and name; of several nodes of one name (GroveMoE's second experts) the first."""
    data = path.read_bytes()
    samples: list[Nodes] = [{} for _ in range(n_samples)]
    at = 0
    while at < len(data):
        sample, length = struct.unpack_from("<ii", data, at)
        name = data[at + 8 : at + 8 + length].decode()
        at += 8 + length
        kind, *shape = struct.unpack_from("<iqqqq", data, at)
        at += 4 + 32
        count = int(np.prod(shape))
        values = np.frombuffer(data, dtype=np.int32 if kind else np.float32, count=count, offset=at)
        samples[sample].setdefault(name, values.reshape(shape[::-1]))
        at += 4 * count
    return samples


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """A file's tensors by name, outermost axis first."""
    return {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(path).tensors}


def last(nodes: Nodes, kinds: Sequence[str], layer: int) -> NDArray[Any]:
    """The node of the last of `kinds` that this layer has."""
    return next(nodes[f"{kind}-{layer}"] for kind in reversed(kinds) if f"{kind}-{layer}" in nodes)


@dataclass
class Routing:
    """One layer's experts on one sample. ids int [n_tokens, n_used], gates and norms float64 of that shape, gap: the
    smallest lead of a selected expert over one that was not, in the score that decides."""

    ids: NDArray[np.int64]
    gates: Floats
    outputs: Floats  # [n_tokens, n_used, n_embd]
    scores: Floats  # [n_tokens, n_experts]
    weighted: Floats | None  # [n_tokens, n_used, n_embd]; None where the gate comes before the experts
    activations: Floats  # [n_tokens, n_used, n_ff]
    scaled: bool  # not every family uses the scales that its file has

    def without_first(self) -> Routing:
        """All tokens but the first, which nothing precedes that it could be predicted from."""
        weighted = None if self.weighted is None else self.weighted[1:]
        arrays = (self.ids[1:], self.gates[1:], self.outputs[1:], self.scores[1:], weighted, self.activations[1:])
        return Routing(*arrays, scaled=self.scaled)

    @property
    def gap(self) -> float:
        order = -np.sort(-self.scores, axis=1)
        n_used = self.ids.shape[1]
        return float((order[:, n_used - 1] - order[:, n_used]).min())

    @property
    def follows_scores(self) -> bool:
        best = np.argsort(-self.scores, axis=1)[:, : self.ids.shape[1]]
        return bool((np.sort(best) == np.sort(self.ids)).all())


def read_routing(nodes: Nodes, layer: int, n_tokens: int, gate_first: bool) -> Routing:
    """What one layer did with one sample. gate_first: the gate multiplies the experts' input (Llama-4), which the
    logits select for."""
    ids = nodes[f"ffn_moe_topk-{layer}"].reshape(n_tokens, -1).astype(np.int64)
    shape = (*ids.shape, -1)
    scores = nodes[f"ffn_moe_logits-{layer}"] if gate_first else last(nodes, SCORES, layer)
    return Routing(
        ids=ids,
        gates=last(nodes, GATES, layer).reshape(ids.shape).astype(np.float64),
        outputs=last(nodes, OUTPUTS, layer).reshape(shape).astype(np.float64),
        scores=scores.reshape(n_tokens, -1).astype(np.float64),
        weighted=None if gate_first else nodes[f"ffn_moe_weighted-{layer}"].reshape(shape).astype(np.float64),
        activations=last(nodes, ACTIVATIONS, layer).reshape(shape).astype(np.float64),
        scaled=f"ffn_moe_down_scaled-{layer}" in nodes,
    )


def group_gap(nodes: Nodes, layer: int, n_tokens: int, n_groups: int, n_used: int) -> float:
    """The smallest lead of a group that a token may use over one that it may not; groups are scored by their two best
    experts."""
    scores = last(nodes, SCORES[:2], layer).reshape(n_tokens, n_groups, -1)
    best_two = np.sort(scores, axis=2)[:, :, -2:].sum(axis=2)
    order = -np.sort(-best_two, axis=1)
    return float((order[:, n_used - 1] - order[:, n_used]).min())


@dataclass
class Sums:
    """One layer's sums, each [n_experts], in float64."""

    n_experts: int
    arrays: dict[str, Floats] = field(init=False)

    def __post_init__(self) -> None:
        self.arrays = {name: np.zeros(self.n_experts) for name in COUNTS_AND_SUMS}

    def add(self, routing: Routing) -> None:
        norms = np.sqrt((routing.outputs**2).sum(axis=2))
        # an output that already holds its gate is not to be multiplied with it again
        gated = norms if routing.weighted is None else routing.gates * norms
        added = {
            "counts": 1.0,
            "gate_sum": routing.gates,
            "norm_sum": norms,
            "gated_norm_sum": gated,
            "gated_norm_sq_sum": gated**2,
            "norm_sq_sum": norms**2,
        }
        for name, values in added.items():
            np.add.at(self.arrays[name], routing.ids, values)
        np.maximum.at(self.arrays["norm_max"], routing.ids, norms)


class Experts:
    """The experts' last matrices of a model, from its file's tensors."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.tensors = {name: values for name, values in tensors.items() if "ffn_down_exps" in name}

    @property
    def layers(self) -> list[int]:
        """Block indices that have experts, ascending."""
        return sorted({int(name.split(".")[1]) for name in self.tensors if name.endswith(".weight")})

    def outputs(self, layer: int, routing: Routing) -> Floats:
        """float64 [n_tokens, n_used, n_embd]: W·a of the selected experts, scaled and biased as the file says."""
        prefix = f"blk.{layer}.ffn_down_exps"
        result = np.empty(routing.outputs.shape)
        for expert in np.unique(routing.ids):
            chosen = routing.ids == expert
            values = routing.activations[chosen] @ self.tensors[f"{prefix}.weight"][expert].astype(np.float64).T
            if routing.scaled:
                values *= float(self.tensors[f"{prefix}.scale"][expert])
            if f"{prefix}.bias" in self.tensors:
                values += self.tensors[f"{prefix}.bias"][expert].astype(np.float64)
            result[chosen] = values
        return result
