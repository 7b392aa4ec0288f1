"""Where the experts of a checkpoint are, found by structure: names and shapes of the stored tensors, and numbers of
config.json.

No list of model classes: a MoE block is what has `experts` (one tensor for each expert and matrix, or fused ones whose
first axis is the experts) or stacked matrices beside a router. A name alone proves nothing, nor does an axis that
happens to be as long as the expert count: both must agree, and what may belong to the experts without doing so in a
known way is refused. Names were read in transformers' conversion_mapping.py and in llama.cpp's
gguf-py/gguf/tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from reap.errors import FormatError, UnsupportedModelError
from reap.hf.disk.checkpoint_files import Checkpoint
from reap.hf.disk.config import ConfigCounts, first_count, read_counts
from reap.hf.disk.discovery import INDEX
from reap.hf.disk.safetensors_file import StoredTensor

#: Parts of a model beside the language model: their experts, where they have some, are another router's and stay.
_TOWERS = frozenset(
    {
        "visual",
        "vision",
        "vision_tower",
        "vision_model",
        "vision_encoder",
        "audio",
        "audio_tower",
        "audio_encoder",
        "talker",
        "code2wav",
    }
)
_PREDICTION = frozenset({"mtp", "nextn", "mtp_block", "mtp_layers"})
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h|decoder_layer)\.(0|[1-9]\d{0,5})(?=\.|$)")
_ONE_EXPERT = re.compile(r"(?P<block>.*?)(?:^|\.)experts\.(?P<expert>0|[1-9]\d{0,6})(?P<rest>\..+)")
_FUSED = re.compile(r"(?P<block>.*?)(?:^|\.)experts\.(?P<rest>\D.*)")
#: The router, by its name inside the block. Its first axis is the experts.
_ROUTER = re.compile(
    r"(gate|router|primary_router|moe_gate)(\.(wg|layer|gate|proj|classifier|linear))?"
    r"(\.(weight|bias|weight_scale|weight_scale_inv|weight_scale_2|input_scale|per_expert_scale|expert_bias|scales|biases|SCB))?"
    r"|(gate\.|router\.|moe_statics\.|experts\.)?(e_score_correction(_bias|\.bias)?|expert_bias|router_bias|per_expert_scale|score_correction_bias)"
    r"|gate_weight"
)
_ROUTER_WEIGHT = re.compile(
    r"(gate|router|primary_router|moe_gate)(\.(wg|layer|gate|proj|classifier|linear))?(\.weight)?|gate_weight"
)
#: What bitsandbytes puts beside a matrix that it packed in blocks of numbers.
_PACKED_ROUTER = re.compile(
    r"(gate|router|primary_router|moe_gate)(\.\w+)?\.weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)"
)
#: What a MoE block holds besides: no expert axis, whatever the length of an axis says.
_BESIDE = re.compile(
    r"(shared_experts?|share_experts?|shared_mlp|shared_expert_gate|shared_experts_gate|.*latent.*|.*norm.*|router\.scale|router\.norm)(\..+)?"
)
#: Stacked matrices without `experts` in their names (Granite, JetMoE, Step-3.5; MLX).
_STACKED = re.compile(
    r"(?:switch_(?:mlp|glu)\.)?(input_linear|output_linear|gate_proj|up_proj|down_proj|gate_up_proj)([._].+)?"
)
#: All experts' rows one after the other in one matrix (DBRX).
_ROWS = re.compile(r"mlp\.(w1|v1|w2)(\.weight)?")
_EXPERT_WORD = re.compile(r"(?:^|[._])(?:chunk_)?experts?(?:[._]|$)|tid2eid|switch_(?:mlp|glu)")
_ROUTER_END = re.compile(r"(?:^|[._])(gate|router|wg|gating)([._](weight|bias|kernel))?$")
_SHARED_WORD = re.compile(r"shared?_experts?")


class Follows(NamedTuple):
    """How a tensor follows the experts of its layer."""

    layer: int
    """GGUF block index."""
    expert: int | None
    """The one expert that it belongs to; None: it has an axis of experts."""
    axis: int
    """That axis, 0 without one; all axes before it have length one, so that an expert is one run of bytes."""
    prefix: str
    """Of one expert's tensor: prefix + expert + suffix is its name."""
    suffix: str
    """See `prefix`."""
    is_router: bool
    """Whether it belongs to the router."""


