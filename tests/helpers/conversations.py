"""Conversations for the tests of chat templates. Each text has a word of its own that says who speaks: sword (system),
uword, rword (a tool's result), aword (what the assistant says or calls with), tword (its thoughts)."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "which"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    },
]


def S(text: Any) -> Message:
    return {"role": "system", "content": text}


def U(text: Any) -> Message:
    return {"role": "user", "content": text}


def A(text: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def T(content: Any, call: str = "abcdef123", name: str = "get_weather") -> Message:
    return {"role": "tool", "content": content, "tool_call_id": call, "name": name}


def call(name: str, arguments: Any, id: str = "abcdef123") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def C(city: str, id: str = "abcdef123") -> dict[str, Any]:
    return call("get_weather", json.dumps({"city": city}), id)


CONVERSATIONS: dict[str, dict[str, Any]] = {}


def conv(name: str, *messages: Message, tools: Any = None) -> None:
    CONVERSATIONS[name] = {"messages": list(messages), "tools": tools}


conv("plain", U("uword1"), A("aword1"))
conv("system", S("sword1"), U("uword1"), A("aword1"))
conv("turns", U("uword1"), A("aword1"), U("uword2"), A("aword2"), U("uword3"), A("aword3"))
conv("system turns", S("sword1"), U("uword1"), A("aword1"), U("uword2"), A("aword2"))
conv("tools unused", U("uword1"), A("aword1"), tools=TOOLS)
conv("system tools unused", S("sword1"), U("uword1"), A("aword1"), tools=TOOLS)
conv("call", U("uword1"), A("", tool_calls=[C("aword1")]), T("rword1"), A("aword2"), tools=TOOLS)
conv("call null", U("uword1"), A(None, tool_calls=[C("aword1")]), T("rword1"), A("aword2"), tools=TOOLS)
conv("call said", U("uword1"), A("aword0", tool_calls=[C("aword1")]), T("rword1"), A("aword2"), tools=TOOLS)
conv(
    "call object",
    U("uword1"),
    A("", tool_calls=[call("get_weather", {"city": "aword1", "days": 3}, "abcdef123")]),
    T("rword1"),
    A("aword2"),
    tools=TOOLS,
)
conv(
    "call system",
    S("sword1"),
    U("uword1"),
    A("", tool_calls=[C("aword1")]),
    T("rword1"),
    A("aword2"),
    U("uword2"),
    A("aword3"),
    tools=TOOLS,
)
conv(
    "parallel",
    U("uword1"),
    A("", tool_calls=[C("aword1", "abcdef123"), C("aword2", "abcdef124")]),
    T("rword1"),
    T("rword2", "abcdef124"),
    A("aword3"),
    tools=TOOLS,
)
conv(
    "two rounds",
    U("uword1"),
    A("", tool_calls=[C("aword1", "abcdef123")]),
    T("rword1"),
    A("", tool_calls=[C("aword2", "abcdef124")]),
    T("rword2", "abcdef124"),
    A("aword3"),
    tools=TOOLS,
)
conv("result json", U("uword1"), A("", tool_calls=[C("aword1")]), T('{"temp": "rword1"}'), A("aword2"), tools=TOOLS)
conv(
    "result object",
    U("uword1"),
    A("", tool_calls=[C("aword1")]),
    T({"temp": "rword1", "n": 3}),
    A("aword2"),
    tools=TOOLS,
)
conv("ends in call", U("uword1"), A("", tool_calls=[C("aword1")]), tools=TOOLS)
conv("no tools listed", U("uword1"), A("", tool_calls=[C("aword1")]), T("rword1"), A("aword2"))
conv(
    "numbers",
    U("uword1"),
    A("", tool_calls=[call("add", {"a": 1, "b": 2.5}, "abcdef123")]),
    T("rword1", name="add"),
    A("aword2"),
    tools=TOOLS,
)
conv(
    "no arguments",
    U("uword1"),
    A("", tool_calls=[call("add", {}, "abcdef123")]),
    T("rword1", name="add"),
    A("aword2"),
    tools=TOOLS,
)
conv(
    "parts",
    {"role": "user", "content": [{"type": "text", "text": "uword1"}, {"type": "text", "text": "uword2"}]},
    A([{"type": "text", "text": "aword1"}]),
)
conv(
    "parts system",
    {"role": "system", "content": [{"type": "text", "text": "sword1"}]},
    {"role": "user", "content": [{"type": "text", "text": "uword1"}]},
    A("aword1"),
    U("uword2"),
    A("aword2"),
)
conv("thoughts", U("uword1"), A("aword1", reasoning_content="tword1"))
conv(
    "thoughts turns",
    U("uword1"),
    A("aword1", reasoning_content="tword1"),
    U("uword2"),
    A("aword2", reasoning_content="tword2"),
)
conv(
    "thoughts some",
    U("uword1"),
    A("aword1"),
    U("uword2"),
    A("aword2", reasoning_content="tword2"),
    U("uword3"),
    A("aword3"),
)
conv(
    "thoughts call",
    U("uword1"),
    A("", reasoning_content="tword1", tool_calls=[C("aword1")]),
    T("rword1"),
    A("aword2", reasoning_content="tword2"),
    U("uword2"),
    A("aword3", reasoning_content="tword3"),
    tools=TOOLS,
)
conv(
    "thoughts system call",
    S("sword1"),
    U("uword1"),
    A("aword0", reasoning_content="tword1", tool_calls=[C("aword1")]),
    T("rword1"),
    A("aword2", reasoning_content="tword2"),
    tools=TOOLS,
)
conv(
    "inline think",
    U("uword1"),
    A("<think>\ntword1\n</think>\n\naword1"),
    U("uword2"),
    A("<think>\ntword2\n</think>\n\naword2"),
)
conv("empty assistant", U("uword1"), A(""), U("uword2"), A("aword2"))
conv("empty user", U(""), A("aword1"), U("uword2"), A("aword2"))
conv("unicode", S("sword1 é漢"), U("uword1 日本語 🙂 \u200b"), A("aword1 ünï 🎉\tmañana"))
conv(
    "unicode call",
    U("uword1"),
    A("", tool_calls=[call("get_weather", {"city": "aword1 Zürich 東京"}, "abcdef123")]),
    T("rword1 °C 🙂"),
    A("aword2 ✓"),
    tools=TOOLS,
)
conv("spaces", U("  uword1 \n"), A("\n aword1 \n\n"), U("uword2\n"), A(" aword2"))
conv("code", U("uword1 <b>&\"'</b>"), A('aword1 ```python\nprint("{{ x }} {% y %}")\n```\n<|im_end|> <div>'))
conv("assistant first", A("aword1"), U("uword1"), A("aword2"))
conv("system assistant first", S("sword1"), A("aword1"), U("uword1"), A("aword2"))
conv("trailing user", U("uword1"), A("aword1"), U("uword2"))
conv("two users", U("uword1"), U("uword2"), A("aword1"))
conv("two assistants", U("uword1"), A("aword1"), A("aword2"))
conv("same words", U("same"), A("same"), U("same"), A("same"))
conv("long", U("uword1 " + "lorem ipsum " * 500), A("aword1 " + "dolor sit " * 500))
conv("no calls", U("uword1"), A("aword1", tool_calls=[]), U("uword2"), A("aword2", tool_calls=None))
conv("tools as text", S("sword1"), U("uword1"), A("aword1"), tools=json.dumps(TOOLS))
conv(
    "long part", U([{"type": "text", "text": "uword1 " + "lorem ipsum " * 500}]), A("aword1"), U("uword2"), A("aword2")
)
conv("developer", {"role": "developer", "content": "sword1"}, U("uword1"), A("aword1"))
