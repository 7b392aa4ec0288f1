"""Checkpoints whose index and files differ, and weights beside the model's own: worked on as told, or refused by
name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoint_builder import KEPT, N_EMBD, N_EXPERTS, build, config, qwen, read_file, write_file
from reap.errors import FormatError, ReapError, UsageError
from reap.hf import prune
from reap.hf.disk.checkpoint_files import Checkpoint
from reap.hf.disk.discovery import INDEX
from reap.scores.plan import PrunePlan

NORM = {"model.layers.0.input_layernorm.weight": ("BF16", (N_EMBD,))}


def plan_of(kept: dict[int, tuple[int, ...]] | None = None) -> PrunePlan:
    return PrunePlan({"n_experts": N_EXPERTS}, "reap", 4, kept or KEPT)


def contents_of(directory: Path) -> dict[str, bytes]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: raw for path in files for name, (_, _, raw) in read_file(path).items()}


def change_index(directory: Path, change: Any) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def check_output(directory: Path, names: set[str]) -> None:
    """The index of the output names exactly what its files hold, and they hold `names`."""
    index = json.loads((directory / INDEX).read_text())
    held = {name: path.name for path in directory.glob("*.safetensors") for name in read_file(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(map(len, contents_of(directory).values()))
    assert set(held) == names
    with Checkpoint.open(directory) as checkpoint:
        assert not checkpoint.difference


def pruned_names(layers: int = 2) -> set[str]:
    return set(qwen(range(layers), n_experts=4))


def refused(tmp_path: Path, *parts: str, **options: Any) -> str:
    with pytest.raises(ReapError) as raised:
        prune(tmp_path / "in", tmp_path / "out", options.pop("plan", plan_of()), **options)
    said = str(raised.value)
    assert all(part in said for part in parts), said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()
    return said


# ---- index and files


def test_an_index_that_names_too_little(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen() | NORM, config(), n_shards=3)
    name = next(iter(NORM))
    change_index(tmp_path / "in", lambda names: names.pop(name))
    refused(tmp_path, "does not name 1 tensor of its files", f"{name} in model-", "--trust shards", "--trust index")
    report = prune(tmp_path / "in", tmp_path / "shards", plan_of(), trust="shards", verify="full")
    check_output(tmp_path / "shards", {*pruned_names(), name})
    assert any("does not name 1 tensor" in said and "gone by the shards" in said for said in report.warnings)
    refused(tmp_path, "cannot be gone by", f"does not name {name} in model-", "--trust shards", trust="index")


def test_tables_that_are_computed_may_be_left_out(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    build(tmp_path / "in", qwen() | {name: ("F32", (4,))}, config(), n_shards=3)
    change_index(tmp_path / "in", lambda names: names.pop(name))
    prune(tmp_path / "in", tmp_path / "index", plan_of(), trust="index", verify="full")
    check_output(tmp_path / "index", pruned_names())


def test_prediction_layers_that_the_index_does_not_name(tmp_path: Path) -> None:
    """They have experts: gone by the files they are cut, gone by the index they are left out."""
    mtp = {name.replace("model.layers.0", "mtp.layers.0"): value for name, value in qwen((0,)).items() if "mlp" in name}
    contents = build(tmp_path / "in", qwen() | mtp, config(), n_shards=3)
    change_index(tmp_path / "in", lambda names: [names.pop(name) for name in mtp])
    refused(tmp_path, f"does not name {len(mtp)} tensors of its files", "…")
    prune(tmp_path / "in", tmp_path / "index", plan_of(), trust="index", verify="full")
    check_output(tmp_path / "index", pruned_names())
    kept = {**KEPT, 2: (0, 1, 2, 7)}
    prune(tmp_path / "in", tmp_path / "shards", plan_of(kept), trust="shards", verify="full")
    found = contents_of(tmp_path / "shards")
    name = "mtp.layers.0.mlp.experts.{}.up_proj.weight"
    assert found[name.format(3)] == contents[name.format(7)]
    check_output(tmp_path / "shards", set(found))


def test_an_index_that_names_too_much(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config(), n_shards=2)
    ghost = "model.layers.2.self_attn.q_proj.weight"
    change_index(tmp_path / "in", lambda names: names.update({ghost: "model-00001-of-00002.safetensors"}))
    refused(tmp_path, "names 1 tensor that is in none of the files", ghost)
    refused(tmp_path, "cannot be gone by", ghost, "--trust shards", trust="index")
    prune(tmp_path / "in", tmp_path / "shards", plan_of(), trust="shards", verify="full")
    check_output(tmp_path / "shards", pruned_names())


def test_an_index_that_names_the_wrong_file(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config(), n_shards=2)
    name = "model.embed_tokens.weight"
    change_index(tmp_path / "in", lambda names: names.update({name: "model-00002-of-00002.safetensors"}))
    refused(tmp_path, f"says that {name} is in model-00002-of-00002.safetensors, but it is in model-00001")
    refused(tmp_path, "cannot be gone by", trust="index")
    prune(tmp_path / "in", tmp_path / "shards", plan_of(), trust="shards", verify="full")
    check_output(tmp_path / "shards", pruned_names())


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    """Only the index can say which is the model's."""
    contents = build(tmp_path / "in", qwen(), config(), n_shards=2)
    name = "model.embed_tokens.weight"
    second = tmp_path / "in" / "model-00002-of-00002.safetensors"
    tensors = {key: (dtype, shape) for key, (dtype, shape, _) in read_file(second).items()}
    contents |= write_file(second, {name: ("BF16", (32, N_EMBD)), **tensors}, seed=1) | {name: contents[name]}
    for options in ({}, {"trust": "shards"}):
        refused(tmp_path, f"{name} is in model-00001-of-00002.safetensors and in model-00002", **options)
    prune(tmp_path / "in", tmp_path / "index", plan_of(), trust="index", verify="full")
    check_output(tmp_path / "index", pruned_names())
    assert contents_of(tmp_path / "index")[name] == contents[name]