@dataclass(frozen=True)
class CheckpointLayout:
    """Where the experts of a checkpoint are."""

    n_layers: int
    """Blocks of the language model, without prediction (MTP) layers."""
    n_experts: int
    """Routed experts in every MoE layer."""
    blocks: Mapping[int, str]
    """Layer -> name of its MoE block, ascending; a prediction layer has the number that it gets in a GGUF file, after
    all others."""
    prediction_layers: tuple[int, ...]
    """Those of the layers that are for prediction, ascending."""
    follows: Mapping[str, Follows]
    """Name of each tensor that depends on the experts -> how."""
    counts: ConfigCounts
    """What config.json says."""
    refusals: tuple[str, ...]
    """Why it cannot be pruned, one sentence each; empty if it can."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Layer -> name of the MoE block, of the prediction layers that were not looked at because they are left out."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Ascending, prediction layers included."""
        return tuple(self.blocks)

    def routers(self, layer: int) -> list[str]:
        """Names of the tensors of a layer's router."""
        return [name for name, how in self.follows.items() if how.layer == layer and how.is_router]

    def router_weight(self, layer: int) -> str | None:
        """Name of the router's matrix [n_experts, n_embd]."""
        inside = len(self.blocks[layer]) + 1 if self.blocks[layer] else 0
        return next((name for name in self.routers(layer) if _ROUTER_WEIGHT.fullmatch(name[inside:])), None)


def read_checkpoint_layout(checkpoint: Checkpoint, *, drop_prediction: bool = False) -> CheckpointLayout:
    """Find the experts of a checkpoint; with `drop_prediction` those of prediction (MTP) layers are not looked at.

    Raises FormatError where names, shapes and config.json contradict each other, UnsupportedModelError for a dense
    model and for one that cannot be understood at all; what only forbids pruning is in `refusals`.
    """
    finder = _Finder(checkpoint)
    layers, n_layers, prediction = _number(checkpoint, finder.blocks())
    _check_left_out(checkpoint, n_layers)
    dropped = {layer: layers[layer] for layer in prediction} if drop_prediction else {}
    if drop_prediction:
        finder = _Finder(checkpoint, n_layers)
        layers = {layer: block for layer, block in layers.items() if layer not in dropped}
        prediction = ()
    if not layers:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: has no experts in a form that reap knows; is it a dense model?"
        )
    n_experts = finder.count(layers.values(), {layers[layer] for layer in prediction})
    follows: dict[str, Follows] = {}
    refusals: list[str] = []
    for layer, block in layers.items():
        found, problems = finder.follow(layer, block, n_experts)
        follows |= found
        refusals += problems
    refusals += finder.unclaimed_tensors(follows)
    counts = read_counts(checkpoint, n_experts)
    unique = tuple(dict.fromkeys(refusals))
    return CheckpointLayout(n_layers, n_experts, layers, prediction, follows, counts, unique, dropped)


