"""docs/architecture-survey.md has a row for every architecture with experts that the engine or the library has: what is
new since it was written fails here by name."""

from __future__ import annotations

import pytest

from helpers.engine_architectures import converted_classes, families_with_experts, with_experts
from helpers.llama_tools import missing, source_directory
from helpers.paths import ROOT

PAGE = ROOT / "docs" / "architecture-survey.md"


def test_every_architecture_of_the_engine_has_a_row() -> None:
    source = source_directory()
    if source is None:
        missing("the sources of llama.cpp's programs are not known")
    page = PAGE.read_text(encoding="utf-8")
    found = with_experts(source)
    assert len(found) > 60
    assert [name for name in sorted(found) if f"| `{name}` |" not in page] == []
    assert "**NEW**" not in page


def test_every_family_of_transformers_has_a_row() -> None:
    found = families_with_experts()
    if not found:
        pytest.skip("transformers is not installed")
    page = PAGE.read_text(encoding="utf-8")
    assert len(found) > 30
    assert [name for name in found if f"| `{name}` |" not in page] == []


def test_the_converter_s_classes_are_found() -> None:
    folder = ROOT / "python" / "reap" / "_converter"
    if not folder.is_dir():
        pytest.skip("the converter comes with the native build")
    assert {"Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "NemotronHForCausalLM"} <= converted_classes(folder)
