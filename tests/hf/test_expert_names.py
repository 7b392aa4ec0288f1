"""What config.json and the files beside it call the experts: called anew where it is understood, else named; never
stale in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoint_builder import KEPT, N_EMBD, N_EXPERTS, N_FF, Tensors, build, config, qwen
from reap.errors import ReapError, UnsupportedModelError
from reap.hf import prune
from reap.hf.disk.config_text import changed_values
from reap.scores.plan import PrunePlan

BLOCK = "model.layers.{}.mlp.experts.{}.{}_proj"
MATRICES = ("gate", "up", "down")


def run(
    tmp_path: Path, document: Any, tensors: Tensors | None = None, beside: dict[str, Any] | None = None, **options: Any
) -> Any:
    """(config.json, the report) of a pruned checkpoint with this config.json."""
    kept = options.pop("kept", KEPT)
    build(tmp_path / "in", tensors or qwen(), document)
    for name, value in (beside or {}).items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(json.dumps(value))
    plan = PrunePlan({"n_experts": N_EXPERTS}, "reap", 4, kept)
    report = prune(tmp_path / "in", tmp_path / "out", plan, **options)
    return json.loads((tmp_path / "out" / "config.json").read_text()), report


def quantised(tmp_path: Path, tensors: Tensors | None = None, **values: Any) -> Any:
    document, _ = run(tmp_path, config(quantization_config=values), tensors)
    return document["quantization_config"]


def all_old() -> dict[str, str]:
    """Every expert module before -> what it is called afterwards, by hand."""
    return {
        BLOCK.format(layer, expert, kind): BLOCK.format(layer, row, kind)
        for layer, kept in KEPT.items()
        for row, expert in enumerate(kept)
        for kind in MATRICES
    }


# ---- counts


def test_lists_of_objects_with_counts(tmp_path: Path) -> None:
    """As a block-wise searched model has it: one object for each layer."""
    blocks = [
        {"block_type": "attention", "heads": 8},
        {"block_type": "moe", "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        {"ffn": {"moe": {"num_local_experts": 8, "x": [8]}, "no_op": False}, "attention": {"n_heads_in_group": 8}},
    ]
    document, _ = run(tmp_path, config(block_configs=blocks))
    assert document["block_configs"] == [
        blocks[0],
        {**blocks[1], "n_routed_experts": 4},
        {"ffn": {"moe": {"num_local_experts": 4, "x": [8]}, "no_op": False}, "attention": {"n_heads_in_group": 8}},
    ]


def test_counts_only_in_a_list_of_objects(tmp_path: Path) -> None:
    document = config(block_configs=[{"n_routed_experts": 8}, {"n_routed_experts": 8}])
    del document["num_experts"]
    patched, _ = run(tmp_path, document)
    assert patched["block_configs"] == [{"n_routed_experts": 4}, {"n_routed_experts": 4}]


def test_counts_under_another_name_are_said(tmp_path: Path) -> None:
    document = config(total_expert_slots=8, routing={"expert_capacity": [1.0] * 8, "experts_seen": 7})
    patched, report = run(tmp_path, document)
    assert patched["total_expert_slots"] == 8
    (said,) = (warning for warning in report.warnings if "still says" in warning)
    assert "config.json still says total_expert_slots: 8, routing.expert_capacity: a list of 8" in said


# ---- names


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", ""])
@pytest.mark.parametrize("key", ["ignore", "modules_to_not_convert", "exclude_modules"])
def test_full_names_under_any_prefix(tmp_path: Path, key: str, prefix: str) -> None:
    name = prefix + "layers.{}.mlp.experts.{}.up_proj"
    names = ["lm_head", name.format(0, 0), name.format(0, 7), name.format(1, 3), "model.layers.0.mlp.shared_expert"]
    found = quantised(tmp_path, **{key: names})
    assert found[key] == ["lm_head", name.format(0, 3), name.format(1, 1), "model.layers.0.mlp.shared_expert"]


def test_prediction_layers_are_not_taken_for_the_first_ones(tmp_path: Path) -> None:
    mtp = {name.replace("model.layers.0", "mtp.layers.0"): value for name, value in qwen((0,)).items() if "mlp" in name}
    name = "{}layers.0.mlp.experts.7.up_proj"
    names = [
        name.format("mtp."),
        name.format("model."),
        name.format("model.mtp."),
        name.format("language_model.model."),
    ]
    document = config(quantization_config={"ignore": names})
    kept = {**KEPT, 2: (0, 1, 2, 7)}
    patched, _ = run(tmp_path, document, qwen() | mtp, kept=kept)
    rows = [3, 3, 3, 3]  # expert 7 is the fourth of both; now with another fourth
    assert [re.findall(r"experts\.(\d)", n)[0] for n in patched["quantization_config"]["ignore"]] == list(
        map(str, rows)
    )


def test_layers_that_are_left_out_are_named_no_more(tmp_path: Path) -> None:
    mtp = {name.replace("model.layers.0", "mtp.layers.0"): value for name, value in qwen((0,)).items() if "mlp" in name}
    names = ["mtp.layers.0.mlp.experts.1.up_proj", "model.layers.0.mlp.experts.1.up_proj"]
    patched, _ = run(tmp_path, config(quantization_config={"ignore": names}), qwen() | mtp, drop_prediction=True)
    assert patched["quantization_config"]["ignore"] == ["model.layers.0.mlp.experts.0.up_proj"]


PATTERNS_THAT_STAY = [
    "re:.*lm_head",
    "re:.*mlp.experts.*",
    r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj",
    r"re:.*\.shared_expert\..*",
    "model.layers.*.self_attn",
    "*.mlp.gate",
    r"re:.*layers\.1\..*",
]


def test_patterns_that_choose_the_same_stay(tmp_path: Path) -> None:
    assert quantised(tmp_path, ignore=PATTERNS_THAT_STAY)["ignore"] == PATTERNS_THAT_STAY


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*experts\.3\..*",
        r"re:.*experts\.[2-5]\..*",
        r"re:model\.layers\.0\.mlp\.experts\.(1|7)\.up_proj",
        r"re:.*\.mlp\.experts\.(?:0|4)\.(gate|up)_proj$",
        r"re:.*(experts\.3\.up_proj|self_attn\.q_proj)",
    ],
)
def test_patterns_with_numbers_become_the_names_they_meant(tmp_path: Path, pattern: str) -> None:
    """What the list matches afterwards are the kept ones of what it matched before."""
    found = quantised(tmp_path, ignore=["lm_head", pattern])["ignore"]
    meant = re.compile(pattern.removeprefix("re:"))
    expected = {new for old, new in all_old().items() if meant.match(old)}
    others = {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    expected |= {name for name in others if meant.match(name)}
    names = {*all_old().values(), *others}
    assert {name for name in names if name in found} == expected
    assert not [entry for entry in found if entry.startswith("re:")]
    assert found[0] == "lm_head"


def test_a_pattern_of_more_than_one_digit(tmp_path: Path) -> None:
    """16 experts: two digits tell some from others without naming any."""
    kept = {layer: (1, 3, 9, 10, 11, 12, 14, 15) for layer in (0, 1)}
    build(
        tmp_path / "in",
        qwen(n_experts=16),
        config(num_experts=16, quantization_config={"ignore": [r"re:.*experts\.\d\d\.up_proj"]}),
    )
    prune(tmp_path / "in", tmp_path / "out", PrunePlan({"n_experts": 16}, "reap", 8, kept))
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    expected = {BLOCK.format(layer, row, "up") for layer in (0, 1) for row in (3, 4, 5, 6, 7)}
    assert expected == {name for name in found if name.startswith("model.")}


def test_groups_of_compressed_tensors(tmp_path: Path) -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}},
        "group_1": {
            "targets": [r"re:.*mlp\.experts\.6\.down_proj", BLOCK.format(0, 2, "up")],
            "weights": {"num_bits": 8},
        },
    }
    found = quantised(tmp_path, config_groups=groups)["config_groups"]
    assert found["group_0"] == groups["group_0"]
    assert found["group_1"]["targets"] == [BLOCK.format(1, 3, "down"), BLOCK.format(0, 1, "up")]


def test_gptq_s_lists_inside_a_layer(tmp_path: Path) -> None:
    every = [f"mlp.experts.{expert}.up_proj" for expert in range(8)]
    lists = [["self_attn.q_proj"], every]
    found = quantised(tmp_path, quant_method="gptq", modules_in_block_to_quantize=lists)
    assert found["modules_in_block_to_quantize"] == [["self_attn.q_proj"], every[:4]]
    (tmp_path / "out").rename(tmp_path / "first")
    (tmp_path / "in").rename(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=r"names mlp\.experts\.\d\.up_proj, but not all experts"):
        quantised(tmp_path, modules_in_block_to_quantize=[every[:3]])


def test_gptq_s_dynamic_keys(tmp_path: Path) -> None:
    dynamic = {r"-:.*experts\.3\.": {}, r"+:.*experts\.": {"bits": 4}, "lm_head": {"bits": 8}}
    found = quantised(tmp_path, dynamic=dynamic)["dynamic"]
    assert found[r"+:.*experts\."] == {"bits": 4}
    assert found["lm_head"] == {"bits": 8}
    minus = [re.compile(key[2:]) for key in found if key.startswith("-:")]
    matched = {new for new in all_old().values() if any(one.match(new) for one in minus)}
    assert matched == {new for old, new in all_old().items() if ".experts.3." in old}


def test_parts_of_names(tmp_path: Path) -> None:
    """`experts.3` is an expert of every layer, and after the cut another one in each."""
    found = quantised(tmp_path, modules_to_not_convert=["experts.3", "mlp.experts.6.up_proj"])
    assert found["modules_to_not_convert"] == [
        "model.layers.1.mlp.experts.1",
        "model.layers.1.mlp.experts.3.up_proj",
    ]


def test_fused_experts_are_named_as_well(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = ("BF16", (8, N_EMBD))
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = ("BF16", (8, 2 * N_FF, N_EMBD))
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = ("BF16", (8, N_EMBD, N_FF))
    found = quantised(tmp_path, tensors, ignore=[BLOCK.format(0, 7, "up"), r"re:.*layers\.1.*experts\.5\.down_proj"])
    assert found["ignore"] == [BLOCK.format(0, 3, "up"), BLOCK.format(1, 2, "down")]


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_files_that_say_what_is_quantised(tmp_path: Path, name: str) -> None:
    value = {"modules_to_not_convert": [BLOCK.format(0, 4, "up")], "dynamic": {BLOCK.format(0, 0, "up"): {"bits": 8}}}
    run(tmp_path, config(), beside={name: value})
    found = json.loads((tmp_path / "out" / name).read_text())
    assert found == {"modules_to_not_convert": [BLOCK.format(0, 2, "up")], "dynamic": {}}


@pytest.mark.parametrize(
    "values",
    [
        {"ignore": ["re:(.*experts\\.3"]},
        {"ignore": ["re:((a*experts\\.3)*)*x"]},
        {"ignore": ["re:(.|[a-z])*experts\\.3$"]},
        {"ignore": ["blocks.expert_3.up"]},
        {"first": "re:.*experts\\.3.*"},
        {"odd": BLOCK.format(0, 0, "up")},
        {"ignore": ["transformer.layers.0.moe.experts.3.up_proj"]},
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ReapError, match=r"names (an )?experts?") as raised:
        quantised(tmp_path, **values)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_other_files_are_read_and_what_they_say_is_named(tmp_path: Path) -> None:
    beside = {
        "expert_stats.json": {"model.layers.0.mlp.experts.3": 0.5, "n_experts": 8},
        "maps/placement.json": {"groups": [["experts.0", "experts.1"]]},
        "generation_config.json": {"top_k": 8, "eos_token_id": 8},
        "vocab.json": {"experts.3": 1},
    }
    _, report = run(tmp_path, config(), beside=beside)
    said = [warning for warning in report.warnings if "speaks of experts" in warning]
    assert [warning.split()[0] for warning in said] == ["expert_stats.json", "maps/placement.json"]
    assert "model.layers.0.mlp.experts.3" in said[0]
    assert "n_experts: 8" in said[0]


def test_nothing_is_said_where_nothing_is_removed(tmp_path: Path) -> None:
    kept = dict.fromkeys((0, 1), tuple(range(8)))
    document = config(quantization_config={"ignore": ["blocks.expert_3.up"]}, other_expert_count=8)
    build(tmp_path / "in", qwen(), document)
    report = prune(tmp_path / "in", tmp_path / "out", PrunePlan({"n_experts": 8}, "reap", 8, kept))
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "in" / "config.json").read_bytes()
    assert not [said for said in report.warnings if "expert" in said and "plan" not in said]


def test_innermost_changes() -> None:
    before = {"a": [1, {"b": 2, "c": [3]}], "d": {"x": 1}, "e": 1}
    after = {"a": [1, {"b": 5, "c": [3, 4]}], "d": {"y": 1}, "e": True}
    assert changed_values(before, after) == {("a", 1, "b"): 5, ("a", 1, "c"): [3, 4], ("d",): {"y": 1}, ("e",): True}


def test_many_names_and_patterns_take_seconds(tmp_path: Path) -> None:
    """As of a model of 60 layers with 384 experts, whose lists name every module."""
    import time

    from reap.hf.disk.expert_names import ExpertNames
    from reap.hf.disk.layout import CheckpointLayout, Follows

    blocks = {layer: f"model.layers.{layer}.mlp" for layer in range(30)}
    follows = {
        f"{block}.experts.{expert}.{kind}_proj.weight": Follows(
            layer, expert, 0, f"{block}.experts.", f".{kind}_proj.weight", False
        )
        for layer, block in blocks.items()
        for expert in range(192)
        for kind in MATRICES
    }
    layout = CheckpointLayout(30, 192, blocks, (), follows, None, ())  # type: ignore[arg-type]
    names = ExpertNames(layout, dict.fromkeys(blocks, tuple(range(0, 192, 2))), list(follows))
    started = time.process_time()
    names.renamed(
        {
            "ignore": [name.removesuffix(".weight") for name in follows],
            "patterns": [rf"re:.*layers\.{layer}\.self_attn.*" for layer in blocks] + ["model.layers.*.self_attn*"],
            "modules_in_block_to_quantize": [f"mlp.experts.{expert}.up_proj" for expert in range(192)],
            "numbers": [r"re:.*experts\.4\..*"],
        }
    )
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r".*layers\.3\.self_attn.*", "self_attn"),
        (r"experts?\.3", "expert"),
        (r".*(gate)?cde", "cde"),
        (r".*(?:gate|up)", ""),
        (r"[ab]cd", ""),
        (r"ab{0,3}c", "c"),
        (r"\dx", "x"),
        ("*mlp*", "ml"),
    ],
)
def test_what_a_name_must_have_to_match(pattern: str, text: str) -> None:
    from reap.hf.disk.expert_names import _needed_text

    found = _needed_text(pattern)
    assert found == text or (len(found) == len(text) and found in pattern)
