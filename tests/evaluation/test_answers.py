"""Answers: beside llama.cpp's program, virtually and from the pruned file, in batches, interrupted, as calibration."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reap
from helpers.llama_tools import require_tool
from reap.cli import main
from reap.engine.session import open_vocabulary
from reap.evaluation.answer_files import better_settings, pair_up, read_answers
from reap.progress import Progress
from reap.text.asked import Prompts

DATA = Path(reap.__file__).parent / "data"
MODEL = DATA / "reap-demo-3.7m-q8_0.gguf"
EXACT: Any = {"ctx_size": 256, "type_k": "f32", "type_v": "f32", "flash_attn": "off", "threads": 1}
TEXTS = [
    "The house stood on",
    "def load(path):\n    ",
    "int main(void)\n{\n",
    "import os\n",
    "She said",
    "x = [",
    "for (",
    "It is",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in 32-bit floats, so that what shares a product changes nothing but last bits."""
    path = tmp_path_factory.mktemp("f32") / "whole.gguf"
    reap.quantize(MODEL, path, "F32", allow_requantize=True)
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> reap.PrunePlan:
    return reap.plan(
        reap.profile(MODEL, DATA / "calibration.jsonl", ctx_size=128, max_tokens=1500, threads=1), keep=0.5
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def tokens_of(answers: reap.Answers) -> list[tuple[int, ...]]:
    return [it.tokens for it in answers.answers]


def test_the_tokens_of_llama_cpps_own_program(whole: Path, prompts: Path) -> None:
    program = require_tool("llama-completion")
    found = reap.generate(whole, prompts, max_new_tokens=60, **EXACT)
    vocabulary = open_vocabulary(whole)
    for text, answer in zip(TEXTS[:5], found.answers, strict=False):
        said = subprocess.run(
            [program, "-m", whole, "-p", text, "-n", "100", "-c", "256", "-t", "1", "--temp", "0", "-no-cnv",
             "--no-display-prompt", "--no-warmup", "-ctk", "f32", "-ctv", "f32", "-fa", "off"],
            capture_output=True, check=True, stdin=subprocess.DEVNULL,
        ).stdout.decode()  # fmt: skip
        assert len(answer.tokens) == 60
        ids = vocabulary.tokenize(text, add_special=False, parse_special=True)
        whole_text = b"".join(map(vocabulary.token_text, (*ids, *answer.tokens))).decode()
        assert (text + said).startswith(whole_text.lstrip() if not text.startswith(" ") else whole_text)


def test_a_plan_is_the_pruned_file_token_by_token(
    tmp_path: Path, whole: Path, plan: reap.PrunePlan, prompts: Path
) -> None:
    reap.prune(whole, tmp_path / "small.gguf", plan)
    virtual = reap.generate(whole, prompts, plan=plan, max_new_tokens=50, **EXACT)
    assert tokens_of(virtual) == tokens_of(reap.generate(tmp_path / "small.gguf", prompts, max_new_tokens=50, **EXACT))
    assert tokens_of(virtual) != tokens_of(reap.generate(whole, prompts, max_new_tokens=50, **EXACT))
    assert virtual.by == "whole.gguf, 16 of 32 by reap"


def test_an_answer_does_not_depend_on_its_batch(whole: Path, prompts: Path) -> None:
    options: Any = {**EXACT, "max_new_tokens": 30, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02}
    alone = reap.generate(whole, prompts, parallel=1, seed=3, **options)
    assert tokens_of(alone) == tokens_of(reap.generate(whole, prompts, parallel=5, seed=3, **options))
    other = tokens_of(reap.generate(whole, prompts, parallel=5, seed=4, **options))
    assert sum(a != b for a, b in zip(tokens_of(alone), other, strict=True)) >= 6
    same = reap.generate(whole, [{"text": TEXTS[0]}] * 4, seed=3, **options)
    assert len(set(tokens_of(same))) == 4  # each prompt has draws of its own


def test_stopped_and_gone_on_with(tmp_path: Path, whole: Path, prompts: Path) -> None:
    options: Any = {**EXACT, "max_new_tokens": 20, "temperature": 1.0, "parallel": 3}
    expected, output = tmp_path / "all.jsonl", tmp_path / "answers.jsonl"
    reap.generate(whole, prompts, expected, **options)

    def stop(progress: Progress) -> None:
        if progress.done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(reap.Interrupted, match=r"stopped after 3 of 8 prompts; .*answers\.jsonl\.resume keeps"):
        reap.generate(whole, prompts, output, progress=stop, **options)
    assert not output.exists()
    with pytest.raises(reap.UsageError, match="a resume file is there already"):
        reap.generate(whole, prompts, output, **options)
    with pytest.raises(reap.MismatchError, match="with seed 0, where this one has 1"):
        reap.generate(whole, prompts, output, resume=True, seed=1, **options)
    done: list[int] = []
    reap.generate(whole, prompts, output, resume=True, progress=lambda it: done.append(it.done), **options)
    assert done == [6, 8]
    assert output.read_bytes() == expected.read_bytes()
    assert not (tmp_path / "answers.jsonl.resume").exists()


def test_killed_and_gone_on_with(tmp_path: Path, whole: Path, prompts: Path) -> None:
    options: Any = {**EXACT, "max_new_tokens": 15, "temperature": 1.0, "parallel": 2}
    expected, output = tmp_path / "all.jsonl", tmp_path / "answers.jsonl"
    reap.generate(whole, prompts, expected, **options)
    code = (
        "import os, signal, sys, reap; from reap.evaluation import resume_file; resume_file._SECONDS = 0;"
        " resume_file._SAVING_SHARE = 1e9; kill = int(sys.argv[4]);"
        " stop = lambda it: it.done >= kill and os.kill(os.getpid(), signal.SIGKILL);"
        f" reap.generate(*sys.argv[1:4], resume=True, progress=stop, **{options!r})"
    )
    for number in (2, 4, 6):  # each goes on from where the one before was killed
        command = [sys.executable, "-c", code, str(whole), str(prompts), str(output), str(number)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert not output.exists()
        kept = json.loads((tmp_path / "answers.jsonl.resume").read_text())
        assert len(kept["state"]["answers"]) == number
    reap.generate(whole, prompts, output, resume=True, **options)
    assert output.read_bytes() == expected.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"all.jsonl", "answers.jsonl", "prompts.jsonl"}


def test_the_answers_are_a_calibration(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    lines: list[dict[str, Any]] = [
        {"prompt": "Write a loop.", "response": "no", "domain": "code"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                      {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "tools": tools},
        {"text": "The house"},
        {"tokens": [5, 6, 7]},
    ]  # fmt: skip
    found = reap.generate(MODEL, lines, tmp_path / "a.jsonl", max_new_tokens=12, ctx_size=128, threads=1)
    written = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    answers = [it.text for it in found.answers]
    assert written[0]["domain"] == "code"
    assert [it["content"] for it in written[0]["messages"]] == ["Write a loop.", answers[0]]
    assert [it["content"] for it in written[1]["messages"]] == ["a", "b", "c", answers[1]]
    assert written[1]["tools"] == tools
    assert written[2]["text"] == "The house" + answers[2]
    assert written[3]["tokens"] == [5, 6, 7, *found.answers[3].tokens]
    profile = reap.profile(MODEL, tmp_path / "a.jsonl", mask="response", ctx_size=128, threads=1)
    assert profile.calibration["samples"] == 4
    plain = reap.generate(MODEL, lines[:1], chat_template="none", max_new_tokens=5, ctx_size=128, threads=1)
    assert plain.answers[0].line == {"domain": "code", "prompt": "Write a loop.", "response": plain.answers[0].text}


def test_a_prompt_ends_where_the_answer_begins() -> None:
    tokenizer = open_vocabulary(MODEL)
    (chat,) = Prompts(
        [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}]}], tokenizer
    )
    text = b"".join(map(tokenizer.token_text, chat.tokens)).decode()
    assert "Why?" in text
    assert "No." not in text
    for line, problem in (
        ({"messages": [{"role": "system", "content": "x"}]}, "sample 1: has no user turn to answer"),
        ({"tokens": []}, "sample 1: has no tokens|sample 1"),
    ):
        with pytest.raises(reap.CalibrationError, match=problem):
            list(Prompts([line], tokenizer))


