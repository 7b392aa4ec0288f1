"""What a file is told to be, by name and by content; places in errors; what is refused; bad lines."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.byte_tokenizer import ByteTokenizer, text_of
from reap.errors import CalibrationError, UsageError
from reap.scores.plan import PrunePlan
from reap.text.evaluation_text import read_evaluation_text, text_files
from reap.text.lines import BadLine
from reap.text.samples import Sample, SampleReader
from reap.text.shapes import KEYS, parse_sample
from reap.text.sources import split_domain
from reap.text.windows import Calibration


def samples_of(source: Any, **options: Any) -> list[Sample]:
    return list(SampleReader(source, **options))


def texts_of(source: Any, **options: Any) -> list[str | None]:
    return [sample.text for sample in samples_of(source, **options)]


def format_of(path: Path) -> str:
    reader = SampleReader(path)
    list(reader)
    return reader.records[0].format


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# ---- by content


NOISE = random.Random(0).randbytes(9999).hex().encode()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('{"text": "a"}\n', "JSON Lines"),
        ('\n  {"text": "a"}\n', "JSON Lines"),
        ('[{"text": "a"}]', "JSON array"),
        ('\n[\n\n  {"text": "a"}\n]', "JSON array"),
        ("text,label\nhello,1\n", "CSV"),
        ('"prompt";"response"\n"a";"b"\n', "CSV"),
        ("id\ttext\n1\thello, there\n", "CSV"),
        ("text\nhello\nthere\n", "CSV"),
        ("Once upon a time, in a land far away,\nthere was, they say, a king.\n", "text"),
        ("[Applause] He bowed.\n", "text"),
        ("[1] Smith et al.\n", "text"),
        ('"Well," he said.\n', "text"),
        ("# Title\n\ntext, label\n", "text"),
        ("Hello, world\nHow are you, today\n", "text"),
    ],
)
def test_a_file_without_a_suffix_and_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, expected: str
) -> None:
    path = write(tmp_path / "data", data)
    assert format_of(path) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    reader = SampleReader("-")
    from_stdin = list(reader)
    assert reader.records[0].format == expected
    assert [sample.text for sample in from_stdin] == texts_of(path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(data.encode()))))
    assert [sample.text for sample in SampleReader("-")] == texts_of(path)


def test_a_table_of_unknown_columns_is_not_prose(tmp_path: Path) -> None:
    path = write(tmp_path / "data", "id,title\n1,foo\n2,bar\n")
    with pytest.raises(CalibrationError, match=r'data:2: should have one of .*, found "id", "title"'):
        samples_of(path)
    assert texts_of(path, columns={"text": "title"}) == ["foo", "bar"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.txt", b"GGUF\3\0\0\0" + bytes(16), r"m\.txt: is a GGUF model; begins with the bytes 47 47 55 46 03"),
        ("d.zip", b"PK\x03\x04" + bytes(40), r"is a ZIP archive; unpack it first"),
        ("d", b"\x89PNG\r\n\x1a\n" + bytes(40), "is an image"),
        ("d.pkl", b"\x80\x04\x95" + bytes(40), "is a pickle, which is never read"),
        ("d.jsonl", "hä".encode("utf-16-le") * 20, "is not text in UTF-8; UTF-16 is read where the file begins with"),
        ("d.parquet", b'{"text": "a"}\n', r"is not a parquet file; begins with the bytes 7b 22 .*, expected \.jsonl"),
        ("d.tar", b"a".ljust(257, b"x") + b"ustar" + b"y" * 300, "is a tar archive; unpack it first"),
        ("d.json", b'{"data": [\n{"text": "a"}\n]}', 'looks like one JSON object over several lines, .* key is "data"'),
        ("e.json", b'{\n "text": "a"\n}', 'key is "text"; expected one object a line, or an array of them'),
        ("f.json", b'{"text": "a"\n{"text": "b"}\n', "f.json:1: is not JSON: Expecting ',' delimiter"),
        ("g.json", b"{text: 1}\n", "is not JSON: Expecting property name"),
        ("d.xz", lzma.compress(b"x" * 99)[:-20], r"d\.xz: the compressed data end too early"),
        ("d.gz", gzip.compress(b"x" * 99)[:-9], "the compressed data end too early"),
        (
            "d.zst",
            zstandard.compress(random.Random(0).randbytes(9999).hex().encode())[:-50],
            "the compressed data end too early",
        ),
        ("f.gz", gzip.compress(b"x" * 99)[:20] + b"garbage" * 9, "the compressed data are damaged"),
        ("f.bz2", bz2.compress(b"x" * 99) + b"garbage" * 9, "the compressed data are damaged"),
        ("f.xz", lzma.compress(b"x" * 99) + b"garbage" * 9, "the compressed data are damaged"),
        ("g.bz2", bz2.compress(b"x" * 99) * 2 + b"BZh91AY&SY", "the compressed data end too early"),
        ("d.csv", b"a,a\n1,2\n", r"d\.csv:1: names the column \"a\" twice"),
        ("d.txt", b"\xff\xfe" + b"a\xd8" * 3, "begins with the mark of UTF-16, but is not UTF-16"),
    ],
)
def test_what_is_none_of_these_says_what_it_looks_like(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        samples_of(write(tmp_path / name, data))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_parquet_needs_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "d.bin")
    assert format_of(tmp_path / "d.bin") == "Parquet"  # by its content
    raw = (tmp_path / "d.bin").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    with pytest.raises(CalibrationError, match="<stdin>: Parquet cannot be read from standard input; give the file"):
        samples_of("-")
    with pytest.raises(CalibrationError, match="cannot be read compressed as a whole"):
        samples_of(write(tmp_path / "d.parquet.gz", gzip.compress(raw)))
    with pytest.raises(CalibrationError, match=r"d\.parquet: cannot be read after row 0: "):
        samples_of(write(tmp_path / "d.parquet", raw[:40] + b"x" * 20 + raw[60:-20]))


def test_without_the_extra(tmp_path: Path) -> None:
    """What says so where pyarrow or zstandard is not installed."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "d.parquet")
    write(tmp_path / "d.jsonl.zst", zstandard.compress(b'{"text": "a"}'))
    script = """
        import sys
        sys.modules["pyarrow"] = sys.modules["zstandard"] = None
        from reap.errors import MissingExtraError
        from reap.text.samples import SampleReader
        try:
            list(SampleReader(sys.argv[1]))
        except MissingExtraError as error:
            print(error)
    """
    for name, package in (("d.parquet", "pyarrow"), ("d.jsonl.zst", "zstandard")):
        if package == "zstandard" and sys.version_info >= (3, 14):
            continue  # the standard library's own
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / name)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"needs {package}: pip install 'reap-moe[data]'" in said


