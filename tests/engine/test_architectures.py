"""Every architecture of llama.cpp that has experts and that its own test suite can write: profile, prune, load,
compare.

Each model is run in a process of its own (`architecture_check.py`), two at a time; a test waits for its model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers.architecture_check import Outcome, check
from helpers.architectures import (
    DENSE,
    GROUPED,
    MOE,
    NOT_GENERATED,
    PREDICTING,
    REFUSED,
    SHARES_CODE,
    WITH_PREDICTION,
    all_but,
    has_experts,
    write_models,
)
from helpers.engine_architectures import with_experts
from helpers.llama_tools import ROOT, find_tool, missing, require_tool, source_directory

SUPPORTED = [name for name in MOE if name not in REFUSED]
NEVER_REFUSED = {
    "qwen3moe",
    "nemotron_h_moe",
    "deepseek2",
    "llama",
    "gpt-oss",
    "olmoe",
    "glm4moe",
}  # llama: Mixtral; deepseek2: V3


@pytest.fixture(scope="session")
def outcome_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Outcome]]:
    for program in ("test-llama-archs", "reap-dump-nodes"):
        require_tool(program)
    selected = [
        item.callspec.params["name"]
        for item in request.session.items
        if "outcome_of" in getattr(item, "fixturenames", ())
    ]
    directory = tmp_path_factory.mktemp("architectures")
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(check, name, directory) for name in dict.fromkeys(selected)}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", [*SUPPORTED, *(name + WITH_PREDICTION for name in PREDICTING)])
def test_profiles_and_prunes(name: str, outcome_of: Callable[[str], Outcome]) -> None:
    outcome = outcome_of(name)
    assert outcome.problems == []
    assert outcome.refusal == ""
    assert outcome.profiles
    assert outcome.exact
    assert outcome.loads_pruned
    assert outcome.as_removed
    assert outcome.virtual
    assert outcome.n_tokens >= 64


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name_with_the_reason(name: str, outcome_of: Callable[[str], Outcome]) -> None:
    outcome = outcome_of(name)
    assert outcome.problems == []
    assert outcome.profiles is None
    assert outcome.refusal.endswith(f"{name} models with experts are not supported: {REFUSED[name].replace('`', '')}")


def test_the_lists_hold_together() -> None:
    assert len(REFUSED) <= 5
    assert set(REFUSED) <= set(MOE)
    assert not NEVER_REFUSED & set(REFUSED)
    assert {*GROUPED, *PREDICTING} <= set(MOE)
    everything = [*MOE, *DENSE, *NOT_GENERATED]
    assert len(everything) == len(set(everything))
    assert set(everything) >= NEVER_REFUSED


def test_the_program_writes_no_other_model_with_experts(tmp_path: Path) -> None:
    """A new llama.cpp with new architectures fails here, and names them."""
    written = write_models(require_tool("test-llama-archs"), all_but(MOE), tmp_path)
    assert len(written) > 50
    assert {path.stem for path in written if has_experts(path)} == set()
    assert {path.stem for path in written if path.stem.endswith("-moe")} == {f"{name}-moe" for name in DENSE}
    assert not {path.stem.rsplit("-", 1)[0] for path in written if path.stem.endswith("-moe")} & set(NOT_GENERATED)
    for path in written:
        path.unlink()


def test_no_architecture_with_experts_is_forgotten() -> None:
    """Every architecture whose code in llama.cpp loads tensors of experts is in a list of ours."""
    source = source_directory()
    if source is None:
        missing("the sources of llama.cpp's programs are not known")
    assert find_tool("test-llama-archs")
    found = with_experts(source)
    assert len(found) > 60
    # Granite Switch, which llama.cpp's program leaves out as well, loads no experts in this version
    assert found == {*MOE, *DENSE, *NOT_GENERATED, *SHARES_CODE} - {"graniteswitch"}


def test_the_documentation_names_every_architecture() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    for name in (*MOE, *DENSE, *NOT_GENERATED):
        assert f"`{name}`" in text, name
