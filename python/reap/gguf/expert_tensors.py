"""Which tensors of a model carry an expert axis: the one table that says what pruning cuts, keeps and refuses.

Names and shapes were read in llama.cpp's src/llama-arch.cpp (names), src/models/*.cpp and src/llama-model.cpp (shapes).
The expert axis is the outermost of every tensor that has one, so an expert is one contiguous run of bytes.
A name alone proves nothing, nor does an axis that happens to be as long as the expert count: both must agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from reap.errors import FormatError
from reap.gguf.foreign_types import foreign_type
from reap.gguf.reader import GGUFModel, TensorInfo
from reap.gguf.tensor_types import INTEGER_TYPES, TENSOR_TYPES, ValueType


class Role(Enum):
    """What pruning does with a tensor."""

    CUT = "cut"  # the outermost axis is the experts: keep some of its rows
    KEEP = "keep"  # no expert axis: copied whole
    IDS = "ids"  # holds ids of experts: the removed ones are replaced, all are renumbered
    REFUSE = "refuse"  # depends on the experts in a way that cutting rows does not handle


class Rule(NamedTuple):
    """One line of the table."""

    pattern: str
    """Regular expression of the name after `blk.N.`."""
    role: Role
    """What pruning does with such a tensor."""
    n_dims: int = 0
    """Axes that a CUT tensor must have; 0 for the others."""
    reason: str = ""
    """Why a REFUSE tensor is refused; empty for the others."""


_OTHER_FAMILIES = (
    r"(?!.*exp)(attn|ssm|time_mix|channel_mix|hc|ple|altup|laurel|vis|indexer|shortconv|nextn|layer|post|pre|inp|proj)"
    r"([_.].+)?"
)
_DENSE_FFN = (
    r"(?!.*exp)ffn(\.act|(_pre|_post|_sub)?_norm(_\d)?|_(gate|up|down|act|res_score|conv_base|conv_proj))(\.[a-z_]+)?"
)

#: The first pattern that matches a whole name decides.
RULES: tuple[Rule, ...] = (
    # experts, with a router that may have a bias and a selection bias
    Rule(r"ffn_(gate|up|down|gate_up)_exps\.weight", Role.CUT, 3),
    Rule(r"ffn_(gate|up|down|gate_up)_exps\.bias", Role.CUT, 2),
    Rule(r"ffn_(gate|up|down|gate_up)_exps\.(scale|input_scale)", Role.CUT, 1),
    Rule(r"ffn_gate_inp\.weight", Role.CUT, 2),
    Rule(r"ffn_gate_inp\.bias", Role.CUT, 1),
    Rule(r"exp_probs_b(_vl)?(\.bias|\.weight)?", Role.CUT, 1),
    # expert-like names without an expert axis: shared experts, latent projections, Arctic's norm, Gemma-4's [n_embd]
    # scale
    Rule(r"ffn_(gate|up|down|gate_up|gate_inp)_shexp\..+", Role.KEEP),
    Rule(r"ffn_norm_exps\..+", Role.KEEP),
    Rule(r"ffn_gate_inp\.scale", Role.KEEP),
    Rule(r"ffn_(latent|routed)_.+", Role.KEEP),
    # everything else a block is known to hold: an axis of it may be as long as the expert count by coincidence
    Rule(_OTHER_FAMILIES, Role.KEEP),
    Rule(_DENSE_FFN, Role.KEEP),
    # experts in forms that rows cannot express
    Rule(
        r"ffn_(gate|up|down)_chexps\..+",
        Role.REFUSE,
        reason="one chunk expert serves a whole group of experts (GroveMoE)",
    ),
    # the experts of each token, by number (hash routing): {n_expert_used, n_vocab}
    Rule(r"ffn_gate_tid2eid(\.weight)?", Role.IDS, 2),
    Rule(
        r"ffn_(gate|up|down)\.\d+\.weight",
        Role.REFUSE,
        reason="each expert is a tensor of its own; convert the model again",
    ),
)

#: Architectures whose experts llama.cpp runs in a way that can be neither measured nor cut -> why. Read in its
#: src/models/*.cpp.
UNSUPPORTED: Mapping[str, str] = {
    # build_moe_ffn divides the chosen ids by the group size before it looks up their gates: group c gets the gate of
    # expert c. So its output depends on how experts are numbered, and no choice of whole groups gives a file that
    # computes the same. Tried: the groups of a small model in another order, everything renumbered with them, and the
    # logits are others altogether.
    "grovemoe": (
        "llama.cpp runs a second set of experts (ffn_*_chexps) for groups of the first, under the same names, and gives"
        " group c the gate of expert c: removing experts would give the groups other gates"
    ),
    "refact": "llama.cpp loads experts for this architecture, but its graph never runs them",
}

_BLOCK_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)", re.DOTALL)
_COMPILED = tuple((re.compile(rule.pattern), rule) for rule in RULES)
#: Tensors whose presence makes a block a MoE layer.
_EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.weight")
_ROUTER = "ffn_gate_inp.weight"
#: Far above llama.cpp's 1,024, so that a forged count costs no memory.
MAX_EXPERTS = 65_536
_MAX_TEXT_BYTES = 65_536
_I32 = 26
_UNKNOWN = "may belong to the experts, but reap does not know this tensor"


def find_rule(block_name: str) -> Rule | None:
    """The table's line for a tensor named `blk.N.<block_name>`, or None if the name is not known."""
    return next((rule for pattern, rule in _COMPILED if pattern.fullmatch(block_name)), None)


