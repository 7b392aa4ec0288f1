"""text.samples, encoding and windows: lines -> samples -> token ids, windows and masks."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.byte_tokenizer import CHATML, ByteTokenizer, text_of
from reap.errors import CalibrationError, UsageError
from reap.text.chat_template import ChatTemplate
from reap.text.windows import Calibration, Window

# Like Qwen3's: the last turn shows a block of thoughts that earlier turns do not have.
THINKING = CHATML.replace(
    "message.content +", "('<think></think>' if message.role == 'assistant' and loop.last else '') + message.content +"
)


class LossyTokenizer(ByteTokenizer):
    """Lower-cases what it reads, so that its tokens do not spell the text."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return super().tokenize(text.lower(), add_special=add_special, parse_special=parse_special)


class SpacePrefixTokenizer(ByteTokenizer):
    """Puts a space before every text, as sentencepiece does."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        ids = super().tokenize(" " + text, add_special=add_special, parse_special=parse_special)
        return [*ids, 257]  # and an EOS after it


def windows_of(source: Any, tokenizer: Any = None, ctx_size: int = 1000, **options: Any) -> list[Window]:
    return list(Calibration(source, ctx_size=ctx_size, **options).windows(tokenizer or ByteTokenizer()))


def counted_text(window: Window, tokenizer: ByteTokenizer | None = None) -> str:
    return text_of(window.tokens[window.counted], tokenizer)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- the four shapes of a line


def test_shapes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.jsonl",
        {"prompt": "ask", "response": "answer", "id": 7},
        {"text": "plain <s>"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "domain": "chat"},
        {"tokens": [1, 2, 3]},
    )
    windows = windows_of(path)
    assert [text_of(w.tokens) for w in windows[:3]] == [
        "<s>ask\nanswer",
        "<s>plain <s>",
        "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n",
    ]
    assert windows[1].tokens.tolist().count(256) == 2  # the one in the text is read as the special token
    assert windows[3].tokens.tolist() == [1, 2, 3]
    assert [w.domain for w in windows] == [None, None, "chat", None]
    assert [(w.sample, w.line) for w in windows] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert all(w.counted.all() and w.tokens.dtype == "int32" and w.counted.dtype == "bool" for w in windows)


def test_special_tokens_can_stay_text() -> None:
    (window,) = windows_of([{"text": "<s>"}], parse_special=False)
    assert window.tokens.tolist() == [256, *b"<s>"]


def test_json_escapes_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "\\u00e9\\ud83d\\ude00\\u0000\\n"}\n')
    (window,) = windows_of(tmp_path / "c.jsonl")
    assert window.tokens.tolist() == [256, *"é😀\0\n".encode()]


def test_blank_lines_bom_and_crlf(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    windows = windows_of(tmp_path / "c.jsonl")
    assert [(text_of(w.tokens), w.line) for w in windows] == [("<s>a", 1), ("<s>b", 4)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", r"c\.jsonl:2: is not JSON"),
        (b'{"text": "a"', r"c\.jsonl:2: is not JSON"),
        (b"[1, 2]", r"c\.jsonl:2: should be an object on one line \(JSON Lines\), found a list"),
        (b'"text"', "should be an object on one line"),
        (b"{}", "should have one of .* found nothing"),
        (b'{"prompt": "a", "answer": "b"}', 'found "prompt", "answer"'),
        (b'{"text": 5}', "text should be a string, found the number 5"),
        (b'{"text": null}', "text should be a string, found null"),
        (b'{"prompt": "a", "response": ["b"]}', "response should be a string, found a list"),
        (b'{"tokens": "1 2"}', "tokens should be a list, found the string"),
        (b'{"tokens": [1, 2.0]}', r"tokens\[1\] should be an integer, found the number 2.0"),
        (b'{"tokens": [true]}', r"tokens\[0\] should be an integer, found true"),
        (b'{"tokens": [261]}', r"c\.jsonl:2: token 261 is not one of the model's, 0 to 260"),
        (b'{"tokens": [-1]}', "token -1 is not one"),
        (b'{"messages": "hi"}', "messages should be a list"),
        (b'{"messages": ["hi"]}', r'messages\[0\] should be an object with a "role"'),
        (
            b'{"messages": [{"role": "user", "content": 3}]}',
            r"messages\[0\]: content should be a string, found the number 3",
        ),
        (b'{"text": "a", "domain": 3}', "domain should be a string"),
        (b'{"text": "a", "domain": ""}', "domain should be a string of 1 to 128"),
        (b'{"text": "\xff"}', "is not UTF-8 text .byte 10 of the line is 0xff"),
        (b'{"text": "\\ud800"}', r"c\.jsonl:2: has a lone surrogate \(\\ud800\)"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"tokens": [' + b"1" * 10_000 + b"]}", "number too long"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(CalibrationError, match=message) as caught:
        windows_of(tmp_path / "c.jsonl")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_line_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reap.text.lines.LINE_LIMIT", 1000)
    write(tmp_path / "c.jsonl", {"text": "x"}, {"text": "x" * 1000})
    with pytest.raises(CalibrationError, match=r"c\.jsonl:2: the line is longer than"):
        windows_of(tmp_path / "c.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n', b'{"tokens": []}'])
def test_nothing_usable_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"c\.jsonl: holds no usable sample"):
        windows_of(tmp_path / "c.jsonl")


def test_a_missing_file_is_a_wrong_call(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the calibration: No such file"):
        windows_of(tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match=r"the folder holds no data; expected files named \.jsonl .*found nothing"):
        windows_of(tmp_path)


def test_models_without_a_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.has_tokenizer = False
    assert windows_of([{"tokens": [3]}], tokenizer)[0].tokens.tolist() == [3]
    with pytest.raises(CalibrationError, match='sample 1: the model has no tokenizer, so a line has to give "tokens"'):
        windows_of([{"text": "a"}], tokenizer)


# ---- sources


def test_sources_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"text": "one"}, {"text": "two"}]
    a, b = write(tmp_path / "a.jsonl", lines[0]), write(tmp_path / "b", lines[1])
    expected = ["<s>one", "<s>two"]
    assert [text_of(w.tokens) for w in windows_of([a, str(b)])] == expected
    assert [text_of(w.tokens) for w in windows_of(lines)] == expected
    assert [text_of(w.tokens) for w in windows_of(iter(lines))] == expected
    stdin = io.TextIOWrapper(io.BytesIO(b"\n" + a.read_bytes() + b.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert [(text_of(w.tokens), w.where) for w in windows_of("-")] == [("<s>one", "<stdin>:2"), ("<s>two", "<stdin>:3")]
    assert not stdin.closed


def test_a_source_of_another_kind() -> None:
    with pytest.raises(UsageError, match=r"a: cannot read .* of the domain 'text'.* a list of one dictionary"):
        windows_of({"text": "a"})
    with pytest.raises(UsageError, match="found int"):
        windows_of(3)
    with pytest.raises(CalibrationError, match="sample 1: should be a dictionary, found int"):
        windows_of([3])


def test_a_text_file_is_one_sample_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\ufefffirst line\n\n\n  second é😀 line\nthird {x}\r\n" * 50
    (tmp_path / "t.txt").write_bytes(text.encode())
    whole = ByteTokenizer().tokenize(text.removeprefix("\ufeff"), add_special=True, parse_special=True)
    for block in (4 << 20, 64, 7):
        monkeypatch.setattr("reap.text.samples.BLOCK", block)
        calibration = Calibration(tmp_path / "t.txt", ctx_size=100)
        windows = list(calibration.windows(ByteTokenizer()))
        assert [int(token) for w in windows for token in w.tokens] == whole
        assert {w.sample for w in windows} == {0}
        assert all(len(w.tokens) == 100 for w in windows[:-1])
        assert calibration.summary()["sha256"] == [hashlib.sha256(text.encode()).hexdigest()]


def test_what_ends_a_text_comes_at_its_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where a long file is cut into parts, for tokenizers that add an end-of-text token."""

    class Ending(ByteTokenizer):
        def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            ids = super().tokenize(text, add_special=add_special, parse_special=parse_special)
            return [*ids, 257] if add_special else ids

    (tmp_path / "t.txt").write_text("a line of a text\n" * 50)
    whole = Ending().tokenize("a line of a text\n" * 50, add_special=True, parse_special=True)
    for block in (4 << 20, 64, 7):
        monkeypatch.setattr("reap.text.samples.BLOCK", block)
        windows = windows_of(tmp_path / "t.txt", Ending(), ctx_size=100)
        assert [int(token) for w in windows for token in w.tokens] == whole


