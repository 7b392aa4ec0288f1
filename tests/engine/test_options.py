"""The engine's options: one table, and what each may hold."""

import inspect
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap
from helpers.gguf_builder import build_moe
from reap.engine import native
from reap.engine.options import KV_CACHE_TYPES, EngineArguments, EngineOptions, engine_fields
from reap.engine.session import open_session
from reap.errors import UsageError


def test_the_arguments_are_the_fields() -> None:
    assert typing.get_type_hints(EngineArguments) == typing.get_type_hints(EngineOptions)
    assert list(EngineArguments.__annotations__) == [field.name for field in fields(EngineOptions)]


def test_flash_attn_is_spelled_in_five_files() -> None:
    """Adding an option to the engine stays a matter of few lines."""
    root = Path(__file__).parents[2]
    sources = [path for folder in ("python", "csrc") for path in (root / folder).rglob("*") if path.suffix in SOURCES]
    assert len(sources) > 100
    named = [path.name for path in sources if "flash_attn" in path.read_text("utf-8")]
    assert len(named) <= 5, named


SOURCES = (".py", ".pyi", ".cpp", ".h")


@pytest.mark.parametrize("function", [reap.profile, reap.evaluate, reap.sweep, reap.refine])
def test_help_names_the_options(function: Any) -> None:
    shown = inspect.signature(function).parameters
    for field in engine_fields():
        expected = shown["ctx_size"].default if field.name == "ctx_size" else field.default
        assert shown[field.name].default == expected
    assert shown["ctx_size"].default == (2048 if function is reap.profile else 512)
    more = {"keep": 1} if function is reap.refine else {}
    with pytest.raises(TypeError, match="flash_attention"):
        function("model.gguf", *["text"] * (1 + ("profile" in shown)), **more, flash_attention="on")


def test_one_item_of_a_list_may_be_given_by_itself() -> None:
    options = EngineOptions(devices="CUDA0", rpc="127.0.0.1:50052", override_tensors="exps=CPU")
    assert options.devices == ("CUDA0",)
    assert options.rpc == ("127.0.0.1:50052",)
    assert options.override_tensors == (("exps", "CPU"),)
    assert EngineOptions(override_tensors=[("a=b", "CPU"), "c=d=CPU"]).override_tensors == (
        ("a=b", "CPU"),
        ("c=d", "CPU"),
    )


def test_metadata_as_llama_cpp_writes_it() -> None:
    pairs = [("general.name", "str", "a=b:c"), ("x.expert_used_count", "int", "4")]
    options = EngineOptions(override_kv=["general.name=str:a=b:c", ("x.expert_used_count", "int", "4")])
    assert list(options.override_kv) == pairs
    assert EngineOptions(override_kv="general.name=str:").override_kv == (("general.name", "str", ""),)
    assert options.record()["override_kv"] == [list(pair) for pair in pairs]
    assert EngineOptions(**options.record()) == options
    empty = EngineOptions(override_kv="general.name=str:")
    assert EngineOptions(**empty.record()) == empty


def test_the_cache_types_are_the_engine_s() -> None:
    assert list(KV_CACHE_TYPES) == native.load().kv_cache_types()


def test_metadata_reaches_the_engine(tmp_path: Path) -> None:
    model = build_moe(tmp_path / "m.gguf", n_layers=1, n_experts=8, n_used=2)
    key = f"{reap.inspect(model).architecture}.context_length"
    plain = open_session(model, EngineOptions(ctx_size=32, threads=1))
    changed = open_session(model, EngineOptions(ctx_size=32, threads=1, override_kv=f"{key}=int:77"))
    assert (plain.n_ctx_train == 77, changed.n_ctx_train) == (False, 77)
    with pytest.raises(UsageError, match=key):
        open_session(model, EngineOptions(ctx_size=32, threads=1, override_kv=[(key, "int", "many")]))


def test_whole_numbers_of_numpy() -> None:
    assert type(EngineOptions(ctx_size=np.int64(64)).ctx_size) is int


WRONG: dict[str, Any] = {
    "ctx_size": [-1, 2**31, 1.0, "512", None, True],
    "batch_size": [0, -1, "8", 8.0, False],
    "ubatch_size": [0, None, "8"],
    "threads": [0, 513, 100_000, "4"],
    "gpu_layers": [-(2**31) - 1, 2**31, "all", None],
    "devices": [3, [3], [""], [None], {"CUDA0": 1}, b"CUDA0"],
    "override_tensors": [3, None, ["exps"], "exps", "=CPU", "exps=", [("exps",)], [("exps", 3)], [("", "CPU")]],
    "override_kv": [
        3,
        None,
        "a",
        "a=int",
        "=int:3",
        "a=long:3",
        [("a", "int")],
        [("a", "int", 3)],
        [3],
        [("", "int", "3")],
        [("a", "x", "3")],
    ],
    "rpc": [3, None, [3]],
    "lora": [3, None, [3], "", [""]],
    "type_k": [16, None, "i8", "f64", "q8_1", ""],
    "type_v": [16, None, "i8"],
    "flash_attn": ["maybe", None, True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_is_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        EngineOptions(**{name: value})


def test_every_option_was_tried_with_a_wrong_value() -> None:
    assert set(WRONG) == {field.name for field in engine_fields()}


def test_the_record_is_json() -> None:
    options = EngineOptions(devices=["CUDA0"], override_tensors=[("exps", "CPU")])
    record = options.record()
    assert record["override_tensors"] == [["exps", "CPU"]]
    assert record["devices"] == ["CUDA0"]
    assert EngineOptions(**record) == options


def test_the_usual_context_is_within_the_model_s() -> None:
    usual = EngineOptions.of({}, ctx_size=2048)
    assert usual.within({}, 512).ctx_size == 512
    assert usual.within({}, 4096).ctx_size == 2048
    assert usual.within({}, 0).ctx_size == 2048
    given = EngineOptions.of({"ctx_size": 2048}, ctx_size=512)
    assert given.within({"ctx_size": 2048}, 512).ctx_size == 2048
