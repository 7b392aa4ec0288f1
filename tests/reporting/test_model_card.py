"""The model card of a pruned file: true to the file, and safe to publish."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reap
from helpers.gguf_builder import build_moe
from helpers.identity_models import N_EXPERTS, bf16, model_with, routers
from helpers.profiles import make_profile
from reap.errors import FormatError, MismatchError, UsageError
from reap.evaluation.sweep_table import SweepRow
from reap.reporting.card import escape
from reap.scores.profile import Profile


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build_moe(tmp_path / "source.gguf")


def profile_of(path: Path, **calibration: object) -> Profile:
    info = reap.inspect(path)
    model = {"fingerprint": info.fingerprint, "n_experts_used": info.n_experts_used, "name": info.name}
    record = {"files": ["/home/somebody/calib_1.jsonl"], "sha256": ["ab" * 32], "samples": 3, "tokens": 1234}
    return make_profile(
        1, layers=info.moe_layers, n_experts=info.n_experts, domains=("code", "prose"), model=model, calibration=record
    )


@pytest.fixture
def pruned(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    reap.prune(source, path, reap.plan(profile_of(source), keep=0.5))
    return path


def test_the_card_says_what_the_file_says(source: Path, pruned: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "e.json"
    figures = {"perplexity": 12.34567, "stderr": 0.51, "tokens": 2805}
    files = {"model": "/x/small.gguf", "text": ["/x/held|out.txt"], "ctx_size": 512}
    compared = {"perplexity_ratio": 1.0504, "kl_mean": 0.0312, "top1": 0.914}
    loops = {"prompts": 8, "looping": 0.25, "reference_looping": 0.125, "repeated": 0.4}
    evaluation.write_text(json.dumps(files | figures | compared | {"domains": {"c": figures}, "loops": loops}))
    info, before = reap.inspect(pruned), reap.inspect(source)
    unknown: dict[str, Any] = dict.fromkeys(
        ("stderr", "kl_mean", "top1", "loss_increase", "loss_increase_stderr"), math.nan
    )
    same = {"seed": None, "bytes": 100, "domain": None, "tokens": 1} | unknown
    keeps = [("baseline", before.n_experts), ("random", info.n_experts), ("reap", 1)]
    table = reap.Sweep(
        rows=tuple(SweepRow(metric=metric, keep=keep, perplexity=99.5, **same) for metric, keep in keeps)
    )
    output = tmp_path / "MODEL_CARD.md"
    made = reap.model_card(
        pruned,
        output,
        source=source,
        profile=profile_of(source),
        evaluations=[evaluation],
        sweep=table,
        base_model="somebody/model",
        license="mit",
    )
    text = made.read_text(encoding="utf-8")
    assert text.startswith('---\nbase_model: "somebody/model"\nlicense: "mit"\n')
    assert f"{before.n_experts - info.n_experts} of {before.n_experts} experts, 50%" in text
    assert before.fingerprint in text
    assert "calib\\_1.jsonl, 1,234 tokens in the domains code, prose" in text
    assert "/home/somebody" not in text
    assert "ab" * 32 in text
    assert "| small.gguf | held\\|out.txt | 12.346 ± 0.51 | 1.05 | 0.0312 | 91.4% | 512 | 2,805 |" in text
    assert "| small.gguf | c | 12.346 ± 0.51 | – | – | – | 512 | 2,805 |" in text
    assert (
        "Of 8 greedy continuations by small.gguf, 25% ended in a loop; of the reference's 12%. 40% of its runs" in text
    )
    assert "| random | " in text
    assert "| reap | 1 |" not in text
    for layer in info.moe_layers:
        kept = (info.provenance or {})[f"reap.kept.{layer}"]
        line = next(line for line in text.splitlines() if line.startswith(f"| {layer} |"))
        assert ids(line.split("|")[3]) == kept
        assert sorted(ids(line.split("|")[2]) + kept) == list(range(before.n_experts))


def ids(cell: str) -> list[int]:
    found: list[int] = []
    for part in cell.strip().split(", "):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def test_the_card_goes_by_the_pruned_model_s_own_name(source: Path, pruned: Path, tmp_path: Path) -> None:
    """general.name says what is left; where --keep-label left it the source's, the file's name tells the two apart."""
    text = reap.model_card(pruned, tmp_path / "1.md", source=source).read_text(encoding="utf-8")
    assert "\n# tiny \\(REAP, 4 of 8 experts\\)\n" in text
    plan = reap.plan(profile_of(source), keep=0.5)
    reap.prune(source, tmp_path / "labelled.gguf", plan, keep_label=True)
    text = reap.model_card(tmp_path / "labelled.gguf", tmp_path / "4.md", source=source).read_text(encoding="utf-8")
    assert "\n# labelled\n" in text
    assert "\n# small\n" in reap.model_card(pruned, tmp_path / "2.md").read_text(encoding="utf-8")
    reap.prune(source, tmp_path / "named.gguf", plan, name="Half of it")
    text = reap.model_card(tmp_path / "named.gguf", tmp_path / "3.md", source=source).read_text(encoding="utf-8")
    assert "\n# Half of it\n" in text


def test_what_was_judged_virtually_is_the_pruned_model_s(source: Path, pruned: Path, tmp_path: Path) -> None:
    plans = [reap.plan(profile_of(source), keep=0.5), reap.plan(profile_of(source), keep=0.5, metric="frequency")]
    assert plans[0].experts_sha256 != plans[1].experts_sha256
    for number, plan in enumerate(plans):
        record = {"metric": plan.metric, "keep": plan.keep, "n_experts": 8, "experts_sha256": plan.experts_sha256}
        figures = {"perplexity": 12.0, "stderr": 0.5, "tokens": 2805, "ctx_size": 512}
        document = {"model": "/x/whole.gguf", "text": ["t.txt"], "plan": record, **figures}
        (tmp_path / f"{number}.json").write_text(json.dumps(document))
    evaluations = [tmp_path / "0.json", tmp_path / "1.json"]
    text = reap.model_card(pruned, tmp_path / "c.md", evaluations=evaluations).read_text(encoding="utf-8")
    assert "| small.gguf, before it was written | t.txt | 12 ± 0.5" in text
    assert f"| whole.gguf, as if pruned to {plans[1].keep} by frequency | t.txt |" in text


def test_without_figures_the_card_says_so(pruned: Path, tmp_path: Path) -> None:
    text = reap.model_card(pruned, tmp_path / "c.md").read_text(encoding="utf-8")
    assert "None were given: this model was not evaluated" in text
    assert "base_model" not in text


def test_what_makes_no_card(source: Path, pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not say what was removed"):
        reap.model_card(source, tmp_path / "c.md")
    with pytest.raises(MismatchError, match="is not the model that"):
        reap.model_card(pruned, tmp_path / "c.md", source=build_moe(tmp_path / "o.gguf", n_experts=16))
    with pytest.raises(MismatchError, match="the profile is not of the model"):
        reap.model_card(pruned, tmp_path / "c.md", profile=make_profile())
    (tmp_path / "e.json").write_text(
        '{"model": "m", "text": "t", "perplexity": "low", "stderr": 1, "ctx_size": 4, "tokens": 3}'
    )
    with pytest.raises(FormatError, match="perplexity should be a number"):
        reap.model_card(pruned, tmp_path / "c.md", evaluations=[tmp_path / "e.json"])
    assert not (tmp_path / "c.md").exists()


def test_strangers_texts_stay_words(source: Path, tmp_path: Path) -> None:
    name = "# x\n---\n[a](b) <script>alert(1)</script> | `c` *d* &amp; ${e}"
    reap.prune(source, tmp_path / "p.gguf", reap.plan(profile_of(source), keep=0.5), name=name)
    text = reap.model_card(tmp_path / "p.gguf", tmp_path / "c.md", base_model='a"\nlicense: "x').read_text(
        encoding="utf-8"
    )
    assert "<script>" not in text
    assert text.count("\n---\n") == 1
    assert 'base_model: "a\\"\\nlicense: \\"x"' in text
    assert escape("a_b | c\nd") == "a\\_b \\| c d"


def profile_with_routers(path: Path) -> Profile:
    info = reap.inspect(path)
    return make_profile(1, layers=info.moe_layers, n_experts=info.n_experts, model=info.record())


def sweep_of(profile: Profile) -> reap.Sweep:
    row = SweepRow(
        metric="baseline", keep=N_EXPERTS, perplexity=9.0, seed=None, bytes=1, domain=None, tokens=1,
        stderr=1.0, kl_mean=0.0, top1=1.0, loss_increase=0.0, loss_increase_stderr=0.0,
    )  # fmt: skip
    return reap.Sweep(rows=(row,), model=dict(profile.model))


def test_siblings_with_one_fingerprint_are_told_apart_by_their_routers(tmp_path: Path) -> None:
    source = model_with(tmp_path / "source.gguf", routers())
    half = model_with(tmp_path / "half.gguf", [bf16(rows) for rows in routers()])
    siblings = [
        model_with(tmp_path / "sibling.gguf", routers(seed=77)),
        model_with(tmp_path / "permuted.gguf", [rows[::-1].copy() for rows in routers()]),
    ]
    small, output = tmp_path / "small.gguf", tmp_path / "card.md"
    reap.prune(source, small, reap.plan(profile_with_routers(source), keep=4))
    for other in (source, half):
        profile = profile_with_routers(other)
        reap.model_card(small, output, source=other, profile=profile, sweep=sweep_of(profile), force=True)
    for other in siblings:
        assert reap.inspect(other).fingerprint == reap.inspect(source).fingerprint
        profile = profile_with_routers(other)
        for given in ({"source": other}, {"profile": profile}, {"sweep": sweep_of(profile)}):
            with pytest.raises(MismatchError, match="was pruned from: the routers of 2 of 2 layers differ"):
                reap.model_card(small, output, **given, force=True)  # type: ignore[arg-type]


def test_the_checkpoint_s_profile_is_known_by_its_routers(tmp_path: Path) -> None:
    source = model_with(tmp_path / "source.gguf", routers())
    of_file = profile_with_routers(source)
    shared = {"routers": of_file.model["routers"], "fingerprint": f"hf-sha256:{'ab' * 32}"}
    of_checkpoint = replace(of_file, model={**shared, "n_experts_used": of_file.model["n_experts_used"]})
    reap.prune(source, tmp_path / "small.gguf", reap.plan(of_checkpoint, keep=4))
    reap.model_card(tmp_path / "small.gguf", tmp_path / "card.md", profile=of_checkpoint)
    sibling = model_with(tmp_path / "sibling.gguf", routers(seed=77))
    other = replace(of_checkpoint, model={**shared, "routers": profile_with_routers(sibling).model["routers"]})
    with pytest.raises(MismatchError, match="the routers of"):
        reap.model_card(tmp_path / "small.gguf", tmp_path / "card.md", profile=other, force=True)


def test_a_file_cut_by_another_model_s_profile_says_so_on_its_card_and_page(tmp_path: Path) -> None:
    source = model_with(tmp_path / "source.gguf", routers())
    other = model_with(tmp_path / "sibling.gguf", routers(seed=77))
    profile = profile_with_routers(other)
    reap.prune(source, tmp_path / "small.gguf", reap.plan(profile, keep=4), allow_mismatch=True)
    card = reap.model_card(tmp_path / "small.gguf", tmp_path / "card.md", source=source, profile=profile)
    assert "**The experts were chosen by a profile of another model**: the routers of 2 of 2" in card.read_text()
    both = reap.merge([replace(profile_with_routers(source), calibration={}), profile], allow_mismatch=True)
    reap.report(both, tmp_path / "page.html", model=other)  # of no model alone, as the profile says
    with pytest.raises(MismatchError) as error:
        reap.report(profile, tmp_path / "page.html", model=source, force=True)
    assert "allow-mismatch" not in str(error.value)  # which `reap report` does not have