def test_a_text_without_lines_is_still_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reap.text.samples.BLOCK", 64)
    monkeypatch.setattr("reap.text.samples.LINE_LIMIT", 100)
    (tmp_path / "t.txt").write_text("x" * 1000)
    assert sum(len(w.tokens) for w in windows_of(tmp_path / "t.txt", ctx_size=64)) == 1001


def test_a_file_without_suffix_is_judged_by_its_first_character(tmp_path: Path) -> None:
    (tmp_path / "prose").write_text("\n  Once {upon} a time\n")
    assert text_of(windows_of(tmp_path / "prose")[0].tokens) == "<s>\n  Once {upon} a time\n"


def test_text_that_is_no_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"fine\nfine\nbad \xe9t\xe9\n")
    with pytest.raises(CalibrationError, match=r"t\.txt:3: is not UTF-8"):
        windows_of(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_bytes(b"")
    with pytest.raises(CalibrationError, match="holds no usable sample"):
        windows_of(tmp_path / "t.txt")


# ---- windows


def test_a_long_sample_is_split_and_nothing_lost() -> None:
    text = "abcdefghij" * 5
    windows = windows_of([{"text": text}, {"text": "z"}], ctx_size=16)
    assert [len(w.tokens) for w in windows] == [16, 16, 16, 3, 2]
    assert "".join(text_of(w.tokens) for w in windows[:4]) == "<s>" + text
    assert [w.sample for w in windows] == [0, 0, 0, 0, 1]
    assert [int(w.tokens[0]) == 256 for w in windows] == [True, False, False, False, True]


def test_a_sample_of_exactly_one_window() -> None:
    assert [len(w.tokens) for w in windows_of([{"text": "x" * 15}], ctx_size=16)] == [16]


@pytest.mark.parametrize(("limit", "expected"), [(5, [5]), (16, [16]), (20, [16, 4]), (1000, [16, 16, 16, 3, 2])])
def test_max_tokens_stops_there(limit: int, expected: list[int]) -> None:
    calibration = Calibration([{"text": "abcdefghij" * 5}, {"text": "z"}], ctx_size=16, max_tokens=limit)
    assert [len(w.tokens) for w in calibration.windows(ByteTokenizer())] == expected
    assert calibration.summary()["tokens"] == sum(expected)


def test_the_digest_covers_what_max_tokens_left_unread(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", *[{"text": "x" * 100}] * 50)
    calibration = Calibration(path, ctx_size=16, max_tokens=10)
    assert len(list(calibration.windows(ByteTokenizer()))) == 1
    assert calibration.summary()["sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest()]


def test_summary(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.jsonl",
        {"text": "abc"},
        {"text": ""},
        {"prompt": "a", "response": ""},
        {"prompt": "a", "response": "b"},
    )
    calibration = Calibration(path, ctx_size=4, mask="response")
    windows = list(calibration.windows(ByteTokenizer()))
    summary = calibration.summary()
    assert summary["files"] == [str(path)]
    assert summary["sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest()]
    assert (summary["samples"], summary["tokens"], summary["counted_tokens"], summary["windows"]) == (2, 8, 5, 2)
    assert summary["skipped"] == 2
    assert summary["skipped_lines"] == [f"{path}:2: no text", f"{path}:3: no response to count"]
    assert [w.line for w in windows] == [1, 4]
    assert summary["mask"] == "response"
    json.dumps(summary)
    assert [w.line for w in calibration.windows(ByteTokenizer())] == [1, 4]  # it can be read again
    assert calibration.summary() == summary


def test_estimated_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", *[{"text": "x" * 99}] * 100)
    calibration = Calibration(path, ctx_size=100)
    assert calibration.estimated_tokens() is None
    windows = calibration.windows(ByteTokenizer())
    for _ in range(10):
        next(windows)
    assert calibration.estimated_tokens() == pytest.approx(10_000, rel=0.2)
    assert Calibration(path, ctx_size=100, max_tokens=7).estimated_tokens() == 7


def test_what_was_consumed_is_known_up_to_every_window(tmp_path: Path) -> None:
    lines = [{"text": "abc"}, {"text": "x" * 30}, {"prompt": "a", "response": "b", "domain": "d"}]
    digests = [w.consumed for w in windows_of(lines, ctx_size=16)]
    assert len(set(digests)) == len(digests) == 4
    path = write(tmp_path / "c.jsonl", *lines, {"text": "more"})
    assert [w.consumed for w in windows_of(path, ctx_size=16)][:4] == digests
    changed = [lines[0], {"text": "x" * 29 + "y"}, lines[2]]
    assert [a == b for a, b in zip(digests, [w.consumed for w in windows_of(changed, ctx_size=16)], strict=True)] == [
        True, True, False, False,
    ]  # fmt: skip
    masked = [w.consumed for w in windows_of(lines, ctx_size=16, mask="response")]
    assert masked[2] == digests[2]
    assert masked[3] != digests[3]
    elsewhere = [{**line, "domain": "e"} for line in lines]
    assert not set(digests) & {w.consumed for w in windows_of(elsewhere, ctx_size=16)}


def test_too_many_domains() -> None:
    with pytest.raises(CalibrationError, match="sample 257: more than 256 domains"):
        windows_of([{"text": "a", "domain": str(i)} for i in range(300)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mask="some"), "mask is 'some', expected one of all, response"),
        (dict(ctx_size=0), "ctx_size is 0"),
        (dict(max_tokens=0), "max_tokens is 0"),
        (dict(max_tokens=True), "max_tokens is True"),
        (dict(chat_template="/absent.jinja"), "cannot read the chat template: No such file"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Calibration([], **{"ctx_size": 10, **options})


# ---- masks


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), LossyTokenizer(), SpacePrefixTokenizer()], ids=lambda t: type(t).__name__
)
def test_only_the_response_counts(tokenizer: ByteTokenizer) -> None:
    (window,) = windows_of([{"prompt": "ask é", "response": "answer 😀"}], tokenizer, mask="response")
    assert counted_text(window, tokenizer) == "answer 😀"
    assert len(window.tokens) > 16


def test_a_token_that_straddles_belongs_to_the_response() -> None:
    (window,) = windows_of([{"prompt": "ask", "response": "\nanswer"}], mask="response")
    assert counted_text(window) == "\n\nanswer"


def test_text_and_tokens_count_whole() -> None:
    windows = windows_of([{"text": "abc"}, {"tokens": [1, 2]}], mask="response")
    assert all(w.counted.all() for w in windows)


CONVERSATION = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), LossyTokenizer()], ids=lambda t: type(t).__name__)
def test_assistant_turns_count(tokenizer: ByteTokenizer) -> None:
    (window,) = windows_of([{"messages": CONVERSATION}], tokenizer, mask="response")
    assert counted_text(window, tokenizer) == "a1<|im_end|>\na2<|im_end|>\n"
    assert text_of(window.tokens).count("<|im_start|>") == 5