class _Finder:
    """The stored tensors by the block that they are in."""

    def __init__(self, checkpoint: Checkpoint, n_layers: int | None = None) -> None:
        """n_layers: where prediction layers are left out, the number of the others."""
        self.where = checkpoint.directory
        self.n_zero = first_count(checkpoint.config, ("zero_expert_num", "num_zero_experts"))
        self.tensors = {
            tensor.name: tensor
            for tensor in checkpoint.tensors
            if not _TOWERS & set(tensor.name.split("."))
            and (n_layers is None or not is_of_prediction(tensor.name, n_layers))
        }
        self.single: dict[str, dict[str, tuple[int, str, str]]] = {}  # block -> name -> expert, prefix, suffix
        self.fused: dict[str, dict[str, str]] = {}  # block -> name -> name after `experts.`
        for name in self.tensors:
            if match := _ONE_EXPERT.fullmatch(name):
                self.single.setdefault(match["block"], {})[name] = (
                    int(match["expert"]),
                    name[: match.start("expert")],
                    match["rest"],
                )
            elif (match := _FUSED.fullmatch(name)) and not _ROUTER.fullmatch("experts." + match["rest"]):
                self.fused.setdefault(match["block"], {})[name] = match["rest"]
        self.by_parent: dict[
            str, dict[str, StoredTensor]
        ] = {}  # every ancestor -> name after it -> tensor, single experts left out
        for name, tensor in self.tensors.items():
            if _ONE_EXPERT.fullmatch(name):
                continue  # there may be a hundred thousand of them
            parts = name.split(".")
            for depth in range(len(parts)):
                self.by_parent.setdefault(".".join(parts[:depth]), {})[".".join(parts[depth:])] = tensor

    def blocks(self) -> list[str]:
        """Names of the MoE blocks, those with `experts` and those with stacked matrices."""
        stacked = [
            parent
            for parent, inside in self.by_parent.items()
            if parent not in self.single
            and parent not in self.fused
            and (router := next((t for name, t in inside.items() if _ROUTER_WEIGHT.fullmatch(name)), None)) is not None
            and any(
                _STACKED.fullmatch(name) and len(t.shape) >= 3 and t.shape[:1] == router.shape[:1]
                for name, t in inside.items()
            )
        ]
        return [*self.single, *(block for block in self.fused if block not in self.single), *stacked]

    def router(self, block: str) -> StoredTensor | None:
        """The router's matrix of a block."""
        return next(
            (
                t
                for name, t in self.by_parent.get(block, {}).items()
                if _ROUTER_WEIGHT.fullmatch(name) and len(t.shape) == 2
            ),
            None,
        )

    def count(self, blocks: Iterable[str], prediction: Collection[str]) -> int:
        """The number of experts, the same in all blocks and, in each, in the router. prediction: the blocks that are
        of prediction layers."""
        counts = {block: self._count(block) for block in blocks}
        if len(set(counts.values())) == 1:
            return next(iter(counts.values()))
        trunk = {block: n for block, n in counts.items() if block not in prediction}
        heads = [block for block in counts if block in prediction]
        if len(set(trunk.values())) == 1:
            n_experts, head = (
                next(iter(trunk.values())),
                next(one for one in heads if counts[one] not in trunk.values()),
            )
            raise UnsupportedModelError(
                f"{self.where}: {head}, which is for prediction (MTP), has {counts[head]} experts, and the other layers"
                f" have {n_experts}; leave it out with --drop-mtp (drop_prediction=True)"
            )
        few, many = (choose(counts, key=counts.__getitem__) for choose in (min, max))
        raise UnsupportedModelError(
            f"{self.where}: {few} has {counts[few]} experts and {many} has {counts[many]}; reap prunes models with"
            " the same number in every layer"
        )

    def _count(self, block: str) -> int:
        router = self.router(block)
        if packed := next((name for name in self.by_parent.get(block, {}) if _PACKED_ROUTER.fullmatch(name)), None):
            raise UnsupportedModelError(
                f"{self.where}: the router of {block} is packed by bitsandbytes ({packed}), in blocks that do not end"
                " where an expert's row ends; prune the checkpoint that it was quantised from"
            )
        if block in self.single:
            experts = {expert for expert, _, _ in self.single[block].values()}
            n_experts = len(experts)
            if missing := sorted(set(range(n_experts)) - experts):
                raise FormatError(f"{self.where}: {block}.experts has {n_experts} experts, but no number {missing[0]}")
            self._check_matrices(block)
            if router is not None and router.shape[0] == n_experts + self.n_zero > n_experts:
                raise UnsupportedModelError(
                    f"{self.where}: {router.name} has {router.shape[0]} rows for {n_experts} experts and {self.n_zero}"
                    " that do nothing (zero_expert_num), which reap can neither measure nor cut"
                )
            if router is not None and router.shape[0] != n_experts:
                raise FormatError(
                    f"{self.where}: {router.name} has {router.shape[0]} rows, but there are {n_experts} experts"
                    " beside it"
                )
            return n_experts
        if router is not None:
            return router.shape[0]
        return next(self.tensors[name].shape[0] if self.tensors[name].shape else 0 for name in self.fused[block])

    def _check_matrices(self, block: str) -> None:
        """Every expert has the matrices that the others have; types and scales may differ."""
        held: dict[int, set[str]] = {}
        for expert, _, suffix in self.single[block].values():
            held.setdefault(expert, set()).add(suffix.rpartition(".")[0])
        every = set().union(*held.values())
        for expert, matrices in sorted(held.items()):
            if lacking := sorted(every - matrices):
                raise FormatError(
                    f"{self.where}: {block}.experts.{expert} has no {lacking[0].removeprefix('.')}, which other experts"
                    " beside it have"
                )

    def follow(self, layer: int, block: str, n_experts: int) -> tuple[dict[str, Follows], list[str]]:
        """(the tensors of a block that depend on its experts, sentences about those that forbid pruning)."""
        follows = {
            name: Follows(layer, expert, 0, prefix, suffix, False)
            for name, (expert, prefix, suffix) in self.single.get(block, {}).items()
        }
        problems: list[str] = []
        is_layer = _LAYER.search(block) is not None and bool(re.search(r"\.\d+$", block))
        for inside, tensor in self.by_parent.get(block, {}).items():
            if tensor.name in follows or _BESIDE.fullmatch(inside):
                continue
            is_router = _ROUTER.fullmatch(inside) is not None
            axis = self._axis(inside, tensor, n_experts)
            is_ours = (
                is_router or inside.startswith("experts.") or (not is_layer and _STACKED.fullmatch(inside) is not None)
            )
            if is_ours and axis is not None:
                follows[tensor.name] = Follows(layer, None, axis, "", "", is_router)
            elif is_ours and tensor.n_elements == 1:
                continue  # one scale for all of them
            elif is_ours or (not is_layer and n_experts in tensor.shape):
                problems.append(
                    f"{self.where}: {tensor.name} {list(tensor.shape)} may belong to the experts, but not in a way that"
                    f" reap knows (its first axis is not that of the {n_experts} experts)"
                    if axis is None
                    else (
                        f"{self.where}: {tensor.name} {list(tensor.shape)} may belong to the experts, but reap does not"
                        " know this tensor"
                    )
                )
        if not any(how.is_router for how in follows.values()):
            problems.append(f"{self.where}: {block} has experts, but no router that reap knows")
        return follows, problems

    def _axis(self, inside: str, tensor: StoredTensor, n_experts: int) -> int | None:
        """Which axis of a tensor is the experts: the first, whatever lies before it has length one."""
        axis = next((index for index, length in enumerate(tensor.shape) if length != 1), None)
        if axis is None:
            return None
        rows = (
            tensor.shape[axis] % n_experts == 0
            and inside.startswith("experts.")
            and _ROWS.fullmatch(inside.removeprefix("experts."))
        )
        fits = tensor.shape[axis] == n_experts or rows
        return axis if fits and tensor.n_bytes % n_experts == 0 else None

    def unclaimed_tensors(self, follows: Mapping[str, Follows]) -> Iterator[str]:
        """A sentence about a tensor that has experts in its name and is in none of the blocks."""
        for name, tensor in self.tensors.items():
            if (
                name not in follows
                and tensor.n_elements > 1
                and _EXPERT_WORD.search(name)
                and not _SHARED_WORD.search(name)
            ):
                yield (
                    f"{self.where}: {name} {list(tensor.shape)} may belong to the experts, but reap does not know this"
                    " tensor"
                )
                return


