"""What a model's file is made of, what a plan leaves of each part, to the byte."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from reap.files.paths import PathLike
from reap.gguf.expert_tensors import read_layout
from reap.gguf.reader import GGUFModel
from reap.pruning.gguf import size_after
from reap.scores.plan import PrunePlan

EXPERTS, ROUTERS, HEADER = "experts", "routers", "header and padding"
_CLASSES = (
    (r"blk\.\d+\..*_shexp\b.*", "shared experts"),
    (r"blk\.\d+\.(attn|indexer|vis).*", "attention"),
    (r"blk\.\d+\.(ssm|time_mix|channel_mix|shortconv).*", "recurrent"),
    (r"blk\.\d+\.ffn_.*", "dense feed-forward"),
    (r"(token_embd|output|per_layer_token_embd|position_embd|token_types)\..*", "embeddings and output"),
)
_COMPILED = tuple((re.compile(pattern), name) for pattern, name in _CLASSES)


@dataclass(frozen=True)
class SizeClass:
    """One kind of tensors."""

    name: str
    """Such as "experts" or "attention"."""
    n_bytes_before: int
    """Bytes in the model as it is."""
    n_bytes_after: int
    """Bytes after the plan."""
    n_tensors: int
    """How many tensors they are; 0 for the header and padding."""


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model's files, exact, before and after a plan."""

    n_bytes_before: int
    """As it is."""
    n_bytes_after: int
    """After the plan."""
    classes: tuple[SizeClass, ...]
    """By kind of tensor, the largest first."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self)


def measure_size(path: PathLike, plan: PrunePlan | None = None, *, allow_mismatch: bool = False) -> ModelSize:
    """What the model at `path` weighs, and what it would after `plan` (None: the same).

    Raises what `prune` does for a plan that does not fit; `allow_mismatch` as there.
    """
    with GGUFModel.open(path) as model:
        layout = read_layout(model)
        cut = layout.cut if plan is not None else {}
        experts, routers = ({tensor.name for tensor in tensors} for tensors in (layout.experts, layout.routers))
        found: dict[str, list[int]] = {}
        for tensor in model.tensors.values():
            name = EXPERTS if tensor.name in experts else ROUTERS if tensor.name in routers else _class_of(tensor.name)
            after = (
                (tensor.n_bytes - tensor.tail_bytes) * plan.keep // tensor.shape[-1] + tensor.tail_bytes
                if plan is not None and tensor.name in cut
                else tensor.n_bytes
            )
            row = found.setdefault(name, [0, 0, 0])
            row[0], row[1], row[2] = row[0] + tensor.n_bytes, row[1] + after, row[2] + 1
        before = model.size
    after = before if plan is None else size_after(path, plan, allow_mismatch=allow_mismatch)
    rest = [before - sum(row[0] for row in found.values()), after - sum(row[1] for row in found.values())]
    classes = [SizeClass(name, *row) for name, row in found.items()] + [SizeClass(HEADER, rest[0], rest[1], 0)]
    return ModelSize(before, after, tuple(sorted(classes, key=lambda item: -item.n_bytes_before)))


def _class_of(name: str) -> str:
    return next((label for pattern, label in _COMPILED if pattern.fullmatch(name)), "other tensors")