def test_rows_are_named(tmp_path: Path) -> None:
    bad = [{"text": "a"}, {"text": "b"}, {"other": 1}]
    with pytest.raises(CalibrationError, match=r'd\.json: row 3: should have one of .* found "other"'):
        samples_of(write(tmp_path / "d.json", json.dumps(bad, indent=2)))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", None], "n": [1, 2, 3]}), tmp_path / "d.parquet")
    with pytest.raises(CalibrationError, match=r"d\.parquet: row 3: text should be a string, found null"):
        samples_of(tmp_path / "d.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"], "n": [1]}), tmp_path / "o.parquet")
    with pytest.raises(CalibrationError, match=r'o\.parquet: row 1: should have one of .* found "title", "n"'):
        samples_of(tmp_path / "o.parquet")
    with pytest.raises(CalibrationError, match=r"d\.csv:4: has 1 values where the first line has 2 names"):
        samples_of(write(tmp_path / "d.csv", 'text,n\n"a\nb",1\nalone\n'))
    with pytest.raises(CalibrationError, match=r"q\.csv:3: is not CSV: "):
        samples_of(write(tmp_path / "q.csv", 'text,n\na,1\n"b" c,2\n'))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[{"text": "a"}, {"text": "b"', r"row 2: is not JSON: the file ends within it"),
        ('[{"text": "a"} {"text": "b"}]', r'after row 1 should have , or \], found "{"'),
        ('[{"text": "a"},', r"row 2: is not JSON"),
        ('[{"text": "a"}', r"after row 1 should have , or \], found the end of the file"),
        ('[{"text": "a"}]\n{"text": "b"}', "goes on after the end of its array"),
        ('[{"text": "a"}, {text: "b"}]', "row 2: is not JSON: Expecting property name"),
        ('[{"text": "a"}, 12345]', r"row 2: should be an object, found the number 12345"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"text": "\udcff"}]', "is not UTF-8 text"),
    ],
)
def test_a_damaged_array(tmp_path: Path, data: str, message: str) -> None:
    path = write(tmp_path / "d.json", data.encode("utf-8", "surrogateescape"))
    with pytest.raises(CalibrationError, match=message):
        samples_of(path)
    if "should be an object" not in message:  # nothing says where the next row would begin
        with pytest.raises(CalibrationError, match=message):
            samples_of(path, skip_bad_lines=True)