@dataclass(frozen=True)
class ExpertLayout:
    """Where the experts of a model are."""

    architecture: str
    """general.architecture of the model."""
    n_experts: int
    """The header's expert count; 0 for a dense model."""
    layers: Mapping[int, tuple[TensorInfo, ...]]
    """GGUF block index of each MoE layer, ascending, multi-token-prediction layers included -> its tensors with an
    expert axis, in file order."""
    refusals: tuple[str, ...]
    """One sentence for each thing that makes the model impossible to prune; empty if it can be pruned."""
    id_tables: Mapping[str, int] = field(default_factory=dict)
    """Name of each table that gives every token its experts by id, int32 [n_tokens, n_used] -> its layer."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """GGUF block indices of the MoE layers, ascending."""
        return tuple(self.layers)

    @property
    def routers(self) -> tuple[TensorInfo, ...]:
        """The routers' tensors (weights, biases and selection biases), in layer order."""
        return tuple(t for tensors in self.layers.values() for t in tensors if "_exps." not in t.name)

    @property
    def experts(self) -> tuple[TensorInfo, ...]:
        """The experts' own tensors, in layer order."""
        return tuple(t for tensors in self.layers.values() for t in tensors if "_exps." in t.name)

    @property
    def cut(self) -> dict[str, int]:
        """Name of each tensor to cut -> its layer."""
        return {tensor.name: layer for layer, tensors in self.layers.items() for tensor in tensors}


def read_architecture(model: GGUFModel) -> str:
    """`general.architecture`. Raises FormatError if the file does not say."""
    architecture = read_text(model, "general.architecture")
    if not architecture:
        raise FormatError(f"{model.path}: has no general.architecture")
    return architecture


def read_text(model: GGUFModel, key: str) -> str | None:
    """A metadata string, or None if the key is missing or holds something else. Raises FormatError for one of more than
    64 KiB."""
    found = model.metadata.get(key)
    if found is not None and found.type == ValueType.STRING and found.n_bytes > _MAX_TEXT_BYTES:
        raise FormatError(f"{model.path}: {key} is {found.n_bytes:,} bytes long, expected at most {_MAX_TEXT_BYTES:,}")
    return found.value if found is not None and found.type == ValueType.STRING else None


def read_count(model: GGUFModel, key: str, default: int = 0) -> int:
    """A metadata integer that must not be negative, whatever its width. Raises FormatError if it is not one."""
    found = model.metadata.get(key)
    if found is None:
        return default
    if found.type not in INTEGER_TYPES or found.value < 0:
        raise FormatError(f"{model.path}: {key} is not an integer of 0 or more")
    return int(found.value)


def read_layout(model: GGUFModel) -> ExpertLayout:
    """Find the experts of a model. Raises FormatError where header and tensors contradict each other."""
    architecture = read_architecture(model)
    n_experts = read_count(model, f"{architecture}.expert_count")
    if n_experts > MAX_EXPERTS:
        raise FormatError(
            f"{model.path}: {architecture}.expert_count is {n_experts:,}, expected at most {MAX_EXPERTS:,}"
        )
    blocks = _blocks(model)
    moe = [layer for layer in sorted(blocks) if _is_moe(blocks[layer])]
    if moe and n_experts == 0:
        raise FormatError(f"{model.path}: blk.{moe[0]} has experts, but the header has no {architecture}.expert_count")
    others = _prediction_blocks_of_their_own(model, architecture, blocks, moe, n_experts)
    others |= _zero_experts(model, blocks, [layer for layer in moe if layer not in others], n_experts)
    for layer in others:
        moe.remove(layer)
        del blocks[layer]
    layers = {layer: _cut_tensors(model, blocks[layer], n_experts) for layer in moe}
    tables = {t.name: layer for layer in moe for name, t in blocks[layer].items() if _is_id_table(name)}
    refusals = (*dict.fromkeys(others.values()), *_refusals(model, blocks, layers, n_experts))
    return ExpertLayout(architecture, n_experts, layers, refusals, tables)


