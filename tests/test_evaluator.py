"""evaluate() against its own formula written out, and against llama-perplexity."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llama_tools import require_tool
from reap.engine import EngineOptions, SessionTokenizer, open_session
from reap.errors import CalibrationError, UsageError
from reap.evaluator import evaluate, perplexity_of

DATA = Path(__file__).parent.parent / "python" / "reap" / "data"


@pytest.fixture(scope="module")
def model() -> Path:
    return next(DATA.glob("reap-demo-*.gguf"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluator") / "text.txt"
    path.write_text((DATA / "heldout" / "python.txt").read_text(encoding="utf-8")[:12_000], encoding="utf-8")
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


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_the_same_as_llama_perplexity(model: Path, text: Path, flash_attn: str) -> None:
    program = require_tool("llama-perplexity")
    command = [program, "-m", model, "-f", text, "-c", "512", "-b", "512", "-ub", "512", "-t", "1", "-fa", flash_attn]
    for _ in range(3):  # its log is written by a thread, and on a busy machine the last lines were seen to be missing at its exit
        printed = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=True)
        match = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", printed.stdout + printed.stderr)
        if match is not None:
            break
    assert match is not None, (printed.stdout + printed.stderr)[-500:]
    found = evaluate(model, text, ctx_size=512, threads=1, flash_attn=flash_attn)
    assert f"{found.perplexity:.4f}" == match[1]
    assert found.stderr == pytest.approx(float(match[2]), abs=1e-4)


def test_perplexity_of_known_probabilities() -> None:
    perplexity, stderr = perplexity_of(np.log(np.array([0.5, 0.5, 0.5])))
    assert perplexity == pytest.approx(2.0)
    assert stderr == pytest.approx(0.0, abs=1e-7)
    assert np.isnan(perplexity_of(np.log(np.array([0.25])))[1])


def test_texts_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(CalibrationError, match=r"short\.txt: has \d+ tokens, expected at least one window of 512"):
        evaluate(model, short)
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\xfe" * 1000)
    with pytest.raises(CalibrationError, match=r"binary\.txt: is no UTF-8 text \(byte 3\)"):
        evaluate(model, tmp_path / "binary.txt")
    with pytest.raises(UsageError, match=r"nowhere\.txt: cannot be read"):
        evaluate(model, tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match="ctx_size is 2"):
        evaluate(model, short, ctx_size=2)
