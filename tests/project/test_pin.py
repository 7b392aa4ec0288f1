"""A bump of the pin that renames a node or changes the loader is caught, and by name (vendor/llama.cpp/source_facts.py,
bump.py)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers.paths import ROOT

VENDOR = ROOT / "vendor" / "llama.cpp"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reap_{name}", VENDOR / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


source_facts, bump = load_script("source_facts"), load_script("bump")
TABLE = source_facts.TABLE


def pinned_tree() -> Path | None:
    """The source that reap was built from, where it is still there."""
    if own := os.environ.get("REAP_LLAMA_CPP_SOURCE"):
        return Path(own)
    found = [
        match[1]
        for path in sorted(ROOT.glob("build/*/CMakeCache.txt"))
        for match in [re.search(r"^llama\.cpp_SOURCE_DIR:\w+=(.+)$", path.read_text(), re.MULTILINE)]
        if match
    ]
    pin = bump.read_pin(VENDOR / "pin.cmake")
    name = f"llama.cpp-{pin['VERSION']}-{pin['SHA256'][:12]}"
    candidates = [Path(path) for path in found] + [Path(bump.fetch.xdg_cache()) / name]
    return next((path for path in candidates if path.name == name and path.is_dir()), None)


TREE = pinned_tree()
needs_tree = pytest.mark.skipif(
    TREE is None and not os.environ.get("CI"), reason="the pinned llama.cpp is not unpacked here"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is read of the pinned tree, to break."""
    assert TREE is not None, "CI builds from the pinned tree, so it must be there"
    shutil.copytree(TREE / "src", tmp_path / "tree" / "src")
    return tmp_path / "tree"


def found_in(tree: Path) -> list[str]:
    return source_facts.problems(source_facts.read_facts(tree))


@needs_tree
def test_the_pinned_tree_names_everything_as_reap_does() -> None:
    assert TREE is not None
    facts = source_facts.read_facts(TREE)
    assert {"ffn_moe_topk", "ffn_moe_weights_norm", "ffn_moe_down"} <= facts.nodes
    assert {"weight", "bias", "scale"} <= facts.tensors["ffn_down_exps"]
    assert "qwen3moe" in facts.architectures
    assert source_facts.problems(facts) == []


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path}: no {old}: this test must follow"
    path.write_text(text.replace(old, new), encoding="utf-8")


@needs_tree
@pytest.mark.parametrize("name", sorted(source_facts.looked_for()) or ["none"])
def test_a_renamed_node_is_named(name: str, tree: Path) -> None:
    """Every node that reap's sources look for, renamed in turn."""
    for path in sorted((tree / "src").rglob("*.cpp")):
        text = path.read_text(encoding="utf-8")
        if f'"{name}"' in text:
            path.write_text(text.replace(f'"{name}"', '"node_with_a_new_name"'), encoding="utf-8")
    assert any(
        f"looks for the node '{name}', which llama.cpp's graph no longer has" in sentence for sentence in found_in(tree)
    )


@needs_tree
def test_a_new_form_of_the_gate_is_named(tree: Path) -> None:
    replace_in(
        tree / "src" / "llama-graph.cpp",
        'cb(weights, "ffn_moe_weights_scaled", il);',
        'cb(weights, "ffn_moe_weights_scaled", il);\n cb(weights, "ffn_moe_weights_sharpened", il);',
    )
    assert found_in(tree) == [
        "llama.cpp's graph has a node 'ffn_moe_weights_sharpened': ids, a gate or an output that csrc/node_names.cpp"
        " does not know"
    ]


@needs_tree
def test_a_tensor_that_the_loader_renames_is_named(tree: Path) -> None:
    replace_in(tree / "src" / "llama-arch.cpp", '"blk.%d.ffn_down_exps"', '"blk.%d.ffn_moe_down_w"')
    sentences = found_in(tree)
    assert f"{TABLE} knows blk.N.ffn_down_exps, which llama.cpp's loader no longer asks for" in sentences
    assert f"llama.cpp's loader asks for blk.N.ffn_moe_down_w.weight, which {TABLE} does not know" in sentences