# ---- an array is read as it stands, however it is cut

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(st.text(max_size=5), values, max_size=5), max_size=6), st.integers(1, 40), st.data())
def test_an_array_in_pieces_of_any_size(rows: list[dict[str, Any]], block: int, data: st.DataObject) -> None:
    from reap.text import lines as module

    indent = data.draw(st.sampled_from([None, 1]))
    ascii_only = data.draw(st.booleans())
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    stream: Any = _Stream(text.encode("utf-8", "surrogatepass" if ascii_only else "replace"))
    expected = json.loads(text.encode("utf-8", "surrogatepass" if ascii_only else "replace"))
    before, module._BLOCK = module._BLOCK, block
    try:
        found = [row.members for row in module.json_array(stream) if isinstance(row, module.Row)]
    finally:
        module._BLOCK = before
    assert found == expected


class _Stream:
    name = "d.json"

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, n_bytes: int) -> bytes:
        return self._file.read(n_bytes)

    @property
    def position(self) -> int:
        return self._file.tell()


# ---- domains and columns


def test_domains_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = write(tmp_path / "a.jsonl", '{"text": "1"}\n{"text": "2", "domain": "own"}\n')
    b = write(tmp_path / "b.txt", "3")

    def domains(source: Any) -> list[tuple[str | None, str | None]]:
        return [(sample.text, sample.domain) for sample in SampleReader(source)]

    named = [("1", "code"), ("2", "code"), ("3", None)]
    assert domains([("code", a), (None, str(b))]) == domains([("code", str(a)), b]) == named
    assert domains({"code": a, "prose": [b, b]}) == [("1", "code"), ("2", "code"), ("3", "prose"), ("3", "prose")]
    assert domains({"mine": [{"text": "x"}]}) == [("x", "mine")]
    with pytest.raises(CalibrationError, match="mine: sample 1: should have one of"):
        domains({"mine": [{"x": "x"}]})
    with pytest.raises(UsageError, match="the domain 'a' should be a path, paths or dictionaries, found a dictionary"):
        domains({"a": {"b": a}})
    assert split_domain(f"code={a}") == ("code", str(a))
    assert split_domain(str(a)) == (None, str(a))
    assert split_domain("code=-") == ("code", "-")
    assert split_domain("/tmp/x=y.txt") == (None, "/tmp/x=y.txt")
    odd = write(tmp_path / "x=y.txt", "z")
    monkeypatch.chdir(tmp_path)
    assert split_domain(odd.name) == (None, "x=y.txt")


def test_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "story,lang,text\nonce,en,no\nes war,de,no\n")
    found = samples_of(path, columns={"text": "story", "domain": "lang"})
    assert [(sample.text, sample.domain) for sample in found] == [("once", "en"), ("es war", "de")]
    assert [sample.domain for sample in samples_of(path, columns={"domain": "lang"})] == ["en", "de"]
    with pytest.raises(CalibrationError, match=r'd\.csv:2: lacks "plot", which .* as text; found "story"'):
        samples_of(path, columns={"text": "plot"})
    rows = [{"q": "a", "a": "b", "label": 3}]
    (sample,) = samples_of(rows, columns={"prompt": "q", "response": "a", "domain": "label"})
    assert (sample.pair, sample.domain) == (("a", "b"), "3")
    pyarrow.parquet.write_table(pyarrow.table({"story": ["x"], "text": ["y"]}), tmp_path / "d.parquet")
    assert texts_of(tmp_path / "d.parquet", columns={"text": "story"}) == ["x"]
    for wrong in ({"txt": "a"}, {"text": ""}, {"prompt": "a"}, {"text": "a", "tokens": "b"}):
        with pytest.raises(UsageError, match="columns: "):
            samples_of(rows, columns=wrong)


# ---- bad lines

BAD = ["nonsense", '{"x": 1}', "[1]", '{"messages": [{"content": "a"}]}', '{"text": "' + "é" * 3 + '", "domain": 3}']


