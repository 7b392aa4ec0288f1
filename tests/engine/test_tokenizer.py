"""Long runs of one kind of character, for pre-tokenizers whose regular expression calls itself for each of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.gguf_builder import build_moe

#: A run of n times 2048 must have the ids of one of 2048, n times: it is one piece, cut into tokens of 8.
CHILD = """
import sys, threading
import numpy as np
from reap.engine.options import EngineOptions
from reap.engine.session import open_session

session = open_session(sys.argv[1], EngineOptions(ctx_size=64, threads=1))

def tokenise():
    for n in map(int, sys.argv[2].split()):
        for run in ("a", "A", "-", " "):
            piece = (run * 2048).encode()
            ids = session.tokenize(piece, False, True)
            assert np.array_equal(session.tokenize(piece * n, False, True), np.tile(ids, n)), (run, n)
            assert len(ids) == 256
            assert b"".join(map(session.token_text, ids.tolist())) == piece

threading.stack_size(256 << 10)  # what the caller's stack is must not matter
thread = threading.Thread(target=tokenise)
thread.start()
thread.join()
print("done")
"""


@pytest.mark.parametrize("pre_tokenizer", ["deepseek-v3", "gpt-4o", "tekken", "falcon"])
def test_long_runs(tmp_path: Path, pre_tokenizer: str) -> None:
    path = build_moe(tmp_path / "m.gguf", tokenizer="bpe", pre_tokenizer=pre_tokenizer, n_vocab=320)
    command = [sys.executable, "-c", CHILD, str(path), "4 100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]


def test_more_stack_than_there_is_memory_is_a_sentence(tmp_path: Path) -> None:
    """Where the process may not map the stack, the text is refused, and the session goes on."""
    path = build_moe(tmp_path / "m.gguf", tokenizer="bpe", pre_tokenizer="tekken", n_vocab=320)
    child = """
import resource, sys
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import EngineError

session = open_session(sys.argv[1], EngineOptions(ctx_size=64, threads=1))
session.tokenize(b"a" * 2048, False, True)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), resource.RLIM_INFINITY))
try:
    session.tokenize(b"a" * (4 << 20), False, True)
except EngineError as error:
    print(error)
print(len(session.tokenize(b"a" * 4096, False, True)))
"""
    command = [sys.executable, "-c", child, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sentence, count = done.stdout.splitlines()
    assert "a text of 4194304 bytes cannot be tokenised: a stack of" in sentence
    assert count == "512"
