"""Calls of tools in what a model wrote: whether they can be read, and whether they match the tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from reap.errors import MissingExtraError

Tool = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """A call that could be read."""

    name: str
    """Of the tool."""
    arguments: dict[str, Any]
    """By name; of the forms that have no types, strings."""
    is_typed: bool = True
    """Whether the arguments are JSON, and not the text of each."""


class Unreadable(Exception):
    """A call was begun, and what follows is not one."""


def read_calls(text: str) -> list[Call | None]:
    """The calls in an answer, in order; None for one that was begun and cannot be read.

    Known are the forms of Hermes and Qwen (<tool_call> around JSON), Qwen3-Coder (<function=…>), GLM (<arg_key>),
    Mistral ([TOOL_CALLS]), Llama 3 (a JSON object of a name and parameters, alone or after <|python_tag|>), gpt-oss
    (to=functions.NAME) and DeepSeek and Kimi (their own marks around a name and JSON).
    """
    for pattern, read in _FORMS:
        found = list(pattern.finditer(text))
        if found:
            return [call for match in found for call in _each(read, match)]
    return []


def _each(read: Callable[[re.Match[str]], Iterator[Call]], match: re.Match[str]) -> Iterator[Call | None]:
    try:
        yield from list(read(match))
    except (Unreadable, ValueError, RecursionError, TypeError):
        yield None


def _of_object(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise Unreadable
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return _checked(value["name"], arguments)


def _checked(name: str, arguments: Any) -> Call:
    if not isinstance(arguments, dict) or not name:
        raise Unreadable
    return Call(name, arguments)


def _tagged(match: re.Match[str]) -> Iterator[Call]:
    """<tool_call> … </tool_call>: JSON, or one of the forms of tags."""
    if not match["end"]:
        raise Unreadable
    inner = match["inner"].strip()
    function = re.fullmatch(r"<function=([^>\n]+)>(.*?)</function>", inner, re.DOTALL)
    if function:
        pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", function[2], re.DOTALL)
        yield Call(function[1].strip(), dict(pairs), is_typed=False)
    elif "<arg_key>" in inner or re.fullmatch(r"[\w.-]+", inner):
        pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", inner, re.DOTALL)
        yield Call(inner.split("<", 1)[0].strip(), dict(pairs), is_typed=False)
    else:
        yield _of_object(json.loads(inner))


def _mistral(match: re.Match[str]) -> Iterator[Call]:
    rest = match["rest"].strip()
    named = re.match(r"([\w.-]+)(?:\[CALL_ID\]\w*)?\[ARGS\]", rest)
    decoder = json.JSONDecoder()
    if named:
        yield _checked(named[1], decoder.raw_decode(rest, named.end())[0])
        return
    value = decoder.raw_decode(rest)[0]
    for entry in value if isinstance(value, list) else [value]:
        yield _of_object(entry)


def _llama(match: re.Match[str]) -> Iterator[Call]:
    yield _of_object(json.loads(match["json"].strip()))


def _named(match: re.Match[str]) -> Iterator[Call]:
    yield _checked(match["name"].strip(), json.JSONDecoder().raw_decode(match["json"].strip())[0])


_FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Iterator[Call]]], ...] = (
    (re.compile(r"<tool_call>(?P<inner>.*?)(?P<end></tool_call>|\Z)", re.DOTALL), _tagged),
    (re.compile(r"\[TOOL_CALLS\](?P<rest>.*?)(?=\[TOOL_CALLS\]|\Z)", re.DOTALL), _mistral),
    (re.compile(r"to=functions\.(?P<name>[\w.-]+).*?<\|message\|>(?P<json>.*?)(?=<\||\Z)", re.DOTALL), _named),
    (
        re.compile(
            r"<\|tool_call_begin\|>(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>"
            r"(?P<json>.*?)(?=<\|tool_call_end\|>|\Z)",
            re.DOTALL,
        ),
        _named,
    ),
    (
        re.compile(
            r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[\w.-]+)\s*(?:<｜tool▁sep｜>)?\s*(?:```json)?"
            r"(?P<json>.*?)(?=```|<｜tool▁call▁end｜>|\Z)",
            re.DOTALL,
        ),
        _named,
    ),
    (re.compile(r"(?:<\|python_tag\|>|\A\s*)(?P<json>\{\s*\"(?:name|type)\"\s*:.*)\Z", re.DOTALL), _llama),
)


# ---- against the schema


def require_schemas() -> None:
    """Raise MissingExtraError where what checks schemas is not installed."""
    if find_spec("jsonschema") is None:
        raise MissingExtraError(
            "prompts with tools need jsonschema, which checks the calls' arguments: pip install 'reap-moe[tools]'"
        )


def matches(call: Call, tools: Sequence[Tool]) -> bool:
    """Whether a tool of that name is there, and takes these arguments. A schema that is none takes anything."""
    import jsonschema

    tool = next((it["function"] for it in tools if it.get("function", {}).get("name") == call.name), None)
    if tool is None:
        return False
    schema = tool.get("parameters") or {}
    arguments = call.arguments if call.is_typed else _typed(call.arguments, schema)
    try:
        validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        return bool(validator(schema).is_valid(arguments))
    except Exception:  # the schema is a stranger's: references that lead nowhere, expressions that are none
        return True


def _typed(arguments: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """Arguments that are text as the schema's types: what is not a string there is JSON."""
    properties = schema.get("properties", {}) if isinstance(schema, Mapping) else {}
    typed = {}
    for name, text in arguments.items():
        described = properties.get(name, {})
        is_string = isinstance(described, Mapping) and described.get("type") in (None, "string")
        try:
            typed[name] = text if is_string else json.loads(text)
        except ValueError:
            typed[name] = text
    return typed
