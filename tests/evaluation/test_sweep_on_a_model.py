"""sweep and refine on the embedded model: figures against evaluate(), sizes against prune(), the command line,
Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap
from reap.cli import main
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import Interrupted, MismatchError, ReapWarning, UsageError
from reap.evaluation import plan_evaluator
from reap.evaluation.quality_metrics import quality_metrics
from reap.evaluation.search_windows import ENOUGH_WINDOWS, divide_windows
from reap.text.evaluation_text import EvaluationText

DATA = Path(reap.__file__).parent / "data"
MODEL = next(DATA.glob("reap-demo-*.gguf"))
OPTIONS: dict[str, Any] = {"threads": 1, "ctx_size": 128}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile, two held-out texts, and calibration text."""
    folder = tmp_path_factory.mktemp("sweep")
    lines = (DATA / "calibration.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "calibration.jsonl").write_text("".join(lines[::7]), encoding="utf-8")
    (folder / "search.jsonl").write_text("".join(lines[::5]), encoding="utf-8")  # as many windows as a search needs
    reap.profile(MODEL, folder / "calibration.jsonl", **OPTIONS).save(folder / "profile.json")
    for name in ("python", "c"):
        (folder / f"{name}.txt").write_text(
            (DATA / "heldout" / f"{name}.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8"
        )
    return folder


@pytest.fixture(scope="module")
def table(work: Path) -> reap.Sweep:
    texts = [work / "python.txt", work / "c.txt"]
    return reap.sweep(MODEL, work / "profile.json", texts, keep=[0.5, 8], metric=["reap", "random"], seeds=2, **OPTIONS)


def test_every_row_is_what_evaluate_says(work: Path, table: reap.Sweep) -> None:
    texts = [work / "python.txt", work / "c.txt"]
    whole = reap.evaluate(MODEL, texts, **OPTIONS)
    assert table.baseline.perplexity == pytest.approx(whole.perplexity, rel=1e-9)
    assert (table.baseline.kl_mean, table.baseline.top1, table.baseline.keep) == (0.0, 1.0, 32)
    assert table.baseline.bytes == MODEL.stat().st_size
    assert [(row.metric, row.seed, row.keep) for row in table.select()] == [
        ("baseline", None, 32),
        ("reap", None, 16),
        ("random", 0, 16),
        ("random", 1, 16),
        ("reap", None, 8),
        ("random", 0, 8),
        ("random", 1, 8),
    ]
    for row in table.select()[1:4]:
        plan = reap.plan(work / "profile.json", keep=row.keep, metric=row.metric, seed=row.seed or 0)
        found = reap.evaluate(MODEL, texts, plan=plan, **OPTIONS)
        assert row.perplexity == pytest.approx(found.perplexity, rel=1e-9)
        assert row.stderr == pytest.approx(found.stderr, rel=1e-9)
        assert row.kl_mean == pytest.approx(found.kl_mean, rel=1e-6)
        assert row.top1 == found.top1
        assert math.exp(row.loss_increase) == pytest.approx(found.perplexity_ratio, rel=1e-9)
        for domain in ("python", "c"):
            [part] = [
                part for part in table.select(metric=row.metric, keep=row.keep, domain=domain) if part.seed == row.seed
            ]
            assert part.perplexity == pytest.approx(found.domains[domain].perplexity, rel=1e-9)
            assert part.tokens == found.domains[domain].tokens


def test_sizes_are_those_of_pruned_files(work: Path, table: reap.Sweep, tmp_path: Path) -> None:
    for row in table.select()[1:]:
        plan = reap.plan(work / "profile.json", keep=row.keep, metric=row.metric, seed=row.seed or 0)
        report = reap.prune(MODEL, tmp_path / "small.gguf", plan, force=True)
        assert row.bytes == report.n_bytes_after == (tmp_path / "small.gguf").stat().st_size


def test_the_best_at_each_size(table: reap.Sweep) -> None:
    best = table.best()
    assert list(best) == [16, 8]
    assert best[16].metric == "reap"
    assert best[16].runner_up == "random"
    assert best[16].margin > 0
    assert set(table.best("c")) == {16, 8}
    assert table.text["domains"] == ["python", "c"]
    assert table.model["n_experts"] == 32
    assert len(table.text["sha256"]) == 2


def test_the_weights_are_loaded_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(
        plan_evaluator, "open_session", lambda *args, **more: opened.append(args) or open_session(*args, **more)
    )
    found = reap.sweep(
        MODEL, work / "profile.json", work / "c.txt", keep=[0.5, 8], metric=["reap", "frequency"], **OPTIONS
    )
    assert len(found.rows) == 5
    assert len(opened) == 1


def test_limits(work: Path) -> None:
    size = reap.prune(MODEL, work / "x.gguf", reap.plan(work / "profile.json", keep=10), dry_run=True).n_bytes_after
    found = reap.sweep(
        MODEL,
        work / "profile.json",
        work / "c.txt",
        metric="reap",
        target_size=size + 100,
        max_ppl_increase="8%",
        **OPTIONS,
    )
    by_size, by_perplexity = found.targets
    assert (by_size.kind, by_size.keep, by_size.bytes) == ("size", 10, size)
    limit = found.baseline.perplexity * 1.08
    assert by_perplexity.perplexity <= limit
    assert by_perplexity.keep < 32
    [below] = [row for row in found.select() if row.keep == by_perplexity.keep - 1]  # bisection asked there
    assert below.perplexity > limit
    with pytest.raises(UsageError, match="cannot be reached: with 4 experts"):
        reap.sweep(MODEL, work / "profile.json", work / "c.txt", metric="reap", target_size="1M", **OPTIONS)


def test_plans_are_judged_as_well(work: Path) -> None:
    made = reap.plan(work / "profile.json", keep=16, metric="gate_sum")
    made.save(work / "plan.json")
    found = reap.sweep(
        MODEL, work / "profile.json", work / "c.txt", keep=16, metric="reap", plans=[work / "plan.json"], **OPTIONS
    )
    assert found.metrics == ("reap", "gate_sum")
    assert {found.best()[16].metric, found.best()[16].runner_up} == {"reap", "gate_sum"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"metric": "best"}, "unknown metric 'best'"),
        ({"metric": []}, "at least one metric"),
        ({"keep": 2}, "keep 2 is fewer than the 4 experts"),
        ({"keep": 33}, "keep 33 is not between"),
        ({"seeds": 0}, "seeds is 0"),
        ({"max_ppl_increase": "5"}, "should be a percentage"),
        ({"target_size": "many"}, "should be a number of bytes"),
        ({"protect": "9:1"}, "layer 9 is not a MoE layer"),
    ],
)
def test_calls_that_cannot_work(options: dict[str, Any], problem: str, work: Path) -> None:
    with pytest.raises(UsageError, match=problem):
        reap.sweep(MODEL, work / "profile.json", work / "c.txt", **options, **OPTIONS)