def test_assistant_turns_of_a_template_that_renders_the_last_one_differently() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = THINKING
    (window,) = windows_of([{"messages": CONVERSATION}], tokenizer, mask="response")
    assert counted_text(window) == "a1<|im_end|>\n<think></think>a2<|im_end|>\n"


def test_a_generation_prompt_that_opens_a_thought() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    (window,) = windows_of([{"messages": CONVERSATION[1:3]}], tokenizer, mask="response")
    assert counted_text(window) == "a1<|im_end|>\n"


def test_a_template_without_any_frame() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (window,) = windows_of([{"messages": CONVERSATION[1:3]}], tokenizer, mask="response")
    assert (text_of(window.tokens), counted_text(window)) == ("<s>2q1a1", "a1")


def test_turns_that_cannot_be_told_apart_are_one_sample_left_out() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last and loop.length > 2 %}"
        "{{ m.content | length }}{% else %}{{ m.role }}{{ m.content }}{% endif %}{% endfor %}{{ messages | length }}"
    )
    source = Calibration([{"messages": CONVERSATION[:3]}, {"messages": CONVERSATION}], ctx_size=99, mask="response")
    (window,) = source.windows(tokenizer)
    assert window.where == "sample 1"
    assert source.summary()["skipped_reasons"] == {"the assistant's turns cannot be told apart": 1}
    assert source.summary()["skipped_lines"] == [
        "sample 2: where the turn of message 3 ends cannot be told; mask=all counts the whole conversation"
    ]


