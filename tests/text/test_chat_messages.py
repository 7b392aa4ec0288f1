"""Messages and tools as data sets hold them -> the form that llama.cpp's server gives a template."""

from __future__ import annotations

from typing import Any

import pytest

from reap.errors import CalibrationError
from reap.text.chat_template import ChatTemplate
from reap.text.messages import normalise_messages, normalise_tools
from reap.text.template_habits import results_into_calls, sort_tool_results

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


def one(**message: Any) -> dict[str, Any]:
    return normalise_messages([{"role": "assistant", **message}])[0]


def test_content() -> None:
    assert one(content=None) == one() == one(content=[]) == {"role": "assistant", "content": ""}
    assert one(content="x")["content"] == "x"
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    assert one(content=parts)["content"] == [{"type": "text", "text": text} for text in "abc"]
    assert normalise_messages([{"role": "tool", "content": {"n": [1, "é"]}}])[0]["content"] == '{"n": [1, "é"]}'
    assert normalise_messages([{"role": "tool", "content": [{"n": 1}]}])[0]["content"] == '[{"n": 1}]'


def test_thoughts_have_one_name() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        assert one(content="x", **{name: "t"})["reasoning_content"] == "t"
    assert one(content=[{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "x"}]) == {
        "role": "assistant",
        "content": [{"type": "text", "text": "x"}],
        "reasoning_content": "t",
    }
    assert "reasoning_content" not in one(content="x", reasoning_content="")
    assert "reasoning_content" not in one(content="x", reasoning_content=None)


@pytest.mark.parametrize("empty", [None, [], ""])
def test_no_calls_are_absent(empty: Any) -> None:
    assert "tool_calls" not in one(content="x", tool_calls=empty)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"id": "c1", "function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "c1", "name": "f", "arguments": {"a": 1}},
    ],
)
def test_calls(call: Any) -> None:
    assert one(tool_calls=[call]) == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_calls_of_before() -> None:
    message = one(content=None, function_call={"name": "f", "arguments": '{"a":1}'})
    assert message["tool_calls"] == [{"type": "function", "function": CALL["function"]}]
    assert normalise_messages([{"role": "function", "name": "f", "content": "x"}])[0]["role"] == "tool"


def test_arguments_become_what_the_template_wants() -> None:
    messages = [{"role": "assistant", "tool_calls": [CALL]}]
    objects = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    assert ChatTemplate(objects, origin="t").render(messages) == '{"a": 1}'
    strings = objects.replace(" | tojson", "")
    assert ChatTemplate(strings, origin="t").render(messages) == '{"a":1}'
    twice = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '"{\\"a\\": 1}"'}]}]
    assert ChatTemplate(objects, origin="t").render(twice) == '{"a": 1}'
    for none in (None, "", {}):
        empty = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": none}]}]
        assert ChatTemplate(objects, origin="t").render(empty) == "{}"


def test_tools() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    assert normalise_tools(None) is normalise_tools([]) is normalise_tools("") is None
    assert (
        normalise_tools([{"name": "f"}])
        == normalise_tools('[{"name": "f"}]')
        == normalise_tools({"name": "f"})
        == [tool]
    )
    assert normalise_tools([{"type": "function", "function": {"name": "f", "parameters": "{}"}}]) == [tool]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "the conversation has no messages"),
        ([{"role": "user", "content": "x"}, 3], "message 2 should be an object, found the number 3"),
        ([{"content": "x"}], "message 1: role should be a string, found nothing"),
        (
            [{"role": "user", "content": 3.5}],
            "message 1: content should be a string or a list of text parts, found the number 3.5",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r'message 1: content\[0\] is an "image_url" part, expected a "text" part \(only text',
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            r"message 1: content\[0\]: text should be a string, found nothing",
        ),
        ([{"role": "assistant", "tool_calls": 3}], "message 1: tool_calls should be a list, found the number 3"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}],
            r"message 1: tool_calls\[0\].function.name should be a string, found nothing",
        ),
    ],
)
def test_what_cannot_be_a_message(messages: Any, error: str) -> None:
    with pytest.raises(CalibrationError, match=error):
        normalise_messages(messages)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("{not json", r"message 1: tool_calls\[0\].function.arguments should be JSON, found '\{not json'"),
        ("[1]", r"message 1: tool_calls\[0\].function.arguments should be an object, found a list"),
    ],
)
def test_arguments_that_are_not_an_object(arguments: str, error: str) -> None:
    source = "{% for m in messages %}{{ (m.tool_calls or []) | tojson }}{% endfor %}"
    with pytest.raises(CalibrationError, match=error):
        ChatTemplate(source, origin="t").render(
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]
        )


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ("nonsense", "tools should be JSON, found 'nonsense'"),
        (3, "tools should be a list of objects, found the number 3"),
        ([{"description": "x"}], r'tools\[0\].function should be an object with a "name", found an object'),
    ],
)
def test_what_cannot_be_a_tool(tools: Any, error: str) -> None:
    with pytest.raises(CalibrationError, match=error):
        normalise_tools(tools)


def test_a_template_without_system_prompts() -> None:
    check = "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    source = "{% for m in messages %}" + check + "{{ m.content }};{% endfor %}"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert ChatTemplate(source, origin="t").render(messages) == "s\nu;"


def test_a_template_that_takes_only_parts() -> None:
    source = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert ChatTemplate(source, origin="t").render([{"role": "user", "content": "u"}]) == "<u>"


def test_habits_of_families() -> None:
    calls = [{**CALL, "id": id} for id in ("a", "b")]
    results = [{"role": "tool", "content": id, "tool_call_id": id} for id in ("b", "a")]
    messages = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        *results,
        {"role": "assistant", "content": "x"},
    ]
    assert [message["content"] for message in sort_tool_results(messages)] == ["", "a", "b", "x"]
    (joined,) = results_into_calls(messages)
    assert joined["tool_responses"] == [{"name": "f", "response": "b"}, {"name": "f", "response": "a"}]
    assert joined["content"] == "x"