def _number(checkpoint: Checkpoint, blocks: list[str]) -> tuple[dict[int, str], int, tuple[int, ...]]:
    """(layer -> block, number of ordinary layers, prediction layers), layers numbered as in a GGUF file.

    `mtp.*` blocks come after the ordinary layers, in their order; a checkpoint that numbers them on (DeepSeek, GLM)
    has them there.
    """
    ordinary = [block for block in blocks if not _PREDICTION & set(block.split("."))]
    layers: dict[int, str] = {}
    for block in ordinary:
        numbers = _LAYER.findall(block)
        if not numbers:
            raise UnsupportedModelError(
                f"{checkpoint.directory}: {block} has experts, but its name does not say in which layer"
            )
        if int(numbers[-1]) in layers:
            other = layers[int(numbers[-1])]
            raise UnsupportedModelError(
                f"{checkpoint.directory}: {other} and {block} both are MoE blocks of layer {numbers[-1]}"
            )
        layers[int(numbers[-1])] = block
    named = [int(number) for name in checkpoint.shard_of if not is_apart(name) for number in _LAYER.findall(name)[:1]]
    n_layers = checkpoint_layers(checkpoint) or max(named, default=0) + 1
    first = max(n_layers, max(layers, default=-1) + 1)
    for rank, block in enumerate(sorted((block for block in blocks if block not in ordinary), key=_natural)):
        layers[first + rank] = block
    return dict(sorted(layers.items())), n_layers, tuple(layer for layer in sorted(layers) if layer >= n_layers)


def _check_left_out(checkpoint: Checkpoint, n_layers: int) -> None:
    """Where the index is gone by, what it does not name is no part of the model: prediction layers, tables that are
    computed."""
    for name, shard in checkpoint.difference.unnamed if checkpoint.trust == "index" else ():
        if not is_of_prediction(name, n_layers) and not name.endswith(("rotary_emb.inv_freq", "masked_bias")):
            raise FormatError(
                f"{checkpoint.directory / INDEX}: cannot be gone by, it does not name {name[:80]} in {shard}, which is"
                " not of a prediction (MTP) layer; --trust shards goes by the files"
            )


def is_apart(name: str) -> bool:
    """Whether a name is in a part beside the language model's own layers: a tower, prediction layers."""
    parts = set(name.split("."))
    return bool(parts & _TOWERS or parts & _PREDICTION)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def is_of_prediction(name: str, n_layers: int) -> bool:
    """Whether a tensor belongs to a prediction (MTP) layer."""
    if _PREDICTION & set(name.split(".")):
        return True
    numbers = [] if is_apart(name) else _LAYER.findall(name)[:1]
    return bool(numbers) and int(numbers[0]) >= n_layers


def speaks_of_experts(tensor: StoredTensor, n_experts: int) -> bool:
    """Whether a tensor of another file has to do with experts, by its name, or by that of a router and its rows."""
    if _EXPERT_WORD.search(tensor.name) and not _SHARED_WORD.search(tensor.name):
        return True
    return bool(_ROUTER_END.search(tensor.name)) and tensor.shape[:1] == (n_experts,)


def checkpoint_layers(checkpoint: Checkpoint) -> int:
    """The number of ordinary layers that config.json states; 0 where it does not."""
    return first_count(checkpoint.config, ("num_hidden_layers", "n_layer", "num_layers", "n_layers"))
