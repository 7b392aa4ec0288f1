"""reap.gguf.expert_tensors: which tensors are cut, which are not, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf import GGMLQuantizationType, GGUFValueType
from helpers.gguf_builder import build_moe
from reap.errors import FormatError
from reap.gguf.expert_tensors import ExpertLayout, Role, find_rule, gates_depend_on_all, read_layout
from reap.gguf.reader import GGUFModel

# correctness trap 12, name by name
CUT = {
    **{f"ffn_{part}_exps.weight": 3 for part in ("gate", "up", "down", "gate_up")},
    **{f"ffn_{part}_exps.bias": 2 for part in ("gate", "up", "down", "gate_up")},
    **{
        f"ffn_{part}_exps.{scale}": 1
        for part in ("gate", "up", "down", "gate_up")
        for scale in ("scale", "input_scale")
    },
    "ffn_gate_inp.weight": 2,
    "ffn_gate_inp.bias": 1,
    "exp_probs_b": 1,
    "exp_probs_b.bias": 1,
    "exp_probs_b_vl": 1,
    "exp_probs_b_vl.bias": 1,
}
KEEP_NAMES = """
    ffn_gate_shexp.weight ffn_up_shexp.weight ffn_down_shexp.weight ffn_down_shexp.scale ffn_gate_inp_shexp.weight
    ffn_latent_down.weight ffn_latent_up.weight ffn_routed_norm.weight ffn_norm_exps.weight ffn_gate_inp.scale
    attn_norm.weight
    attn_q.weight attn_k_norm.weight attn_sinks.weight attn_kv_a_mqa.weight attn_q.bias attn_q.scale ssm_a
    ssm_conv1d.weight
    ssm_dt.bias ssm_in.weight ffn_norm.weight ffn_gate.weight ffn_up.weight ffn_down.weight ffn_down.scale
    ffn_up.input_scale
    ffn_gate.bias ffn_sub_norm.weight post_attention_norm.weight post_ffw_norm_1.weight pre_ffw_norm_2.weight
    layer_output_scale.weight layer_output_norm.weight nextn.eh_proj.weight nextn.shared_head_head.weight
    indexer.k_norm.weight
    indexer_compressor_kv.weight hc_attn_fn.weight time_mix_w1.weight inp_gate.weight shortconv.conv.weight
    altup_router.weight
    vis_gate.weight proj.weight ffn.act ffn_conv_proj.weight ple_key.weight
