"""What a process has one of, and what a file says in bytes: threads, limits, paths, the engine's warnings."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf
import reap
from gguf import GGMLQuantizationType
from helpers.gguf_builder import build_moe
from helpers.llama_tools import require_tool
from reap.engine import native
from reap.engine.options import EngineOptions
from reap.engine.session import SessionTokenizer, open_session
from reap.errors import EngineError, UnsupportedModelError

SMALL = EngineOptions(ctx_size=64, ubatch_size=64, threads=1)
STRING = gguf.GGUFValueType.STRING


def test_four_threads_open_sessions(tmp_path: Path) -> None:
    path = build_moe(tmp_path / "m.gguf")
    before = resource.getrlimit(resource.RLIMIT_AS)
    expected = open_session(path, SMALL).log_probs([1, 2, 3], 0)
    problems: list[str] = []

    def work(number: int) -> None:
        for _ in range(5):
            if not np.array_equal(open_session(path, SMALL).log_probs([1, 2, 3], 0), expected):
                problems.append("other numbers")
            absent = tmp_path / f"absent{number}.gguf"
            absent.touch()
            try:
                open_session(absent, SMALL)
            except EngineError as error:
                problems.extend(str(error) for other in range(4) if other != number and f"absent{other}" in str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def odd_directory(parent: Path) -> Path:
    """A directory whose name is not UTF-8."""
    directory = Path(os.fsdecode(os.fsencode(parent) + b"/caf\xff"))
    directory.mkdir()
    return directory


def test_a_path_that_is_not_utf_8(tmp_path: Path) -> None:
    directory = odd_directory(tmp_path)
    kind = GGMLQuantizationType.F16
    path = build_moe(directory / "m.gguf", n_embd=64, n_ff=64, n_vocab=320, tokenizer="bpe", expert_type=kind)
    (directory / "text.txt").write_text("some words to count the experts of, and some more of them", "utf-8")
    profile = reap.profile(path, directory / "text.txt", ctx_size=64, threads=1)
    assert profile.total_tokens.max() > 0
    report = reap.quantize(path, directory / "q.gguf", "q8_0")
    assert report.n_bytes_after == (directory / "q.gguf").stat().st_size
    (directory / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(EngineError, match="cannot load this model"):
        open_session(directory / "bad.gguf", SMALL)


def test_text_of_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = build_moe(
        tmp_path / "m.gguf",
        n_vocab=320,
        tokenizer="bpe",
        keys={"tokenizer.chat_template": (STRING, "{{ messages }} caf?")},
    )
    path.write_bytes(path.read_bytes().replace(b" caf?", b" caf\xe9"))
    session = open_session(path, SMALL)
    assert SessionTokenizer(session).chat_template == "{{ messages }} caf�"
    # an architecture's name, which the engine quotes in its log
    path.write_bytes(path.read_bytes().replace(b"qwen3moe", b"qwen3mo\xff"))
    with pytest.raises(EngineError, match="unknown model architecture: 'qwen3mo�'"):
        open_session(path, SMALL)


def test_warnings_of_the_engine(tmp_path: Path) -> None:
    said = build_moe(tmp_path / "said.gguf", n_vocab=320, tokenizer="bpe", pre_tokenizer="gpt-2")
    silent = build_moe(tmp_path / "silent.gguf", n_vocab=320, tokenizer="bpe", pre_tokenizer=None)
    assert open_session(said, SMALL).warnings() == []
    warnings = open_session(silent, SMALL).warnings()
    assert [line for line in warnings if "missing pre-tokenizer type" in line] == warnings[:1]
    assert len(set(warnings)) == len(warnings)

    session = open_session(said, EngineOptions(ctx_size=300, threads=1))
    assert session.n_ctx_train == 256
    (warning,) = session.warnings()
    assert "the context of 300 tokens is longer than the 256 that the model was trained with" in warning
    assert open_session(said, EngineOptions(ctx_size=256, threads=1)).warnings() == []
    assert open_session(said, EngineOptions(ctx_size=64, batch_size=512, threads=1), n_sequences=8).warnings() == []


def test_a_model_that_sees_the_future(tmp_path: Path) -> None:
    path = build_moe(tmp_path / "m.gguf")
    assert not open_session(path, SMALL).sees_the_future()
    core = native.load()
    options = core.SessionOptions()
    options.model_path, options.ctx_size = path, 64
    options.kv_overrides = [("qwen3moe.attention.causal", "bool", "false")]
    session = core.Session(options)
    assert session.sees_the_future()
    assert session.sees_the_future()  # nothing is left of the first time


@pytest.mark.parametrize(
    ("architecture", "expected"), [("llada-moe", True), ("rnd1", True), ("olmoe", False), ("granitehybrid", False)]
)
def test_architectures_that_see_the_future(tmp_path: Path, architecture: str, expected: bool) -> None:
    from helpers.architectures import write_models

    path = write_models(require_tool("test-llama-archs"), f"^{architecture}$", tmp_path)[-1]
    assert open_session(path, SMALL).sees_the_future() is expected


def test_a_prediction_block_that_there_is_not(tmp_path: Path) -> None:
    path = build_moe(tmp_path / "m.gguf")
    with pytest.raises(
        UnsupportedModelError, match=r"layer 1: the engine cannot run its prediction block; without its"
    ):
        open_session(path, SMALL, prediction_layer=1)


def test_what_falls_back_is_said(tmp_path: Path) -> None:
    """Rows of 64 do not divide into blocks of 256."""
    kind = GGMLQuantizationType.F16
    path = build_moe(tmp_path / "m.gguf", n_embd=64, n_ff=64, n_vocab=64, expert_type=kind)
    report = reap.quantize(path, tmp_path / "q.gguf", "Q4_K_M")
    assert "Q4_K" not in report.tensor_types
    fell: dict[str, int] = {}
    for warning in report.warnings:
        n, _, _, got, *_ = warning.split()
        fell[got] = fell.get(got, 0) + int(n)
    assert fell["Q5_0"] == report.tensor_types["Q5_0"] > 0  # what stands in for Q4_K, and is in no mixture of it
    assert all(n <= report.tensor_types[name] for name, n in fell.items())
    wide = build_moe(tmp_path / "wide.gguf", n_embd=256, n_ff=256, n_vocab=64, n_head_dim=64, expert_type=kind)
    assert not reap.quantize(wide, tmp_path / "w.gguf", "Q4_K_M").warnings


def test_paths_of_the_options_are_read_back() -> None:
    core = native.load()
    for options, name in ((core.SessionOptions(), "model_path"), (core.QuantizeOptions(), "output")):
        given: Any
        for given in ("a", b"a", Path("a")):
            setattr(options, name, given)
            assert getattr(options, name) == "a"
        setattr(options, name, b"\xff")
        assert getattr(options, name) == os.fsdecode(b"\xff")