def test_a_file_that_the_index_does_not_name(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config(), n_shards=2)
    write_file(tmp_path / "in" / "extra.safetensors", NORM)
    refused(tmp_path, "does not name 1 file beside it (extra.safetensors)")
    prune(tmp_path / "in", tmp_path / "shards", plan_of(), trust="shards", verify="full")
    check_output(tmp_path / "shards", {*pruned_names(), *NORM})
    report = prune(tmp_path / "in", tmp_path / "index", plan_of(), trust="index", verify="full")
    check_output(tmp_path / "index", pruned_names())
    assert any("1 files with other weights were not carried over: extra" in said for said in report.warnings)


def test_a_missing_shard_is_an_error_whatever_is_trusted(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config(), n_shards=3)
    (tmp_path / "in" / "model-00002-of-00003.safetensors").unlink()
    for options in ({}, {"trust": "shards"}, {"trust": "index"}):
        refused(tmp_path, 'names "model-00002-of-00003.safetensors", which is not there', **options)


def test_a_word_that_is_neither(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    for options, name in (({"trust": "both"}, "trust"), ({"other_weights": "keep"}, "other_weights")):
        assert refused(tmp_path, **options).startswith(f"unknown {name}")
    with pytest.raises(UsageError, match="unknown trust 'named'"):
        prune(tmp_path / "in", tmp_path / "out", plan_of(), trust="named")  # type: ignore[arg-type]


def test_what_reads_only_is_not_stopped(tmp_path: Path) -> None:
    """A profile's sketch of the routers, a comparison: what the named files hold, as transformers has it."""
    from reap.hf.disk.info import sketch_folder

    build(tmp_path / "in", qwen(), config(), n_shards=2)
    before = sketch_folder(tmp_path / "in")
    change_index(tmp_path / "in", lambda names: names.pop("model.layers.0.mlp.gate.weight"))
    write_file(tmp_path / "in" / "extra.safetensors", NORM)
    assert sketch_folder(tmp_path / "in").keys() == before.keys() == {0, 1}
    with pytest.raises(FormatError, match=r"does not name 1 file beside it .*; does not name 1 tensor"):
        Checkpoint.open(tmp_path / "in")


# ---- weights beside


def put(directory: Path, name: str, raw: bytes = b"weights") -> None:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pytorch_model.bin", "is in a form that reap does not read"),
        ("original/consolidated.00.pth", "is in a form that reap does not read"),
        ("ple/layer_0.bin", "is in a form that reap does not read"),
        ("model.gguf", "is in a form that reap does not read"),
        ("onnx/model.onnx_data", "is in a form that reap does not read"),
        ("consolidated.safetensors", "cannot be read"),
    ],
)
def test_weights_that_cannot_be_read_are_refused_by_name(tmp_path: Path, name: str, what: str) -> None:
    build(tmp_path / "in", qwen(), config())
    put(tmp_path / "in", name)
    refused(tmp_path, "has a file with weights", f"({name} {what})", "--other-weights leave", "--other-weights carry")
    prune(tmp_path / "in", tmp_path / "carry", plan_of(), other_weights="carry")
    assert (tmp_path / "carry" / name).read_bytes() == b"weights"
    report = prune(tmp_path / "in", tmp_path / "leave", plan_of(), other_weights="leave")
    assert not (tmp_path / "leave" / name).exists()
    assert any(said.endswith(f"not carried over: {name}") for said in report.warnings)