"""
REFUSE = (
    "ffn_gate_chexps.weight",
    "ffn_up_chexps.weight",
    "ffn_down_chexps.weight",
    "ffn_gate.0.weight",
    "ffn_up.12.weight",
    "ffn_down.7.weight",
)
UNKNOWN = (
    "ffn_side_exps.weight",
    "ffn_exps.weight",
    "attn_exps.weight",
    "expert_router.weight",
    "moe_gate.weight",
    "ffn_gate_exps.zero",
)


@pytest.mark.parametrize("name", CUT)
def test_tensors_with_an_expert_axis_are_cut(name: str) -> None:
    rule = find_rule(name)
    assert rule is not None
    assert (rule.role, rule.n_dims) == (Role.CUT, CUT[name])


@pytest.mark.parametrize("name", KEEP_NAMES.split())
def test_other_tensors_of_a_block_are_known_and_kept(name: str) -> None:
    rule = find_rule(name)
    assert rule is not None
    assert rule.role is Role.KEEP


@pytest.mark.parametrize("name", REFUSE)
def test_forms_that_rows_cannot_express_are_refused_with_a_reason(name: str) -> None:
    rule = find_rule(name)
    assert rule is not None
    assert rule.role is Role.REFUSE
    assert rule.reason


@pytest.mark.parametrize("name", UNKNOWN)
def test_names_that_are_not_in_the_table_stay_unknown(name: str) -> None:
    assert find_rule(name) is None


def layout_of(tmp_path: Path, **changes: Any) -> ExpertLayout:
    with GGUFModel.open(build_moe(tmp_path / "m.gguf", **changes)) as model:
        return read_layout(model)


def test_layout_of_a_model_with_a_dense_first_layer(tmp_path: Path) -> None:
    layout = layout_of(
        tmp_path, n_layers=3, dense_layers=(0,), biases=True, scales=True, selection_bias=True, shared_expert=True
    )
    assert layout.architecture == "qwen3moe"
    assert layout.n_experts == 8
    assert layout.moe_layers == (1, 2)
    names = {"ffn_gate_inp.weight", "ffn_gate_inp.bias", "exp_probs_b.bias"}
    names |= {
        f"ffn_{part}_exps.{what}"
        for part in ("gate", "up", "down")
        for what in ("weight", "bias", "scale", "input_scale")
    }
    assert {name for name, layer in layout.cut.items() if layer == 1} == {f"blk.1.{name}" for name in names}
    assert [tensor.name for tensor in layout.routers] == [
        f"blk.{layer}.{name}"
        for layer in (1, 2)
        for name in ("ffn_gate_inp.weight", "ffn_gate_inp.bias", "exp_probs_b.bias")
    ]
    assert len(layout.experts) == 2 * 12
    assert layout.refusals == ()


def test_fused_experts(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, fused=True, n_layers=1, biases=True)
    assert "blk.0.ffn_gate_up_exps.weight" in layout.cut
    assert "blk.0.ffn_gate_up_exps.bias" in layout.cut


@pytest.mark.parametrize("n_experts", [8, 16, 32, 64, 300])
def test_an_expert_count_that_equals_another_dimension_fools_nobody(tmp_path: Path, n_experts: int) -> None:
    # 8 is the head size, 16 the rows of attn_k, 32 the embedding and the feed-forward size, 64 the context's old
    # vocabulary, 300 the new
    layout = layout_of(
        tmp_path, n_experts=n_experts, n_vocab=300 if n_experts == 300 else 64, shared_expert=True, dense_layers=(1,)
    )
    assert set(layout.cut) == {
        f"blk.0.{name}.weight" for name in ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    }
    assert layout.refusals == ()


def test_a_dense_model_has_no_layout_and_no_complaint(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, n_experts=0)
    assert (layout.n_experts, layout.moe_layers, layout.refusals) == (0, (), ())


def test_an_axis_that_contradicts_the_header_names_the_tensor(tmp_path: Path) -> None:
    extra = {"blk.0.exp_probs_b.bias": np.zeros(9, dtype=np.float32)}
    with pytest.raises(FormatError, match=r"blk\.0\.exp_probs_b\.bias has 9 experts where the header says 8"):
        layout_of(tmp_path, extra=extra)


def test_the_expert_count_on_an_inner_axis_does_not_make_it_the_expert_axis(tmp_path: Path) -> None:
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((32, 8), dtype=np.float32)}
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_gate_inp\.weight has 32 experts where the header says 8"):
        layout_of(tmp_path, extra=extra)


def test_a_tensor_with_the_wrong_number_of_axes_is_named(tmp_path: Path) -> None:
    extra = {"blk.0.exp_probs_b.bias": np.zeros((8, 8), dtype=np.float32)}
    with pytest.raises(FormatError, match=r"blk\.0\.exp_probs_b\.bias has 2 axes, expected 1"):
        layout_of(tmp_path, extra=extra)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.1.ffn_mystery_exps.weight", (8, 4, 32), "does not know this tensor"),
        ("blk.1.mystery.weight", (8, 32), "does not know this tensor"),
        ("blk.1.mystery.weight", (32, 8), "does not know this tensor"),
        ("blk.1.ffn_gate_chexps.weight", (4, 8, 32), "one chunk expert serves a whole group"),
        ("blk.1.ffn_gate_tid2eid.weight", (64, 2), "holds ids of experts as F32"),
        ("blk.0.ffn_gate_tid2eid.weight", (64, 2), "holds ids of experts as F32"),
        ("blk.0.ffn_gate.3.weight", (32, 32), "a tensor of its own"),
        ("blk.0.ffn_gate_inp.weight", (8, 32), "does not have both a router and experts"),
        ("blk.0.ffn_up_exps.weight", (8, 32, 32), "does not have both a router and experts"),
        ("mtp.ffn_up_exps.weight", (8, 32, 32), "does not know this tensor"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    layout = layout_of(tmp_path, dense_layers=(0,), extra={name: np.zeros(shape, dtype=np.float32)})
    [refusal] = layout.refusals
    assert name in refusal
    assert message in refusal


def test_an_unknown_tensor_without_an_axis_like_the_experts_is_let_through(tmp_path: Path) -> None:
    extra = {
        "blk.1.mystery.weight": np.zeros((4, 32), dtype=np.float32),
        "blk.0.mystery.weight": np.zeros(8, dtype=np.float32),
    }
    assert layout_of(tmp_path, dense_layers=(0,), extra=extra).refusals == ()


def test_a_quantised_row_of_experts_cannot_be_cut_apart(tmp_path: Path) -> None:
    from helpers.gguf_builder import random_tensor

    array, _ = random_tensor(np.random.default_rng(0), (32,), GGMLQuantizationType.Q8_0)
    path = build_moe(
        tmp_path / "m.gguf",
        n_experts=32,
        n_layers=1,
        typed={"blk.0.exp_probs_b.bias": (array, GGMLQuantizationType.Q8_0)},
    )
    with GGUFModel.open(path) as model:
        [refusal] = read_layout(model).refusals
    assert "blk.0.exp_probs_b.bias" in refusal
    assert "a block of Q8_0 holds several experts" in refusal


def test_experts_without_a_count_are_a_format_error(tmp_path: Path) -> None:
    names = {"ffn_gate_inp.weight": (8, 32), "ffn_up_exps.weight": (8, 32, 32)}
    extra = {f"blk.1.{name}": np.zeros(shape, dtype=np.float32) for name, shape in names.items()}
    with pytest.raises(FormatError, match=r"blk\.1 has experts, but the header has no qwen3moe\.expert_count"):
        layout_of(tmp_path, n_experts=0, extra=extra)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (GGUFValueType.INT32, -8),
        (GGUFValueType.FLOAT32, 8.0),
        (GGUFValueType.STRING, "8"),
        (GGUFValueType.ARRAY, [8, 8]),
    ],
)
def test_an_expert_count_that_is_no_count_is_a_format_error(tmp_path: Path, kind: GGUFValueType, value: Any) -> None:
    with pytest.raises(FormatError, match=r"qwen3moe\.expert_count is not an integer"):
        layout_of(tmp_path, n_experts=0, keys={"qwen3moe.expert_count": (kind, value)})


def test_a_forged_expert_count_is_a_format_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="expected at most 65,536"):
        layout_of(tmp_path, n_experts=0, keys={"qwen3moe.expert_count": (GGUFValueType.UINT64, 2**40)})


SOFTMAX = {"deepseek2.expert_gating_func": (GGUFValueType.UINT32, 1)}
SIGMOID = {"deepseek2.expert_gating_func": (GGUFValueType.UINT32, 2)}
NORMALISED = {"deepseek2.expert_weights_norm": (GGUFValueType.BOOL, True)}


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("qwen3moe", {}, False),
        ("olmoe", {}, True),
        ("qwen2moe", {}, True),
        ("deepseek", {}, True),
        ("jamba", {}, True),
        ("deepseek2", {}, True),
        ("deepseek2", SOFTMAX, True),
        ("deepseek2", {**SOFTMAX, **NORMALISED}, False),
        ("deepseek2", SIGMOID, False),
        ("glm4moe", {}, False),
    ],
)
def test_which_gates_grow_when_experts_go(tmp_path: Path, architecture: str, keys: Any, expected: bool) -> None:
    with GGUFModel.open(build_moe(tmp_path / "m.gguf", architecture=architecture, keys=keys)) as model:
        assert gates_depend_on_all(model, architecture) is expected
