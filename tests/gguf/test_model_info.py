"""reap.gguf.model_info: what a model is, and what makes two files the same model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from helpers.gguf_builder import build_moe
from reap.errors import FormatError, UnsupportedModelError, UsageError
from reap.gguf.model_info import ModelInfo, inspect, require_moe


def info_of(tmp_path: Path, stem: str = "m", **changes: Any) -> ModelInfo:
    return inspect(build_moe(tmp_path / f"{stem}.gguf", **changes))


def test_what_inspect_says_of_a_moe_model(tmp_path: Path) -> None:
    info = info_of(
        tmp_path,
        n_layers=3,
        dense_layers=(0,),
        biases=True,
        tokenizer="words",
        n_vocab=300,
        expert_type=GGMLQuantizationType.Q8_0,
    )
    assert info.path == tmp_path / "m.gguf"
    assert (info.name, info.architecture) == ("tiny", "qwen3moe")
    assert (info.n_layers, info.moe_layers, info.n_prediction_layers) == (3, (1, 2), 0)
    assert (info.n_experts, info.n_experts_used, info.n_experts_used_per_layer) == (8, 2, (2, 2))
    assert (info.n_groups, info.n_groups_used) == (1, 1)
    assert (info.vocab_size, info.context_length) == (300, 256)
    assert (info.has_tokenizer, info.has_chat_template) == (True, False)
    assert info.n_files == 1
    assert info.provenance is None
    assert info.refusals == ()
    assert info.is_moe


def test_sizes_add_up_to_what_the_gguf_package_reads(tmp_path: Path) -> None:
    info = info_of(
        tmp_path, biases=True, selection_bias=True, shared_expert=True, expert_type=GGMLQuantizationType.Q8_0
    )
    tensors = GGUFReader(info.path).tensors
    experts = [tensor for tensor in tensors if "_exps." in tensor.name]
    routers = [tensor for tensor in tensors if "ffn_gate_inp" in tensor.name or "exp_probs" in tensor.name]
    assert info.n_bytes == info.path.stat().st_size == info.expert_bytes + info.other_bytes
    assert info.expert_bytes == sum(int(tensor.n_bytes) for tensor in experts)
    assert info.bytes_per_expert == sum(int(tensor.n_bytes) // 8 for tensor in experts + routers)
    assert info.n_parameters == sum(int(tensor.n_elements) for tensor in tensors)
    assert info.tensor_types == {"F32": len(tensors) - 6, "Q8_0": 6}


def test_to_dict_is_json(tmp_path: Path) -> None:
    document = json.loads(json.dumps(info_of(tmp_path).to_dict()))
    assert document["n_experts"] == 8
    assert document["moe_layers"] == [0, 1]
    assert document["is_moe"] is True


def test_a_dense_model_can_be_inspected_but_is_no_moe(tmp_path: Path) -> None:
    info = info_of(tmp_path, n_experts=0)
    assert (info.moe_layers, info.n_experts, info.expert_bytes, info.bytes_per_expert) == ((), 0, 0, 0)
    with pytest.raises(UnsupportedModelError, match="qwen3moe here is a dense model"):
        require_moe(info)


def test_experts_in_no_known_layout_are_not_called_dense(tmp_path: Path) -> None:
    info = info_of(
        tmp_path, dense_layers=(0, 1), extra={"blk.0.ffn_gate.0.weight": np.zeros((32, 32), dtype=np.float32)}
    )
    with pytest.raises(UnsupportedModelError, match="a tensor of its own"):
        require_moe(info)


def test_experts_used_may_differ_per_layer(tmp_path: Path) -> None:
    info = info_of(tmp_path, n_layers=3, dense_layers=(0,), used_per_layer=(0, 4, 2))
    assert (info.n_experts_used, info.n_experts_used_per_layer) == (4, (4, 2))


@pytest.mark.parametrize("used", [(2,), (2, 2, 2), (0, 9), (-1, 2)])
def test_experts_used_per_layer_that_cannot_be_are_a_format_error(tmp_path: Path, used: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"qwen3moe\.expert_used_count"):
        info_of(tmp_path, used_per_layer=used)


def test_experts_without_a_number_of_used_ones_are_a_format_error(tmp_path: Path) -> None:
    build_moe(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"expert_used_count", b"expert_xxxx_count"))
    with pytest.raises(FormatError, match=r"no qwen3moe\.expert_used_count"):
        inspect(tmp_path / "m.gguf")


def test_groups_of_the_router(tmp_path: Path) -> None:
    info = info_of(tmp_path, architecture="deepseek2", n_groups=4, n_groups_used=2)
    assert (info.n_groups, info.n_groups_used) == (4, 2)


@pytest.mark.parametrize(("n_groups", "n_groups_used"), [(3, 1), (4, 5), (4, 0), (16, 1)])
def test_groups_that_cannot_be_are_a_format_error(tmp_path: Path, n_groups: int, n_groups_used: int) -> None:
    with pytest.raises(FormatError, match="which cannot be"):
        info_of(tmp_path, n_groups=n_groups, n_groups_used=n_groups_used)


def test_a_model_without_an_architecture_or_with_a_forged_block_count(tmp_path: Path) -> None:
    build_moe(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"general.architecture", b"general.archibecture"))
    with pytest.raises(FormatError, match=r"no general\.architecture"):
        inspect(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="block_count is 1,000,000,000"):
        info_of(tmp_path, n_layers=2, keys={"qwen3moe.block_count": (GGUFValueType.UINT32, 1_000_000_000)})


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        inspect(tmp_path / "absent.gguf")


# ---- the same model, or another


def test_another_quantisation_is_the_same_model(tmp_path: Path) -> None:
    plain = info_of(tmp_path)
    types = {"expert_type": GGMLQuantizationType.Q8_0, "router_type": GGMLQuantizationType.F16}
    quantised = info_of(tmp_path, "q", scales=True, name="other", alignment=64, **types)
    assert plain.fingerprint == quantised.fingerprint
    assert plain.router_fingerprint != quantised.router_fingerprint
    assert plain.fingerprint.startswith("sha256:")
    assert len(plain.fingerprint) == len("sha256:") + 64


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "olmoe"},
        {"n_layers": 3},
        {"n_experts": 7},
        {"n_used": 3},
        {"n_ff": 64},
        {"n_vocab": 65},
        {"dense_layers": (0,)},
        {"shared_expert": True},
        {"biases": True},
        {"tokenizer": "words"},
        {"keys": {"tokenizer.ggml.bos_token_id": (GGUFValueType.UINT32, 3)}},
    ],
    ids=str,
)
def test_another_model_has_another_fingerprint(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert info_of(tmp_path, "other", **changes).fingerprint != info_of(tmp_path).fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"n_ctx": 512},
        {"keys": {"tokenizer.chat_template": (GGUFValueType.STRING, "{{ messages }}")}},
        {"keys": {"general.author": (GGUFValueType.STRING, "someone")}},
    ],
    ids=str,
)
def test_what_does_not_make_another_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert info_of(tmp_path, "other", **changes).fingerprint == info_of(tmp_path).fingerprint


def test_a_token_that_differs_makes_another_model(tmp_path: Path) -> None:
    before = info_of(tmp_path, tokenizer="words", n_vocab=300)
    content = before.path.read_bytes()
    before.path.write_bytes(content.replace("\u2581w7".encode(), "\u2581x7".encode(), 1))
    after = inspect(before.path)
    assert before.fingerprint != after.fingerprint
    assert before.router_fingerprint == after.router_fingerprint


def test_the_router_fingerprint_is_that_of_the_routers_bytes(tmp_path: Path) -> None:
    info = info_of(tmp_path, selection_bias=True)
    digest = hashlib.sha256()
    tensors = {tensor.name: tensor for tensor in GGUFReader(info.path).tensors}
    for name in (
        "blk.0.ffn_gate_inp.weight",
        "blk.0.exp_probs_b.bias",
        "blk.1.ffn_gate_inp.weight",
        "blk.1.exp_probs_b.bias",
    ):
        digest.update(tensors[name].data.tobytes())
    assert info.router_fingerprint == f"sha256:{digest.hexdigest()}"


@pytest.mark.parametrize("where", [0.0, 0.3, 1.0])
def test_of_a_large_router_blocks_are_compared_from_its_first_byte_to_its_last(tmp_path: Path, where: float) -> None:
    info = info_of(tmp_path, n_layers=1, n_experts=128, n_embd=1024, n_ff=32)
    router = next(tensor for tensor in GGUFReader(info.path).tensors if tensor.name == "blk.0.ffn_gate_inp.weight")
    assert router.n_bytes == 512 << 10
    with open(info.path, "r+b") as file:
        file.seek(router.data_offset + min(int(where * router.n_bytes), int(router.n_bytes) - 40_000))
        file.write(bytes(40_000))  # a training run changes every byte; an edit of a few may be missed
    assert inspect(info.path).router_fingerprint != info.router_fingerprint
    assert inspect(info.path).fingerprint == info.fingerprint