def test_safetensors_in_folders_are_looked_into(tmp_path: Path) -> None:
    """A draft model without experts is carried along with its index, whatever its axes; one with experts is refused."""
    build(tmp_path / "in", qwen(), config())
    draft = {"model.layers.0.mlp.gate_proj.weight": ("BF16", (N_EXPERTS, N_EMBD)), "fc.weight": ("BF16", (8, 8))}
    (tmp_path / "in" / "dspark").mkdir()
    write_file(tmp_path / "in" / "dspark" / "model.safetensors", draft)
    put(tmp_path / "in", "dspark/model.safetensors.index.json", b'{"weight_map": {}}')
    put(tmp_path / "in", "training_args.bin")
    report = prune(tmp_path / "in", tmp_path / "out", plan_of())
    for name in ("dspark/model.safetensors", "dspark/model.safetensors.index.json", "training_args.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert not any("not carried over" in said for said in report.warnings)
    (tmp_path / "out").rename(tmp_path / "first")

    for name, shape in (
        ("model.layers.0.mlp.experts.0.up_proj.weight", (4, 4)),
        ("model.layers.0.mlp.switch_mlp.up_proj.weight", (4, 4, 4)),
        ("model.layers.0.mlp.gate.weight", (N_EXPERTS, N_EMBD)),
    ):
        write_file(tmp_path / "in" / "dspark" / "model.safetensors", draft | {name: ("BF16", shape)})
        refused(tmp_path, f"(dspark/model.safetensors holds {name})")
    report = prune(tmp_path / "in", tmp_path / "out", plan_of(), other_weights="leave")
    assert not (tmp_path / "out" / "dspark").exists()
    assert any("dspark/model.safetensors.index.json" in said for said in report.warnings)


def test_many_files_are_named_in_part(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen(), config())
    for number in range(9):
        put(tmp_path / "in", f"ple/{number}.bin")
    said = refused(tmp_path, "has 9 files with weights", "ple/0.bin", "and 6 more")
    assert len(said) < 600


# ---- prediction layers


def head(n_experts: int = N_EXPERTS, **changes: Any) -> Any:
    """An MTP block with its experts."""
    tensors = {
        name.replace("model.layers.0", "mtp.layers.0"): value
        for name, value in qwen((0,), n_experts=n_experts).items()
        if ".mlp." in name
    }
    return tensors | changes | {"mtp.fc.weight": ("BF16", (N_EMBD, N_EMBD))}


HEADS: dict[str, tuple[Any, str]] = {
    "another number of experts": (
        head(4),
        "mtp.layers.0.mlp, which is for prediction (MTP), has 4 experts, and the other layers have 8; leave it out with"
        " --drop-mtp",
    ),
    "a tensor that is not known": (
        head() | {"mtp.layers.0.mlp.balance": ("F32", (8,))},
        "mtp.layers.0.mlp.balance [8] may belong to the experts",
    ),
    "a packed router": (
        head() | {"mtp.layers.0.mlp.gate.weight_scale_inv": ("F32", (1, 2))},
        "weight_scale_inv [1, 2] may belong to the experts",
    ),
    "no router": (
        {name: value for name, value in head().items() if "gate.weight" not in name},
        "mtp.layers.0.mlp has experts, but no router",
    ),
    "an expert that is missing": (
        {name: value for name, value in head().items() if ".experts.3." not in name},
        "mtp.layers.0.mlp.experts has 7 experts, but no number 3",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_what_is_left_out_is_not_refused(tmp_path: Path, case: str) -> None:
    tensors, message = HEADS[case]
    names = ["mtp.layers.0.mlp.experts.1.up_proj", "lm_head", "model.layers.0.mlp.experts.1.up_proj"]
    document = config(num_nextn_predict_layers=1, quantization_config={"ignore": names})
    build(tmp_path / "in", qwen() | tensors, document, n_shards=2)
    kept = {**KEPT, 2: (0, 1, 2, 3)}
    refused(tmp_path, message, plan=plan_of(kept))
    for number, plan in enumerate((plan_of(), plan_of(kept))):
        report = prune(tmp_path / "in", tmp_path / f"out{number}", plan, drop_prediction=True, verify="full")
        check_output(tmp_path / f"out{number}", pruned_names())
        document = json.loads((tmp_path / f"out{number}" / "config.json").read_text())
        assert document["num_nextn_predict_layers"] == 0
        assert document["quantization_config"]["ignore"] == ["lm_head", "model.layers.0.mlp.experts.0.up_proj"]
        assert "the prediction (MTP) layers [2] were left out" in report.warnings


def test_layers_that_differ_are_no_heads(tmp_path: Path) -> None:
    build(tmp_path / "in", qwen((0,)) | qwen((1,), n_experts=4), config())
    refused(tmp_path, "model.layers.1.mlp has 4 experts and model.layers.0.mlp has 8", drop_prediction=True)


def test_a_head_with_experts_on_a_dense_trunk_is_no_model_of_experts(tmp_path: Path) -> None:
    build(tmp_path / "in", head() | NORM, config())
    refused(tmp_path, "is it a dense model", drop_prediction=True)
