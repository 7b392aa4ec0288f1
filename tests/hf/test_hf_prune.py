"""Checkpoints on disk: what is cut, what stays, what is refused; outputs that appear whole or not at all. Needs no
PyTorch."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import reap
from helpers.checkpoint_builder import (
    KEPT,
    N_EMBD,
    N_EXPERTS,
    N_FF,
    Tensors,
    build,
    config,
    qwen,
    read_file,
    write_file,
)
from helpers.profiles import make_profile
from reap.cli import main
from reap.errors import FormatError, MismatchError, OutputError, ReapError, UnsupportedModelError, UsageError
from reap.hf import prune
from reap.hf.disk import prune as disk_pruner
from reap.hf.disk.config_text import replace_values
from reap.scores.plan import PrunePlan


def plan_of(kept: dict[int, tuple[int, ...]] | None = None, n_experts: int = N_EXPERTS, **model: Any) -> PrunePlan:
    kept = KEPT if kept is None else kept
    return PrunePlan({"n_experts": n_experts, **model}, "reap", len(next(iter(kept.values()))), kept)


def rows(raw: bytes, kept: tuple[int, ...], n_experts: int = N_EXPERTS) -> bytes:
    size = len(raw) // n_experts
    return b"".join(raw[expert * size : expert * size + size] for expert in kept)


def expected(contents: dict[str, bytes], cut: str = r"^$") -> dict[str, bytes]:
    """What must be left: names renumbered one by one, tensors that match `cut` sliced; written without any of reap's
    code."""
    result = {}
    for name, raw in contents.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if layer and expert:
            kept = KEPT[int(layer[1])]
            if int(expert[1]) in kept:
                result[name.replace(f".experts.{expert[1]}.", f".experts.{kept.index(int(expert[1]))}.")] = raw
        elif layer and re.search(cut, name):
            result[name] = rows(raw, KEPT[int(layer[1])])
        else:
            result[name] = raw
    return result


def contents_of(directory: Path) -> dict[str, bytes]:
    return {
        name: raw for path in sorted(directory.glob("*.safetensors")) for name, (_, _, raw) in read_file(path).items()
    }


# ---- what is cut


@pytest.mark.parametrize("n_shards", [1, 3, 40])
def test_experts_are_renumbered_and_everything_else_stays(tmp_path: Path, n_shards: int) -> None:
    contents = build(tmp_path / "in", qwen(), config(), n_shards)
    report = prune(tmp_path / "in", tmp_path / "out", plan_of(), verify="full")
    assert contents_of(tmp_path / "out") == expected(contents, r"\.mlp\.gate\.weight$")
    assert report.kept == KEPT
    assert report.removed[0] == (0, 3, 5, 6)
    assert report.n_bytes_before == sum(path.stat().st_size for path in (tmp_path / "in").glob("*.safetensors"))
    assert report.n_bytes_after == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert report.files == {path: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    if n_shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(map(len, contents_of(tmp_path / "out").values()))
        for name, file in index["weight_map"].items():
            assert name in read_file(tmp_path / "out" / file)
        assert len(index["weight_map"]) == len(contents_of(tmp_path / "out"))


def test_shapes_and_types(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    prune(tmp_path / "in", tmp_path / "out", plan_of())
    before, after = read_file(tmp_path / "in" / "model.safetensors"), read_file(tmp_path / "out" / "model.safetensors")
    for name, (dtype, shape, _) in after.items():
        assert dtype == "BF16"
        assert shape == ((4, N_EMBD) if name.endswith("mlp.gate.weight") else before[name][1])


def each(name: str, **parts: tuple[str, tuple[int, ...]]) -> Tensors:
    """The tensors of every expert; `name` has a star where the expert's number goes."""
    return {f"{name.replace('*', str(expert))}.{part}": value for expert in range(8) for part, value in parts.items()}


