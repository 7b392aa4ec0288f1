"""Checkpoints as publishers leave them: a sound one, changed in a few seeded ways (needs PyTorch)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

N_EXPERTS = 8
INDEX = "model.safetensors.index.json"
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(.*)\.weight")


@dataclass
class Draft:
    """A checkpoint before it is written."""

    tensors: dict[str, torch.Tensor]
    shard_of: dict[str, str]
    config: dict[str, Any]
    n_layers: int
    trunk: list[str]
    """Names of the tensors of a MoE layer, from which prediction blocks are made."""
    may_predict: bool = False
    """Whether transformers passes over prediction blocks of this family."""
    unnamed: set[str] = field(default_factory=set)
    ghosts: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    doubles: list[tuple[str, str]] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)
    """Shards that are not there."""
    extra: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Other safetensors files -> tensors."""
    raw: dict[str, bytes] = field(default_factory=dict)
    """Other files."""
    mtp_experts: int = 0
    done: list[str] = field(default_factory=list)
    """What was changed, in words."""

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.shard_of.values()))

    @property
    def lists(self) -> list[str]:
        """A list of modules in config.json."""
        found: list[str] = self.config.setdefault("module_lists", {"ignore": ["lm_head"]})["ignore"]
        return found

    def write(self, directory: Path) -> None:
        directory.mkdir()
        for shard in self.shards:
            if shard not in self.absent:
                held = {name: tensor for name, tensor in self.tensors.items() if self.shard_of[name] == shard}
                held |= {name: self.tensors[name] for name, other in self.doubles if other == shard}
                save_file(held, directory / shard, metadata={"format": "pt"})
        if len(self.shards) > 1:
            names = {name: shard for name, shard in self.shard_of.items() if name not in self.unnamed}
            document = {"metadata": {}, "weight_map": names | self.ghosts | self.elsewhere}
            (directory / INDEX).write_text(json.dumps(document))
        for name, tensors in self.extra.items():
            (directory / name).parent.mkdir(exist_ok=True)
            save_file(tensors, directory / name, metadata={"format": "pt"})
        for name, raw in self.raw.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(raw)
        (directory / "config.json").write_text(json.dumps(self.config, indent=2))


def draft(source: Path, n_layers: int, n_shards: int) -> Draft:
    """The checkpoint in `source`, a single file, to be written as `n_shards`."""
    tensors = load_file(source / "model.safetensors")
    files = [f"model-{number + 1:05}-of-{n_shards:05}.safetensors" for number in range(n_shards)]
    files = files if n_shards > 1 else ["model.safetensors"]
    shard_of = {name: files[number % n_shards] for number, name in enumerate(tensors)}
    layer = next(match[1] for name in tensors if (match := re.search(r"layers\.(\d+)\..*\.experts\.", name)))
    trunk = [name for name in tensors if f"layers.{layer}." in name]
    return Draft(tensors, shard_of, json.loads((source / "config.json").read_text()), n_layers, trunk)


Mutation = Callable[[Draft, random.Random], None]


def _block(it: Draft) -> str:
    return next(name for name in it.tensors if ".experts." in name).partition(".experts.")[0]


def _plain(it: Draft) -> list[str]:
    """Tensors that are not an expert's."""
    return [name for name in it.tensors if ".experts." not in name and not name.startswith("mtp")]


def forget_some(it: Draft, rng: random.Random) -> None:
    it.unnamed |= set(rng.sample(list(it.tensors), 1 + rng.randrange(4)))


def forget_mtp(it: Draft, rng: random.Random) -> None:
    add_mtp(it, rng)
    it.unnamed |= {name for name in it.tensors if name.startswith("mtp")}


def ghosts(it: Draft, rng: random.Random) -> None:
    for number in range(1 + rng.randrange(3)):
        it.ghosts[f"model.layers.{90 + number}.mlp.experts.{number}.up_proj.weight"] = it.shards[0]


def wrong_file(it: Draft, rng: random.Random) -> None:
    name = rng.choice(list(it.tensors))
    it.elsewhere[name] = rng.choice([shard for shard in it.shards if shard != it.shard_of[name]] or it.shards)


def double(it: Draft, rng: random.Random) -> None:
    name = rng.choice(list(it.tensors))
    it.doubles += [(name, shard) for shard in it.shards if shard != it.shard_of[name]][:1]


def missing_shard(it: Draft, rng: random.Random) -> None:
    it.absent.add(rng.choice(it.shards))


def unnamed_file(it: Draft, rng: random.Random) -> None:
    """A file of prediction tensors, of a copy of a weight, or of a draft model."""
    name = rng.choice(_plain(it))
    choices = [{name: it.tensors[name] + 1}, *([{"mtp.fc.weight": torch.ones(4, 4)}] if it.may_predict else [])]
    tensors = rng.choice(choices)
    it.extra[rng.choice(["extra.safetensors", "mtp.safetensors"])] = dict(tensors)


def block_configs(it: Draft, rng: random.Random) -> None:
    key = rng.choice(["n_routed_experts", "num_local_experts", "num_experts"])
    it.config["block_configs"] = [
        {"type": "attention"},
        {"ffn": {"moe": {key: N_EXPERTS, "width": 7}}, key: N_EXPERTS},
    ]


def unknown_count(it: Draft, rng: random.Random) -> None:
    it.config["expert_slots_total"] = N_EXPERTS


