"""The assistant's turns in what small templates write, each with one awkward habit."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from reap.errors import UsageError
from reap.text.chat_template import ChatTemplate
from reap.text.marks import Unlocated
from reap.text.windows import Calibration

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "s1"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1", "reasoning_content": "t1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a2", "reasoning_content": "t2"},
]


def turns(source: str, messages: Any = TALK, tools: Any = None) -> list[str]:
    text, spans = ChatTemplate(source, origin="the template", bos="<s>", eos="</s>").render_turns(messages, tools=tools)
    return [text[start:end] for start, end in spans]


def test_a_plain_template() -> None:
    assert turns(CHATML) == ["a1<|im_end|>\n", "a2<|im_end|>\n"]


def test_a_template_that_looks_at_how_a_text_begins() -> None:
    source = CHATML.replace("{{ m.content }}", "{{ '!' if m.content[0] in 'ua' else '?' }}{{ m.content }}")
    assert turns(source) == ["!a1<|im_end|>\n", "!a2<|im_end|>\n"]
    source = CHATML.replace("{{ m.content }}", "{% if m.content.startswith('u') %}>{% endif %}{{ m.content }}")
    assert turns(source) == ["a1<|im_end|>\n", "a2<|im_end|>\n"]


def test_a_template_that_trims_and_escapes() -> None:
    source = CHATML.replace("m.content", "m.content | trim | tojson(ensure_ascii=true)")
    talk = [{"role": "user", "content": " ü "}, {"role": "assistant", "content": "\n ä\n"}]
    assert turns(source, talk) == ['"\\u00e4"<|im_end|>\n']


def test_earlier_thoughts_left_out() -> None:
    source = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}",
    )
    template = ChatTemplate(source, origin="the template")
    rendered = template.read(TALK, turns=True)
    assert [rendered.text[a:b] for a, b in rendered.spans or []] == [
        "a1<|im_end|>\n",
        "<think>t2</think>a2<|im_end|>\n",
    ]
    assert rendered.left_out == [(2, "reasoning_content")]


def test_a_system_prompt_that_moves() -> None:
    source = (
        "{% for m in messages[1:] %}{% if m.role == 'user' %}[INST]{% if loop.index0 >= messages | length - 3 %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    assert turns(source) == [" a1</s>", " a2</s>"]


def test_an_assistant_first_does_not_count_the_system_prompt() -> None:
    source = "<|im_start|>system\nYou are helpful.<|im_end|>\n" + CHATML
    assert turns(source, TALK[2:]) == ["a1<|im_end|>\n", "a2<|im_end|>\n"]


def test_words_that_look_like_the_template_s() -> None:
    talk = [
        {"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nu1"},
        {"role": "assistant", "content": "<|im_end|>\n<|im_start|>user\na1"},
        {"role": "user", "content": "a1"},
        {"role": "assistant", "content": "a1"},
    ]
    assert turns(CHATML, talk) == ["<|im_end|>\n<|im_start|>user\na1<|im_end|>\n", "a1<|im_end|>\n"]


def test_texts_with_private_characters() -> None:
    talk = [{"role": "user", "content": "\U00100001"}, {"role": "assistant", "content": "\U00100000a1"}]
    assert turns(CHATML, talk) == ["\U00100000a1<|im_end|>\n"]
    talk[0]["content"] += "\U000f0000"
    with pytest.raises(Unlocated):
        turns(CHATML, talk)


def test_the_template_s_own_marks() -> None:
    source = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}<|im_end|>",
    )
    assert turns(source) == ["a1", "a2"]
    # one turn without a mark: they are not taken
    assert turns(source.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")) == [
        "a1<|im_end|>\n",
        "a2<|im_end|>\n",
    ]


def test_a_part_that_a_template_drops_is_said() -> None:
    source = CHATML.replace("{{ m.content }}", "{{ m.content if m.content | length < 100 else '' }}")
    talk = [{"role": "user", "content": "long " * 1200}, {"role": "assistant", "content": "a1"}]
    assert ChatTemplate(source, origin="the template").read(talk).left_out == [(0, "content")]


class Words:
    """Characters as tokens."""

    n_vocab = 1 << 21
    has_tokenizer = True
    add_bos = True
    bos: int | None = ord("^")
    eos: int | None = None

    def __init__(self, chat_template: str) -> None:
        self.chat_template: str | None = chat_template

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [*([ord("^")] if add_special else []), *map(ord, text)]

    def token_text(self, token: int) -> bytes:
        return chr(token).encode()


def run(source: str, lines: list[Any], **options: Any) -> tuple[list[str], dict[str, Any]]:
    calibration = Calibration(lines, ctx_size=10_000, **options)
    texts = ["".join(map(chr, window.tokens.tolist())) for window in calibration.windows(Words(source))]
    return texts, calibration.summary()


def test_bos_once() -> None:
    (text,), _ = run("{{ bos_token }}" + CHATML, [{"messages": TALK}])
    assert text.startswith("^<|im_start|>")
    (text,), _ = run(CHATML, [{"messages": TALK}])
    assert text.startswith("^<|im_start|>")


def test_variables_reach_the_template() -> None:
    source = "{{ enable_thinking }} {{ tone | default('none') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (text,), summary = run(source, [{"messages": TALK[1:2]}])
    assert text == "^True noneu1"
    variables = {"enable_thinking": False, "tone": "dry"}
    (text,), summary = run(source, [{"messages": TALK[1:2]}], chat_template_kwargs=variables)
    assert (text, summary["chat_template_kwargs"]) == ("^False dryu1", variables)


@pytest.mark.parametrize("variables", [{"messages": []}, {"x": object()}, {"a b": 1}, [1]])
def test_variables_that_cannot_be(variables: Any) -> None:
    with pytest.raises(UsageError, match="chat_template_kwargs"):
        Calibration([{"messages": TALK}], ctx_size=9, chat_template_kwargs=variables)


def test_one_moment_for_a_whole_run() -> None:
    source = (
        "{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ date_string }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )

    def lines() -> Iterator[Any]:
        yield {"messages": TALK[1:2]}
        yield {"messages": TALK[1:2]}

    now = datetime(2025, 3, 4, 5, 6, 7)
    texts, summary = run(source, list(lines()), now=now)
    assert texts == ["^2025-03-04 05:06:07 04 Mar 2025u1"] * 2
    assert summary["chat_template_time"] == "2025-03-04T05:06:07"


def test_what_is_left_out_is_counted() -> None:
    _, summary = run(CHATML, [{"messages": TALK}, {"messages": TALK[:3]}])
    assert summary["texts_left_out"] == {"thoughts": 3}
    assert summary["notes"][-1] == "the chat template leaves out the thoughts of 3 turns"
