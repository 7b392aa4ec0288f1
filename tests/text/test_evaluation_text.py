"""Held-out text -> windows: the rule, domains, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reap.errors import CalibrationError, UsageError
from reap.text.evaluation_text import read_evaluation_text


class Bytes:
    """A tokenizer of one token per byte, with BOS 256 where the model adds it."""

    n_vocab = 300
    has_tokenizer = True
    bos = 256
    eos = None
    chat_template = None

    def __init__(self, add_bos: bool = False) -> None:
        self.add_bos = add_bos

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        assert not parse_special
        return [256] * (self.add_bos and add_special) + list(text.encode())

    def token_text(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_one_text(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz")
    found = read_evaluation_text(path, Bytes(), 8)
    assert [bytes(window.tolist()) for window in found.windows] == [b"abcdefgh", b"ijklmnop", b"qrstuvwx"]
    assert found.dropped_tokens == 2
    assert found.domains == ()
    assert (found.first_scored, found.n_scored) == (4, 3)


def test_every_window_begins_with_bos_where_the_model_adds_it(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz")
    found = read_evaluation_text(path, Bytes(add_bos=True), 8)
    assert [window.tolist()[:2] for window in found.windows] == [[256, ord("a")], [256, ord("i")], [256, ord("q")]]


def test_lines_with_domains(tmp_path: Path) -> None:
    lines = [
        {"text": "aaaa", "domain": "a"},
        {"text": "bbbbbbbb", "domain": "b"},
        {"prompt": "aa", "response": "a", "domain": "a"},
        {"tokens": [1, 2, 3, 4], "domain": "b"},
        {"text": "nobody's"},
    ]
    found = read_evaluation_text(write(tmp_path / "t.jsonl", lines), Bytes(), 4)
    assert found.domain_of == ("a", "a", "b", "b", "b", None, None)
    assert found.domains == ("a", "b")
    assert bytes(found.windows[1].tolist()) == b"aa\na"
    assert found.windows[4].tolist() == [1, 2, 3, 4]
    assert found.in_domain("a").tolist() == [True] * 2 + [False] * 5


def test_several_files_are_domains(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("1" * 10)
    (tmp_path / "two.txt").write_text("2" * 9)
    write(tmp_path / "three.jsonl", [{"text": "3" * 8}, {"text": "4" * 8, "domain": "four"}])
    paths = [tmp_path / name for name in ("one.txt", "two.txt", "three.jsonl")]
    found = read_evaluation_text(paths, Bytes(), 8)
    assert found.domain_of == ("one", "two", "three", "four")
    assert found.dropped_tokens == 3
    assert read_evaluation_text(paths[:1], Bytes(), 8).domains == ()


def test_no_more_windows_than_wanted(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("1" * 50)
    (tmp_path / "two.txt").write_text("2" * 9)
    found = read_evaluation_text([tmp_path / "one.txt", tmp_path / "two.txt"], Bytes(), 8, max_windows=2)
    assert found.domain_of == ("one", "one", "two")
    assert found.dropped_tokens == 34 + 1


def test_the_digest_is_of_what_is_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 4)
    (tmp_path / "b.txt").write_text("abcdefgh" * 4 + "x")
    (tmp_path / "c.txt").write_text("bbcdefgh" * 4)
    digests = {name: read_evaluation_text(tmp_path / f"{name}.txt", Bytes(), 8).digest for name in "abc"}
    assert digests["a"] == digests["b"] != digests["c"]
    assert read_evaluation_text(tmp_path / "a.txt", Bytes(), 16).digest != digests["a"]


def test_what_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no text to evaluate on"):
        read_evaluation_text([], Bytes(), 8)
    lines = [{"text": "a" * 20, "domain": "long"}, {"text": "b" * 7, "domain": "short"}]
    path = write(tmp_path / "t.jsonl", lines)
    with pytest.raises(
        CalibrationError, match=r't\.jsonl: the domain "short" has 7 tokens, expected at least one window of 8'
    ):
        read_evaluation_text(path, Bytes(), 8)
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(CalibrationError, match=r"bad\.jsonl:1: "):
        read_evaluation_text(tmp_path / "bad.jsonl", Bytes(), 8)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CalibrationError, match=r"empty\.txt: has 0 tokens"):
        read_evaluation_text(tmp_path / "empty.txt", Bytes(), 8)


def test_a_model_without_a_tokenizer_needs_ids(tmp_path: Path) -> None:
    tokenizer = Bytes()
    tokenizer.has_tokenizer = False
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(CalibrationError, match=r"t\.txt: the model has no tokenizer"):
        read_evaluation_text(tmp_path / "t.txt", tokenizer, 8)
    found = read_evaluation_text(write(tmp_path / "t.jsonl", [{"tokens": list(range(20))}]), tokenizer, 8)
    assert np.array_equal(np.concatenate(found.windows), np.arange(16))