def test_a_mask_follows_its_tokens_into_the_windows() -> None:
    windows = windows_of([{"prompt": "0123456789", "response": "abcdefghij"}], ctx_size=8, mask="response")
    assert [counted_text(w) for w in windows] == ["", "abcd", "efghij"]


# ---- chat templates


def test_pairs_with_a_template(tmp_path: Path) -> None:
    pair = {"prompt": "q", "response": "a"}
    (window,) = windows_of([pair], chat_template="auto")
    assert text_of(window.tokens) == "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    (tmp_path / "t.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"
    )
    (window,) = windows_of([pair], chat_template=tmp_path / "t.jinja")
    assert text_of(window.tokens) == "<s>[user]q[assistant]a</s>"
    assert window.tokens.tolist().count(256) == 1  # the template wrote BOS: it is not added again
    (window,) = windows_of([{"messages": [{"role": "user", "content": "x"}]}], chat_template=tmp_path / "t.jinja")
    assert text_of(window.tokens) == "<s>[user]x</s>"


def test_a_template_s_special_tokens_are_always_read() -> None:
    (window,) = windows_of([{"prompt": "q", "response": "a"}], chat_template="auto", parse_special=False)
    assert 258 in window.tokens


def test_a_model_without_a_template() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="sample 1: the model has no chat template"):
        windows_of([{"messages": CONVERSATION}], tokenizer)


def render(source: str, **options: Any) -> str:
    return ChatTemplate(source, origin="the template", bos="<s>", eos="</s>").render(
        [{"role": "user", "content": "<a & 'b'>"}], **options
    )


def test_templates_render_as_transformers_does() -> None:
    assert render("{{ messages[0].content }}") == "<a & 'b'>"  # nothing is escaped
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "<a & \'b\'>"}'
    assert render("{% if true %}\n  x\n  {% endif %}\ny") == "  x\ny"  # trim_blocks, lstrip_blocks
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{{ bos_token }}{% endgeneration %}{{ eos_token }}") == "<s></s>"
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))
    assert render("{{ tools is none }}{{ add_generation_prompt }}", add_generation_prompt=True) == "TrueTrue"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "the template cannot render the messages: roles must alternate",
        ),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the template cannot render"),
        ("{{ messages.append(1) }}", "the template cannot render"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[5].content.x }}", "the template cannot render"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "the template cannot render"),
        ("{% for i in range(1000000) %}{% endfor %}", "the template cannot render"),
        ("{% if %}", "the template: is not a chat template"),
    ],
)
def test_templates_are_boxed_in(source: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        render(source)