@needs_tree
def test_a_new_tensor_of_the_experts_is_named(tree: Path) -> None:
    replace_in(
        tree / "src" / "llama-model.cpp",
        'LLM_TENSOR_FFN_DOWN_EXPS, "input_scale"',
        'LLM_TENSOR_FFN_DOWN_EXPS, "zero_point"',
    )
    assert found_in(tree) == [
        f"llama.cpp's loader asks for blk.N.ffn_down_exps.zero_point, which {TABLE} does not know"
    ]


@needs_tree
def test_a_key_that_is_renamed_is_named(tree: Path) -> None:
    replace_in(tree / "src" / "llama-arch.cpp", '"%s.expert_used_count"', '"%s.expert_active_count"')
    assert found_in(tree) == ["reap reads the key <architecture>.expert_used_count, which llama.cpp no longer has"]


@needs_tree
@needs_tree
def test_a_pre_tokenizer_that_is_renamed_is_named(tree: Path) -> None:
    replace_in(tree / "src" / "llama-vocab.cpp", '"joyai-llm"', '"joyous-llm"')
    gone, new = found_in(tree)
    assert "'joyai-llm', which llama.cpp's vocabulary no longer knows" in gone
    assert "knows the pre-tokenizer 'joyous-llm'" in new


def test_a_tree_that_is_written_otherwise_is_no_silent_success(tree: Path) -> None:
    path = tree / "src" / "llama-arch.cpp"
    path.write_text(path.read_text(encoding="utf-8").replace("LLM_ARCH_", "ARCH_"), encoding="utf-8")
    with pytest.raises(ValueError, match="no architectures found"):
        found_in(tree)


# ---- the script that bumps


@needs_tree
def test_what_changed_between_two_trees(tree: Path) -> None:
    assert TREE is not None
    before = source_facts.read_facts(TREE)
    replace_in(tree / "src" / "llama-arch.cpp", '"qwen3moe"', '"qwen9moe"')
    replace_in(tree / "src" / "llama-graph.cpp", '"ffn_moe_silu"', '"ffn_moe_swish"')
    assert bump.differences(before, source_facts.read_facts(tree)) == [
        "architectures: + qwen9moe; - qwen3moe",
        "nodes: + ffn_moe_swish; - ffn_moe_silu",
    ]


def test_the_pin_is_rewritten_in_place(tmp_path: Path) -> None:
    path = tmp_path / "pin.cmake"
    shutil.copy(VENDOR / "pin.cmake", path)
    old = bump.read_pin(path)
    bump.write_pin(path, {**old, "VERSION": "9.9.9", "SHA256": "a" * 64, "COMMIT": "b" * 40})
    assert bump.read_pin(path) == {
        "PACKAGE": old["PACKAGE"],
        "VERSION": "9.9.9",
        "SHA256": "a" * 64,
        "COMMIT": "b" * 40,
    }
    assert path.read_text().splitlines()[0] == (VENDOR / "pin.cmake").read_text().splitlines()[0]


def test_the_changelog_gets_a_line() -> None:
    pin = {"PACKAGE": "p", "VERSION": "9.9.9", "SHA256": "a" * 64, "COMMIT": "b" * 40}
    line = f"- llama.cpp is pinned to {'b' * 40} (from the source distribution of p 9.9.9)."
    made = bump.with_change("# Changes\n\n## 0.1.0\n\n- one\n", pin)
    assert made == f"# Changes\n\n## Unreleased\n\n{line}\n\n## 0.1.0\n\n- one\n"
    assert (
        bump.with_change("# Changes\n\n## Unreleased\n\n- one\n", pin)
        .splitlines()[4]
        .startswith("- llama.cpp is pinned to bbb")
    )


def test_the_changelog_names_the_pin() -> None:
    assert bump.read_pin(VENDOR / "pin.cmake")["COMMIT"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
