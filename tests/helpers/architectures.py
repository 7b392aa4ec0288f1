"""One small MoE model of every architecture that llama.cpp's own test suite can write, wide enough to route and to
prune.

`test-llama-archs -o DIR` saves a tiny random model of each architecture: 2 experts, both always used. `widen` makes
them 8 by repeating the experts with noise, with the official `gguf` package and nothing of reap.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gguf import GGUFReader, GGUFValueType, GGUFWriter

Array = np.ndarray[Any, Any]

SEED = 1
N_EXPERTS = 8

#: What the program writes as `NAME-moe.gguf` with experts inside.
MOE = (
    "afmoe", "arctic", "bailingmoe", "bailingmoe2", "bailingmoe3", "cohere2moe", "dbrx", "deepseek", "deepseek2",
    "deepseek32",
    "deepseek4", "dots1", "dots3note", "ernie4_5-moe", "exaone-moe", "glm-dsa", "glm4moe", "glm5-next", "gpt-oss",
    "granite",
    "granitemoe", "grok", "grovemoe", "hunyuan-moe", "hy_v3", "hy_v4", "kimi-k3", "kimi-linear", "laguna", "lfm2moe",
    "llada-moe",
    "llama", "llama4", "maple", "mellum", "mimo2", "minicpm", "minimax-01", "minimax-m2", "minimax-m3", "mistral3",
    "mistral4", "olmoe",
    "phimoe", "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vlmoe", "qwen4exp", "refact", "rnd1",
    "smallthinker",
)  # fmt: skip

#: What it calls `NAME-moe.gguf` although there are no experts inside.
DENSE = ("ernie4_5", "paddleocr")


class PredictionBlock(NamedTuple):
    """A multi-token-prediction block to add. like: the block to copy. keys: what must change with it."""

    like: int
    keys: Mapping[str, Any] = {}


#: Architectures whose prediction block llama.cpp runs with experts; each is tested with one as well.
PREDICTING = {
    "cohere2moe": PredictionBlock(1),
    "deepseek2": PredictionBlock(1),
    "deepseek32": PredictionBlock(1),
    "glm-dsa": PredictionBlock(1),
    # sections are for images, and its prediction block cannot use them
    "glm4moe": PredictionBlock(1, {"rope.dimension_sections": [0, 0, 0, 0]}),
    "hy_v3": PredictionBlock(1),
    "qwen35moe": PredictionBlock(1),
    "qwen3next": PredictionBlock(1),
}
WITH_PREDICTION = "+mtp"

#: What reap refuses, by name -> the reason.
REFUSED = {
    "grovemoe": (
        "llama.cpp runs a second set of experts (`ffn_*_chexps`) for groups of the first, under the same names, and"
        " gives group c the gate of expert c: removing experts would give the groups other gates"
    ),
    "refact": "llama.cpp loads experts for this architecture, but its graph never runs them",
}

#: Architectures with experts that the program cannot write -> why.
NOT_GENERATED = {
    "deepseek2-ocr": "marked as unsupported in the program",
    "dflash": "a draft model, which the program leaves out",
    "gemma4": "its cache needs more than the program sets up",
    "granite_swa": "written without experts",
    "granitehybrid": "written without experts",
    "graniteswitch": "needs adapters that the program does not set up",  # and loads no experts in this version
    "jamba": "written without experts",
    "llama-embed": "an embedding model, marked as unsupported in the program",
    "nemotron_h_moe": "written without experts (NemotronH is tested against PyTorch instead)",
    "nomic-bert-moe": "an embedding model, which needs a vocabulary that the program does not have",
    "step35": "llama.cpp cannot save this architecture",
}

#: Architectures without experts whose code is that of one with experts.
SHARES_CODE = {"lfm2": "lfm2moe", "nemotron_h": "nemotron_h_moe"}

#: Name -> (groups of the router, groups that a token may use), for families whose real models have a grouped router.
GROUPED = {"bailingmoe2": (2, 1), "deepseek2": (2, 1), "glm4moe": (2, 1)}

#: Name -> tensor -> factor. SmallThinker routes on the residual stream, which nothing normalises: its logits would
#: all be alike in the
#: first layer, and its sigmoids all 0 or 1 in the second.
FACTORS = {"smallthinker": {"blk.0.ffn_gate_inp.weight": 6.0, "blk.1.ffn_gate_inp.weight": 0.06}}

_EXPERT_AXIS = re.compile(
    r"blk\.\d+\.(ffn_(gate|up|down|gate_up)_(exps|chexps)|ffn_gate_inp|exp_probs_b|exp_probs_b_vl)(\.(weight|bias|scale|input_scale))?"
)


def write_models(program: Path, pattern: str, directory: Path) -> list[Path]:
    """Run the program for the architectures whose names match `pattern`; the files it wrote, by name."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [str(program), "-a", pattern, "-s", str(SEED), "-o", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-1000:]}")
    return sorted(directory.glob("*.gguf"))


