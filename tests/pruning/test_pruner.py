"""reap.pruning.gguf: what is cut and what is not, byte for byte, with the `gguf` package and numpy as the oracle."""

from __future__ import annotations

import os
import re
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gguf
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from helpers.gguf_builder import build_moe, random_tensor
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import FormatError, MismatchError, OutputError, UnsupportedModelError, UsageError
from reap.gguf.model_info import inspect
from reap.pruning import verification
from reap.pruning.gguf import PruneReport, prune, size_after
from reap.scores.plan import PrunePlan

KEPT = {0: (0, 3, 4, 7), 1: (1, 2, 5, 6)}


def plan_for(path: Path, layers: Mapping[int, Sequence[int]], **changes: Any) -> PrunePlan:
    info = inspect(path)
    model = {
        "n_experts": info.n_experts,
        "fingerprint": info.fingerprint,
        "name": info.name,
        **changes.pop("model", {}),
    }
    layers = {layer: tuple(ids) for layer, ids in layers.items()}
    return PrunePlan(
        model, changes.pop("metric", "reap"), changes.pop("keep", len(next(iter(layers.values())))), layers, **changes
    )


def pruned(path: Path, layers: Mapping[int, Sequence[int]] = KEPT, **options: Any) -> Path:
    output = path.with_name(f"{path.stem}-small.gguf")
    prune(path, output, plan_for(path, layers), verify="full", **options)
    return output


def assert_cut(source: Path, output: Path, layers: Mapping[int, Sequence[int]], cut_names: set[str]) -> None:
    """`output` holds the tensors of `source`, those in `cut_names` (after `blk.N.`) only with the rows in `layers`."""
    before, after = GGUFReader(source).tensors, GGUFReader(output).tensors
    assert [tensor.name for tensor in after] == [tensor.name for tensor in before]
    n_cut = 0
    for old, new in zip(before, after, strict=True):
        assert new.tensor_type == old.tensor_type
        expected = old.data
        layer, _, rest = old.name.removeprefix("blk.").partition(".")
        if rest in cut_names and layer.isdigit() and int(layer) in layers:
            expected = np.take(old.data, layers[int(layer)], axis=0)
            n_cut += 1
        assert np.array_equal(new.data.view(np.uint8), expected.view(np.uint8)), old.name
        assert new.data.shape == expected.shape
    assert n_cut == len(cut_names) * len(layers)


def keys_of(path: Path) -> dict[str, tuple[list[int], Any]]:
    fields = GGUFReader(path).fields
    return {
        key: ([int(kind) for kind in field.types], field.contents())
        for key, field in fields.items()
        if not key.startswith("GGUF.")
    }


WEIGHTS = {"ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"}
BIASES = {"ffn_gate_inp.bias", "ffn_gate_exps.bias", "ffn_up_exps.bias", "ffn_down_exps.bias"}
SCALES = {f"ffn_{part}_exps.{scale}" for part in ("gate", "up", "down") for scale in ("scale", "input_scale")}
FUSED = {
    name.replace("ffn_up_exps", "ffn_gate_up_exps") for name in WEIGHTS | BIASES | SCALES if "ffn_gate_exps" not in name
}

VARIANTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, WEIGHTS),
    "every tensor": (
        {"biases": True, "scales": True, "selection_bias": True, "shared_expert": True},
        WEIGHTS | BIASES | SCALES | {"exp_probs_b.bias"},
    ),
    "fused": ({"fused": True, "biases": True, "scales": True}, FUSED),
    "alignment": ({"alignment": 256, "n_embd": 8, "n_ff": 24}, WEIGHTS),
    **{
        name: ({"extra": {f"blk.{layer}.{name}": np.arange(8, dtype=np.float32) for layer in (0, 1)}}, WEIGHTS | {name})
        for name in ("exp_probs_b", "exp_probs_b_vl", "exp_probs_b_vl.bias")
    },
    "look-alikes": (
        {
            "extra": {
                "blk.0.ffn_gate_inp.scale": np.ones(32, dtype=np.float32),
                "blk.0.ffn_norm_exps.weight": np.ones(8, dtype=np.float32),
                "blk.1.ffn_gate_inp_shexp.weight": np.ones(8, dtype=np.float32),
                "blk.1.ffn_latent_down.weight": np.ones((8, 32), dtype=np.float32),
                "blk.1.ssm_a": np.ones((8, 8), dtype=np.float32),
                "rope_freqs.weight": np.ones(8, dtype=np.float32),
            }
        },
        WEIGHTS,
    ),
    **{
        kind: (
            {
                "expert_type": GGMLQuantizationType[kind],
                "router_type": GGMLQuantizationType[kind],
                "n_embd": block,
                "n_ff": block,
            },
            WEIGHTS,
        )
        for kind, block in {
            "F16": 32,
            "BF16": 32,
            "Q8_0": 32,
            "Q4_0": 32,
            "MXFP4": 32,
            "NVFP4": 64,
            "Q4_K": 256,
            "IQ2_XXS": 256,
        }.items()
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_with_an_expert_axis_is_cut_and_no_other(tmp_path: Path, variant: str) -> None:
    changes, names = VARIANTS[variant]
    source = build_moe(tmp_path / "m.gguf", **changes)
    assert_cut(source, pruned(source), KEPT, names)


@pytest.mark.parametrize("n_experts", [8, 16, 32, 64])
def test_an_expert_count_that_equals_another_dimension_fools_nobody(tmp_path: Path, n_experts: int) -> None:
    # 8 is the head size, 16 the rows of attn_k, 32 the embedding and the feed-forward size, 64 the vocabulary
    source = build_moe(tmp_path / "m.gguf", n_experts=n_experts, biases=True)
    kept = {0: tuple(range(0, n_experts, 2)), 1: tuple(range(n_experts // 2))}
    assert_cut(source, pruned(source, kept), kept, WEIGHTS | BIASES)


def test_a_dense_layer_stays_whole_though_its_axes_are_as_long(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", n_layers=3, dense_layers=(0,), n_experts=32)
    kept = {1: range(16), 2: range(16, 32)}
    assert_cut(source, pruned(source, kept), kept, WEIGHTS)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_choice_of_experts(tmp_path: Path, data: Any) -> None:
    source = tmp_path / "m.gguf"
    if not source.exists():
        build_moe(source, expert_type=GGMLQuantizationType.Q8_0, biases=True)
    keep = data.draw(st.integers(2, 8))
    kept = {layer: sorted(data.draw(st.permutations(range(8)))[:keep]) for layer in (0, 1)}
    assert_cut(source, pruned(source, kept, force=True), kept, WEIGHTS | BIASES)


# ---- metadata


def test_only_the_expert_count_changes_and_provenance_is_added(tmp_path: Path) -> None:
    keys = {
        "qwen3moe.expert_weights_scale": (GGUFValueType.FLOAT32, 2.5),
        "test.many": (GGUFValueType.ARRAY, [1, 2, 3]),
        "test.wide": (GGUFValueType.UINT64, 8),
    }
    source = build_moe(tmp_path / "m.gguf", keys=keys, tokenizer="words", n_vocab=300)
    output = pruned(source, keep_label=True)
    before, after = keys_of(source), keys_of(output)
    assert list(after)[: len(before)] == list(before)
    added = {key: after.pop(key) for key in list(after)[len(before) :]}
    assert before.pop("qwen3moe.expert_count") == ([4], 8)
    assert after.pop("qwen3moe.expert_count") == ([4], 4)
    assert after == before
    assert list(added) == [
        f"reap.{name}"
        for name in ("version", "metric", "source.fingerprint", "source.expert_count", "kept.0", "kept.1")
    ]
    assert added["reap.metric"] == ([8], "reap")
    assert added["reap.source.fingerprint"] == ([8], inspect(source).fingerprint)
    assert added["reap.source.expert_count"] == ([4], 8)
    assert added["reap.kept.1"] == ([9, 5], [1, 2, 5, 6])


def test_what_is_not_patched_is_byte_identical(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", tokenizer="words", n_vocab=300)
    count = b"qwen3moe.expert_count" + (4).to_bytes(4, "little") + (8).to_bytes(4, "little")
    content = source.read_bytes()
    start, end = 24, content.index(b"token_embd.weight") - 8
    patched = content[start:end].replace(count, count[:-4] + (4).to_bytes(4, "little"))
    assert patched != content[start:end]
    assert pruned(source, keep_label=True).read_bytes()[start : start + len(patched)] == patched


@pytest.mark.parametrize("kind", [GGUFValueType.UINT8, GGUFValueType.INT32, GGUFValueType.UINT16, GGUFValueType.UINT64])
def test_the_expert_count_keeps_its_integer_type(tmp_path: Path, kind: GGUFValueType) -> None:
    moe = build_moe(tmp_path / "a.gguf", n_layers=1)
    tensors = {
        tensor.name: (tensor.data, tensor.tensor_type) for tensor in GGUFReader(moe).tensors if "ffn_" in tensor.name
    }
    keys = {"qwen3moe.expert_count": (kind, 8), "qwen3moe.expert_used_count": (kind, 2)}
    source = build_moe(tmp_path / "m.gguf", n_layers=1, n_experts=0, keys=keys, typed=tensors)
    assert keys_of(pruned(source, {0: KEPT[0]}))["qwen3moe.expert_count"] == ([int(kind)], 4)


def test_a_count_of_used_experts_per_layer_stays_as_it_is(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", used_per_layer=(2, 4))
    assert keys_of(pruned(source))["qwen3moe.expert_used_count"] == keys_of(source)["qwen3moe.expert_used_count"]


@pytest.mark.parametrize("has_name", [True, False])
def test_the_name_says_how_many_experts_are_left(tmp_path: Path, has_name: bool) -> None:
    source = build_moe(tmp_path / "m.gguf")
    if not has_name:
        source.write_bytes(source.read_bytes().replace(b"general.name", b"general.nome"))
    assert keys_of(pruned(source)).get("general.name") == (([8], "tiny (REAP, 4 of 8 experts)") if has_name else None)
    renamed = keys_of(pruned(source, name="tiny, pruned", force=True))
    assert renamed["general.name"] == ([8], "tiny, pruned")


def test_the_calibration_is_named_where_the_plan_knows_it(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    plan = plan_for(source, KEPT, calibration={"sha256": ["ab", "cd"], "files": ["a", "b"]}, metric="frequency")
    prune(source, tmp_path / "s.gguf", plan)
    provenance = inspect(tmp_path / "s.gguf").provenance
    assert provenance is not None
    assert provenance["reap.calibration.sha256"] == "ab,cd"
    assert provenance["reap.metric"] == "frequency"


# ---- pruning again


def test_pruning_twice_is_pruning_once(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", biases=True, expert_type=GGMLQuantizationType.Q8_0)
    half, quarter, direct = tmp_path / "half.gguf", tmp_path / "quarter.gguf", tmp_path / "direct.gguf"
    prune(source, half, plan_for(source, KEPT))
    prune(half, quarter, plan_for(half, {0: (1, 3), 1: (0, 2)}), name="x")
    prune(source, direct, plan_for(source, {0: (3, 7), 1: (1, 5)}), name="x")
    assert quarter.read_bytes() == direct.read_bytes()
    assert keys_of(quarter)["reap.source.expert_count"] == ([4], 8)
    assert inspect(quarter).provenance == inspect(direct).provenance


def test_keeping_everything_changes_no_tensor(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    kept = {0: range(8), 1: range(8)}
    assert_cut(source, pruned(source, kept), kept, WEIGHTS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reap.kept.1", (GGUFValueType.ARRAY, [0, 1, 2, 3, 4, 5, 6, 16])),
        ("reap.kept.1", (GGUFValueType.ARRAY, [0, 1, 2, 3, 4, 5, 7, 6])),
        ("reap.kept.1", (GGUFValueType.ARRAY, [0, 1])),
        ("reap.kept.1", (GGUFValueType.STRING, "all")),
        ("reap.kept.2", (GGUFValueType.ARRAY, [0, 1, 2, 3, 4, 5, 6, 7])),
        ("reap.source.expert_count", (GGUFValueType.STRING, "16")),
    ],
)
def test_damaged_provenance_is_a_format_error(tmp_path: Path, key: str, value: Any) -> None:
    keys = {
        "reap.source.fingerprint": (GGUFValueType.STRING, "sha256:0"),
        "reap.source.expert_count": (GGUFValueType.UINT32, 16),
        "reap.kept.0": (GGUFValueType.ARRAY, list(range(8))),
    }
    source = build_moe(tmp_path / "m.gguf", keys={**keys, key: value})
    with pytest.raises(FormatError, match=r"reap\."):
        pruned(source)


# ---- the report


def test_the_report_says_what_happened_to_the_byte(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", biases=True)
    output = tmp_path / "s.gguf"
    report = prune(source, output, plan_for(source, KEPT))
    assert isinstance(report, PruneReport)
    assert (report.source, report.output) == (source, output)
    assert (report.n_bytes_before, report.n_bytes_after) == (source.stat().st_size, output.stat().st_size)
    assert (report.n_experts_before, report.n_experts_after) == (8, 4)
    assert report.kept == KEPT
    assert report.removed == {0: (1, 2, 5, 6), 1: (0, 3, 4, 7)}
    assert report.warnings == ()
    assert report.seconds > 0
    assert report.to_dict()["removed"] == {"0": [1, 2, 5, 6], "1": [0, 3, 4, 7]}


@pytest.mark.parametrize(
    "changes", [{}, {"alignment": 512}, {"expert_type": GGMLQuantizationType.Q8_0, "biases": True}]
)
def test_a_dry_run_knows_the_size_and_writes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = build_moe(tmp_path / "m.gguf", **changes)
    plan = plan_for(source, KEPT)
    dry = prune(source, tmp_path / "s.gguf", plan, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert dry.dry_run
    assert (
        prune(source, tmp_path / "s.gguf", plan).n_bytes_after
        == dry.n_bytes_after
        == (tmp_path / "s.gguf").stat().st_size
    )


def test_the_size_of_a_plan_is_known_without_an_output(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", biases=True)
    plan = plan_for(source, KEPT)
    assert size_after(source, plan) == prune(source, tmp_path / "s.gguf", plan).n_bytes_after
    with pytest.raises(MismatchError):
        size_after(source, plan_for(source, KEPT, model={"fingerprint": "sha256:0"}))


def warnings_of(source: Path, plan: PrunePlan) -> str:
    return "\n".join(prune(source, source.with_name("s.gguf"), plan, dry_run=True).warnings)


def test_what_the_report_warns_of(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    three = {0: (0, 1, 2), 1: (5, 6, 7)}
    assert "2 or 4 would run with it" in warnings_of(source, plan_for(source, three))
    olmoe = build_moe(tmp_path / "o.gguf", architecture="olmoe")
    assert "does not normalise the gates" in warnings_of(olmoe, plan_for(olmoe, KEPT))
    assert warnings_of(olmoe, plan_for(olmoe, {0: range(8), 1: range(8)})) == ""
    assert "does not say which model" in warnings_of(source, plan_for(source, KEPT, model={"fingerprint": None}))
    assert "routers' bytes differ" in warnings_of(
        source, plan_for(source, KEPT, model={"router_fingerprint": "sha256:0"})
    )
    assert "not to be trusted" in warnings_of(source, plan_for(source, KEPT, options={"trusted": False}))


def test_a_dry_run_warns_of_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_moe(tmp_path / "m.gguf")
    plan = plan_for(source, KEPT)
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([*real[:4], 0, *real[5:]]))
    assert "only 0 are free" in warnings_of(source, plan)
    with pytest.raises(OutputError, match="only 0 are free"):
        prune(source, tmp_path / "s.gguf", plan)


def test_a_plan_serves_another_quantisation_of_the_model(tmp_path: Path) -> None:
    full = build_moe(tmp_path / "f.gguf")
    quantised = build_moe(tmp_path / "q.gguf", expert_type=GGMLQuantizationType.Q8_0)
    plan_for(full, KEPT).save(tmp_path / "plan.json")
    prune(quantised, tmp_path / "s.gguf", tmp_path / "plan.json")
    assert_cut(quantised, tmp_path / "s.gguf", KEPT, WEIGHTS)


# ---- plans that do not fit


def refusal(source: Path, layers: Mapping[int, Sequence[int]], kind: type[Exception], **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        prune(source, source.with_name("s.gguf"), plan_for(source, layers, **changes))
    assert not source.with_name("s.gguf").exists()
    return str(caught.value)


def test_a_plan_of_another_model_is_refused_naming_both(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    message = refusal(source, KEPT, MismatchError, model={"fingerprint": "sha256:77", "name": "Other-30B"})
    assert "sha256:77" in message
    assert "Other-30B" in message
    assert inspect(source).fingerprint in message
    assert str(source) in message
    assert "with 16 experts" in refusal(source, KEPT, MismatchError, model={"fingerprint": None, "n_experts": 16})


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        ({0: KEPT[0]}, MismatchError, r"says nothing about MoE layers \[1\]"),
        ({**KEPT, 2: KEPT[0]}, MismatchError, r"names layers \[2\]"),
        ({0: (0, 1, 2), 1: (0, 1)}, UsageError, "keeps 2 experts in layer 1, but 3 elsewhere"),
        ({0: (0, 1), 1: (1, 0)}, UsageError, r"of layer 1 are not ascending ids from 0 to 7: \[1, 0\]"),
        ({0: (0, 1), 1: (1, 1)}, UsageError, "not ascending"),
        ({0: (0, 1), 1: (1, 8)}, UsageError, "not ascending"),
        ({0: (-1, 1), 1: (0, 1)}, UsageError, "not ascending"),
        ({0: (0,), 1: (0,)}, UsageError, "fewer than the 2 experts"),
        ({0: (), 1: ()}, UsageError, "keep 0"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(
    tmp_path: Path, layers: Any, kind: type[Exception], message: str
) -> None:
    assert re.search(message, refusal(build_moe(tmp_path / "m.gguf"), layers, kind))


def test_the_layer_that_uses_most_experts_decides_how_many_must_stay(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", used_per_layer=(2, 4))
    assert "fewer than the 4 experts" in refusal(source, {0: (0, 1, 2), 1: (0, 1, 2)}, UsageError)


def test_prediction_layers_lose_as_many_experts(tmp_path: Path) -> None:
    keys = {"qwen3moe.nextn_predict_layers": (GGUFValueType.UINT32, 1)}
    source = build_moe(tmp_path / "m.gguf", n_layers=3, keys=keys)
    assert inspect(source).moe_layers == (0, 1, 2)
    message = refusal(source, KEPT, MismatchError)
    assert "prediction (MTP) layers [2]" in message
    assert "profile the model again" in message
    kept = {**KEPT, 2: (4, 5, 6, 7)}
    assert_cut(source, pruned(source, kept), kept, WEIGHTS)
    with pytest.raises(MismatchError, match=r"MoE layers \[0\]"):
        prune(source, tmp_path / "x.gguf", plan_for(source, {1: KEPT[1], 2: KEPT[1]}))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((0, 1, 2, 3, 4), "cannot be shared equally"),
        ((0, 4, 8, 12), "at least 2 in each"),
        ((0, 1, 2, 4, 5, 8, 9, 12), r"keeps \[3, 2, 2, 1\] experts in the router's groups of layer 0"),
    ],
)
def test_groups_keep_equally_many_and_at_least_two(tmp_path: Path, kept: tuple[int, ...], message: str) -> None:
    source = build_moe(tmp_path / "m.gguf", n_layers=1, n_experts=16, n_groups=4, n_groups_used=2)
    assert re.search(message, refusal(source, {0: kept}, UsageError))
    good = (0, 1, 6, 7, 8, 10, 13, 15)
    assert_cut(source, pruned(source, {0: good}), {0: good}, WEIGHTS)


def test_the_groups_a_token_may_use_hold_enough_experts(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", n_layers=1, n_experts=16, n_used=5, n_groups=4, n_groups_used=2)
    assert "hold 4, fewer than the 5" in refusal(source, {0: (0, 1, 4, 5, 8, 9, 12, 13)}, UsageError)


def test_llama_cpp_needs_more_experts_than_groups(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", n_used=1, n_groups=1, n_groups_used=1)
    assert "needs more experts than the router's groups (1)" in refusal(source, {0: (0,), 1: (0,)}, UsageError)


def test_a_dense_model_and_an_unknown_tensor_are_unsupported(tmp_path: Path) -> None:
    dense = build_moe(tmp_path / "d.gguf", n_experts=0)
    with pytest.raises(UnsupportedModelError, match="dense model"):
        prune(dense, tmp_path / "s.gguf", PrunePlan({"n_experts": 8}, "reap", 4, dict(KEPT)))
    odd = build_moe(tmp_path / "m.gguf", extra={"blk.1.ffn_side_exps.weight": np.zeros((8, 32), dtype=np.float32)})
    assert "blk.1.ffn_side_exps.weight" in refusal(odd, KEPT, UnsupportedModelError)


@pytest.mark.parametrize(
    ("architecture", "extra", "reason"),
    [
        ("grovemoe", {"blk.0.ffn_up_chexps.weight": (4, 8, 32)}, "gives group c the gate of expert c"),
        ("refact", {}, "its graph never runs them"),
        ("deepseek4", {"blk.0.ffn_gate_tid2eid.weight": (64, 2)}, "holds ids of experts as F32"),
    ],
)
def test_families_that_cannot_be_cut_are_refused_by_name(
    tmp_path: Path, architecture: str, extra: Any, reason: str
) -> None:
    tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in extra.items()}
    source = build_moe(tmp_path / "m.gguf", architecture=architecture, extra=tensors)
    message = refusal(source, KEPT, UnsupportedModelError)
    assert reason in message
    assert architecture in message or next(iter(extra)) in message


# ---- paths and options


def test_the_output_must_not_be_the_model_or_the_plan(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    content = source.read_bytes()
    plan = plan_for(source, KEPT).save(tmp_path / "plan.json")
    (tmp_path / "symlink.gguf").symlink_to("m.gguf")
    os.link(source, tmp_path / "hard.gguf")
    for output in (source, tmp_path / "symlink.gguf", tmp_path / "hard.gguf", tmp_path / "plan.json"):
        with pytest.raises(UsageError, match="is the input"):
            prune(source, output, tmp_path / "plan.json", force=True)
    with pytest.raises(UsageError, match="is the input"):
        prune(tmp_path / "symlink.gguf", source, str(plan), force=True)
    assert source.read_bytes() == content


def test_an_output_that_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    output = tmp_path / "s.gguf"
    output.write_text("precious")
    plan = plan_for(source, KEPT)
    with pytest.raises(UsageError, match="exists already"):
        prune(source, output, plan)
    assert output.read_text() == "precious"
    assert prune(source, output, plan, force=True).n_bytes_after == output.stat().st_size


def test_options_that_do_not_exist(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="unknown verify 'maybe'"):
        prune(source, tmp_path / "s.gguf", plan_for(source, KEPT), verify="maybe")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not valid Unicode"):
        prune(source, tmp_path / "s.gguf", plan_for(source, KEPT), name="\udcff")


def test_progress_counts_the_bytes_of_the_output(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    seen = []
    report = prune(source, tmp_path / "s.gguf", plan_for(source, KEPT), progress=seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (report.n_bytes_after, report.n_bytes_after, "bytes")


# ---- verification


@pytest.mark.parametrize("verify", ["fast", "full"])
@pytest.mark.parametrize("damage", ["first byte", "last byte", "header", "cut off"])
def test_a_damaged_output_is_noticed_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: Any, damage: str
) -> None:
    source = build_moe(tmp_path / "m.gguf")
    real = verification.Check.__call__

    def spoil(check: Any, temporaries: list[Path]) -> None:
        [temporary] = temporaries
        with open(temporary, "r+b") as file:
            offset = GGUFReader(temporary).get_tensor(12).data_offset
            file.seek(
                {"first byte": offset, "last byte": -1, "header": 24 + 8, "cut off": 0}[damage],
                2 if damage == "last byte" else 0,
            )
            if damage == "cut off":
                file.truncate(check.new_files[0].n_bytes - 1)
            else:
                file.write(b"\xab")
        real(check, temporaries)

    monkeypatch.setattr(verification.Check, "__call__", spoil)
    with pytest.raises(OutputError, match="was not written as it should be"):
        prune(source, tmp_path / "s.gguf", plan_for(source, KEPT), verify=verify)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("row", [0, -1])
def test_samples_are_taken_of_the_first_and_the_last_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    source = build_moe(tmp_path / "m.gguf")
    real = verification.Check.__call__

    def swap(check: Any, temporaries: list[Path]) -> None:
        [temporary] = temporaries
        tensor = next(tensor for tensor in GGUFReader(temporary).tensors if tensor.name == "blk.1.ffn_up_exps.weight")
        with open(temporary, "r+b") as file:
            file.seek(tensor.data_offset + (row % 4) * int(tensor.n_bytes) // 4)
            file.write(tensor.data[1].tobytes())
        real(check, temporaries)

    monkeypatch.setattr(verification.Check, "__call__", swap)
    with pytest.raises(OutputError, match=r"blk\.1\.ffn_up_exps\.weight differs"):
        prune(source, tmp_path / "s.gguf", plan_for(source, KEPT))


def test_full_verification_sees_what_samples_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_moe(tmp_path / "m.gguf", n_vocab=2048)
    plan = plan_for(source, KEPT)
    real = verification.Check.__call__

    def spoil(check: Any, temporaries: list[Path]) -> None:
        [temporary] = temporaries
        with open(temporary, "r+b") as file:
            file.seek(GGUFReader(temporary).get_tensor(0).data_offset + 100_000)
            file.write(b"\xab\xcd\xef")
        real(check, temporaries)

    monkeypatch.setattr(verification.Check, "__call__", spoil)
    prune(source, tmp_path / "fast.gguf", plan)
    with pytest.raises(OutputError, match=r"token_embd\.weight differs from the source's"):
        prune(source, tmp_path / "full.gguf", plan, verify="full")


# ---- split models


def test_a_split_model_is_pruned_into_one_file(tmp_path: Path) -> None:
    whole = build_moe(tmp_path / "whole.gguf", biases=True)
    tensors = [(tensor.name, tensor.data, tensor.tensor_type) for tensor in GGUFReader(whole).tensors]
    writer = gguf.GGUFWriter(str(tmp_path / "part.gguf"), "qwen3moe", split_max_tensors=len(tensors) // 3 + 1)
    for key, field in GGUFReader(whole).fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind if data.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.glob("part-*.gguf"))
    assert len(shards) == 3
    assert inspect(shards[0]).n_files == 3
    assert inspect(shards[0]).fingerprint == inspect(whole).fingerprint
    prune(shards[0], tmp_path / "a.gguf", plan_for(whole, KEPT), verify="full")
    assert_cut(whole, tmp_path / "a.gguf", KEPT, WEIGHTS | BIASES)
    assert not [key for key in keys_of(tmp_path / "a.gguf") if key.startswith("split.")]
    for shard in shards:
        with pytest.raises(UsageError, match="is the input"):
            prune(shards[0], shard, plan_for(whole, KEPT), force=True)


def test_memory_stays_small_however_large_the_tensors_are(tmp_path: Path) -> None:
    array, kind = random_tensor(np.random.default_rng(0), (65_536, 128))
    source = build_moe(tmp_path / "m.gguf", typed={"extra.weight": (array, kind)})
    plan = plan_for(source, KEPT)
    tracemalloc.start()
    prune(source, tmp_path / "s.gguf", plan, verify="fast")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert array.nbytes == 32 << 20
    assert peak < 4 << 20


# ---- what the engine makes of it


def never_routed(removed: Mapping[int, Sequence[int]], rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors with which a tiny model never routes to `removed`: a channel that is always large, and routers that shun
    it."""
    embedding = rng.standard_normal((64, 32)).astype(np.float32)
    embedding[:, 0] = 30
    tensors = {"token_embd.weight": embedding}
    for layer, ids in removed.items():
        router = rng.standard_normal((8, 32)).astype(np.float32)
        router[:, 0] = 0
        router[list(ids), 0] = -100
        tensors[f"blk.{layer}.ffn_gate_inp.weight"] = router
    return tensors


def test_the_engine_computes_the_same_when_only_unused_experts_are_gone(tmp_path: Path) -> None:
    removed = {layer: [expert for expert in range(8) if expert not in ids] for layer, ids in KEPT.items()}
    source = build_moe(tmp_path / "m.gguf", extra=never_routed(removed, np.random.default_rng(1)))
    options = EngineOptions(ctx_size=64, type_k="f32", type_v="f32", flash_attn="off", threads=2)
    tokens = np.arange(48, dtype=np.int32)
    before = open_session(source, options).logits(tokens, 0)
    output = pruned(source)
    after = open_session(output, options).logits(tokens, 0)
    np.testing.assert_allclose(after, before, atol=2e-6 * np.abs(before).max())
    # a router in another order than its experts loads and runs as well: it has to be seen here
    router = next(tensor for tensor in GGUFReader(output).tensors if tensor.name == "blk.0.ffn_gate_inp.weight")
    with open(output, "r+b") as file:
        file.seek(router.data_offset)
        file.write(router.data[::-1].tobytes())
    assert np.abs(open_session(output, options).logits(tokens, 0) - before).max() > 1e-3 * np.abs(before).max()


# ---- split output


def shards_of(path: Path, size: int | str, source: Path, **options: Any) -> list[Path]:
    report = prune(source, path, plan_for(source, KEPT), split_max_size=size, verify="full", **options)
    return list(report.files)


@pytest.mark.parametrize("changes", [{}, {"alignment": 256}, {"tokenizer": "words", "n_vocab": 300}])
def test_a_split_output_holds_what_a_single_file_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = build_moe(tmp_path / "m.gguf", biases=True, **changes)
    single = pruned(source)
    files = shards_of(tmp_path / "s.gguf", 50_000, source)
    count = len(files)
    assert count >= 3
    assert files == [tmp_path / f"s-{index + 1:05d}-of-{count:05d}.gguf" for index in range(count)]
    assert all(path.stat().st_size <= 50_000 for path in files[1:])
    readers = [GGUFReader(path) for path in files]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    expected = GGUFReader(single).tensors
    assert [tensor.name for tensor in tensors] == [tensor.name for tensor in expected]
    for found, wanted in zip(tensors, expected, strict=True):
        assert np.array_equal(found.data, wanted.data)
        assert found.data_offset % int(changes.get("alignment", 32)) == 0
    for index, path in enumerate(files):
        split = {key: value for key, value in keys_of(path).items() if key.startswith("split.")}
        assert split == {
            "split.no": ([2], index),
            "split.count": ([2], count),
            "split.tensors.count": ([5], len(expected)),
        }
    first = {key: value for key, value in keys_of(files[0]).items() if not key.startswith("split.")}
    assert first == keys_of(single)
    assert inspect(files[1]).fingerprint == inspect(single).fingerprint
    assert inspect(files[0]).provenance == inspect(single).provenance
    assert leftovers(tmp_path) == []


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def test_the_engine_loads_a_split_output(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", tokenizer="words", n_vocab=300)
    options = EngineOptions(ctx_size=64, type_k="f32", type_v="f32", flash_attn="off", threads=1)
    tokens = np.arange(20, dtype=np.int32)
    files = shards_of(tmp_path / "s.gguf", 30_000, source)
    logits = open_session(files[0], options).logits(tokens, 0)
    np.testing.assert_array_equal(logits, open_session(pruned(source), options).logits(tokens, 0))
    assert logits.shape == (20, 300)


def test_a_dry_run_knows_every_shard_to_the_byte(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    plan = plan_for(source, KEPT)
    dry = prune(source, tmp_path / "s.gguf", plan, split_max_size="0.04M", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    real = prune(source, tmp_path / "s.gguf", plan, split_max_size=40_000)
    assert len(dry.files) > 1
    assert dry.files == real.files == {path: path.stat().st_size for path in real.files}
    assert dry.n_bytes_after == sum(real.files.values())
    assert real.to_dict()["files"] == {str(path): n_bytes for path, n_bytes in real.files.items()}


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    files = shards_of(tmp_path / "s.gguf", 1, source)
    assert [len(GGUFReader(path).tensors) for path in files] == [1] * len(GGUFReader(source).tensors)


def test_what_fits_is_one_file_under_its_own_name(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    assert shards_of(tmp_path / "s.gguf", "4G", source) == [tmp_path / "s.gguf"]
    assert (tmp_path / "s.gguf").read_bytes() == pruned(source).read_bytes()


def test_a_split_model_may_be_pruned_into_a_split_one(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    everything = {0: range(8), 1: range(8)}
    report = prune(source, tmp_path / "w.gguf", plan_for(source, everything), split_max_size=60_000)
    first = report.output
    again = prune(first, tmp_path / "s.gguf", plan_for(first, KEPT), split_max_size=30_000, verify="full")
    merged = prune(
        again.output, tmp_path / "one.gguf", plan_for(again.output, {0: range(4), 1: range(4)}), verify="full"
    )
    assert_cut(source, merged.output, KEPT, WEIGHTS)
    assert not [key for key in keys_of(merged.output) if key.startswith("split.")]
    for shard in report.files:
        with pytest.raises(UsageError, match="is the input"):
            prune(first, shard, plan_for(first, KEPT), force=True)


@pytest.mark.parametrize("size", ["", "4X", "G", "-1", "0", "1e9", "4 G", "0.0000001K", True, "9" * 40])
def test_sizes_that_are_none(tmp_path: Path, size: Any) -> None:
    source = build_moe(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="should be a number of bytes"):
        prune(source, tmp_path / "s.gguf", plan_for(source, KEPT), split_max_size=size)


def test_a_split_output_must_not_be_named_like_a_shard(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="named like one shard"):
        shards_of(tmp_path / "s-00001-of-00002.gguf", 30_000, source)


def test_a_shard_that_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    files = shards_of(tmp_path / "s.gguf", 30_000, source)
    for path in (*files[:1], *files[2:]):
        path.unlink()
    files[1].write_text("precious")
    with pytest.raises(UsageError, match=rf"{files[1].name}: exists already"):
        shards_of(tmp_path / "s.gguf", 30_000, source)
    assert files[1].read_text() == "precious"
    assert shards_of(tmp_path / "s.gguf", 30_000, source, force=True) == files
    assert inspect(files[0]).n_experts == 4


def test_a_partial_set_is_refused_by_name(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf")
    files = shards_of(tmp_path / "s.gguf", 30_000, source)
    for missing, opened in ((0, 1), (1, 0), (len(files) - 1, 0)):
        content = files[missing].read_bytes()
        files[missing].unlink()
        with pytest.raises(FormatError, match=rf"{files[missing].name}: is missing, .* the set is not complete"):
            inspect(files[opened])
        files[missing].write_bytes(content)
    inspect(files[0])