def test_bad_lines_are_counted_before_anything_is_run(tmp_path: Path) -> None:
    lines = ['{"text": "fine"}'] * 50
    lines[10:10] = BAD
    path = write(tmp_path / "c.jsonl", "\n".join([*lines, BAD[0]]))
    with pytest.raises(CalibrationError) as caught:
        Calibration(path, ctx_size=10).check()
    assert str(caught.value) == (
        f"{path}:11: is not JSON: Expecting value (column 1) (6 bad lines of 56: 2 not JSON, 1 no known shape, 1 not an"
        " object, 1 message without a role, 1 domain that is not a name); --skip-bad-lines (skip_bad_lines=True) leaves"
        " such lines out"
    )
    write(path, "\n".join(lines[:10]))
    Calibration(path, ctx_size=10).check()


def test_messages_that_no_template_takes_are_bad_lines() -> None:
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
    with pytest.raises(CalibrationError, match=r"sample 2: message 1: .*image.*--skip-bad-lines"):
        Calibration([{"text": "a"}, {"messages": [picture]}], ctx_size=10).check()


CHAT = [{"role": "user", "content": "<image>what is it"}, {"role": "assistant", "content": "a cat"}]


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"images": ["a.png"], "messages": CHAT}, r'has "images" beside .* --columns messages=messages reads the text'),
        ({"image": "a.png", "conversations": CHAT}, r'has "image" beside .* --columns messages=conversations'),
        ({"image": {"bytes": "", "path": "a"}, "text": "a"}, r'has "image" beside its text.*--columns text=text'),
        ({"video": ["a"], "question": "a", "answer": "b"}, r"--columns prompt=question,response=answer reads"),
        ({"image": "a", "chosen": "a"}, r'has "image" beside its text, and only text reaches a model here;'),
        ({"messages": [{**CHAT[0], "images": ["base64"]}, CHAT[1]]}, r"message 1 has images beside its content"),
        ({"messages": [{"role": "user", "content": [{"image_url": "x"}]}, CHAT[1]]}, r'is an "image_url" part'),
    ],
)
def test_images_are_refused_with_a_word_not_dropped(sample: dict[str, Any], said: str) -> None:
    with pytest.raises(CalibrationError, match=rf"sample 1: .*{said}"):
        Calibration([sample], ctx_size=64).check()


def test_what_is_no_image_is_read(tmp_path: Path) -> None:
    lines = [{"text": "a", "image": None}, {"text": "a", "images": []}, {"text": "a", "video": "https://a"}]
    Calibration(lines, ctx_size=64).check()
    for columns in ({"messages": "messages"},):  # asked for
        Calibration([{"images": ["a.png"], "messages": CHAT}], ctx_size=64, columns=columns).check()


