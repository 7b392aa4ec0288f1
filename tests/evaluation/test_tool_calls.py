"""Calls of tools, in the forms that families of models write them, held against the tool's schema."""

from __future__ import annotations

import pytest

from reap.errors import MissingExtraError
from reap.evaluation import tool_calls
from reap.evaluation.loop_probe import tool_call_metrics
from reap.evaluation.tool_calls import Call, matches, read_calls, require_schemas
from reap.text.asked import Asked

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}
OSLO = Call("weather", {"city": "Oslo", "days": 2})


@pytest.mark.parametrize(
    "text",
    [
        'Well.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 2}"}</tool_call>',
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}]',
        '[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "days": 2}',
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}',
        '{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}',
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo", "days": 2}<|call|>',
        '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Oslo", "days": 2}'
        "<|tool_call_end|>",
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Oslo", "days": 2}\n```'
        "<｜tool▁call▁end｜>",
    ],
)
def test_forms_of_json(text: str) -> None:
    assert read_calls(text) == [OSLO]
    assert matches(OSLO, [WEATHER])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>",
    ],
)
def test_forms_of_tags_have_the_schemas_types(text: str) -> None:
    assert read_calls(text) == [Call("weather", {"city": "Oslo", "days": "2"}, is_typed=False)]
    assert matches(read_calls(text)[0], [WEATHER])  # type: ignore[arg-type]
    assert not matches(read_calls(text.replace("2", "two"))[0], [WEATHER])  # type: ignore[arg-type]


def test_what_cannot_be_read_is_a_call_all_the_same() -> None:
    for text in (
        '<tool_call>{"name": "weather", "arguments": {"city"',
        '<tool_call>{"name": "weather", "arguments": {"city": </tool_call>',
        '<tool_call>["weather"]</tool_call>',
        '<tool_call>{"name": "weather", "arguments": ["Oslo"]}</tool_call>',
        "[TOOL_CALLS]weather",
        '{"name": "weather", "parameters": {',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ):
        assert read_calls(text) == [None], text[:60]
    assert read_calls("The weather in Oslo is fine.") == read_calls('{"city": "Oslo"}') == read_calls("") == []
    two = '<tool_call>{"name": "a", "arguments": {}}</tool_call> and <tool_call>{"name": '
    assert read_calls(two) == [Call("a", {}), None]


def test_the_schema() -> None:
    assert not matches(Call("weather", {"days": 2}), [WEATHER])
    assert not matches(Call("weather", {"city": "Oslo", "days": 0}), [WEATHER])
    assert not matches(Call("wether", {"city": "Oslo"}), [WEATHER])
    assert matches(Call("free", {"x": 1}), [{"function": {"name": "free"}}])
    broken = {"function": {"name": "odd", "parameters": {"$ref": "https://nowhere.invalid/schema"}}}
    assert matches(Call("odd", {}), [broken])


def test_shares_of_a_run() -> None:
    asked = [Asked((1,), {}, "a:1", [WEATHER]), Asked((1,), {}, "a:2", [WEATHER]), Asked((1,), {}, "a:3", None)] * 2
    good = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    answers = [good, "no", good, good + "<tool_call>", good.replace("Oslo", "").replace("city", "town"), ""]
    found = tool_call_metrics(asked, answers)
    assert found is not None
    assert (found.prompts, found.called, found.calls, found.parsed, found.matched) == (4, 3, 4, 3, 2)
    assert (found.parsed_share, found.matched_share) == (0.75, 0.5)
    assert tool_call_metrics(asked[2:3], ["x"]) is None


def test_without_the_extra_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    require_schemas()
    monkeypatch.setattr(tool_calls, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'reap-moe\[tools\]'"):
        require_schemas()
