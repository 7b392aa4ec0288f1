"""The wrong model is not cut: what tells two models apart, in every call that takes a plan or a profile."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import reap
from gguf import GGMLQuantizationType, GGUFValueType
from helpers.identity_models import N_EXPERTS, model_with, routers
from helpers.profiles import random_sums
from reap.cli import main
from reap.cli.app import app
from reap.errors import MismatchError, ReapWarning
from reap.gguf.model_info import inspect
from reap.pruning.compatibility import check_plan, plan_warnings
from reap.scores.plan import PrunePlan
from reap.scores.profile import Profile

FLAG = GGUFValueType.BOOL
NUMBER = GGUFValueType.UINT32


def profile_of(path: Path, seed: int = 0, **model: Any) -> Profile:
    sums = random_sums(np.random.default_rng(seed), 2, N_EXPERTS)
    return Profile.from_sums(layers=[0, 1], **sums, model={**inspect(path).record(), **model})


def older(profile: Profile, fingerprint: str) -> Profile:
    """As a release without parts and sketches wrote it."""
    model = {key: value for key, value in profile.model.items() if key not in ("identity", "routers")}
    return replace(profile, model=model | {"fingerprint": fingerprint})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_with(tmp_path / "model.gguf", routers())


@pytest.fixture
def permuted(tmp_path: Path) -> Path:
    return model_with(tmp_path / "permuted.gguf", [rows[::-1].copy() for rows in routers()])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_a_plan_serves_every_quantisation_of_the_routers(model: Path, tmp_path: Path, kind: str) -> None:
    other = model_with(tmp_path / "other.gguf", routers(), GGMLQuantizationType[kind])
    made = reap.plan(profile_of(model).save(tmp_path / "p.json"), keep=4)
    report = reap.prune(other, tmp_path / "small.gguf", made.save(tmp_path / "plan.json"))
    assert not [warning for warning in report.warnings if "router" in warning]
    assert "reap.mismatch" not in (inspect(tmp_path / "small.gguf").provenance or {})


def test_who_gave_a_profile_is_told_of_a_profile(
    model: Path, permuted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_other, text = tmp_path / "p.json", tmp_path / "t.jsonl"
    profile_of(permuted).save(of_other)
    text.write_text('{"tokens": [1, 2, 3]}\n')
    calls: list[list[Any]] = [
        ["sweep", model, of_other, text],
        ["plan", of_other, "--keep", 4, "--refine", "1s", "--model", model, "--text", text],
        ["plan", of_other, "--keep", 4, "--model", model],
        ["prune", model, "--profile", of_other, "--keep", 4, "-o", tmp_path / "x.gguf"],
    ]
    for call in calls:
        assert main([str(word) for word in call]) == 2
        assert "the profile is of a model (tiny) other than " in " ".join(capsys.readouterr().err.split())
    with pytest.raises(MismatchError, match="the profile is of a model"):
        reap.sweep(model, of_other, text)


def test_permuted_routers_are_refused_by_prune(model: Path, permuted: Path, tmp_path: Path) -> None:
    made = reap.plan(profile_of(model), keep=4)
    with pytest.raises(MismatchError, match=r"2 of 2 layers differ, and hold the same rows in another order.*by 1\.\d"):
        reap.prune(permuted, tmp_path / "small.gguf", made, dry_run=True)
    with pytest.raises(MismatchError, match="--allow-mismatch"):
        reap.prune(permuted, tmp_path / "small.gguf", made, force=True)
    assert not (tmp_path / "small.gguf").exists()


def test_a_mismatch_that_is_allowed_is_recorded(model: Path, permuted: Path, tmp_path: Path) -> None:
    made = reap.plan(profile_of(model), keep=4)
    report = reap.prune(permuted, tmp_path / "small.gguf", made, allow_mismatch=True)
    assert any("of a model other than" in warning for warning in report.warnings)
    said = (inspect(tmp_path / "small.gguf").provenance or {})["reap.mismatch"]
    assert "the routers of 2 of 2 layers differ" in said


@pytest.mark.parametrize("seed", [10, 11])
def test_a_sibling_is_refused(model: Path, tmp_path: Path, seed: int) -> None:
    sibling = model_with(tmp_path / "sibling.gguf", routers(seed=seed), GGMLQuantizationType.Q8_0)
    with pytest.raises(MismatchError, match="F32 and Q8_0 accounts for at most"):
        reap.prune(sibling, tmp_path / "small.gguf", reap.plan(profile_of(model), keep=4))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"tokenizer": "words", "n_vocab": 300, "keys": {"tokenizer.ggml.eos_token_id": (NUMBER, 7)}},
            "eos_token_id is",
        ),
        (
            {"tokenizer": "words", "n_vocab": 300, "keys": {"tokenizer.ggml.add_bos_token": (FLAG, False)}},
            "add_bos_token is",
        ),
        ({"n_vocab": 301}, "tokenizer.ggml.tokens differs"),
        ({"n_used": 3}, "expert_used_count is 2 in the plan and 3 in other.gguf"),
        ({"architecture": "olmoe"}, "general.architecture is qwen3moe"),
        ({"n_ff": 64}, "the shapes of tensors differ"),
    ],
)
def test_the_message_names_what_differs(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    model = model_with(tmp_path / "model.gguf", routers(), tokenizer="words", n_vocab=300)
    other = model_with(tmp_path / "other.gguf", routers(), **{"tokenizer": "words", "n_vocab": 300, **changes})
    with pytest.raises(MismatchError, match=named):
        reap.prune(other, tmp_path / "small.gguf", reap.plan(profile_of(model), keep=4))


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer.ggml.padding_token_id": (NUMBER, 5)},
        {"tokenizer.ggml.add_bos_token": (FLAG, True)},  # the default of this tokenizer
        {"tokenizer.ggml.add_eos_token": (FLAG, False)},
        {"tokenizer.ggml.add_space_prefix": (FLAG, True)},
        {"tokenizer.ggml.eot_token_id": (NUMBER, 9)},
        {"tokenizer.chat_template": (GGUFValueType.STRING, "{{ messages }}")},
    ],
    ids=str,
)
def test_what_no_score_depends_on_makes_no_other_model(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = model_with(tmp_path / "model.gguf", routers(), tokenizer="words", n_vocab=300)
    other = model_with(tmp_path / "other.gguf", routers(), tokenizer="words", n_vocab=300, keys=keys)
    assert inspect(model).fingerprint == inspect(other).fingerprint
    assert check_plan(inspect(other), reap.plan(profile_of(model), keep=4)) is None


# ---- files of older releases


def test_a_plan_of_an_older_release_is_compared_by_what_it_has(model: Path, permuted: Path, tmp_path: Path) -> None:
    (fingerprint,) = inspect(model).older_fingerprints
    assert fingerprint != inspect(model).fingerprint
    made = reap.plan(older(profile_of(model), fingerprint), keep=4)
    saved = PrunePlan.load(made.save(tmp_path / "plan.json"))
    assert check_plan(inspect(model), saved) is None
    assert any("no sketch of the routers" in warning for warning in plan_warnings(inspect(model), saved))
    assert any("bytes differ" in warning for warning in plan_warnings(inspect(permuted), saved))
    with pytest.raises(MismatchError, match="fingerprint sha256:1"):
        check_plan(inspect(model), reap.plan(older(profile_of(model), "sha256:1"), keep=4))


def test_profiles_of_two_releases_are_compared_by_what_they_have(model: Path) -> None:
    first, second = profile_of(model, 1), older(profile_of(model, 2), "sha256:2")
    with pytest.warns(ReapWarning, match="an older release of reap"):
        merged = reap.merge([second, first])
    assert merged.model["identity"] == first.model["identity"]
    with pytest.raises(MismatchError, match="n_experts_used"):
        reap.merge([first, replace(second, model=second.model | {"n_experts_used": 3})])


# ---- merge, compare, report, sweep tables


def test_profiles_of_other_routers_do_not_add_up(model: Path, permuted: Path, tmp_path: Path) -> None:
    first, second = profile_of(model, 1), profile_of(permuted, 2)
    with pytest.raises(MismatchError, match="another order"):
        reap.merge([first, second])
    with pytest.raises(MismatchError, match="another order"):
        reap.compare(first, second)
    with pytest.warns(ReapWarning, match="another order"):
        reap.compare(first, second, allow_mismatch=True)
    merged = reap.merge([first, second], allow_mismatch=True)
    assert "another order" in merged.model["mismatch"]
    made = reap.plan(Profile.load(merged.save(tmp_path / "m.json")), keep=4)
    report = reap.prune(model, tmp_path / "small.gguf", made)
    assert any("profiles of different models" in warning for warning in report.warnings)
    assert "another order" in (inspect(tmp_path / "small.gguf").provenance or {})["reap.mismatch"]


def test_merging_quantisations_keeps_the_sketch(model: Path, tmp_path: Path) -> None:
    quantised = model_with(tmp_path / "q.gguf", routers(), GGMLQuantizationType.Q8_0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = reap.merge([profile_of(model, 1), profile_of(quantised, 2)])
    assert merged.model["routers"] == profile_of(model).model["routers"]


def test_a_report_refuses_what_is_of_another_model(model: Path, permuted: Path, tmp_path: Path) -> None:
    profile = profile_of(model)
    with pytest.raises(MismatchError, match="routers of 2 of 2"):
        reap.report(profile, tmp_path / "r.html", model=permuted)
    with pytest.raises(MismatchError, match="routers of 2 of 2"):
        reap.report(profile, tmp_path / "r.html", plan=reap.plan(profile_of(permuted), keep=4))


def test_what_runs_a_model_refuses_a_plan_of_another_one(model: Path, permuted: Path, tmp_path: Path) -> None:
    """Before the engine sees a file."""
    profile, text = profile_of(model), tmp_path / "text.txt"
    text.write_text("some words")
    with pytest.raises(MismatchError, match="another order"):
        reap.evaluate(permuted, text, plan=reap.plan(profile, keep=4))
    with pytest.raises(MismatchError, match="another order"):
        reap.sweep(permuted, profile, text, keep=4, metric="reap")
    with pytest.raises(MismatchError, match="another order"):
        reap.refine(permuted, profile, text, keep=4)


# ---- the command line


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_option_of_prune_and_merge(model: Path, permuted: Path, tmp_path: Path) -> None:
    profile_of(model, 1).save(tmp_path / "a.json")
    profile_of(permuted, 2).save(tmp_path / "b.json")
    call = ["prune", permuted, "--profile", tmp_path / "a.json", "--keep", "4", "-o", tmp_path / "s.gguf"]
    assert isinstance(run(*call, "--force").exception, MismatchError)
    assert run(*call, "--allow-mismatch", "--json").exit_code == 0
    assert "reap.mismatch" in (inspect(tmp_path / "s.gguf").provenance or {})
    call = ["merge", tmp_path / "a.json", tmp_path / "b.json", "-o", tmp_path / "m.json"]
    assert isinstance(run(*call).exception, MismatchError)
    assert run(*call, "--allow-mismatch").exit_code == 0
    assert "mismatch" in json.loads((tmp_path / "m.json").read_text())["model"]
    assert isinstance(run("compare", tmp_path / "a.json", tmp_path / "b.json").exception, MismatchError)


@pytest.mark.parametrize("command", ["prune", "evaluate", "sweep", "plan", "merge", "compare", "hf prune"])
def test_every_command_that_compares_has_the_option(command: str) -> None:
    found = run(*command.split(), "--help")
    assert "--allow-mismatch" in found.output