BESIDE = {"model.layers.{}.mlp.shared_experts.down_proj.weight": ("BF16", (N_EXPERTS, 3))}
FORMS: dict[str, tuple[Tensors, str]] = {  # tensors of one layer, and which of them are sliced
    "deepseek, FP8 in blocks": (
        each(
            "model.layers.{}.mlp.experts.*.up_proj",
            weight=("F8_E4M3", (N_FF, N_EMBD)),
            weight_scale_inv=("F32", (1, 1)),
        )
        | {
            "model.layers.{}.mlp.gate.weight": ("BF16", (8, N_EMBD)),
            "model.layers.{}.mlp.gate.e_score_correction_bias": ("F32", (8,)),
        }
        | BESIDE,
        r"mlp\.gate\.",
    ),
    "gpt-oss, MXFP4": (
        {
            "model.layers.{}.mlp.router.weight": ("BF16", (8, N_EMBD)),
            "model.layers.{}.mlp.router.bias": ("BF16", (8,)),
            "model.layers.{}.mlp.experts.gate_up_proj_blocks": ("U8", (8, 6, 2, 16)),
            "model.layers.{}.mlp.experts.gate_up_proj_scales": ("U8", (8, 6, 2)),
            "model.layers.{}.mlp.experts.gate_up_proj_bias": ("BF16", (8, 6)),
            "model.layers.{}.mlp.experts.down_proj_blocks": ("U8", (8, 8, 1, 16)),  # as many outputs as experts
            "model.layers.{}.mlp.experts.down_proj_scales": ("U8", (8, 8, 1)),
            "model.layers.{}.mlp.experts.down_proj_bias": ("BF16", (8, 8)),
        },
        r"mlp\.(router|experts)\.",
    ),
    "fused, transposed, FP8 with a scale for each expert and one for all": (
        {
            "model.layers.{}.feed_forward.router.weight": ("BF16", (8, N_EMBD)),
            "model.layers.{}.feed_forward.experts.gate_up_proj": ("F8_E4M3", (8, N_EMBD, 6)),
            "model.layers.{}.feed_forward.experts.gate_up_proj_scale": ("F32", (8, 1, 6)),
            "model.layers.{}.feed_forward.experts.gate_up_proj_input_scale": ("F32", ()),
            "model.layers.{}.feed_forward.experts.down_proj": ("F8_E4M3", (8, 3, N_EMBD)),
            "model.layers.{}.feed_forward.shared_expert.down_proj.weight": ("BF16", (8, 3)),
        },
        r"router|experts\.(gate_up_proj|gate_up_proj_scale|down_proj)$",
    ),
    "nemotron, NVFP4 with latent experts": (
        each(
            "backbone.layers.{}.mixer.experts.*.up_proj",
            weight=("U8", (4, 8)),
            weight_scale=("F8_E4M3", (4, 1)),
            weight_scale_2=("F32", ()),
            input_scale=("F32", ()),
        )
        | {
            "backbone.layers.{}.mixer.gate.weight": ("BF16", (8, N_EMBD)),
            "backbone.layers.{}.mixer.gate.e_score_correction_bias": ("BF16", (8,)),
            "backbone.layers.{}.mixer.fc1_latent_proj.weight": ("BF16", (8, N_EMBD)),
            "backbone.layers.{}.mixer.fc2_latent_proj.weight": ("BF16", (N_EMBD, 8)),
            "backbone.layers.{}.mixer.shared_experts.up_proj.weight": ("BF16", (8, N_EMBD)),
        },
        r"mixer\.gate\.",
    ),
    "granite, stacked": (
        {
            "model.layers.{}.block_sparse_moe.input_linear.weight": ("BF16", (8, 8, N_EMBD)),
            "model.layers.{}.block_sparse_moe.output_linear.weight": ("BF16", (8, N_EMBD, 4)),
            "model.layers.{}.block_sparse_moe.router.layer.weight": ("BF16", (8, N_EMBD)),
            "model.layers.{}.shared_mlp.input_linear.weight": ("BF16", (8, N_EMBD)),
        },
        r"block_sparse_moe",
    ),
    "step, stacked": (
        {
            "model.layers.{}.moe.gate.weight": ("F32", (8, N_EMBD)),
            "model.layers.{}.moe.router_bias": ("F32", (8,)),
            "model.layers.{}.moe.gate_proj.weight": ("BF16", (8, 4, N_EMBD)),
            "model.layers.{}.moe.up_proj.weight": ("BF16", (8, 4, N_EMBD)),
            "model.layers.{}.moe.down_proj.weight": ("BF16", (8, N_EMBD, 4)),
            "model.layers.{}.share_expert.gate_proj.weight": ("BF16", (8, N_EMBD)),
        },
        r"\.moe\.",
    ),
    "minimax, FP8": (
        each(
            "model.layers.{}.block_sparse_moe.experts.*.w1",
            weight=("F8_E4M3", (4, N_EMBD)),
            weight_scale_inv=("F32", (1, 1)),
        )
        | {
            "model.layers.{}.block_sparse_moe.gate.weight": ("F32", (8, N_EMBD)),
            "model.layers.{}.block_sparse_moe.e_score_correction_bias": ("F32", (8,)),
        },
        r"block_sparse_moe\.(gate\.|e_score)",
    ),
    "ernie, a bias with a row of its own": (
        each("model.layers.{}.mlp.experts.*.up_proj", weight=("BF16", (4, N_EMBD)))
        | {
            "model.layers.{}.mlp.gate.weight": ("F32", (8, N_EMBD)),
            "model.layers.{}.mlp.moe_statics.e_score_correction_bias": ("F32", (1, 8)),
        },
        r"mlp\.(gate|moe_statics)\.",
    ),
    "dbrx, all rows in one matrix": (
        {
            "transformer.layers.{}.ffn.router.layer.weight": ("BF16", (8, N_EMBD)),
            "transformer.layers.{}.ffn.experts.mlp.w1": ("BF16", (8 * 4, N_EMBD)),
            "transformer.layers.{}.ffn.experts.mlp.v1": ("BF16", (8 * 4, N_EMBD)),
            "transformer.layers.{}.ffn.experts.mlp.w2": ("BF16", (8 * 4, N_EMBD)),
        },
        r"\.ffn\.",
    ),
    "gemma, the router beside the block": (
        {
            "model.language_model.layers.{}.router.proj.weight": ("BF16", (8, N_EMBD)),
            "model.language_model.layers.{}.router.scale": (
                "BF16",
                (8,),
            ),  # as wide as the model, which is as wide as there are experts
            "model.language_model.layers.{}.router.per_expert_scale": ("BF16", (8,)),
            "model.language_model.layers.{}.experts.gate_up_proj": ("BF16", (8, 8, N_EMBD)),
            "model.language_model.layers.{}.experts.down_proj": ("BF16", (8, N_EMBD, 4)),
            "model.language_model.layers.{}.self_attn.q_norm.weight": ("BF16", (8,)),
        },
        r"router\.(proj|per_expert_scale)|\.experts\.",
    ),
    "MLX, 4 bit: weights, scales and biases, the router's too": (
        {
            f"model.layers.{{}}.mlp.{name}.{part}": (dtype, shape)
            for name, rows in (("switch_mlp.gate_proj", (8, 4)), ("switch_mlp.down_proj", (8, N_EMBD)), ("gate", (8,)))
            for part, dtype, shape in (
                ("weight", "U32", (*rows, 8)),  # as many as there are experts
                ("scales", "BF16", (*rows, 1)),
                ("biases", "BF16", (*rows, 1)),
            )
        }
        | {
            "model.layers.{}.mlp.gate.e_score_correction_bias": ("F32", (8,)),
            "model.layers.{}.mlp.shared_experts.gate_proj.scales": ("BF16", (8, 1)),
        },
        r"mlp\.(switch_mlp|gate)\.",
    ),
    "MLX of gpt-oss": (
        {
            "model.layers.{}.mlp.experts.gate_proj.weight": ("U32", (8, 4, 2)),
            "model.layers.{}.mlp.experts.gate_proj.scales": ("BF16", (8, 4, 1)),
            "model.layers.{}.mlp.experts.gate_proj.biases": ("BF16", (8, 4, 1)),
            "model.layers.{}.mlp.experts.gate_proj.bias": ("BF16", (8, 4)),
            "model.layers.{}.mlp.router.weight": ("U32", (8, 4)),
            "model.layers.{}.mlp.router.scales": ("BF16", (8, 1)),
            "model.layers.{}.mlp.router.biases": ("BF16", (8, 1)),
            "model.layers.{}.mlp.router.bias": ("BF16", (8,)),
        },
        r"mlp\.(experts|router)\.",
    ),
    "bitsandbytes, 8 bit": (
        each(
            "model.layers.{}.mlp.experts.*.up_proj",
            weight=("I8", (4, N_EMBD)),
            SCB=("F32", (4,)),
            weight_format=("U8", ()),
        )
        | {
            "model.layers.{}.mlp.gate.weight": ("I8", (8, N_EMBD)),
            "model.layers.{}.mlp.gate.SCB": ("F32", (8,)),
            "model.layers.{}.mlp.gate.weight_format": ("U8", ()),
        },
        r"mlp\.gate\.(weight|SCB)$",
    ),
    "bitsandbytes, 4 bit, but for the router": (
        each(
            "model.layers.{}.mlp.experts.*.up_proj",
            **{
                "weight": ("U8", (32, 1)),
                "weight.absmax": ("U8", (1,)),
                "weight.quant_map": ("F32", (16,)),
                "weight.nested_absmax": ("F32", (1,)),
                "weight.quant_state.bitsandbytes__nf4": ("U8", (8,)),
            },
        )
        | {"model.layers.{}.mlp.gate.weight": ("BF16", (8, N_EMBD))},
        r"mlp\.gate\.weight$",
    ),
    "hunyuan, GPTQ": (
        each(
            "model.layers.{}.mlp.experts.*.up_proj",
            qweight=("I32", (2, 8)),
            qzeros=("I32", (1, 1)),
            scales=("F16", (1, 8)),
            g_idx=("I32", (16,)),
        )
        | {
            "model.layers.{}.mlp.gate.wg.weight": ("F32", (8, N_EMBD)),
            "model.layers.{}.mlp.shared_mlp.up_proj.qweight": ("I32", (8, 8)),
        },
        r"gate\.wg",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_experts(tmp_path: Path, form: str) -> None:
    layer, cut = FORMS[form]
    tensors = {name.format(number): value for number in (0, 1) for name, value in layer.items()}
    contents = build(tmp_path / "in", {"lm_head.weight": ("BF16", (8, N_EMBD)), **tensors}, config(), n_shards=2)
    prune(tmp_path / "in", tmp_path / "out", plan_of(), verify="full")
    assert contents_of(tmp_path / "out") == expected(contents, cut)


def test_other_towers_keep_their_experts(tmp_path: Path) -> None:
    talker = {f"talker.model.{name.removeprefix('model.')}": value for name, value in qwen(n_experts=4).items()}
    thinker = {f"thinker.{name}": value for name, value in qwen().items()}
    document = {"thinker_config": {"text_config": config()}, "talker_config": {"text_config": config(num_experts=4)}}
    contents = build(tmp_path / "in", {**thinker, **talker}, document)
    prune(tmp_path / "in", tmp_path / "out", plan_of(), verify="full")
    after = contents_of(tmp_path / "out")
    assert {name: raw for name, raw in after.items() if "talker" in name} == {
        name: raw for name, raw in contents.items() if "talker" in name
    }
    patched = json.loads((tmp_path / "out" / "config.json").read_text())
    assert patched["thinker_config"]["text_config"]["num_experts"] == 4
    assert patched["talker_config"] == document["talker_config"]


# ---- config.json and what lies beside


def test_config_changes_in_the_count_alone(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    odd = json.dumps(
        config(num_local_experts=8, text_config={"num_experts": 8, "x": [8, 8]}, vision_config={"num_experts": 8})
    )
    odd = odd.replace(
        '"vocab_size": 32',
        '"time_step_limit": [0.0, Infinity],\t"vocab_size" :  32 , "eps": 1.0E-05, "name": "caf\\u00e9 é"',
    )
    (tmp_path / "in" / "config.json").write_text(odd)
    prune(tmp_path / "in", tmp_path / "out", plan_of())
    wanted = odd.replace('"num_experts": 8', '"num_experts": 4').replace(
        '"num_local_experts": 8', '"num_local_experts": 4'
    )
    wanted = wanted.replace('"vision_config": {"num_experts": 4}', '"vision_config": {"num_experts": 8}')
    assert (tmp_path / "out" / "config.json").read_text() == wanted


def test_experts_named_in_the_quantisation_are_renumbered(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    block = "model.layers.0.mlp"
    lists = {
        "ignore": [
            "lm_head",
            f"{block}.gate",
            f"{block}.experts.0.up_proj",
            f"{block}.experts.7.up_proj",
            "re:.*experts.*",
        ]
    }
    document = config(
        quantization_config={
            "quant_method": "compressed-tensors",
            **lists,
            "groups": {"a": {"targets": [f"{block}.experts.2"]}},
        }
    )
    (tmp_path / "in" / "config.json").write_text(json.dumps(document))
    prune(tmp_path / "in", tmp_path / "out", plan_of())
    patched = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert patched["ignore"] == ["lm_head", f"{block}.gate", f"{block}.experts.3.up_proj", "re:.*experts.*"]
    assert patched["groups"]["a"]["targets"] == [f"{block}.experts.1"]


def test_experts_that_are_keys_are_renumbered_in_both_files(tmp_path: Path) -> None:
    """ModelOpt, with a mixture of types."""
    build(tmp_path / "in", qwen(), config())
    name = "model.layers.1.mlp.experts.{}.up_proj".format
    layers = {
        name(0): {"quant_algo": "FP8"},
        name(1): {"quant_algo": "NVFP4"},
        name(5): {"quant_algo": "NVFP4"},
        "lm_head": {},
    }
    quantisation = {
        "producer": {"name": "modelopt"},
        "quantization": {"quantized_layers": layers, "exclude_modules": [name(6), name(7)]},
    }
    (tmp_path / "in" / "hf_quant_config.json").write_text(json.dumps(quantisation, indent=4))
    (tmp_path / "in" / "config.json").write_text(json.dumps(config(quantization_config={"quantized_layers": layers})))
    prune(tmp_path / "in", tmp_path / "out", plan_of())
    expected = {name(0): {"quant_algo": "FP8"}, name(2): {"quant_algo": "NVFP4"}, "lm_head": {}}
    found = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert found == {**quantisation, "quantization": {"quantized_layers": expected, "exclude_modules": [name(3)]}}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "quantized_layers": expected
    }


def test_a_profile_in_place_of_a_plan(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    profile = make_profile(3, layers=(0, 1))
    profile.save(tmp_path / "p.json")
    report = prune(tmp_path / "in", tmp_path / "out", profile=tmp_path / "p.json", keep=0.5, metric="frequency")
    assert report.kept == reap.plan(profile, keep=0.5, metric="frequency").layers
    assert report.metric == "frequency"
    for options in ({}, {"profile": profile}, {"keep": 4}, {"plan": plan_of(), "profile": profile, "keep": 4}):
        with pytest.raises(UsageError, match="give either a plan, or a profile and keep"):
            prune(tmp_path / "in", tmp_path / "no", **options)


def test_values_inside_a_text() -> None:
    text = '{"a": [1, {"b,": "}\\"]"}, []], "c" : {"d":-1.5e3}}'
    assert replace_values(text, {("a", 0): 22, ("c", "d"): [7]}) == '{"a": [22, {"b,": "}\\"]"}, []], "c" : {"d":[7]}}'
    with pytest.raises(KeyError):
        replace_values(text, {("a", 9): 1})


def test_what_lies_beside_is_carried_over(tmp_path: Path) -> None:
    source = tmp_path / "in"
    build(source, qwen(), config())
    beside = {
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": "{}",
        "modeling_own.py": "raise SystemExit('never run')",
        "additional_chat_templates/tool.jinja": "x",
        "LICENSE": "",
    }
    for name, text in beside.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source / "README.md").write_text("README of the model")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("")
    prune(source, tmp_path / "out", plan_of())
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {*beside, "README.md", "tokenizer.json", "config.json", "model.safetensors", "reap.json"}
    assert all((tmp_path / "out" / name).read_text() == text for name, text in beside.items())


def test_provenance(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    plan = PrunePlan({"n_experts": 8}, "reap", 4, KEPT, {"sha256": ["ab" * 32]})
    prune(tmp_path / "in", tmp_path / "out", plan)
    record = json.loads((tmp_path / "out" / "reap.json").read_text())
    assert (record["format"], record["version"], record["metric"]) == ("reap.provenance", 1, "reap")
    assert record["kept"] == {str(layer): list(ids) for layer, ids in KEPT.items()}
    assert record["source"]["n_experts"] == 8
    assert record["source"]["fingerprint"].startswith("hf-sha256:")
    assert record["calibration"] == {"sha256": ["ab" * 32]}
    for text, message in (
        ("{}", 'lacks "format"'),
        (json.dumps({**record, "kept": {"0": [3, 1, 2, 4], "1": [0, 1, 2, 3]}}), "in order"),
    ):
        (tmp_path / "out" / "reap.json").write_text(text)
        with pytest.raises(FormatError, match=message):
            prune(tmp_path / "out", tmp_path / "again", plan_of({0: (0, 1), 1: (0, 1)}, 4))


def test_a_plan_fits_every_quantisation_and_no_other_model(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    prune(tmp_path / "in", tmp_path / "out", plan_of())
    fingerprint = json.loads((tmp_path / "out" / "reap.json").read_text())["source"]["fingerprint"]
    build(tmp_path / "fp8", qwen(dtype="F8_E4M3"), config(torch_dtype="float8"))
    prune(tmp_path / "fp8", tmp_path / "fp8-out", plan_of(fingerprint=fingerprint))
    build(tmp_path / "wide", qwen(), config(hidden_size=2 * N_EMBD))
    with pytest.raises(MismatchError, match="fingerprint"):
        prune(tmp_path / "wide", tmp_path / "no", plan_of(fingerprint=fingerprint))


def test_a_plan_of_a_gguf_file_is_compared_by_what_it_says(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    gguf = {"fingerprint": "sha256:00", "n_experts_used": 2, "n_embd": N_EMBD}
    report = prune(tmp_path / "in", tmp_path / "out", plan_of(**gguf))
    assert any("made of a GGUF file" in warning for warning in report.warnings)
    for wrong in ({"n_experts_used": 3}, {"n_embd": 32}, {"n_groups": 2, "n_groups_used": 1}):
        with pytest.raises(MismatchError, match="the plan is of a model"):
            prune(tmp_path / "in", tmp_path / "no", plan_of(**{**gguf, **wrong}))


# ---- what is refused


def test_plans_that_do_not_fit(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    build(tmp_path / "grouped", qwen(), config(n_group=4, topk_group=2))
    for name, plan, message in (
        ("in", plan_of({0: KEPT[0]}), r"nothing about MoE layers \[1\]"),
        ("in", plan_of({**KEPT, 2: KEPT[0]}), r"names layers \[2\]"),
        ("in", plan_of(n_experts=16), "16 experts"),
        ("in", plan_of({0: (1,), 1: (2,)}), "fewer than the 2 experts"),
        ("in", plan_of({0: (1, 2, 4, 8), 1: KEPT[1]}), "not ascending ids from 0 to 7"),
        ("in", plan_of({0: (1, 2, 4), 1: KEPT[1]}), "keeps 4 experts in layer 1, but 3 elsewhere"),
        ("grouped", plan_of({0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}), "needs at least 2 in each"),
    ):
        with pytest.raises(UsageError, match=message):
            prune(tmp_path / name, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[Tensors, dict[str, Any], type[Exception], str]] = {
    "dense": (
        {"model.layers.0.mlp.gate_proj.weight": ("BF16", (4, 4))},
        {},
        UnsupportedModelError,
        "is it a dense model",
    ),
    "no number of experts in the configuration": (
        qwen(),
        {"num_experts": None},
        UnsupportedModelError,
        "under no name that reap knows",
    ),
    "another number of experts in the configuration": (
        qwen(),
        {"num_experts": 16},
        FormatError,
        "num_experts is not 8",
    ),
    "a router with more rows than experts": (
        qwen() | {"model.layers.0.mlp.gate.weight": ("BF16", (9, N_EMBD))},
        {},
        FormatError,
        "has 9 rows, but there are 8 experts",
    ),
    "an expert that is missing": (
        {name: value for name, value in qwen().items() if ".1.mlp.experts.3." not in name},
        {},
        FormatError,
        "has 7 experts, but no number 3",
    ),
    "an expert that lacks a matrix": (
        {name: value for name, value in qwen().items() if ".1.mlp.experts.3.down" not in name},
        {},
        FormatError,
        "model.layers.1.mlp.experts.3 has no down_proj, which other experts beside it have",
    ),
    "layers with different numbers": (
        qwen((0,)) | qwen((1,), n_experts=4),
        {},
        UnsupportedModelError,
        "has 4 experts and model.layers.0.mlp has 8",
    ),
    "experts without a router": (
        {name: value for name, value in qwen().items() if "mlp.gate." not in name},
        {},
        UnsupportedModelError,
        "no router that reap knows",
    ),
    "an unknown tensor with as many rows": (
        qwen() | {"model.layers.0.mlp.balance": ("F32", (8,))},
        {},
        UnsupportedModelError,
        "mlp.balance .8. may belong to the experts, but reap does not know this tensor",
    ),
    "a packed router": (
        qwen() | {"model.layers.0.mlp.gate.weight_scale_inv": ("F32", (1, 2))},
        {},
        UnsupportedModelError,
        "weight_scale_inv .1, 2. may belong to the experts, but not in a way",
    ),
    "a router packed by bitsandbytes": (
        {name: value for name, value in qwen().items() if "0.mlp.gate" not in name}
        | {
            "model.layers.0.mlp.gate.weight": ("U8", (64, 1)),
            "model.layers.0.mlp.gate.weight.absmax": ("U8", (2,)),
            "model.layers.0.mlp.gate.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
        },
        {},
        UnsupportedModelError,
        r"the router of model.layers.0.mlp is packed by bitsandbytes \(gate.weight.absmax\).*quantised from",
    ),
    "experts that do nothing": (
        {
            name: (dtype, (12, N_EMBD) if "mlp.gate.weight" in name else shape)
            for name, (dtype, shape) in qwen().items()
        },
        {"zero_expert_num": 4},
        UnsupportedModelError,
        r"has 12 rows for 8 experts and 4 that do nothing \(zero_expert_num\)",
    ),
    "MLX experts with another first axis": (
        {
            "model.layers.0.mlp.gate.weight": ("BF16", (8, N_EMBD)),
            "model.layers.0.mlp.switch_mlp.up_proj.weight": ("U32", (8, 4, 2)),
            "model.layers.0.mlp.switch_mlp.up_proj.scales": ("BF16", (4, 8)),
        },
        {},
        UnsupportedModelError,
        "switch_mlp.up_proj.scales .4, 8. may belong to the experts",
    ),
    "a table of experts by token": (
        qwen() | {"model.layers.0.mlp.gate.tid2eid": ("I64", (32, 2))},
        {},
        UnsupportedModelError,
        "tid2eid",
    ),
    "chunk experts": (
        qwen() | {f"model.layers.0.mlp.chunk_experts.{i}.up_proj.weight": ("BF16", (4, 4)) for i in range(4)},
        {},
        UnsupportedModelError,
        "chunk_experts",
    ),
    "fused experts with another first axis": (
        {
            "model.layers.0.mlp.gate.weight": ("BF16", (8, N_EMBD)),
            "model.layers.0.mlp.experts.gate_up_proj": ("BF16", (N_EMBD, 8, 4)),
        },
        {},
        UnsupportedModelError,
        "its first axis is not that of the 8 experts",
    ),
    "two blocks in one layer": (
        qwen() | qwen(block="decoder.layers.{}.mlp"),
        {},
        UnsupportedModelError,
        "both are MoE blocks of layer 0",
    ),
    "more experts a token than there are": (qwen(), {"num_experts_per_tok": 9}, FormatError, "uses 9 of 8 experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_refused(tmp_path: Path, case: str) -> None:
    tensors, changes, kind, message = REFUSED[case]
    build(tmp_path / "in", tensors, config(**changes))
    with pytest.raises(kind, match=message):
        prune(tmp_path / "in", tmp_path / "out", plan_of())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_paths_that_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    build(source, qwen(), config())
    (tmp_path / "file").write_text("precious")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("precious")
    (tmp_path / "link").symlink_to(source)
    for output, options, message in (
        (source, {"force": True}, "is the input"),
        (tmp_path / "link", {"force": True}, "is the input"),
        (source / "out", {}, "lies in it"),
        (tmp_path, {"force": True}, "holds it"),
        (tmp_path / "file", {"force": True}, "is not a directory"),
        (tmp_path / "home", {}, "exists already"),
        (tmp_path / "home", {"force": True}, r"has no config\.json, so it"),
        (tmp_path / "no" / "where", {}, "there is no directory"),
        (tmp_path / "out", {"verify": "twice"}, "unknown verify"),
    ):
        with pytest.raises(UsageError, match=message):
            prune(source, output, plan_of(), **options)
    for wrong, message in ((tmp_path / "absent", "no such file"), (tmp_path / "home", r"has no config\.json")):
        with pytest.raises(UsageError, match=message):
            prune(wrong, tmp_path / "out", plan_of())
    assert (tmp_path / "home" / "letters.txt").read_text() == "precious"
    assert not list(tmp_path.glob(".*"))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config()))
    # a pickle that would leave a mark if anyone loaded it
    (source / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + os.fsencode(tmp_path / "ran") + b"'\ntR.")
    with pytest.raises(
        UsageError, match=r"holds a pickle \(pytorch_model\.bin\), which reap never loads.*save_pretrained"
    ):
        prune(source, tmp_path / "out", plan_of())
    assert not (tmp_path / "ran").exists()


# ---- outputs that appear whole or not at all


def test_force_replaces_a_checkpoint_whole(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    build(tmp_path / "out", qwen(), config(), n_shards=3)
    with pytest.raises(UsageError, match="exists already"):
        prune(tmp_path / "in", tmp_path / "out", plan_of())
    prune(tmp_path / "in", tmp_path / "out", plan_of(), force=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "reap.json",
        "tokenizer.json",
    ]
    (tmp_path / "empty").mkdir()
    prune(tmp_path / "in", tmp_path / "empty", plan_of())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "in", "out"]


def test_dry_run_says_what_would_be_written(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config(), n_shards=3)
    dry = prune(tmp_path / "in", tmp_path / "out", plan_of(), dry_run=True)
    assert not (tmp_path / "out").exists()
    wet = prune(tmp_path / "in", tmp_path / "out", plan_of())
    assert dry.files == wet.files == {path: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert (dry.n_bytes_after, dry.dry_run, wet.dry_run) == (wet.n_bytes_after, True, False)


@pytest.mark.parametrize("problem", ["interrupt", "full", "damage"])
def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    build(tmp_path / "in", qwen(), config(), n_shards=3)
    real = disk_pruner.write
    names: list[str] = []

    def spoil(path: Path, *arguments: Any, **options: Any) -> None:
        names.append(path.name)
        if path.suffix == ".safetensors" and len(names) > 3 and problem == "interrupt":
            raise KeyboardInterrupt
        if path.suffix == ".safetensors" and len(names) > 3 and problem == "full":
            raise OutputError(f"{path}: cannot be written: the disk is full; nothing was left behind")
        real(path, *arguments, **options)
        if path.name == "model-00002-of-00003.safetensors":
            with open(path, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last[0] ^ 1]))

    monkeypatch.setattr(disk_pruner, "write", spoil)
    kind = KeyboardInterrupt if problem == "interrupt" else OutputError
    with pytest.raises(
        kind, match={"damage": "differs from the source", "full": "the disk is full", "interrupt": None}[problem]
    ):
        prune(tmp_path / "in", tmp_path / "out", plan_of())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_writer_that_was_killed_is_cleaned_up_after(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    plan_of().save(tmp_path / "plan.json")
    code = (
        "import sys, time\nfrom reap.hf.disk import prune as disk_pruner\n"
        "disk_pruner._verify = lambda *a, **k: (print('written', flush=True), time.sleep(60))\n"
        "disk_pruner.prune(*sys.argv[1:4])"
    )
    arguments = [str(tmp_path / name) for name in ("in", "out", "plan.json")]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        (alive,) = tmp_path.glob(".out.*")
        prune(tmp_path / "in", tmp_path / "out", plan_of())  # beside a living one, which is left alone
        assert alive.is_dir()
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert alive.is_dir()
    prune(tmp_path / "in", tmp_path / "out", plan_of(), force=True)
    assert not alive.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "plan.json"]


# ---- hostile files


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def entry(begin: Any = 0, end: Any = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


ATTACKS: dict[str, tuple[bytes, bytes, str]] = {  # header, data, message
    "not JSON": (b"{" * 8, b"", "is not JSON"),
    "no object": (b"[1, 2]  ", b"", "does not begin with"),
    "nested deeply": (b'{"a":' + b"[" * 100_000, b"", "is not JSON|nested too deeply"),
    "a name twice": (b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4), "appears twice"),
    "not a number": (
        b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}',
        bytes(4),
        "NaN is not a JSON number",
    ),
    "infinity": (
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}',
        bytes(4),
        "Infinity is not a JSON number",
    ),
    "overlap": (header(a=entry(0, 4), b=entry(2, 6)), bytes(6), "overlaps the one before it"),
    "the same bytes twice": (header(a=entry(0, 4), b=entry(0, 4)), bytes(4), "overlaps the one before it"),
    "a hole": (header(a=entry(0, 4), b=entry(8, 12)), bytes(12), "leaves a hole"),
    "beyond the end": (header(a=entry(0, 400, (100,))), bytes(4), "end at byte"),
    "bytes without a name": (header(a=entry()), bytes(5), "end at byte"),
    "end before begin": (header(a=entry(4, 0)), bytes(4), "should be a begin and an end"),
    "negative": (header(a=entry(-4, 0)), bytes(4), "from 0 to"),
    "a fraction": (header(a=entry(0, 4.0)), bytes(4), "should be an integer"),
    "true": (header(a=entry(False, 4)), bytes(4), "should be an integer"),
    "a product that overflows": (header(a=entry(0, 4, (2**61, 2**61))), bytes(4), "takes 4 bytes where"),
    "a dimension of 150 digits": (header(a=entry(0, 4, (10**150,))), bytes(4), "from 0 to"),
    "many dimensions": (header(a=entry(0, 4, (1,) * 65)), bytes(4), "has 65 entries"),
    "unknown type": (header(a=entry(dtype="Q4_K")), bytes(4), "not a type of safetensors"),
    "no type": (b'{"a": {"shape": [1], "data_offsets": [0, 4]}}', bytes(4), 'lacks "dtype"'),
    "shape is a number": (header(a=entry(shape=1)), bytes(4), "should be a list"),
    "an entry is a list": (b'{"a": []}', b"", "should be an object"),
    "metadata of numbers": (b'{"__metadata__": {"format": 1}}', b"", "should be a string"),
    "not UTF-8": (b'{"\xff": 1}', b"", "is not UTF-8"),
    "half a character": (
        b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        bytes(4),
        "not valid Unicode",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_headers(tmp_path: Path, attack: str) -> None:
    raw, data, message = ATTACKS[attack]
    build(tmp_path / "in", qwen(), config())
    path = tmp_path / "in" / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    refuse(tmp_path, message)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "too few"),
        (b"\1\0\0", "too few"),
        (b"\xff" * 8 + b"{}", "cut short"),
        ((2**40).to_bytes(8, "little") + b"{}", "cut short"),
    ],
)
def test_hostile_lengths(tmp_path: Path, raw: bytes, message: str) -> None:
    build(tmp_path / "in", qwen(), config())
    (tmp_path / "in" / "model.safetensors").write_bytes(raw)
    refuse(tmp_path, message)


def test_a_huge_header_costs_little(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    with open(tmp_path / "in" / "model.safetensors", "wb") as file:
        file.write((101_000_000).to_bytes(8, "little") + b"{")
        file.truncate(8 + 101_000_000)
    refuse(tmp_path, "18,874,368 are the most")


def test_damaged_files_end_in_an_error_of_ours_or_in_a_sound_checkpoint(tmp_path: Path) -> None:
    """A thousand files with a few bytes changed, cut short or repeated."""
    build(tmp_path / "in", qwen(), config(), n_shards=2)
    files = sorted(path for path in (tmp_path / "in").iterdir() if path.name != "tokenizer.json")
    sound = {path: path.read_bytes() for path in files}
    rng = random.Random(1)
    messages: list[str] = []
    for _ in range(1000):
        path = rng.choice(files)
        path.write_bytes(damage(sound[path], rng))
        try:
            prune(tmp_path / "in", tmp_path / "out", plan_of(), dry_run=True)
        except ReapError as error:
            messages.append(str(error))
        path.write_bytes(sound[path])
    assert 300 < len(messages) < 1000  # some changes are in the tensors
    assert not [message for message in messages if "\n" in message or len(message) > 1000]


def damage(raw: bytes, rng: random.Random) -> bytes:
    spot = rng.randrange(min(len(raw), 20_000))
    kind = rng.randrange(4)
    if kind == 0:
        return raw[:spot]
    if kind == 1:
        return raw[:spot] + raw[max(0, spot - rng.randrange(1, 60)) :]
    if kind == 2:
        return raw[:spot] + rng.choice([b"9", b"-", b"0", b'"', b"]", b"}", b"e", b"\xff", b"NaN"]) + raw[spot + 1 :]
    return raw[:spot] + bytes([raw[spot] ^ (1 << rng.randrange(8))]) + raw[spot + 1 :]


INDEXES: dict[str, tuple[Any, str]] = {
    "no map": ({}, 'lacks "weight_map"'),
    "map is a list": ({"weight_map": []}, "should be an object"),
    "up": ({"weight_map": {"a": "../in/model-00001-of-00002.safetensors"}}, "beside the index"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "beside the index"),
    "another kind of file": ({"weight_map": {"a": "config.json"}}, "beside the index"),
    "hidden": ({"weight_map": {"a": "..safetensors"}}, "beside the index"),
    "a number": ({"weight_map": {"a": 1}}, "should be a string"),
    "nothing": ({"weight_map": {}}, "names no file"),
    "absent": ({"weight_map": {"a": "absent.safetensors"}}, "which is not there"),
    "a tensor that is not there": ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "in none of the files"),
}


@pytest.mark.parametrize("attack", INDEXES)
def test_hostile_indexes(tmp_path: Path, attack: str) -> None:
    document, message = INDEXES[attack]
    build(tmp_path / "in", qwen(), config(), n_shards=2)
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(document))
    refuse(tmp_path, message)


def test_an_index_that_forgets_a_tensor_or_names_the_wrong_file(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config(), n_shards=2)
    path = tmp_path / "in" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, file = index["weight_map"].popitem()
    path.write_text(json.dumps(index))
    refuse(tmp_path, "does not name")
    (other,) = {*index["weight_map"].values()} - {file}
    index["weight_map"][name] = other
    path.write_text(json.dumps(index))
    refuse(tmp_path, "but it is in")
    write_file(tmp_path / "in" / other, {name: ("F32", (1,))})
    refuse(tmp_path, "is in .* and in ")


@pytest.mark.parametrize(
    ("text", "message"), [("", "is not JSON"), ("[]", "should be an object"), ('{"a": 1, "a": 2}', "appears twice")]
)
def test_hostile_configurations(tmp_path: Path, text: str, message: str) -> None:
    build(tmp_path / "in", qwen(), config())
    (tmp_path / "in" / "config.json").write_text(text)
    refuse(tmp_path, message)


def refuse(tmp_path: Path, message: str) -> None:
    started = time.process_time()  # of this process: other work on the machine does not count
    with pytest.raises(FormatError, match=message) as raised:
        prune(tmp_path / "in", tmp_path / "out", plan_of())
    assert time.process_time() - started < 2
    assert str(raised.value).startswith(str(tmp_path / "in"))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert not (tmp_path / "out").exists()


# ---- the command line


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "in", qwen(), config(), n_shards=2)
    plan_of().save(tmp_path / "plan.json")
    call = ["hf", "prune", str(tmp_path / "in"), "--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]
    assert main([*call, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dry_run"] is True
    assert main(call) == 0
    said = capsys.readouterr().out
    assert f"{sum(document['files'].values()):,} bytes in {len(document['files'])} files" in said
    assert main(call) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*call, "--force", "--keep", "4"]) == 2
    assert main([*call, "--force", "--drop-mtp", "--verify", "full"]) == 0


def test_help_ends_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hf", "prune", "--help"]) == 0
    assert "Example: reap hf prune" in " ".join(capsys.readouterr().out.split())


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    plan_of().save(tmp_path / "plan.json")
    code = (
        "import sys; from reap.cli import main; status = main(sys.argv[1:]); print(status, sorted({'torch',"
        " 'transformers', 'safetensors', 'reap._core'} & set(sys.modules)), file=sys.stderr)"
    )
    arguments = [
        "hf",
        "prune",
        str(tmp_path / "in"),
        "--plan",
        str(tmp_path / "plan.json"),
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0 []"