def test_what_cannot_be_is_said_before_anything_runs(tmp_path: Path, prompts: Path) -> None:
    there = tmp_path / "there.jsonl"
    there.write_text("kept")
    for output, options, problem in (
        (there, {}, "exists already"),
        (prompts, {"force": True}, "is also an input|input"),
        (None, {"temperature": -1.0}, "temperature is -1.0"),
        (None, {"top_p": 2.0}, "top_p is 2.0"),
        (None, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (None, {"parallel": 0}, "parallel is 0"),
    ):
        with pytest.raises(reap.UsageError, match=problem):
            reap.generate(MODEL, prompts, output, **options)  # type: ignore[arg-type]
    assert there.read_text() == "kept"
    with pytest.raises(reap.CalibrationError, match="no prompt fits a context of 8 tokens"):
        reap.generate(MODEL, [{"text": "one two three " * 20}], ctx_size=8, threads=1)
    with pytest.warns(reap.ReapWarning, match="1 of 2 prompts are longer than the context"):
        found = reap.generate(MODEL, [{"text": "one two three " * 90}, {"text": "a"}], ctx_size=64, threads=1)
    assert found.skipped == {"longer than the context": 1}
    assert len(found.answers[0].tokens) <= 64


def test_the_command(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(MODEL), str(prompts), "-o", str(tmp_path / "a.jsonl"), "-n", "8", "-c", "64", "-t", "1"]
    assert main([*command, "--temp", "0.7", "--min-p", "0.1", "--seed", "5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["prompts"], said["seed"], said["sampling"]["min_p"]) == (8, 5, 0.1)
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def filed(path: Path, by: str, temperature: float, answers: list[tuple[str, list[int]]]) -> Path:
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.05}
    lines = [
        {
            "prompt": f"<script>{n}</script>",
            "response": text,
            "reap": {
                "by": by,
                "sampling": sampling,
                "prompt": f"{n:016x}",
                "answer": text,
                "ended": "text",
                "tokens": ids,
            },
        }
        for n, (text, ids) in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_side_by_side(tmp_path: Path) -> None:
    profile = reap.profile(MODEL, DATA / "calibration.jsonl", ctx_size=128, max_tokens=800, threads=1)
    profile.save(tmp_path / "p.json")
    a = filed(tmp_path / "a.jsonl", "whole", 0, [("same", [1, 2]), ("late <b>", [1, 2, 3]), ("early", [4])])
    b = filed(tmp_path / "b.jsonl", "small", 0, [("same", [1, 2]), ("late </td>", [1, 2, 9]), ("\u2028no", [5])])
    pairs = pair_up(read_answers(a), read_answers(b))
    assert [pair.first.answer for pair in pairs] == ["early", "late <b>", "same"]
    page = reap.report(tmp_path / "p.json", tmp_path / "r.html", answers=[a, b]).read_text()
    assert "&lt;script&gt;0&lt;/script&gt;" in page
    assert "<script>0" not in page
    assert "late &lt;/td&gt;" in page
    assert "2 of 3 prompts were answered differently" in page
    with pytest.raises(reap.UsageError, match="1 files of answers were given, expected two"):
        reap.report(tmp_path / "p.json", tmp_path / "r2.html", answers=[a])
    other = filed(tmp_path / "c.jsonl", "small", 0, [])
    with pytest.raises(reap.FormatError, match="holds no answers"):
        reap.report(tmp_path / "p.json", tmp_path / "r2.html", answers=[a, other])
    other.write_text('{"prompt": "x", "response": "y"}\n')
    with pytest.raises(reap.FormatError, match=r"c\.jsonl:1 is not an answer that reap generate wrote"):
        reap.report(tmp_path / "p.json", tmp_path / "r2.html", answers=[a, other])


def test_the_card_recommends_what_was_measured(tmp_path: Path) -> None:
    steady, stuck = ("fine", list(range(30))), ("aaa", [7] * 30)
    greedy = filed(tmp_path / "g.jsonl", "small.gguf", 0, [stuck] * 20 + [steady] * 80)
    warm = filed(tmp_path / "w.jsonl", "small.gguf", 0.7, [stuck] * 4 + [steady] * 96)
    little = filed(tmp_path / "l.jsonl", "small.gguf", 0.7, [stuck] * 15 + [steady] * 85)
    others = filed(tmp_path / "o.jsonl", "another.gguf", 0.7, [steady] * 100)
    files = {path.name: read_answers(path) for path in (greedy, warm, little, others)}
    ((better, worse, p_value),) = better_settings(list(files.values()))
    assert (better.path, worse.path) == (str(warm), str(greedy))
    assert p_value < 0.001
    plan = reap.plan(reap.profile(MODEL, DATA / "calibration.jsonl", ctx_size=128, max_tokens=800, threads=1), keep=0.5)
    reap.prune(MODEL, tmp_path / "small.gguf", plan)
    card = reap.model_card(tmp_path / "small.gguf", tmp_path / "c.md", answers=[greedy, warm]).read_text()
    assert "with --temp 0.7 --top-k 0 --top-p 1 --min-p 0.05: 4.0%" in card
    assert r"20.0% \(95 %: 13.3% to 28.9%\)" in card
    card = reap.model_card(tmp_path / "small.gguf", tmp_path / "d.md", answers=[greedy, little]).read_text()
    assert "ended in a loop, and" not in card


def test_the_loop_probe_with_prompts_of_ones_own(tmp_path: Path, plan: reap.PrunePlan, prompts: Path) -> None:
    options: Any = {"ctx_size": 128, "max_tokens": 256, "threads": 1}
    found = reap.evaluate(MODEL, DATA / "heldout" / "c.txt", plan=plan, loop_prompts=prompts, **options)
    loops = found.loops
    assert loops is not None
    assert loops.prompts == 8
    low, high = loops.looping_interval
    assert low <= loops.looping <= high
    assert loops.reference_looping_interval is not None
    assert loops.looping_p_value is not None
    assert any("8 prompts do not show whether two more of a hundred end in a loop" in it for it in found.warnings)
    assert "(95 %: " in found.meaning
    json.dumps(found.to_dict(), allow_nan=False)
    windows = reap.evaluate(MODEL, DATA / "heldout" / "c.txt", loop_prompts=2, **options)
    assert windows.loops is not None
    assert windows.loops.prompts == 2
    with pytest.raises(reap.UsageError, match="loop_prompts is 0"):
        reap.evaluate(MODEL, DATA / "heldout" / "c.txt", loop_prompts=0, **options)