def test_images_in_a_table_are_seen(tmp_path: Path) -> None:
    """Columns that are not wanted stay on the disk; that of an image is wanted."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"text": ["a cat"], "image": [{"bytes": b"\x89PNG", "path": "a.png"}], "id": [1]}
    parquet.write_table(arrow.table(rows), tmp_path / "c.parquet")
    with pytest.raises(CalibrationError, match=r'row 1: has "image" beside its text'):
        Calibration(tmp_path / "c.parquet", ctx_size=64).check()
    Calibration(tmp_path / "c.parquet", ctx_size=64, columns={"text": "text"}).check()


def test_bad_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", '{"text": "one"}\n' + "\n".join(BAD) + '\n{"text": "two"}\n{"tokens": [999]}\n')
    calibration = Calibration(path, ctx_size=100, skip_bad_lines=True)
    calibration.check()
    windows = list(calibration.windows(ByteTokenizer()))
    assert [text_of(window.tokens) for window in windows] == ["<s>one", "<s>two"]
    assert [(window.sample, window.unit, window.line) for window in windows] == [(0, 0, 1), (1, 1, 7)]
    summary = calibration.summary()
    assert summary["skipped"] == 6
    assert summary["skipped_reasons"] == {
        "not JSON": 1,
        "no known shape": 1,
        "not an object": 1,
        "message without a role": 1,
        "domain that is not a name": 1,
        "cannot be rendered or tokenised": 1,
    }
    assert len(summary["skipped_lines"]) == 6
    assert any(line == f"{path}:8: token 999 is not one of the model's, 0 to 260" for line in summary["skipped_lines"])
    with pytest.raises(CalibrationError, match=r"c\.jsonl:2: is not JSON"):
        list(Calibration(path, ctx_size=100).windows(ByteTokenizer()))


def test_a_calibration_of_bad_lines_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", "\n".join(BAD))
    with pytest.raises(CalibrationError, match=r"holds no usable sample \(.*c\.jsonl:1: is not JSON"):
        list(Calibration(path, ctx_size=100, skip_bad_lines=True).windows(ByteTokenizer()))


def test_the_check_reads_no_further_than_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", '{"text": "' + "x" * 1000 + '"}\n' + '{"text": "y"}\n' * 1000 + "bad\n")
    Calibration(path, ctx_size=10, max_tokens=20).check()
    with pytest.raises(CalibrationError, match=":1002: is not JSON"):
        Calibration(path, ctx_size=10, max_tokens=2000).check()


def test_what_cannot_be_read_twice_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{bad")))
    Calibration("-", ctx_size=10).check()
    assert sys.stdin.buffer.tell() == 0
    rows = iter([{"text": "a"}, {"x": 1}])
    Calibration(rows, ctx_size=10).check()
    assert next(rows) == {"text": "a"}
    with pytest.raises(CalibrationError, match="sample 2: should have one of"):
        Calibration([{"text": "a"}, {"x": 1}], ctx_size=10).check()


def test_a_row_that_is_not_csv_is_one_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", 'text,n\na,1\n"b" c,2\nshort\nd,4\n')
    reader = SampleReader(path, skip_bad_lines=True)
    assert [(sample.text, sample.line) for sample in reader] == [("a", 2), ("d", 5)]
    assert dict(reader.records[0].bad) == {"not CSV": 1, "another number of values than names": 1}


@pytest.mark.parametrize("skip", [False, True])
def test_a_quote_that_does_not_end_is_no_bad_line(tmp_path: Path, skip: bool) -> None:
    """All rows after it would be lost with it, counted as one."""
    path = write(tmp_path / "d.csv", 'text,n\na,1\n"b,2\nc,3\nd,4\n')
    with pytest.raises(CalibrationError, match=r"d\.csv:3: a quoted value of this row does not end; rows after it"):
        samples_of(path, skip_bad_lines=skip)


def test_a_row_that_is_not_utf8_is_one_bad_line(tmp_path: Path) -> None:
    raw = [b"a", b"b\xe9", b"c\xc3\xa9"]
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [None, pyarrow.array([0, 1, 3, 6], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"".join(raw))],
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
    write(tmp_path / "d.csv", b"text,n\n" + b"".join(text + b",1\n" for text in raw))
    for name, where in (("d.parquet", "row 2"), ("d.csv", "3")):
        reader = SampleReader(tmp_path / name, skip_bad_lines=True)
        assert [sample.text for sample in reader] == ["a", "cé"]
        assert dict(reader.records[0].bad) == {"not UTF-8 text": 1}
        with pytest.raises(CalibrationError, match=rf"{name}: ?{where}: is not UTF-8 text"):
            samples_of(tmp_path / name)


@pytest.mark.parametrize("tools", [None, "", "null", "None", "[]", []])
def test_tools_that_are_not_there(tools: Any) -> None:
    (sample,) = samples_of([{"messages": [{"role": "user", "content": "q"}], "tools": tools}])
    assert sample.tools is None


# ---- the richest shape, and what is said of it


def test_several_shapes_in_one_line_are_said_once() -> None:
    rows = [{"text": "t", "prompt": "p", "response": "r", "tokens": [1]}] * 3 + [{"text": "t", "tokens": [1]}]
    calibration = Calibration(rows, ctx_size=100)
    windows = list(calibration.windows(ByteTokenizer()))
    assert text_of(windows[0].tokens) == "<s>p\nr"
    assert calibration.summary()["shapes"] == {"prompt+response": 3, "text": 1}
    assert calibration.notes[:2] == [
        "sample 1: has tokens, text as well; prompt+response is read",
        "sample 4: has tokens as well; text is read",
    ]


def test_null_is_as_good_as_absent() -> None:
    rows = [
        {"messages": None, "prompt": None, "text": "a"},
        {"messages": [], "text": None, "prompt": "p", "response": "r"},
    ]
    first, second = samples_of(rows)
    assert first.text == "a"
    assert second.messages == []
    calibration = Calibration(rows, ctx_size=10)
    assert len(list(calibration.windows(ByteTokenizer()))) == 1
    assert calibration.summary()["skipped_reasons"] == {"no messages": 1}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, "ua"),
        ({"input": [{"role": "user", "content": "q"}], "output": "a"}, "ua"),
        ({"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": []}, "ua"),
        ({"system": "s", "conversations": [{"from": "human", "value": "q"}]}, "su"),
        ({"conversations": [{"from": "gpt", "value": "a"}, {"from": "observation", "value": "t"}]}, "at"),
        ({"conversation": [{"role": "ChatGPT", "content": "a"}, {"role": "model", "content": "b"}]}, "aa"),
    ],
)
def test_other_ways_of_saying_messages(row: dict[str, Any], expected: str) -> None:
    (sample,) = samples_of([row])
    assert "".join(message["role"][0] for message in sample.messages or ()) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            r'conversations\[0\]: from is the string "alien", expected',
        ),
        ({"messages": '[{"role": "user"'}, "messages should be a list, or JSON of one, found the string"),
        ({"messages": [], "tools": "get_weather()"}, "tools should be a list"),
        ({"messages": [], "tools": [3]}, "tools should be a list of objects, found the number 3 in it"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries for 2 tokens"),
        ({"prompt": "p", "response": 3}, "response should be a string, found the number 3"),
    ],
)
def test_what_is_wrong_in_a_shape(row: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=f"sample 1: {message}"):
        samples_of([row])


def test_pairs_without_the_model_s_template_are_said_once() -> None:
    rows = [{"prompt": "a", "response": "b"}] * 3
    calibration = Calibration(rows, ctx_size=100)
    list(calibration.windows(ByteTokenizer()))
    assert [note for note in calibration.notes if "--chat-template auto" in note] == [
        "3 pairs are joined by a newline, without the model's chat template; --chat-template auto"
        ' (chat_template="auto") renders a pair as the turns of a user and an assistant'
    ]
    calibration = Calibration(rows, ctx_size=100, chat_template="auto")
    list(calibration.windows(ByteTokenizer()))
    assert calibration.notes == []
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = None
    calibration = Calibration(rows, ctx_size=100)
    list(calibration.windows(tokenizer))
    assert calibration.notes == []


def test_a_system_prompt_beside_a_pair_is_a_turn_of_the_template() -> None:
    rows = [{"system_prompt": "s", "question": "q", "response": "a"}]
    (window,) = Calibration(rows, ctx_size=100, chat_template="auto").windows(ByteTokenizer())
    assert "<|im_start|>system\ns<|im_end|>" in text_of(window.tokens)


# ---- memory

STREAM = """
    import resource, sys
    from pathlib import Path
    from reap.text.samples import SampleReader
    n = sum(len(sample.text) for sample in SampleReader(sys.argv[1]))
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process was before it began another program
        peak = int(status.read_text().split("VmHWM:")[1].split()[0])
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(n, peak)
"""


def memory_of(path: Path) -> tuple[int, float]:
    """Characters read, and the process's peak in MB."""
    command = [sys.executable, "-c", textwrap.dedent(STREAM), str(path)]
    n_characters, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(n_characters), int(peak) / 1000


