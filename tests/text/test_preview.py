"""preview(): what is counted of a calibration, against a slow count; what the command line shows of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reap
from helpers.byte_tokenizer import ByteTokenizer
from reap.cli import main
from reap.errors import CalibrationError, EngineError, UsageError
from reap.text.preview import Preview, preview_text
from reap.text.windows import Calibration

DATA = Path(reap.__file__).parent / "data"
MODEL = DATA / "reap-demo-3.7m-q8_0.gguf"


def seen_of(source: Any, *, ctx_size: int = 1000, show: int = 3, **options: Any) -> Preview:
    return preview_text(Calibration(source, ctx_size=ctx_size, **options), ByteTokenizer(), model="m", show=show)


def test_what_is_counted(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"prompt": "ask", "response": "answer", "domain": "a"},
        {"prompt": "ask", "response": "answer", "domain": "a"},
        {"text": "x" * 40, "domain": "b"},
        {"text": ""},
        {"other": 1},
        {"text": "plain"},
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.txt").write_text("prose " * 10)
    seen = seen_of([path, ("t", tmp_path / "t.txt")], ctx_size=16, mask="response", skip_bad_lines=True)
    assert [(it.name, it.format, it.domain, it.shapes, it.bad) for it in seen.files] == [
        (str(path), "JSON Lines", None, {"text": 3, "prompt+response": 2}, {"no known shape": 1}),
        (str(tmp_path / "t.txt"), "text", "t", {"text file": 1}, {}),
    ]
    assert {name: (it.samples, it.windows, it.tokens, it.counted_tokens) for name, it in seen.domains.items()} == {
        "a": (2, 2, 22, 12),
        "b": (1, 3, 41, 41),
        None: (1, 1, 6, 6),
        "t": (1, 4, 61, 61),
    }
    assert (seen.samples, seen.windows, seen.tokens, seen.counted_tokens) == (5, 10, 130, 120)
    assert seen.skipped_reasons == {"no text": 1, "no known shape": 1}
    assert seen.duplicates == 1
    assert seen.longest_run is not None
    assert (seen.longest_run.character, seen.longest_run.length) == ("x", 40)  # across windows
    assert seen.longest_run.where == f"{path}:3"
    assert [(it.shape, it.domain, it.n_tokens) for it in seen.shown] == [
        ("prompt+response", "a", 11),
        ("prompt+response", "a", 11),
        ("text", "b", 41),
    ]
    assert seen.shown[0].text == "<s>ask\nanswer"
    assert "".join(p for p, c in zip(seen.shown[0].pieces, seen.shown[0].counted, strict=True) if c) == "answer"
    json.dumps(seen.to_dict())


def test_calls_and_thoughts() -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call, call], "reasoning_content": "left out"},
        {"role": "assistant", "content": "shown", "reasoning_content": " shown "},
        {"role": "assistant", "content": "a", "reasoning_content": "", "tool_calls": None},
    ]
    seen = seen_of([{"messages": messages}])
    assert (seen.tool_calls, seen.turns_with_thoughts, seen.turns_without_thoughts) == (2, 2, 1)


texts = st.lists(st.text(alphabet="aab é😀\n", max_size=30), min_size=1, max_size=6)


@given(texts, st.integers(2, 9))
def test_runs_and_duplicates(rows: list[str], ctx_size: int) -> None:
    rows = [*rows, "x"]
    seen = seen_of([{"text": row} for row in rows], ctx_size=ctx_size)
    used = [row for row in rows if row]
    assert seen.duplicates == sum(count - 1 for count in Counter(used).values())
    longest = max((_longest(row) for row in used), default=0)
    assert (seen.longest_run.length if seen.longest_run else 0) == (longest if longest >= 4 else 0)


def _longest(text: str) -> int:
    best = run = 0
    for before, sign in zip(" " + text, text, strict=False):
        run = run + 1 if sign == before and run else 1
        best = max(best, run)
    return best


def test_a_character_of_several_tokens_is_that_of_the_last() -> None:
    (shown,) = seen_of([{"text": "aé😀b"}]).shown
    assert shown.pieces == ["<s>", "a", "", "é", "", "", "", "😀", "b"]


# ---- with a model


def test_the_embedded_calibration() -> None:
    seen = reap.preview(MODEL, DATA / "calibration.jsonl")
    assert (seen.samples, seen.tokens, seen.n_experts) == (200, 51_784, 32)
    assert seen.tokens_per_expert == 51_784 * 4 / 32
    assert set(seen.domains) == {"c", "english", "python"}
    assert seen.shown[0].text.startswith("import os\nimport sysconfig")
    assert seen.seconds is None


def test_it_takes_less_than_a_second_of_the_processor() -> None:
    """Wall time on an idle machine; what else runs here does not count."""
    script = "import sys, reap; reap.preview(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", f"import time; {script}; print(time.process_time())"]
    command += [str(MODEL), str(DATA / "calibration.jsonl")]
    times = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(times) < 1.5


def test_the_time_of_a_profile() -> None:
    seen = reap.preview(MODEL, DATA / "calibration.jsonl", measure_time=True, max_tokens=2000, show=0, threads=1)
    assert seen.shown == []
    assert seen.tokens_per_second is not None
    assert seen.seconds == pytest.approx(2000 / seen.tokens_per_second)
    started = time.monotonic()
    reap.profile(MODEL, DATA / "calibration.jsonl", max_tokens=2000, threads=1)
    assert seen.seconds < 30 * (time.monotonic() - started)


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="show is -1"):
        reap.preview(MODEL, [{"text": "a"}], show=-1)
    with pytest.raises(CalibrationError, match="sample 2: should have one of"):
        reap.preview(MODEL, [{"text": "a"}, {"x": 1}], skip_bad_lines=False)
    with pytest.raises(UsageError, match="no such file"):
        reap.preview(tmp_path / "absent.gguf", [{"text": "a"}])
    with pytest.raises(TypeError, match=r"preview\(\) got an unexpected keyword argument 'checkpoint'"):
        reap.preview(MODEL, [{"text": "a"}], checkpoint="x")  # type: ignore[call-arg]


def test_a_vocabulary_is_the_session_s() -> None:
    from reap.engine.options import EngineOptions
    from reap.engine.session import SessionTokenizer, open_session, open_vocabulary

    alone = open_vocabulary(MODEL)
    whole = SessionTokenizer(open_session(MODEL, EngineOptions(ctx_size=64)))
    for name in ("n_vocab", "has_tokenizer", "add_bos", "bos", "eos", "chat_template"):
        assert getattr(alone, name) == getattr(whole, name)
    text = "int main(void) { return 0; } <|im_start|> é"
    for parse in (False, True):
        ids = alone.tokenize(text, add_special=True, parse_special=parse)
        assert ids == whole.tokenize(text, add_special=True, parse_special=parse)
    assert [alone.token_text(token) for token in ids] == [whole.token_text(token) for token in ids]
    with pytest.raises(EngineError, match="cannot read this model's tokenizer"):
        open_vocabulary(DATA / "calibration.jsonl")


# ---- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "What is C?", "response": "A \\u001b[31mlanguage."}\nbad\n' * 2)
    assert main(["preview", str(MODEL), f"chat={path}", "--mask", "response", "--tokens"]) == 0
    said = capsys.readouterr().out
    assert "2 prompt+response" in said
    assert "2 not JSON" in said
    assert "chat" in said
    assert "1 samples are the same as an earlier one" in said
    assert "2 pairs are joined by a newline" in said
    assert "│⟦" in said
    assert "\x1b" not in said
    assert r"\x1b" in said
    assert main(["preview", str(MODEL), str(path), "--json", "--show", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["duplicates"] == 1
    assert document["shown"][0]["text"].startswith("What is C?\nA ")
    assert main(["preview", str(MODEL), str(path), "--columns", "text=prompt", "--show", "0"]) == 0
    assert "2 text" in capsys.readouterr().out
    assert main(["preview", str(MODEL), str(path), "--columns", "story"]) == 2
    assert "--columns should be ROLE=NAME" in capsys.readouterr().err


def test_profile_takes_what_preview_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{"story": "int main(void);" * 5}, {"story": 3}]))
    out = tmp_path / "p.json"
    command = ["profile", str(MODEL), f"c={path}", "-o", str(out), "--columns", "text=story", "-c", "64"]
    assert main(command) == 1
    assert "row 2: text should be a string, found the number 3; --skip-bad-lines" in capsys.readouterr().err
    assert main([*command, "--skip-bad-lines"]) == 0
    profile = reap.Profile.load(out)
    assert profile.domains == ("c",)
    assert profile.calibration["skipped_reasons"] == {"value of the wrong type": 1}
    assert profile.calibration["shapes"] == {"text": 1}
