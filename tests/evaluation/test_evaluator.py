"""evaluate() against its own formula written out, against llama-perplexity, and virtually against the pruned file."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap
from helpers.architectures import write_model
from helpers.gguf_builder import build_moe
from helpers.llama_tools import require_tool
from reap.cli import main
from reap.engine.options import EngineOptions
from reap.engine.session import SessionTokenizer, open_session
from reap.errors import CalibrationError, MismatchError, ReapWarning, UnsupportedModelError, UsageError
from reap.evaluation.evaluate import evaluate
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.evaluation.quality_metrics import QualityMetrics
from reap.profiling.gguf import profile
from reap.progress import Progress
from reap.pruning.gguf import prune
from reap.scores.plan import PrunePlan
from reap.scores.plan import plan as make_plan

DATA = Path(reap.__file__).parent / "data"


@pytest.fixture(scope="module")
def model() -> Path:
    return next(DATA.glob("reap-demo-*.gguf"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluator") / "text.txt"
    path.write_text((DATA / "heldout" / "python.txt").read_text(encoding="utf-8")[:12_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plan(model: Path) -> PrunePlan:
    return make_plan(profile(model, DATA / "calibration.jsonl", max_tokens=2000, threads=1), keep=0.25)


@pytest.fixture(scope="module")
def small(model: Path, plan: PrunePlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    prune(model, path, plan)
    return path


def test_the_rule_written_out(model: Path, text: Path) -> None:
    found = evaluate(model, text, ctx_size=256, threads=1)
    session = open_session(model, EngineOptions(ctx_size=256, threads=1))
    tokens = SessionTokenizer(session).tokenize(text.read_text(encoding="utf-8"), add_special=True, parse_special=False)
    losses = []
    for start in range(0, len(tokens) - 255, 256):
        window = np.array(tokens[start : start + 256], dtype=np.int32)
        logits = session.logits(window, 0).astype(np.float64)
        for position in range(129, 256):  # ctx/2 + 1 to ctx - 1
            row = logits[position - 1]
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[window[position]])
    assert found.windows == len(tokens) // 256
    assert found.dropped_tokens == len(tokens) % 256
    assert found.tokens == len(losses) == found.windows * 127
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    expected_error = np.exp(np.mean(losses)) * np.std(losses) / np.sqrt(len(losses) - 1)
    assert found.stderr == pytest.approx(expected_error, rel=1e-4)


def run_perplexity(pattern: str, *options: object) -> re.Match[str]:
    """What llama-perplexity prints, where it matches."""
    command = [str(part) for part in (require_tool("llama-perplexity"), *options)]
    for _ in range(
        3
    ):  # its log is written by a thread, and on a busy machine the last lines were seen to be missing at its exit
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        printed = done.stdout + done.stderr
        match = re.search(pattern, printed, re.DOTALL)
        if match is not None:
            return match
    pytest.fail(printed[-500:])


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_the_same_as_llama_perplexity(model: Path, text: Path, flash_attn: str) -> None:
    same = ("-m", model, "-f", text, "-c", "512", "-b", "512", "-ub", "512", "-t", "1", "-fa", flash_attn)
    match = run_perplexity(r"PPL = ([\d.]+) \+/- ([\d.]+)", *same)
    found = evaluate(model, text, ctx_size=512, threads=1, flash_attn=flash_attn)
    assert f"{found.perplexity:.4f}" == match[1]
    assert found.stderr == pytest.approx(float(match[2]), abs=1e-4)


def test_agreement_is_that_of_llama_perplexity(model: Path, small: Path, text: Path, tmp_path: Path) -> None:
    """Its base file holds log-probabilities above -16 in steps of up to 2.4e-4 nats, ours 32-bit floats: so much may
    the figures differ."""
    same = ("-f", text, "-c", "512", "-b", "512", "-ub", "512", "-t", "1", "-fa", "off")
    run_perplexity("PPL = ", "-m", model, *same, "--kl-divergence-base", tmp_path / "base")
    number = r" *(-?[\d.]+)"
    names = ("Mean PPL\\(Q\\)", "Mean PPL\\(Q\\)/PPL\\(base\\)", "Mean    KLD", "Maximum KLD", "99.0%   KLD",
    "95.0%   KLD",
             "90.0%   KLD", "Median  KLD", "Same top p")  # fmt: skip
    pattern = ".*".join(f"{name} *:{number}(?: ±{number})?" for name in names)
    match = run_perplexity(pattern, "-m", small, *same, "--kl-divergence-base", tmp_path / "base", "--kl-divergence")
    theirs = {name: (float(match[2 * index + 1]), match[2 * index + 2]) for index, name in enumerate(names)}

    found = evaluate(small, text, reference=model, threads=1, flash_attn="off")
    assert found.perplexity == pytest.approx(theirs[names[0]][0], rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(theirs[names[1]][0], rel=1e-4)
    # ours allows for what the tokens of a window have in common, so it is the larger
    assert found.ratio_stderr >= float(theirs[names[1]][1]) * 0.99
    ours = (found.kl_mean, found.kl_max, found.kl_p99, found.kl_p95, found.kl_p90, found.kl_median)
    for name, value in zip(names[2:8], ours, strict=True):
        assert value == pytest.approx(theirs[name][0], abs=2.4e-4, rel=1e-3), name
    assert found.kl_stderr >= float(theirs[names[2]][1]) * 0.99
    assert 100 * found.top1 == pytest.approx(theirs["Same top p"][0], abs=0.1)
    assert 100 * found.top1_stderr == pytest.approx(float(theirs["Same top p"][1]), abs=0.01)


# ---- virtually, and beside a reference

COMPARED = [field.name for field in fields(QualityMetrics) if field.name not in ("tokens", "kl_rest")]


def test_a_plan_gives_the_figures_of_the_pruned_file(tmp_path: Path) -> None:
    model, small = build_moe(tmp_path / "m.gguf", n_layers=3, n_experts=8, n_used=3), tmp_path / "small.gguf"
    tokens = np.random.default_rng(3).integers(0, 64, 400).tolist()
    text = tmp_path / "ids.jsonl"
    text.write_text(json.dumps({"tokens": tokens}) + "\n")
    exact: dict[str, Any] = {"ctx_size": 64, "threads": 1, "type_k": "f32", "type_v": "f32", "flash_attn": "off"}
    plan = make_plan(profile(model, text, **exact), keep=4)
    prune(model, small, plan)
    virtual, physical = evaluate(model, text, plan=plan, **exact), evaluate(small, text, reference=model, **exact)
    alone = evaluate(small, text, **exact)
    for name in COMPARED:
        assert getattr(virtual, name) == pytest.approx(getattr(physical, name), rel=1e-5, abs=1e-6), name
    assert alone.perplexity == pytest.approx(physical.perplexity, rel=1e-9)
    assert alone.kl_mean is None
    assert virtual.kl_mean > 1e-3  # what was removed mattered
    record = {"metric": "reap", "keep": 4, "n_experts": 8, "experts_sha256": plan.experts_sha256}
    assert (virtual.plan, virtual.reference) == (record, str(model))
    assert (physical.plan, physical.reference) == (None, str(model))


def test_with_quantised_weights_the_figures_are_nearly_those(
    model: Path, plan: PrunePlan, small: Path, text: Path
) -> None:
    """Sums in another order differ in the last bit, and now and then that rounds an activation to its neighbour."""
    virtual, physical = evaluate(model, text, plan=plan, threads=1), evaluate(small, text, reference=model, threads=1)
    assert virtual.perplexity == pytest.approx(physical.perplexity, rel=1e-3)
    assert virtual.kl_mean == pytest.approx(physical.kl_mean, rel=1e-2)
    assert virtual.top1 == pytest.approx(physical.top1, abs=5e-3)


def test_a_model_agrees_with_itself(model: Path, text: Path) -> None:
    found = evaluate(model, text, reference=model, threads=1)
    assert (found.perplexity_ratio, found.kl_mean, found.kl_max, found.top1, found.halved) == (1, 0, 0, 1, 0)


def test_the_plan_by_path_and_a_reference_that_is_the_model(
    model: Path, plan: PrunePlan, text: Path, tmp_path: Path
) -> None:
    plan.save(tmp_path / "plan.json")
    (tmp_path / "same.gguf").symlink_to(model)
    by_path = evaluate(model, text, plan=tmp_path / "plan.json", threads=1)
    assert evaluate(model, text, plan=plan, reference=tmp_path / "same.gguf", threads=1).kl_mean == by_path.kl_mean


def test_domains_are_the_files_alone(model: Path, plan: PrunePlan, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "english.txt"
    other.write_text((DATA / "heldout" / "english.txt").read_text(encoding="utf-8")[:8_000], encoding="utf-8")
    both = evaluate(model, [text, other], plan=plan, threads=1)
    assert list(both.domains) == ["text", "english"]
    for path, figures in zip((text, other), both.domains.values(), strict=True):
        alone = evaluate(model, path, plan=plan, threads=1)
        assert {name: getattr(figures, name) for name in COMPARED} == pytest.approx(
            {name: getattr(alone, name) for name in COMPARED}
        )
    n_tokens = sum(figures.tokens for figures in both.domains.values())
    assert both.tokens == n_tokens
    weighted = sum(figures.kl_mean * figures.tokens for figures in both.domains.values()) / n_tokens
    assert both.kl_mean == pytest.approx(weighted)


def test_an_evaluator_loads_once_and_forgets_each_plan(model: Path, plan: PrunePlan, text: Path) -> None:
    evaluator = PlanEvaluator(model, text, EngineOptions(ctx_size=512, threads=1), max_windows=3)
    whole = evaluator.score()
    first = evaluator.score(plan)
    other = PrunePlan(plan.model, "other", 8, {layer: tuple(range(8)) for layer in plan.layers})
    assert evaluator.score(other).perplexity != first.perplexity
    again = evaluator.score(plan)
    assert {name: getattr(again, name) for name in COMPARED} == {name: getattr(first, name) for name in COMPARED}
    assert evaluator.score().perplexity == whole.perplexity == pytest.approx(first.reference_perplexity, rel=1e-9)
    assert evaluator.reference() is evaluator.reference()
    assert first.windows == 3
    assert first.tokens == 3 * 255


def test_less_memory_for_the_reference_makes_the_divergence_a_little_smaller(
    model: Path, plan: PrunePlan, text: Path
) -> None:
    options = EngineOptions(ctx_size=512, threads=1)
    exact, bounded, poor = (
        PlanEvaluator(model, text, options, max_windows=3, reference_bytes=n_bytes).score(plan)
        for n_bytes in (512 << 20, 3 << 20, 1)
    )
    assert exact.kl_rest == 0 < bounded.kl_rest < poor.kl_rest
    assert poor.kl_mean < bounded.kl_mean < exact.kl_mean
    # what is missing is rest · KL(within the rest), mostly a few times the rest's share
    assert bounded.kl_mean == pytest.approx(exact.kl_mean, rel=3 * bounded.kl_rest)
    for name in ("perplexity", "stderr", "perplexity_ratio", "top1", "halved"):
        assert getattr(poor, name) == pytest.approx(getattr(exact, name), rel=1e-6)


def test_continuations_are_the_most_probable_tokens(model: Path, plan: PrunePlan, text: Path) -> None:
    evaluator = PlanEvaluator(model, text, EngineOptions(ctx_size=512, threads=1), max_windows=1)
    found = evaluator.continuations(plan)
    session = open_session(model, EngineOptions(ctx_size=512, threads=1))
    session.set_kept({layer: list(kept) for layer, kept in plan.layers.items()})
    tokens = evaluator.text.windows[0][:64].tolist()
    for expected in found.tokens[0][:20]:
        best = int(session.logits(np.array(tokens, dtype=np.int32), len(tokens) - 1)[0].argmax())
        assert best == expected
        tokens.append(best)
    assert evaluator.continuations() is evaluator.continuations()


def test_loops_beside_the_reference(model: Path, plan: PrunePlan, text: Path) -> None:
    found = evaluate(model, text, plan=plan, loops=True, threads=1).loops
    assert found is not None
    assert found.prompts == 8
    assert found.reference_repeated is not None
    assert 0 <= found.same_start < 1
    assert found.repeated != found.reference_repeated
    alone = evaluate(model, text, loops=True, threads=1).loops
    assert alone is not None
    assert alone.repeated == found.reference_repeated
    assert alone.same_start is None


@pytest.mark.parametrize("loops", [False, True])
def test_progress_reaches_its_end_once(model: Path, plan: PrunePlan, text: Path, loops: bool) -> None:
    seen: list[Progress] = []
    evaluate(model, text, plan=plan, loops=loops, threads=1, progress=seen.append)
    shares = [step.done / step.total for step in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert shares.count(1) == 1


def test_what_the_figures_mean(model: Path, plan: PrunePlan, text: Path) -> None:
    assert "as if it chose among" in evaluate(model, text, threads=1).meaning
    found = evaluate(model, text, plan=plan, threads=1)
    assert (
        f"with 8 of 32 experts a layer has a perplexity {(found.perplexity_ratio - 1) * 100:.3g} % higher"
        in found.meaning
    )
    assert json.loads(json.dumps(found.to_dict()))["kl_mean"] == found.kl_mean


def test_what_does_not_belong_together(model: Path, plan: PrunePlan, text: Path, tmp_path: Path) -> None:
    tiny = build_moe(tmp_path / "tiny.gguf", n_layers=2, n_experts=8, n_used=2)
    with pytest.raises(MismatchError, match=r"the plan is of a model \(.*\) other than"):
        evaluate(tiny, text, plan=plan)
    (tmp_path / "ids.jsonl").write_text(json.dumps({"tokens": list(range(60)) * 3}) + "\n")
    with pytest.raises(MismatchError, match="has a vocabulary of 64 tokens, but"):
        evaluate(model, tmp_path / "ids.jsonl", reference=tiny, ctx_size=32, threads=1)
    with pytest.raises(UsageError, match=r"nowhere\.json: "):
        evaluate(model, text, plan=tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match=r"nowhere\.gguf"):
        evaluate(model, text, reference=tmp_path / "nowhere.gguf")
    few = PrunePlan(plan.model, "reap", 2, {layer: (0, 1) for layer in plan.layers})
    with pytest.raises(UsageError, match="keep 2"):
        evaluate(model, text, plan=few)


def test_the_command(
    model: Path, plan: PrunePlan, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.save(tmp_path / "plan.json")
    command = ["evaluate", str(model), str(text), "--plan", str(tmp_path / "plan.json"), "-t", "1"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["keep"] == 8
    assert document["kl_mean"] > 0
    assert 0 < document["top1"] < 1
    other = tmp_path / "more.txt"
    other.write_text(text.read_text()[:6000])
    assert main([*command, str(other), "--loops"]) == 0
    printed = capsys.readouterr().out
    for word in (
        "perplexity ratio",
        "KL divergence",
        "same top token",
        "halved",
        "end in a loop",
        "more",
        "Beside the reference",
    ):
        assert word in printed
    assert main(["evaluate", str(model), str(text), "--plan", str(text)]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_text_of_the_calibration_is_named(model: Path, plan: PrunePlan, text: Path) -> None:
    assert evaluate(model, text, plan=plan, ctx_size=256, threads=1).warnings == ()
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    seen = replace(plan, calibration={"files": ["c.txt"], "sha256": [digest]})
    (warning,) = evaluate(model, text, plan=seen, ctx_size=256, threads=1).warnings
    assert warning.startswith(f"{text}: is the calibration file c.txt itself")


def test_texts_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(CalibrationError, match=r"short\.txt: has \d+ tokens, expected at least one window of 512"):
        evaluate(model, short)
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\xfe" * 1000)
    with pytest.raises(CalibrationError, match=r"binary\.txt: is not UTF-8 text \(byte 3\)"):
        evaluate(model, tmp_path / "binary.txt")
    with pytest.raises(UsageError, match=r"nowhere\.txt: cannot be read"):
        evaluate(model, tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match="ctx_size is 2"):
        evaluate(model, short, ctx_size=2)


# ---- what is said, and what is refused


def test_what_the_engine_warns_of_is_said_once_and_kept(model: Path, plan: PrunePlan, text: Path) -> None:
    """A context beyond what the model was trained with."""
    with pytest.warns(ReapWarning) as caught:
        found = evaluate(model, text, plan=plan, ctx_size=1024, threads=1)
    said = [str(one.message) for one in caught]
    assert len(said) == len(set(said))
    assert any("512" in line for line in said)
    assert set(said) <= set(found.warnings)


def test_the_default_context_is_not_beyond_training(model: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    info = reap.inspect(model)
    assert EngineOptions(ctx_size=2048).within({}, info.context_length).ctx_size == info.context_length == 512
    monkeypatch.setattr("reap.evaluation.evaluate.inspect", lambda _: replace(info, context_length=128))
    assert evaluate(model, text, threads=1, max_tokens=256).ctx_size == 128


def test_a_batch_size_takes_no_memory_and_is_said_to_change_nothing(model: Path, text: Path) -> None:
    evaluator = PlanEvaluator(model, text, EngineOptions(ctx_size=128, threads=1, batch_size=4096), max_windows=1)
    assert evaluator._session.batch_size == 128
    assert any(line.startswith("batch_size changes nothing") for line in evaluator.warnings)


def test_about_so_many_tokens_spread_over_each_domain(model: Path, text: Path) -> None:
    texts = [text, DATA / "heldout" / "c.txt"]
    found = evaluate(model, texts, ctx_size=128, threads=1, max_tokens=1280)
    assert 9 <= found.windows <= 11
    assert set(found.domains) == {"text", "c"}
    with pytest.raises(UsageError, match="max_tokens is 0, expected at least 1"):
        evaluate(model, texts, threads=1, max_tokens=0)


def test_a_text_that_the_plan_has_seen_is_said(model: Path, tmp_path: Path) -> None:
    """Not the file itself, but a part of it: the plan carries the calibration's sketch."""
    calibration = DATA / "calibration.jsonl"
    made = make_plan(profile(model, calibration, max_tokens=20_000, threads=1), keep=0.5)
    lines = calibration.read_text(encoding="utf-8").splitlines()[:40]
    leaky = tmp_path / "leaky.txt"
    leaky.write_text("\n".join(json.loads(line)["text"] for line in lines), encoding="utf-8")
    found = evaluate(model, leaky, plan=made, threads=1, max_tokens=4096)
    assert [line for line in found.warnings if "of it was in the calibration" in line]


def test_a_model_that_sees_what_follows_has_no_perplexity(tmp_path: Path) -> None:
    """Found by what it does, not by its name."""
    diffusion = write_model(require_tool("test-llama-archs"), "llada-moe", tmp_path)
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text(json.dumps({"tokens": [index % 100 for index in range(300)]}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"llada-moe sees the tokens that follow \(a diffusion model\)"):
        evaluate(diffusion, tokens, ctx_size=64, threads=1)