def full_names(it: Draft, rng: random.Random) -> None:
    block = _block(it)
    tail = block[block.index("layers.") :]
    prefix = rng.choice([block.removesuffix(tail), "language_model.model.", ""])
    it.lists.extend(f"{prefix}{tail}.experts.{expert}.up_proj" for expert in rng.sample(range(N_EXPERTS), 3))


def patterns(it: Draft, rng: random.Random) -> None:
    number = rng.randrange(N_EXPERTS)
    it.lists.append(
        rng.choice(
            [
                rf"re:.*\.experts\.{number}\..*",
                rf"re:.*\.experts\.[{number}-7]\.up_proj",
                r"re:.*\.experts\.\d+\.down_proj",
                r"re:.*self_attn.*",
                rf"re:.*layers\.\d+\.[a-z_]+\.experts\.({number}|0)\.",
            ]
        )
    )


def parts(it: Draft, rng: random.Random) -> None:
    it.lists.append(rng.choice(["experts.{}", "mlp.experts.{}.up_proj", "mixer.experts.{}"]).format(rng.randrange(8)))


def odd_names(it: Draft, rng: random.Random) -> None:
    it.config["notes"] = rng.choice(["blocks.expert_3.up", "re:.*experts.3", ["h.0.moe.experts.1.w"], "the experts"])


def quantisation_file(it: Draft, rng: random.Random) -> None:
    name = rng.choice(["hf_quant_config.json", "quantize_config.json"])
    module = f"{_block(it)}.experts.{rng.randrange(8)}.up_proj"
    document = {"bits": 16, "exclude_modules": [module], "layers": {module: {"bits": 16}}}
    it.raw[name] = json.dumps(document).encode()


def stale_json(it: Draft, rng: random.Random) -> None:
    it.raw["stats/experts.json"] = json.dumps({"model.layers.0.mlp.experts.1": 0.5}).encode()


def add_mtp(it: Draft, rng: random.Random, n_experts: int = N_EXPERTS) -> None:
    it.mtp_experts = n_experts
    part = re.search(r"layers\.\d+\.", it.trunk[0])
    assert part is not None
    for name in (name for name in it.trunk if name in it.tensors):
        new = "mtp.layers.0." + name.split(part[0])[1]
        expert = re.search(r"\.experts\.(\d+)\.", new)
        tensor = it.tensors[name]
        if expert and int(expert[1]) >= n_experts:
            continue
        if n_experts != N_EXPERTS and len(tensor) == N_EXPERTS:
            tensor = tensor[:n_experts]
        it.tensors[new] = tensor.clone()
        it.shard_of[new] = it.shards[0]


def mtp_of_another_count(it: Draft, rng: random.Random) -> None:
    add_mtp(it, rng, rng.choice([2, 4, 6]))


def mtp_with_a_stranger(it: Draft, rng: random.Random) -> None:
    add_mtp(it, rng)
    router = next(name for name in it.tensors if re.fullmatch(r"mtp\..*\.(gate|router)\.weight", name))
    name = router.rpartition(".")[0].rpartition(".")[0] + ".balance"
    it.tensors[name], it.shard_of[name] = torch.ones(N_EXPERTS), it.shards[0]


def other_weights(it: Draft, rng: random.Random) -> None:
    it.raw[rng.choice(["pytorch_model.bin", "ple/0.bin", "original/model.pth", "model.gguf"])] = b"weights"


def draft_model(it: Draft, rng: random.Random) -> None:
    experts = rng.random() < 0.5
    name = "layers.0.mlp.experts.0.up_proj.weight" if experts else "layers.0.mlp.up_proj.weight"
    it.extra["dspark/model.safetensors"] = {name: torch.ones(N_EXPERTS, 4)}


def packed_router(it: Draft, rng: random.Random) -> None:
    name = next(name for name in it.tensors if re.search(r"\.(gate|router)\.weight$", name))
    it.tensors[f"{name}.absmax"], it.shard_of[f"{name}.absmax"] = torch.ones(2), it.shard_of[name]


def zero_experts(it: Draft, rng: random.Random) -> None:
    name = next(name for name in it.tensors if re.search(r"\.(gate|router)\.weight$", name))
    it.tensors[name] = torch.cat([it.tensors[name], it.tensors[name][:4]])
    it.config["zero_expert_num"] = 4


def lost_expert(it: Draft, rng: random.Random) -> None:
    single = [name for name in it.tensors if _EXPERT.fullmatch(name)]
    if single:
        block, expert, _ = _EXPERT.fullmatch(rng.choice(single)).groups()  # type: ignore[union-attr]
        for name in [name for name in single if name.startswith(f"{block}.experts.{expert}.")]:
            del it.tensors[name], it.shard_of[name]


MUTATIONS: tuple[Mutation, ...] = (
    forget_some, forget_mtp, ghosts, wrong_file, double, missing_shard, unnamed_file,
    block_configs, unknown_count, full_names, patterns, parts, odd_names, quantisation_file, stale_json,
    add_mtp, mtp_of_another_count, mtp_with_a_stranger,
    other_weights, draft_model, packed_router, zero_experts, lost_expert,
)  # fmt: skip
#: Families whose prediction blocks transformers passes over.
WITH_MTP = ("qwen3_next", "nemotronh", "qwen3_5_moe")
NEEDS_SHARDS = (forget_some, forget_mtp, ghosts, wrong_file, double, missing_shard, unnamed_file)
ABOUT_MTP = (forget_mtp, add_mtp, mtp_of_another_count, mtp_with_a_stranger)