def array(n_rows: int, row: bytes) -> Callable[[Any], None]:
    def feed(file: Any) -> None:
        file.write(b"[" + row)
        for _ in range(n_rows - 1):
            file.write(b",\n" + row)
        file.write(b"]")

    return feed


def test_a_long_array_takes_little_memory(tmp_path: Path) -> None:
    """200 MB through a pipe; benchmarks/streaming_memory.py reads 5 GB."""
    pipe = tmp_path / "array.json"
    os.mkfifo(pipe)
    row = json.dumps({"text": "word " * 20_000}).encode()

    def feed() -> None:
        with open(pipe, "wb") as file:
            array(2000, row)(file)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    n_characters, peak = memory_of(pipe)
    feeder.join(10)
    assert n_characters == 2000 * 100_000
    assert peak < 150


def test_a_parquet_file_of_one_row_group_takes_little_memory(tmp_path: Path) -> None:
    text = pyarrow.array([os.urandom(2500).hex() for _ in range(40_000)])  # 200 MB that do not compress to nothing
    pyarrow.parquet.write_table(
        pyarrow.table({"text": text, "other": text}), tmp_path / "d.parquet", use_dictionary=False
    )
    n_characters, peak = memory_of(tmp_path / "d.parquet")
    assert n_characters == 40_000 * 5000
    assert peak < 200


# ---- every file is read, or refused in words

rows_of_anything = st.dictionaries(
    st.sampled_from(sorted(KEYS)), values | st.text(max_size=9) | st.lists(values, max_size=3), max_size=6
)


