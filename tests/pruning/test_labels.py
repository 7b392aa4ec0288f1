"""What a pruned file calls itself: hubs and apps show general.name and general.size_label."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf.utility import size_label

import reap
from gguf import GGUFReader, GGUFValueType
from helpers.gguf_builder import build_moe
from reap.gguf.model_info import inspect
from reap.pruning.gguf import size_after
from reap.pruning.header import new_size_label, rounded
from reap.scores.plan import PrunePlan

LABELS = {"general.size_label": (GGUFValueType.STRING, "8x1.8B")}


def pruned(source: Path, keep: int, output: Path, **changes: object) -> dict[str, object]:
    info = inspect(source)
    layers = dict.fromkeys(info.moe_layers, tuple(range(keep)))
    plan = PrunePlan({"n_experts": info.n_experts, "fingerprint": info.fingerprint}, "reap", keep, layers)
    reap.prune(source, output, plan, **changes)
    assert output.stat().st_size == size_after(source, plan, **changes)
    return {key: pair.contents() for key, pair in GGUFReader(output).fields.items() if key.startswith("general.")}


def test_name_and_size_say_what_is_left(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", name="Tiny 8x1.8B", keys=LABELS)
    found = pruned(source, 5, tmp_path / "five.gguf")
    assert found["general.name"] == "Tiny 8x1.8B (REAP, 5 of 8 experts)"
    assert found["general.size_label"] == "5x1.8B"
    again = pruned(tmp_path / "five.gguf", 3, tmp_path / "three.gguf")
    assert again["general.name"] == "Tiny 8x1.8B (REAP, 3 of 8 experts)"
    assert again["general.size_label"] == "3x1.8B"


def test_labels_stay_when_asked_and_where_nothing_was_removed(tmp_path: Path) -> None:
    source = build_moe(tmp_path / "m.gguf", name="Tiny", keys=LABELS)
    kept = pruned(source, 5, tmp_path / "a.gguf", keep_label=True)
    assert (kept["general.name"], kept["general.size_label"]) == ("Tiny", "8x1.8B")
    whole = pruned(source, 8, tmp_path / "b.gguf")
    assert (whole["general.name"], whole["general.size_label"]) == ("Tiny", "8x1.8B")
    named = pruned(source, 5, tmp_path / "c.gguf", name="Mine")
    assert (named["general.name"], named["general.size_label"]) == ("Mine", "5x1.8B")
    without = build_moe(tmp_path / "n.gguf")
    assert "general.size_label" not in pruned(without, 5, tmp_path / "d.gguf")


@pytest.mark.parametrize(
    ("label", "expected"),
    [("128x1.8B", "64x1.8B"), ("30B-A3B", "17B-A3B"), ("30B", "17B"), ("8x7B", "17B"), ("large", "17B")],
)
def test_the_forms_of_a_size(label: str, expected: str) -> None:
    assert new_size_label(label, 128, 64, 16_800_000_000) == expected


@pytest.mark.parametrize(
    "n_parameters", [9_100, 123_456, 1_800_000, 16_800_000_000, 235_000_000_000, 1_020_000_000_000]
)
def test_a_number_of_parameters_is_written_as_llama_cpp_s_converter_does(n_parameters: int) -> None:
    assert rounded(n_parameters) == size_label(n_parameters, 0, 0, 0)