def write_model(program: Path, name: str, directory: Path) -> Path:
    """The widened model of one architecture; with a prediction block where the name ends in `+mtp`."""
    architecture = name.removesuffix(WITH_PREDICTION)
    narrow, wide, target = directory / "narrow", directory / "wide.gguf", directory / f"{name}.gguf"
    write_models(program, f"^{architecture}$", narrow)
    widen(narrow / f"{architecture}-moe.gguf", wide, groups=GROUPED.get(architecture))
    shutil.rmtree(narrow)
    if name == architecture:
        return wide.rename(target)
    add_prediction_block(wide, target, PREDICTING[architecture])
    wide.unlink()
    return target


def has_experts(path: Path) -> bool:
    """Whether any tensor of a model holds experts."""
    return any("_exps." in tensor.name for tensor in GGUFReader(path).tensors)


def widen(source: Path, target: Path, *, groups: tuple[int, int] | None = None, seed: int = SEED) -> None:
    """Repeat the experts along their axis with noise, and let norms be about 1, so that a router's logits differ from
    each other."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    changed: dict[str, Any] = {f"{architecture}.expert_count": N_EXPERTS}
    if groups:
        changed[f"{architecture}.expert_group_count"], changed[f"{architecture}.expert_group_used_count"] = groups
    writer = GGUFWriter(target, architecture)
    for key, pair in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = changed.pop(key, pair.contents())
        if pair.types[0] == GGUFValueType.ARRAY and len(value) == 0:
            continue
        writer.add_key_value(key, value, pair.types[0], sub_type=pair.types[1] if len(pair.types) > 1 else None)
    if changed:
        raise RuntimeError(f"{source} has no {', '.join(changed)}")
    for tensor in reader.tensors:
        rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
        values = _widened(tensor.name, np.array(tensor.data), rng) * FACTORS.get(architecture, {}).get(tensor.name, 1)
        writer.add_tensor(tensor.name, values.astype(tensor.data.dtype), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _widened(name: str, values: Array, rng: np.random.Generator) -> Array:
    if _EXPERT_AXIS.fullmatch(name):
        repeated = np.concatenate([values] * (N_EXPERTS // len(values))).astype(np.float32)
        noise = rng.standard_normal(repeated.shape)
        return 1 + 0.3 * noise if name.endswith("scale") else repeated + 0.1 * noise
    return values + 1 if re.search(r"norm(_exps)?\.weight$", name) else values


def cut(tensors: Mapping[str, Array], kept: Mapping[int, list[int]]) -> dict[str, Array]:
    """What every tensor of a model must be once each layer has only the experts `kept[layer]`."""
    return {
        name: values[kept[int(name.split(".")[1])]] if _EXPERT_AXIS.fullmatch(name) else values
        for name, values in tensors.items()
    }


def all_but(names: Iterable[str]) -> str:
    """A pattern for the program that matches every architecture but these."""
    return f"^(?!({'|'.join(names)})$)"


def add_prediction_block(source: Path, target: Path, block: PredictionBlock, *, seed: int = SEED) -> None:
    """The same model with one block more, a copy of another with noise."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    n_layers = reader.fields[f"{architecture}.block_count"].contents()
    n_embd = reader.fields[f"{architecture}.embedding_length"].contents()
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(target, architecture)
    for key, pair in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = block.keys.get(key.removeprefix(f"{architecture}."), pair.contents())
        if key == f"{architecture}.block_count":
            value = n_layers + 1
        elif key == f"{architecture}.nextn_predict_layers":
            value = 1
        elif pair.types[0] == GGUFValueType.ARRAY and len(value) == n_layers:
            value = [*value, value[-1]]
        writer.add_key_value(key, value, pair.types[0], sub_type=pair.types[1] if len(pair.types) > 1 else None)
    prefix, copy = f"blk.{block.like}.", f"blk.{n_layers}."
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for name, values in list(tensors.items()):
        # llama.cpp never asks for the scales of such a block, and then finds more tensors in the file than it asked for
        if name.startswith(prefix) and not name.endswith("scale"):
            tensors[copy + name[len(prefix) :]] = values + (0.1 * rng.standard_normal(values.shape)).astype(
                values.dtype
            )
    tensors[f"{copy}nextn.eh_proj.weight"] = (0.1 * rng.standard_normal((n_embd, 2 * n_embd))).astype(np.float32)
    for norm in ("enorm", "hnorm", "shared_head_norm"):
        tensors[f"{copy}nextn.{norm}.weight"] = np.ones(n_embd, dtype=np.float32)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
