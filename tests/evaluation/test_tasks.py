"""Tasks of lm-evaluation-harness: our model class on local task files, beside transformers' class, and with plans."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap
from helpers.torch_needs import absent, needs  # noqa: F401
from reap.cli import main as run_command
from reap.evaluation import tasks
from reap.evaluation.tasks import TaskEvaluation, evaluate_tasks, mcnemar

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's packages warn of themselves
DATA = Path(reap.__file__).parent / "data"
MODEL = DATA / "reap-demo-3.7m-q8_0.gguf"
EXACT: Any = {"ctx_size": 256, "type_k": "f32", "type_v": "f32", "flash_attn": "off", "threads": 1}
TASKS = ["reap_choice", "reap_rolling", "reap_until"]


@pytest.fixture(scope="module")
def harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        absent("lm-evaluation-harness is not installed: pip install 'reap-moe[tasks]'")


@pytest.fixture(scope="module")
def task_files(harness: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which line comes next; how probable is a text; what comes after a line."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [it for it in (DATA / "heldout" / "python.txt").read_text().splitlines() if len(it.strip()) > 12]
    rows = [
        {"context": lines[i], "choices": [f"\n{lines[i + 1]}", f"\n{lines[i + 40]}", " a", " b"], "answer": i % 2}
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": (DATA / "heldout" / "english.txt").read_text()[i * 900 : (i + 1) * 900]} for i in range(3)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))

    def write(name: str, file: str, body: str) -> None:
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / file}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{body}")

    write(
        "reap_choice",
        "rows.jsonl",
        "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    )
    write(
        "reap_rolling",
        "texts.jsonl",
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n"
        "  - metric: word_perplexity\n",
    )
    write(
        "reap_until",
        "rows.jsonl",
        "output_type: generate_until\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{choices[0]}}'\n"
        'generation_kwargs:\n  until: ["\\n\\n", "e"]\n  max_gen_toks: 40\nmetric_list:\n  - metric: exact_match\n',
    )
    return folder


def run(model: Path, task_files: Path, **options: Any) -> TaskEvaluation:
    return evaluate_tasks(model, TASKS, include_path=task_files, **EXACT, **options)


def test_mcnemar() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(3, 7) == pytest.approx(2 * (1 + 10 + 45 + 120) / 1024)
    assert mcnemar(700, 500) < 1e-7


def test_the_error_of_a_difference() -> None:
    """Of means, perplexities and bits: against the spread of many draws."""
    rng = np.random.default_rng(2)
    before = rng.normal(-40, 6, (3000, 200))
    after = before - 2 + rng.normal(0, 3, before.shape)
    words = rng.integers(10, 30, before.shape).astype(float)
    figures = {
        "acc": lambda sums, n: sums.sum(axis=-1) / n.sum(axis=-1),
        "word_perplexity": lambda sums, n: np.exp(-sums.sum(axis=-1) / n.sum(axis=-1)),
        "bits_per_byte": lambda sums, n: -sums.sum(axis=-1) / n.sum(axis=-1) / math.log(2),
    }
    for name, figure in figures.items():
        spread = float((figure(after, words) - figure(before, words)).std())
        whole, ours = ({n: (float(a), float(w)) for n, (a, w) in enumerate(zip(it[0], words[0], strict=True))}
                       for it in (before, after))  # fmt: skip
        samples = [
            {"doc_id": n, "doc_hash": "", "prompt_hash": "", "filter": "none", name: it} for n, it in whole.items()
        ]
        found = {"results": {"t": {f"{name},none": float(figure(before[0], words[0]))}}, "samples": {"t": samples}}
        mine = {(n, "", ""): it for n, it in ours.items()}
        paired = tasks._paired(found, "t", f"{name},none", float(figure(after[0], words[0])), mine)
        assert paired.stderr == pytest.approx(spread, rel=0.25), name
        assert paired.p_value is None


@pytest.mark.tasks
def test_a_plan_is_the_pruned_file(tmp_path: Path, task_files: Path) -> None:
    profile = reap.profile(MODEL, DATA / "calibration.jsonl", ctx_size=128, max_tokens=1500, threads=1)
    plan = reap.plan(profile, keep=0.5)
    model = tmp_path / "f32.gguf"
    reap.quantize(MODEL, model, "F32", allow_requantize=True)
    reap.prune(model, tmp_path / "small.gguf", plan)
    whole, virtual = run(model, task_files), run(model, task_files, plan=plan)
    small = run(tmp_path / "small.gguf", task_files)
    assert {it.task for it in whole.results} == set(TASKS)
    for ours, before, theirs in zip(virtual.results, whole.results, small.results, strict=True):
        assert ours.whole is not None
        assert (ours.task, ours.metric, ours.whole.value) == (before.task, before.metric, before.value)
        assert ours.value == pytest.approx(theirs.value, rel=1e-5)
        if ours.metric == "acc":
            gained, lost = ours.whole.gained, ours.whole.lost
            assert gained is not None
            assert lost is not None
            assert ours.whole.difference == pytest.approx((gained - lost) / ours.questions)
        if ours.metric == "word_perplexity":
            assert ours.whole.stderr is not None
            assert 0 < ours.whole.stderr < abs(ours.value)
            assert ours.whole.p_value is None
    rolling = [next(it for it in found.results if it.task == "reap_rolling").value for found in (virtual, whole)]
    assert rolling[0] != pytest.approx(rolling[1], rel=0.02)
    json.dumps(virtual.to_dict(), allow_nan=False)


@pytest.mark.tasks
def test_what_cannot_be_is_refused(tmp_path: Path, task_files: Path) -> None:
    with pytest.raises(reap.UsageError, match="has no task 'reap_absent'"):
        evaluate_tasks(MODEL, "reap_absent", include_path=task_files, **EXACT)
    with pytest.raises(reap.UsageError, match="is not a folder"):
        evaluate_tasks(MODEL, "reap_choice", include_path=tmp_path / "absent", **EXACT)
    with pytest.raises(reap.UsageError, match="limit is 0"):
        evaluate_tasks(MODEL, "reap_choice", limit=0, **EXACT)


@pytest.mark.tasks
@pytest.mark.usefixtures("harness")
def test_what_shares_a_batch_changes_nothing() -> None:
    from lm_eval.api.instance import Instance

    from reap.evaluation.harness_model import HarnessModel

    lines = (DATA / "heldout" / "c.txt").read_text().splitlines()
    asked = [(f"int {i};\n{lines[i]}", ending) for i in range(9) for ending in (" a", " = 0;\n", "", ";")[: 1 + i % 4]]
    asked += [("", "return"), ("x" * 2000, "y"), ("if", " (x" * 60)]
    scored = [Instance("loglikelihood", {}, args, n) for n, args in enumerate(asked) if args[1]]
    texts = [Instance("loglikelihood_rolling", {}, (line * 9,), n) for n, line in enumerate(lines[:5])]
    kinds: list[dict[str, Any]] = [
        {"until": [";", "\n\n"], "max_gen_toks": 30},
        {"until": "}", "max_gen_toks": 9, "do_sample": True, "temperature": 0.9, "top_k": 40},
    ]
    written = [Instance("generate_until", {}, (line, kinds[n % 2]), n) for n, line in enumerate(lines[:8])]
    found = []
    for sequences in (1, 3, 16):
        lm = HarnessModel(MODEL, sequences=sequences, **EXACT)
        found.append((lm.loglikelihood(scored), lm.loglikelihood_rolling(texts), lm.generate_until(written)))
    alone = found[0]
    for together in found[1:]:
        for (a, greedy_a), (b, greedy_b) in zip(alone[0], together[0], strict=True):
            # of Q8_0 weights: which rows share a product moves a sum's last bits, and now and then a rounding
            assert a == pytest.approx(b, rel=0.01, abs=0.02)
            assert greedy_a == greedy_b
        assert alone[1] == pytest.approx(together[1], rel=0.005)
        assert alone[2] == together[2]
    assert all(";" not in text for text in alone[2][::2])
    asked_so = lm.apply_chat_template([{"role": "user", "content": "Why?"}])
    begun = lm.apply_chat_template(
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Be"}], add_generation_prompt=False
    )
    assert "Why?" in asked_so
    assert begun == asked_so + "Be"
    assert lm.chat_template(True)
    assert len(set(alone[2])) > 4


@pytest.mark.tasks
def test_the_harness_itself_knows_the_model(tmp_path: Path, task_files: Path) -> None:
    root = Path(reap.__file__).parent.parent  # where reap_lm_eval.pth lies: site-packages, or the tree
    arguments = ["run", "--model", "reap", "--tasks", "reap_choice", "--include_path", str(task_files), "--limit", "3"]
    arguments += ["--num_fewshot", "2"]
    arguments += ["--model_args", f"pretrained={MODEL},ctx_size=256,threads=1", "--output_path", str(tmp_path)]
    code = (
        f"import site, sys; sys.path.insert(0, {str(root)!r}); site.addsitedir({str(root)!r});"
        " assert 'reap' not in sys.modules;"
        " from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.rglob("results*.json")
    said = json.loads(written.read_text())["results"]["reap_choice"]["acc,none"]
    assert (
        said
        == evaluate_tasks(MODEL, "reap_choice", include_path=task_files, limit=3, num_fewshot=2, **EXACT)
        .results[0]
        .value
    )


@pytest.mark.tasks
def test_the_command_the_page_and_the_card(
    tmp_path: Path, task_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = reap.profile(MODEL, DATA / "calibration.jsonl", ctx_size=128, max_tokens=1500, threads=1)
    profile.save(tmp_path / "p.json")
    plan = reap.plan(profile, keep=0.5)
    plan.save(tmp_path / "plan.json")
    reap.prune(MODEL, tmp_path / "small.gguf", plan)
    command = ["evaluate", str(MODEL), "--tasks", "reap_choice,reap_until", "--include-path", str(task_files)]
    command += ["--limit", "5", "-c", "256", "-t", "1", "--plan", str(tmp_path / "plan.json")]
    assert run_command([*command, "--json"]) == 0
    (tmp_path / "tasks.json").write_text(capsys.readouterr().out)
    said = json.loads((tmp_path / "tasks.json").read_text())
    assert said["reference"] == str(MODEL)
    assert [(it["task"], it["metric"], it["questions"]) for it in said["results"]] == [
        ("reap_choice", "acc", 5), ("reap_choice", "acc_norm", 5), ("reap_until", "exact_match", 5),
    ]  # fmt: skip
    page = reap.report(tmp_path / "p.json", tmp_path / "r.html", evaluations=[tmp_path / "tasks.json"]).read_text()
    card = reap.model_card(
        tmp_path / "small.gguf", tmp_path / "card.md", evaluations=[tmp_path / "tasks.json"]
    ).read_text()
    accuracy = said["results"][0]
    assert '<th scope="row">' in page
    for text, named in ((page, "reap_choice: acc"), (card, r"reap\_choice: acc")):
        assert named in text
        assert f"{accuracy['value']:.4g} ± {accuracy['stderr']:.2g}" in text
    assert "None were given" not in card
    assert "small.gguf, before it was written" in card
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(reap.FormatError, match="was compared with no other model"):
        reap.report(tmp_path / "p.json", tmp_path / "r2.html", evaluations=[tmp_path / "text.json"])


def test_without_the_extra_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reap.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(reap.MissingExtraError, match=r"pip install 'reap-moe\[tasks\]'"):
        evaluate_tasks(MODEL, "reap_choice")


@pytest.mark.torch
@pytest.mark.tasks
@pytest.mark.usefixtures("needs")
def test_the_same_as_transformers(tmp_path: Path, task_files: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from helpers import torch_models
    from reap.evaluation.harness_model import HarnessModel
    from reap.hf import convert_checkpoint

    checkpoint = torch_models.save(torch_models.build("olmoe"), tmp_path / "hf")
    convert_checkpoint(checkpoint, tmp_path / "m.gguf", outtype="f32", pre=torch_models.PRE)
    theirs = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", max_length=256, batch_size=1)
    ours = HarnessModel(tmp_path / "m.gguf", **EXACT)
    manager = tasks._manager(TASKS, task_files)
    found = [tasks._run(lm, tasks._load(manager, TASKS, None), None)["samples"] for lm in (ours, theirs)]
    for task in TASKS:
        for mine, other in zip(found[0][task], found[1][task], strict=True):
            if task == "reap_until":
                assert mine["filtered_resps"] == other["filtered_resps"]
            elif task == "reap_rolling":
                assert mine["filtered_resps"] == pytest.approx(other["filtered_resps"], abs=1e-3, rel=1e-5)
            else:
                for (a, same_a), (b, same_b) in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                    assert float(a) == pytest.approx(float(b), abs=1e-4)
                    assert same_a == same_b
                assert mine["acc"] == other["acc"]