def _prediction_blocks_of_their_own(
    model: GGUFModel,
    architecture: str,
    blocks: Mapping[int, Mapping[str, TensorInfo]],
    moe: Sequence[int],
    n_experts: int,
) -> dict[int, str]:
    """Multi-token-prediction block with another number of experts than the trunk -> why that forbids pruning."""
    n_prediction = read_count(model, f"{architecture}.nextn_predict_layers")
    first = read_count(model, f"{architecture}.block_count") - n_prediction
    found = {}
    for layer in moe:
        router = blocks[layer][_ROUTER]
        if layer >= first and n_prediction and router.shape[-1] != n_experts:
            found[layer] = (
                f"{model.path}: the prediction layer {layer} has {router.shape[-1]} experts where the header says"
                f" {n_experts}, which llama.cpp does not load; --drop-prediction-layers (drop_prediction_layers=True)"
                " leaves it out"
            )
    return found


def _zero_experts(
    model: GGUFModel, blocks: Mapping[int, Mapping[str, TensorInfo]], moe: Sequence[int], n_experts: int
) -> dict[int, str]:
    """Layer whose router chooses among more experts than the file holds -> why that forbids pruning."""
    found = {}
    for layer in moe:
        router, experts = blocks[layer][_ROUTER], [t for name, t in blocks[layer].items() if _EXPERTS.fullmatch(name)]
        if router.shape[-1] > n_experts and all(tensor.shape[-1] == n_experts for tensor in experts):
            found[layer] = (
                f"{model.path}: its routers choose among {router.shape[-1]} experts, of which the file holds"
                f" {n_experts}: the others are zero experts, which pass a token through (LongCat); llama.cpp runs no"
                " such model, so nothing here could measure or verify what is cut"
            )
    return found if len(found) == len(moe) else {}  # of one layer alone it is damage


def _is_id_table(name: str) -> bool:
    rule = find_rule(name)
    return rule is not None and rule.role is Role.IDS


def read_id_table(model: GGUFModel, tensor: TensorInfo) -> Any:
    """int32 [n_tokens, n_used]: a table that gives each token its experts by id."""
    import numpy as np

    return np.frombuffer(model.data(tensor), dtype="<i4").reshape(tensor.shape[1], tensor.shape[0])


def _blocks(model: GGUFModel) -> dict[int, dict[str, TensorInfo]]:
    """Block index -> name after `blk.N.` -> tensor."""
    blocks: dict[int, dict[str, TensorInfo]] = {}
    for tensor in model.tensors.values():
        match = _BLOCK_NAME.fullmatch(tensor.name)
        if match:
            blocks.setdefault(int(match[1]), {})[match[2]] = tensor
    return blocks


def _is_moe(block: Mapping[str, TensorInfo]) -> bool:
    return _ROUTER in block and any(_EXPERTS.fullmatch(name) for name in block)


def _cut_tensors(model: GGUFModel, block: Mapping[str, TensorInfo], n_experts: int) -> tuple[TensorInfo, ...]:
    """The tensors of one MoE layer that have an expert axis, each checked."""
    cut = []
    for name, tensor in block.items():
        rule = find_rule(name)
        if rule is not None and rule.role is Role.CUT:
            _check_axis(model, tensor, rule, n_experts)
            cut.append(tensor)
    return tuple(cut)


def _check_axis(model: GGUFModel, tensor: TensorInfo, rule: Rule, n_experts: int) -> None:
    if len(tensor.shape) != rule.n_dims:
        raise FormatError(f"{model.path}: {tensor.name} has {len(tensor.shape)} axes, expected {rule.n_dims}")
    if tensor.shape[-1] != n_experts:
        raise FormatError(
            f"{model.path}: {tensor.name} has {tensor.shape[-1]} experts where the header says {n_experts}"
        )