@given(rows_of_anything)
def test_any_object_is_a_sample_or_a_bad_line(row: dict[str, Any]) -> None:
    problem = None
    try:
        sample = parse_sample(row, "here", 1)
    except BadLine as bad:
        problem = bad
    if problem is not None:
        assert str(problem).startswith("here: ")
        assert problem.reason
        return
    contents = [sample.text, sample.pair, sample.messages, sample.tokens]
    assert sum(content is not None for content in contents) == 1
    assert sample.shape


SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ""]
TEXTS = [b"", b"[", b'[{"text": "a"},', b'{"text": "a"}\n', b"text,b\n", b"\xff\xfe", b"\xef\xbb\xbf"]
MAGIC = [
    b"PAR1",
    b"ARROW1\0\0",
    b"\xff\xff\xff\xff\x10\0\0\0",
    b"\x1f\x8b\x08",
    b"BZh91AY&SY",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
]
beginnings = st.sampled_from([*TEXTS, *MAGIC, gzip.compress(b"[1")])


@given(beginnings, st.binary(max_size=60), st.sampled_from(SUFFIXES), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path: Path, start: bytes, rest: bytes, suffix: str, skip: bool) -> None:
    path = write(tmp_path / f"d{suffix}", start + rest)
    said = str(path)
    try:
        samples_of(path, skip_bad_lines=skip)
    except CalibrationError as error:
        said = str(error)
    assert said.startswith(str(path))
    assert "\n" not in said


def test_a_data_frame_is_asked_for_its_rows() -> None:
    class DataFrame:
        def itertuples(self) -> None: ...

        def __iter__(self) -> Iterator[str]:
            yield "text"

    with pytest.raises(UsageError, match=r"calibration is a DataFrame; give its rows: to_dict\('records'\)"):
        samples_of(DataFrame())


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": json.dumps(CHAT)},
        {"prompt": "hi", "chosen": json.dumps(CHAT)},
        {"prompt": "hi", "chosen": json.dumps(CHAT[1])},
        {"prompt": json.dumps(CHAT[:1]), "response": "yo"},
        {"prompt": json.dumps(CHAT[:1]), "completion": json.dumps(CHAT[1:])},
        {"question": "hi", "answer": json.dumps([{"from": "gpt", "value": "yo"}])},
    ],
)
def test_messages_as_json_in_a_side_of_a_pair_are_messages(row: dict[str, Any]) -> None:
    assert [sample.messages for sample in samples_of([row])] == [CHAT]


@pytest.mark.parametrize("answer", ['[{"name": "f"}]', '{"role": "user"}', "[1, 2]", "[", "[]"])
def test_other_json_in_a_pair_is_text(answer: str) -> None:
    assert samples_of([{"prompt": "q", "response": answer}])[0].pair == ("q", answer)


def test_a_message_without_its_conversation_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "chat.json", json.dumps(CHAT))
    with pytest.raises(CalibrationError, match=r'row 1: is one message, of the role "user"; expected .*"messages"'):
        samples_of(path)
    assert texts_of(path, columns={"text": "content"}) == ["hi", "yo"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CHAT), tmp_path / "chat.parquet")
    with pytest.raises(CalibrationError, match="row 1: is one message"):
        samples_of(tmp_path / "chat.parquet")


def test_texts_of_one_kind_that_are_not_read_are_said() -> None:
    reader = SampleReader([{"text": "Write f", "code": "def f()"}])
    list(reader)
    assert reader.notes == ["sample 1: has code as well; text is read"]
    reader = SampleReader([{"instruction": "a", "input": "b", "output": "c"}, {**CHAT[0], "role": None}])
    list(reader)
    assert reader.notes == []


