"""The sketch of a calibration's windows, against plain sets of all windows."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.profiles import make_profile
from reap.errors import FormatError
from reap.files.strict_json import Node
from reap.scores.merging import merge
from reap.scores.profile import Profile
from reap.text.overlap import CAPACITY, WINDOW, Sketch, overlap_warnings, read_sketch, window_hashes
from reap.text.windows import Calibration


def random_text(seed: int, n_tokens: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, n_tokens)


def sketch_of(*texts: np.ndarray) -> Sketch:
    sketch = Sketch()
    for text in texts:
        sketch.add(text)
    return sketch


@given(st.lists(st.integers(0, 3), max_size=60))
def test_equal_windows_have_equal_hashes_and_others_do_not(tokens: list[int]) -> None:
    hashes = window_hashes(tokens).tolist()
    windows = [tuple(tokens[start : start + WINDOW]) for start in range(len(tokens) - WINDOW + 1)]
    assert len(hashes) == len(windows)
    assert len(set(zip(windows, hashes, strict=True))) == len(set(windows)) == len(set(hashes))


def test_a_small_calibration_is_remembered_whole() -> None:
    calibration = random_text(1, 1000)
    text = np.concatenate([random_text(2, 500), calibration[200:400], random_text(3, 300)])
    overlap = sketch_of(calibration).look_up(text)
    assert overlap.looked_up == 1000 - WINDOW + 1
    assert overlap.found == 200 - WINDOW + 1


def test_of_a_large_one_the_share_is_estimated() -> None:
    calibration = random_text(1, 100_000)
    sketch = sketch_of(*np.split(calibration, 100))
    assert len(sketch.hashes) == CAPACITY
    assert sketch.look_up(calibration[5000:15_000]).share > 0.95  # all except the windows across the hundred parts
    assert sketch.look_up(random_text(2, 100_000)).found == 0
    half = np.concatenate([calibration[:10_000], random_text(3, 10_000)])
    overlap = sketch.look_up(half)
    assert 200 < overlap.looked_up < 700
    assert overlap.share == pytest.approx(0.5, abs=0.12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_merging_is_adding(seed: int, n_parts: int) -> None:
    parts = np.array_split(random_text(seed, 9000), n_parts)
    merged = Sketch()
    for part in reversed(parts):
        merged.merge(sketch_of(part))
    assert merged.hashes.tolist() == sketch_of(*parts).hashes.tolist()


def test_nothing_seen() -> None:
    assert sketch_of().look_up(random_text(1, 100)).share == 0.0
    assert sketch_of(random_text(1, WINDOW - 1)).hashes.size == 0
    assert sketch_of(random_text(1, 100)).look_up([]).share == 0.0


def test_it_survives_a_file(tmp_path: Path) -> None:
    sketch = sketch_of(random_text(1, 50_000))
    record = sketch.to_dict()
    assert len(record["hashes"]) == 2048 * 8
    assert read_sketch(Node(record, "x")).hashes.tolist() == sketch.hashes.tolist()
    profile = make_profile(calibration={"files": ["a"], "sha256": ["0" * 64], "sketch": record})
    profile.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json").calibration["sketch"] == record


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({}, 'lacks "tokens_per_window"'),
        ({"tokens_per_window": 8, "hashes": ""}, "should be an integer from 16 to 16"),
        ({"tokens_per_window": 16, "hashes": []}, "should be a string"),
        ({"tokens_per_window": 16, "hashes": "&&&&"}, "is not base64"),
        ({"tokens_per_window": 16, "hashes": "é"}, "is not base64"),
        ({"tokens_per_window": 16, "hashes": "AAAA"}, "should be at most 2,048 hashes of 6 bytes, found 3 bytes"),
        ({"tokens_per_window": 16, "hashes": base64.b64encode(bytes(12)).decode()}, "should ascend"),
        ({"tokens_per_window": 16, "hashes": base64.b64encode(bytes(6 * 2049)).decode()}, "at most 2,048"),
    ],
)
def test_damaged_sketches(record: dict[str, object], problem: str, tmp_path: Path) -> None:
    make_profile(calibration={"files": ["a"], "sha256": ["0" * 64], "sketch": record}).save(tmp_path / "p.json")
    with pytest.raises(FormatError, match=rf"p\.json: calibration: sketch.*{problem}"):
        Profile.load(tmp_path / "p.json")


def test_merged_profiles_remember_both() -> None:
    a, b = random_text(1, 800), random_text(2, 800)
    profiles = [
        make_profile(seed, calibration={"files": [name], "sha256": [name * 64], "sketch": sketch_of(text).to_dict()})
        for seed, (name, text) in enumerate({"a": a, "b": b}.items())
    ]
    record = merge(profiles).calibration["sketch"]
    assert read_sketch(Node(record, "x")).hashes.tolist() == sketch_of(a, b).hashes.tolist()


def test_what_a_reader_is_told() -> None:
    text = random_text(1, 2000)
    record = {"files": ["calib.txt"], "sha256": ["ab" * 32], "sketch": sketch_of(text).to_dict()}
    said = overlap_warnings({"held.txt": "ab" * 32, "other.txt": "ef" * 32}, random_text(2, 100), record)
    assert len(said) == 1
    assert said[0].startswith("held.txt: is the calibration file calib.txt itself")
    said = overlap_warnings({"held.txt": "cd" * 32}, np.concatenate([text[:500], random_text(3, 500)]), record)
    assert said[0].startswith(
        "held.txt: about 49% of it was in the calibration (485 of 985 windows of 16 tokens that were looked up)"
    )
    assert overlap_warnings({"held.txt": "cd" * 32}, random_text(2, 2000), record) == []
    assert overlap_warnings({"held.txt": "cd" * 32}, text, {"files": ["x"], "sha256": ["0" * 64]}) == []
    boilerplate = np.concatenate([text[:19], random_text(4, 50)])  # four windows of 54: no overlap worth a word
    assert overlap_warnings({"held.txt": "cd" * 32}, boilerplate, record) == []


class WordTokenizer:
    n_vocab = 1 << 20
    has_tokenizer = True
    bos = eos = None
    chat_template = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def token_text(self, token: int) -> bytes:
        return str(token).encode()


def test_calibration_keeps_a_sketch_of_what_the_model_saw_and_no_more() -> None:
    ids = random_text(5, 900).tolist()
    source = Calibration([{"text": " ".join(map(str, ids))}], ctx_size=300, max_tokens=600)
    windows = list(source.windows(WordTokenizer()))
    sketch = read_sketch(Node(source.summary()["sketch"], "x"))
    assert len(windows) == 2
    assert sketch.hashes.tolist() == sketch_of(np.array(ids[:300]), np.array(ids[300:600])).hashes.tolist()