def _refusals(
    model: GGUFModel,
    blocks: Mapping[int, Mapping[str, TensorInfo]],
    layers: Mapping[int, tuple[TensorInfo, ...]],
    n_experts: int,
) -> Iterator[str]:
    """One sentence for each kind of thing that makes pruning impossible, with the first tensor of that kind."""
    architecture = read_architecture(model)
    if layers and architecture in UNSUPPORTED:
        yield f"{model.path}: {architecture} models with experts are not supported: {UNSUPPORTED[architecture]}"
    seen: set[str] = set()
    for layer, block in blocks.items():
        for name, tensor in block.items():
            reason = _refusal(name, tensor, layer in layers, n_experts)
            if reason and reason not in seen:
                seen.add(reason)
                yield f"{model.path}: {tensor.name} {list(tensor.shape)} {reason}"
    for tensor in model.tensors.values():
        if "exps" in tensor.name and not _BLOCK_NAME.fullmatch(tensor.name):
            yield f"{model.path}: {tensor.name} {list(tensor.shape)} {_UNKNOWN}"


def _refusal(name: str, tensor: TensorInfo, is_moe: bool, n_experts: int) -> str:
    """Why this tensor `blk.N.<name>` forbids pruning, or nothing."""
    rule = find_rule(name)
    if rule is None:
        suspicious = "exp" in name or (is_moe and n_experts in tensor.shape)
        return _UNKNOWN if suspicious else ""
    if rule.role is Role.REFUSE:
        return f"cannot be cut: {rule.reason}"
    if rule.role is Role.IDS and (TENSOR_TYPES.get(tensor.type) != TENSOR_TYPES[_I32] or len(tensor.shape) != 2):
        return f"cannot be rewritten: it holds ids of experts as {tensor.type_name}, expected two axes of I32"
    if rule.role in (Role.CUT, Role.IDS) and not is_moe:
        return "belongs to experts, but its block does not have both a router and experts"
    return _uncuttable(tensor, rule) if rule.role is Role.CUT else ""


def _uncuttable(tensor: TensorInfo, rule: Rule) -> str:
    """Why bytes of one expert cannot be told from its neighbours', or nothing."""
    known = TENSOR_TYPES.get(tensor.type)
    if rule.n_dims == 1 and (known is None or known.block_size != 1):
        return f"cannot be cut: a block of {tensor.type_name} holds several experts"
    rows = 1 if known is not None else foreign_type(tensor.type).n_rows
    if rows > 1 and (rule.n_dims < 3 or tensor.shape[1] % rows):
        return f"cannot be cut: {tensor.type_name} interleaves {rows} rows, which belong to several experts"
    return ""


# ---- what removing experts does to the gate

# read in llama.cpp's src/models/*.cpp, in the calls of build_moe_ffn: a softmax over all experts and norm_w false
_NEVER_RENORMALISES = frozenset({"deepseek", "jamba", "llada-moe", "nomic-bert-moe", "olmoe", "qwen2moe"})
# there too: norm_w is the key expert_weights_norm, false where the key is missing
_RENORMALISES_BY_KEY = frozenset(
    {
        "afmoe",
        "bailingmoe",
        "bailingmoe2",
        "bailingmoe3",
        "cohere2moe",
        "deepseek2",
        "deepseek2-ocr",
        "deepseek32",
        "dots1",
        "dots3note",
        "exaone-moe",
        "glm-dsa",
        "glm4moe",
        "glm5-next",
        "hy_v3",
        "hy_v4",
        "kimi-k3",
        "laguna",
        "minimax-m3",
        "step35",
    }
)
# of those, the ones whose gate is a softmax where expert_gating_func is missing
_SOFTMAX_BY_DEFAULT = frozenset({"bailingmoe", "deepseek2", "deepseek2-ocr"})
_SOFTMAX = 1  # llama.cpp's src/llama-hparams.h, LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX


def gates_depend_on_all(model: GGUFModel, architecture: str) -> bool:
    """Whether a gate is a softmax over all experts that is not normalised again over the chosen ones.

    Removing experts then makes the gates of the survivors larger, because the denominator shrinks.
    """
    if architecture in _NEVER_RENORMALISES:
        return True
    if architecture not in _RENORMALISES_BY_KEY or model.get(f"{architecture}.expert_weights_norm", False):
        return False
    gating = read_count(model, f"{architecture}.expert_gating_func")
    return gating == _SOFTMAX or (gating == 0 and architecture in _SOFTMAX_BY_DEFAULT)