def test_python_values_are_read_as_json_s() -> None:
    array = np.array
    calls = array([{"function": {"name": "f", "arguments": {"a": array([1])}}}], dtype=object)
    rows = [
        {1: "x", "text": "a", "domain": float("nan")},
        {"messages": array([CHAT[0], {"role": "assistant", "tool_calls": calls}], dtype=object)},
        {"input_ids": list(array([1, 2]))},
    ]
    one, two, three = samples_of(rows)
    assert (one.text, one.domain, three.tokens) == ("a", None, [1, 2])
    assert two.messages is not None
    assert two.messages[1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": [1]}}}]
    circle: dict[str, Any] = {"text": "a"}
    circle["self"] = circle
    with pytest.raises(BadLine, match="sample 1: is nested too deeply, or holds itself"):
        samples_of([circle])


def test_long_arrays_have_a_digest_of_all_their_values() -> None:
    ids = np.zeros(5000, dtype=np.int64)
    other = ids.copy()
    other[2500] = 1
    readers = [SampleReader([{"input_ids": array}]) for array in (ids, other)]
    assert [len(list(reader)) for reader in readers] == [1, 1]
    assert readers[0].digests != readers[1].digests


def test_standard_input_is_given_once() -> None:
    with pytest.raises(UsageError, match=r"standard input .+ more than once"):
        samples_of([("a", "-"), ("b", "-")])


@pytest.mark.parametrize("row", [{"text": "\ud800"}, {"prompt": "a", "response": "\ud800"}, {"messages": [
    {"role": "user", "content": "\ud800"}]}])  # fmt: skip
def test_half_a_character_is_found_before_a_model_is_loaded(row: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=r"sample 2: has a lone surrogate \(\\ud800\)"):
        Calibration([{"text": "a"}, row], ctx_size=64).check()


def test_maps_doubled_names_and_times_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    call = pyarrow.struct([("name", pyarrow.string()), ("arguments", pyarrow.map_(pyarrow.string(), pyarrow.string()))])
    message = pyarrow.struct(
        [("role", pyarrow.string()), ("content", pyarrow.string()), ("tool_calls", pyarrow.list_(call))]
    )
    turn = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": [("k", "v")]}]}
    pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array([[turn]], pyarrow.list_(message))}), path)
    messages = samples_of(path)[0].messages
    assert messages is not None
    assert messages[0]["tool_calls"] == [{"name": "f", "arguments": {"k": "v"}}]
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text"]), path)
    with pytest.raises(CalibrationError, match='has the column "text" twice'):
        samples_of(path)
    times = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "domain": times}), path)
    reader = SampleReader(path, skip_bad_lines=True)
    assert list(reader) == []
    assert "row 2: has a value that Python cannot hold: date value out of range" in str(reader.bad_lines[1])


def test_streams_of_one_file_follow_one_another(tmp_path: Path) -> None:
    for name, pack, gap in (("a.bz2", bz2.compress, b""), ("a.xz", lzma.compress, b"\0" * 4)):
        (tmp_path / name).write_bytes(pack(b'{"text": "one"}\n') + gap + pack(b'{"text": "two"}\n') + gap)
        assert [sample.text for sample in SampleReader(tmp_path / name)] == ["one", "two"]


def test_what_is_not_there_is_said_before_a_model_is_loaded() -> None:
    for place, hint in (("https://a.b/c.jsonl", "is a URL"), ("Qwen/calibration", "on the Hugging Face hub")):
        with pytest.raises(UsageError, match=hint):
            Calibration(place, ctx_size=64).check()
        with pytest.raises(UsageError, match=hint):
            text_files(place)
        with pytest.raises(UsageError, match=hint):
            PrunePlan.load(place)


REAP_FILES = [(f'{{"format": "reap.{name}", "version": 1,\n "x": []}}', said) for name, said in (
    ("profile", "a profile of reap"), ("plan", "a plan of reap"), ("sweep", "a sweep of reap"),
    ("resume", "a file that an interrupted run resumes from"), ("sweep.resume", "a file that an interrupted run"),
)]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *REAP_FILES,
        ("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n", "a Git LFS pointer"),
        (b"\x10\0\0\0\0\0\0\0{" + b" " * 40, "a safetensors file"),
    ],
)
@pytest.mark.parametrize("name", ["x.json", "x.txt", "x"])
def test_other_files_of_a_folder_are_named(content: str | bytes, said: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    path = tmp_path if "." in name else tmp_path / name  # of a folder the files with a suffix of data are read
    with pytest.raises(CalibrationError, match=f"{re.escape(name)}: is {said}"):
        list(Calibration(path, ctx_size=8).windows(ByteTokenizer()))
    with pytest.raises(CalibrationError, match=f"{re.escape(name)}: is {said}"):
        read_evaluation_text(path, ByteTokenizer(), 8)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_what_comes_before_the_damage_is_read(suffix: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = "".join(json.dumps({"text": f"{rng.random()} {rng.random()}"}) + "\n" for _ in range(3000))
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    whole = pack(lines.encode())
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) - 200] if suffix != ".bz2" else pack(lines[:60000].encode()) + whole[:200])
    found: list[int] = []
    windows = Calibration(path, ctx_size=512).windows(ByteTokenizer())
    with pytest.raises(CalibrationError, match="end too early"):
        found.extend(window.sample for window in windows)
    assert len(found) > 1000