def test_a_profile_of_another_model(work: Path) -> None:
    document = json.loads((work / "profile.json").read_text())
    document["model"]["fingerprint"] = "sha256:" + "1" * 64
    (work / "other.json").write_text(json.dumps(document))
    with pytest.raises(MismatchError, match="fingerprint"):
        reap.sweep(MODEL, work / "other.json", work / "c.txt", **OPTIONS)


def test_text_that_was_in_the_calibration(work: Path) -> None:
    quick: dict[str, Any] = {"keep": 16, "metric": "reap", **OPTIONS}
    with pytest.warns(ReapWarning, match=r"calibration\.jsonl: is the calibration file .*calibration\.jsonl itself"):
        found = reap.sweep(MODEL, work / "profile.json", work / "calibration.jsonl", **quick)
    assert len(found.warnings) == 1
    sample = json.loads((work / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[0])
    own = (work / "c.txt").read_text(encoding="utf-8")[:3000]
    (work / "leaky.txt").write_text(
        own + (sample.get("text") or sample["prompt"] + "\n" + sample["response"]), encoding="utf-8"
    )
    with pytest.warns(ReapWarning, match=r"leaky\.txt: about \d+% of it was in the calibration"):
        reap.sweep(MODEL, work / "profile.json", work / "leaky.txt", **quick)


# ---- the command line


def test_the_command(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = [str(work / "python.txt"), str(work / "c.txt")]
    command = [
        "sweep",
        str(MODEL),
        str(work / "profile.json"),
        *text,
        "--keep",
        "0.5,8",
        "--metric",
        "reap,random",
        "-c",
        "128",
        "-t",
        "1",
    ]
    assert main([*command, "-o", str(tmp_path / "s.json")]) == 0
    printed = capsys.readouterr().out
    for part in (
        "baseline",
        "random (seed 0)",
        "perplexity on each domain",
        "16 experts",
        "o reap  x random  = baseline",
        "s.json",
    ):
        assert part in printed
    assert reap.Sweep.load(tmp_path / "s.json").complete
    assert main([*command, "--json", "--target-size", "2M", "--max-ppl-increase", "20%"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "reap.sweep"
    assert {target["kind"] for target in document["targets"]} == {"size", "perplexity"}
    assert all(target["bytes"] <= 2_000_000 for target in document["targets"] if target["kind"] == "size")


def test_a_call_that_cannot_work_says_so(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(MODEL), str(work / "profile.json"), str(work / "absent.txt")]) == 2
    assert "absent.txt: cannot be read" in capsys.readouterr().err
    assert (
        main(["sweep", str(MODEL), str(work / "profile.json"), str(work / "c.txt"), "--max-ppl-increase", "lots"]) == 2
    )
    assert "should be a percentage such as 5%" in capsys.readouterr().err


def test_ctrl_c_keeps_the_rows(work: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text((DATA / "heldout" / "c.txt").read_text(encoding="utf-8"), encoding="utf-8")
    output = tmp_path / "s.json"
    arguments = [
        "sweep",
        MODEL,
        work / "profile.json",
        text,
        "--metric",
        "random",
        "--seeds",
        "200",
        "-t",
        "1",
        "-o",
        output,
    ]
    command = [sys.executable, "-m", "reap", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not output.exists():
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert f"{output} keeps the rows so far" in err
    kept = reap.Sweep.load(output)
    assert not kept.complete
    assert len(kept.rows) >= 2


# ---- refining


@pytest.fixture(scope="module")
def refined(work: Path) -> reap.PrunePlan:
    return reap.refine(
        MODEL, work / "profile.json", work / "search.jsonl", keep=16, seconds=600, max_passes=14, **OPTIONS
    )


def test_a_refined_plan(work: Path, refined: reap.PrunePlan) -> None:
    record = refined.options["refined"]
    is_refined = record["result"] == "refined"
    start = record["start" if is_refined else "best_criterion"].split(",")[0]
    assert refined.metric == (f"{start}+refined" if is_refined else start)
    assert 13 < record["passes"] <= 14
    assert record["experts_tried"] > 0
    assert record["judged"]
    assert record["kl_after"] <= record["kl_before"]
    assert (record["kl_gain"] > 2 * record["kl_gain_stderr"] and record["loss_gain"] >= 0) == is_refined
    assert all(len(kept) == 16 for kept in refined.layers.values())
    assert refined.calibration["files"][-1] == str(work / "search.jsonl")
    again = reap.refine(
        MODEL, work / "profile.json", work / "search.jsonl", keep=16, seconds=600, max_passes=14, **OPTIONS
    )
    assert again.layers == refined.layers


def test_the_end_is_judged_on_windows_held_out(work: Path, refined: reap.PrunePlan) -> None:
    """The figures of the record are those of the windows that the search never saw."""
    record = refined.options["refined"]
    evaluator = plan_evaluator.PlanEvaluator(MODEL, work / "search.jsonl", EngineOptions(**OPTIONS))
    windows = divide_windows(evaluator.text.domain_of, seed=0)
    assert {name: len(part) for name, part in vars(windows).items()} == record["windows_divided"]
    found = quality_metrics(evaluator.try_experts(refined.layers, windows.hold_out))
    assert record["kl_after"] == pytest.approx(found.kl_mean, rel=1e-9)
    assert record["perplexity_after"] == pytest.approx(found.perplexity, rel=1e-9)


@pytest.mark.filterwarnings("ignore:the text has .* windows:reap.errors.ReapWarning")
def test_as_few_experts_as_a_token_uses(work: Path) -> None:
    """None is tried with one fewer, which the engine would refuse."""
    found = reap.refine(
        MODEL, work / "profile.json", work / "c.txt", keep=4, seconds=600, max_passes=9, metric="reap", **OPTIONS
    )
    assert found.options["refined"]["experts_tried"] > 0
    assert all(len(kept) == 4 for kept in found.layers.values())


def test_a_refined_plan_prunes(refined: reap.PrunePlan, tmp_path: Path) -> None:
    refined.save(tmp_path / "plan.json")
    report = reap.prune(MODEL, tmp_path / "small.gguf", tmp_path / "plan.json")
    assert report.kept == refined.layers
    provenance = reap.inspect(tmp_path / "small.gguf").provenance or {}
    assert provenance["reap.metric"] == refined.metric


@pytest.mark.filterwarnings("ignore:the text has .* windows:reap.errors.ReapWarning")
def test_protected_experts_stay(work: Path) -> None:
    worst = reap.plan(work / "profile.json", keep=16).removed(0)[:2]
    protect = [(0, expert) for expert in worst]
    found = reap.refine(
        MODEL,
        work / "profile.json",
        work / "c.txt",
        keep=16,
        seconds=600,
        max_passes=8,
        metric="reap",
        protect=protect,
        **OPTIONS,
    )
    assert set(worst) <= set(found.layers[0])
    assert found.metric.startswith("reap")


def test_refining_on_the_command_line(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", str(work / "profile.json"), "--keep", "16", "-o", str(tmp_path / "plan.json"), "--force"]
    assert (
        main([*base, "--refine", "0.01s", "--model", str(MODEL), "--text", str(work / "c.txt"), "-c", "128", "-t", "1"])
        == 0
    )
    out, err = capsys.readouterr()
    assert "refined" in out
    assert "0 s do not reach every layer once" in err
    assert reap.PrunePlan.load(tmp_path / "plan.json").options["refined"]["seconds"] < 30
    assert main([*base, "--refine", "1s", "--model", str(MODEL)]) == 2
    assert "--refine needs --model MODEL" in capsys.readouterr().err
    assert main([*base, "--text", str(work / "c.txt")]) == 2
    assert "--text is for --refine" in capsys.readouterr().err
    assert main([*base, "--refine", "soon", "--model", str(MODEL), "--text", str(work / "c.txt")]) == 2
    assert "'soon' is not a time such as 90s, 10m or 1.5h" in capsys.readouterr().err


class Stop:
    """Ctrl-C at the n-th call of a progress callback."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, step: reap.Progress) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:the text has .* windows:reap.errors.ReapWarning")
def test_ctrl_c_keeps_the_choice_so_far_and_resume_goes_on(work: Path, tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    call = (MODEL, work / "profile.json", work / "c.txt")
    options: dict[str, Any] = {"keep": 16, "seconds": 600, "max_passes": 12, "metric": "reap", **OPTIONS}
    prepared: list[reap.Progress] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of passes that are too few
        reap.refine(*call, progress=prepared.append, **{**options, "max_passes": 0})
    stop = len(prepared) + 40
    with pytest.raises(Interrupted, match=r"plan\.json has the best choice .* goes on from .*plan\.json\.resume"):
        reap.refine(*call, output=target, progress=Stop(stop), **options)
    record = reap.PrunePlan.load(target).options["refined"]
    assert record["judged"] is False
    assert 0 < record["passes"] < 11
    with pytest.raises(UsageError, match="a resume file is there already; --resume"):
        reap.refine(*call, output=target, **options)
    with pytest.raises(MismatchError, match=r"is of a run with seed 0, where this one has 1"):
        reap.refine(*call, output=target, resume=True, **options, seed=1)
    made = reap.refine(*call, output=target, resume=True, **options)
    assert made.options["refined"]["judged"] is True
    assert 11 < made.options["refined"]["passes"] <= 12
    assert made.layers == reap.PrunePlan.load(target).layers
    assert not (tmp_path / "plan.json.resume").exists()
    with pytest.raises(KeyboardInterrupt):
        reap.refine(*call, progress=Stop(stop), **options)


def test_a_sweep_goes_on(work: Path, tmp_path: Path) -> None:
    target = tmp_path / "s.json"
    call = (MODEL, work / "profile.json", work / "c.txt")
    options: dict[str, Any] = {"keep": [0.5, 8], "metric": ["reap", "random"], **OPTIONS}
    n_windows = reap.sweep(*call, **{**options, "keep": 8, "metric": "reap"}).text["windows"]
    with pytest.raises(Interrupted, match=r"stopped after 3 of the sweep's models; .*s\.json keeps the rows") as stop:
        reap.sweep(*call, output=target, progress=Stop(3 * n_windows + 1), **options)
    assert isinstance(stop.value.result, reap.Sweep)
    assert stop.value.result.rows == reap.Sweep.load(target).rows
    tried = []

    class Watch:
        def __call__(self, step: reap.Progress) -> None:
            tried.append(step.done)

    found = reap.sweep(*call, output=target, resume=True, progress=Watch(), **options)
    assert len(tried) == 3 * n_windows  # the model as it is, and the two candidates that were left
    whole = reap.sweep(*call, **options)
    assert (found.rows, found.verdicts, found.complete) == (whole.rows, whole.verdicts, True)
    assert not (tmp_path / "s.json.resume").exists()


def test_a_sweep_without_a_file_prints_its_rows(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = (MODEL, work / "profile.json", work / "c.txt")
    stop = Stop(reap.evaluate(MODEL, work / "c.txt", **OPTIONS).windows + 1)
    with pytest.raises(Interrupted, match=r"stopped after 1 of the sweep's models$") as stopped:
        reap.sweep(*call, progress=stop, keep=8, metric="reap", **OPTIONS)
    table = stopped.value.result
    assert isinstance(table, reap.Sweep)
    assert not table.complete

    def interrupted(*_: object, **__: object) -> reap.Sweep:
        raise stopped.value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reap, "sweep", interrupted)
        assert main(["sweep", *map(str, call)]) == 130
    out, err = capsys.readouterr()
    assert "baseline" in out
    assert "stopped after 1 of the sweep's models" in err


@pytest.mark.filterwarnings("ignore:it will take about")  # on a slow machine it says so as well
def test_short_of_time_it_uses_no_fewer_windows_than_are_enough(work: Path) -> None:
    with pytest.warns(ReapWarning, match="do not reach every layer once"):
        made = reap.refine(MODEL, work / "profile.json", DATA / "calibration.jsonl", keep=16, seconds=1, **OPTIONS)
    record = made.options["refined"]
    assert ENOUGH_WINDOWS <= record["windows"] + 2 < record["windows_of_the_text"]
    assert record["result"] == "start"
    assert record["seconds"] < 120


def test_thinned_windows_lie_all_over_each_domain() -> None:
    windows = tuple(np.full(4, number, dtype=np.int32) for number in range(30))
    text = EvaluationText(("t",), 4, windows, ("a",) * 20 + ("b",) * 9 + ("c",), 3)
    thin = text.thinned(6)
    assert [int(window[0]) for window in thin.windows] == [0, 5, 10, 15, 20, 24, 29]
    assert thin.domain_of == ("a",) * 4 + ("b",) * 2 + ("c",)
    assert thin.dropped_tokens == 3 + 23 * 4
    assert text.thinned(30) == text


# ---- fewer experts of each token


@pytest.fixture(scope="module")
def fewer(work: Path) -> reap.Sweep:
    return reap.sweep(
        MODEL,
        work / "profile.json",
        [work / "python.txt", work / "c.txt"],
        keep=0.5,
        metric=["reap", "frequency"],
        experts_used=[2, 3],
        output=work / "fewer.json",
        **OPTIONS,
    )


def test_fewer_experts_of_each_token_are_what_evaluate_says(work: Path, fewer: reap.Sweep) -> None:
    texts = [work / "python.txt", work / "c.txt"]
    plan = reap.plan(work / "profile.json", keep=0.5, metric="reap")
    assert fewer.experts_used == (3, 2)
    for used in (3, 2):
        override = {"override_kv": [f"qwen3moe.expert_used_count=int:{used}"]}
        whole = reap.evaluate(MODEL, texts, reference=MODEL, **override, **OPTIONS)
        found = fewer.select(experts_used=used)
        assert [(row.metric, row.keep) for row in found] == [("baseline", 32), ("reap", 16), ("frequency", 16)]
        assert found[0].perplexity == pytest.approx(whole.perplexity, rel=1e-9)
        pruned = reap.evaluate(MODEL, texts, plan=plan, **override, **OPTIONS)
        assert found[1].perplexity == pytest.approx(pruned.perplexity, rel=1e-9)
        # beside the model as it is, with as many as it uses itself
        assert found[0].kl_mean > 0.001
        assert found[0].loss_increase == pytest.approx(math.log(found[0].perplexity / fewer.baseline.perplexity))
        assert {row.domain for row in fewer.rows if row.experts_used == used} == {None, "python", "c"}


def test_what_a_sweep_says_of_its_choice_is_of_the_models_own_number(work: Path, fewer: reap.Sweep) -> None:
    texts = [work / "python.txt", work / "c.txt"]
    plain = reap.sweep(MODEL, work / "profile.json", texts, keep=0.5, metric=["reap", "frequency"], **OPTIONS)
    assert fewer.select() == plain.select()
    assert fewer.verdicts == plain.verdicts
    assert fewer.winner() == plain.winner()
    again = reap.Sweep.load(work / "fewer.json")
    assert again.rows == fewer.rows
    own, three, two = (fewer.model["active_bytes"][name] for name in ("own", "3", "2"))
    assert own > three > two
    assert own - three == pytest.approx(three - two, abs=2)
    assert "active_bytes" not in plain.model


def test_fewer_experts_on_the_command_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", str(MODEL), str(work / "profile.json"), str(work / "c.txt"), "--keep", "0.5", "-c", "128"]
    assert main([*command, "--metric", "reap", "--experts-used", "3", "-t", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "with 3 experts for each token: " in shown
    assert "of weights in use for a token" in shown
    assert "whole model" in shown


@pytest.mark.parametrize(
    ("used", "sentence"),
    [
        (4, "experts_used 4: the model uses 4 experts for each token itself; what can be tried is fewer"),
        ([3, 9], "experts_used 9: the model uses 4"),
        (0, "experts_used should be numbers of experts from 1 on, found 0"),
        ([2.0], "experts_used should be numbers of experts from 1 on, found 2.0"),
    ],
)
def test_what_cannot_be_used_is_said_before_the_model_is_loaded(
    work: Path, used: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(plan_evaluator, "open_session", never)
    with pytest.raises(UsageError, match=sentence):
        reap.sweep(MODEL, work / "profile.json", work / "c.txt", keep=0.5, experts_used=used, **OPTIONS)
