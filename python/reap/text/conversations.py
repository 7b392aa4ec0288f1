"""Conversations as data sets hold them: messages, ShareGPT's turns, tools; JSON in a string among them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from reap.files.strict_json import kind_of
from reap.text.sample import Message

TOOLS = ("tools", "functions")
SYSTEMS = ("system", "system_prompt")
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_MESSAGES = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})

Members = Mapping[str, Any]


class WrongType(Exception):
    """The names of a shape are there, but what they hold is something else."""


class BrokenSample(Exception):
    """The shape is plain, and something in it is wrong."""

    def __init__(self, problem: str, reason: str) -> None:
        super().__init__(problem)
        self.reason = reason


def as_list(value: Any, name: str) -> list[Any]:
    """A list, or JSON of one; arrays and tuples of Python's are lists."""
    if isinstance(value, str):
        value = _from_json(value, name)
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, list):
        raise WrongType(f"{name} should be a list, found {kind_of(value)}")
    return value


def _from_json(text: str, name: str) -> Any:
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WrongType(f"{name} should be a list, or JSON of one, found {kind_of(text)}: {_detail(error)}") from error


def messages_in(value: Any) -> Any:
    """The messages that a string holds in JSON, as tables have them, or one message; any other value as it is.

    Other JSON in a string is text: an answer may be a list of objects.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    entries = parsed if isinstance(parsed, list) else [parsed]
    return parsed if entries and all(map(is_message, entries)) else value


def is_message(entry: Any) -> bool:
    """Whether an object has the names of a message of a known kind."""
    return isinstance(entry, Mapping) and any(names <= entry.keys() for names in _MESSAGES)


def _detail(error: Exception) -> str:
    return f"{error.msg} (character {error.pos})" if isinstance(error, json.JSONDecodeError) else "too deep or too long"


def read_messages(entries: list[Any], name: str) -> Iterator[Message]:
    """Turns of any of the known kinds as messages with "role" and "content". BrokenSample names one that is not."""
    for index, entry in enumerate(entries):
        where = f"{name}[{index}]"
        if isinstance(entry, Mapping) and "from" in entry and "value" in entry:
            yield _sharegpt(entry, where)
        elif isinstance(entry, Mapping) and isinstance(entry.get("role"), str):
            yield _with_role(entry, where, name)
        elif (
            isinstance(entry, Mapping) and isinstance(entry.get("input"), str) and isinstance(entry.get("output"), str)
        ):
            yield {"role": "user", "content": entry["input"]}
            yield {"role": "assistant", "content": entry["output"]}
        else:
            raise BrokenSample(
                f'{where} should be an object with a "role" and "content", or "from" and "value", found {_keys(entry)}',
                "message without a role",
            )


def _keys(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return kind_of(entry)
    return ", ".join(json.dumps(str(key))[:40] for key in list(entry)[:8]) or "an empty object"


def _sharegpt(entry: Mapping[str, Any], where: str) -> Message:
    role = _SHAREGPT_ROLES.get(str(entry["from"]).lower())
    if role is None:
        raise BrokenSample(
            f"{where}: from is {kind_of(entry['from'])}, expected one of {', '.join(_SHAREGPT_ROLES)}",
            "message of an unknown role",
        )
    others = {key: value for key, value in entry.items() if key not in ("from", "value", "role", "content")}
    return {"role": role, "content": _content(entry["value"], where, "value"), **others}


def _with_role(entry: Mapping[str, Any], where: str, name: str) -> Message:
    message = dict(entry)
    _content(message.get("content"), where, "content")
    if name != "messages":  # of data sets that name the speakers as they like; in "messages" they are the template's
        message["role"] = _SHAREGPT_ROLES.get(message["role"].lower(), message["role"])
    return message


def _content(value: Any, where: str, name: str) -> Any:
    if isinstance(value, bool | int | float):
        raise BrokenSample(f"{where}: {name} should be a string, found {kind_of(value)}", "content that is not text")
    return value


def with_system(messages: list[Message], members: Members) -> list[Message]:
    """The messages, after the system prompt that stands beside them."""
    system = read_system(members)
    if system is None or not messages or messages[0].get("role") == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def read_system(members: Members) -> str | None:
    """The system prompt that stands beside a conversation or a pair."""
    return next((members[name] for name in SYSTEMS if isinstance(members.get(name), str) and members[name]), None)


def read_tools(members: Members) -> Any:
    """The tools of a line, as a list of objects; None where it has none."""
    name = next((name for name in TOOLS if members.get(name) not in (None, "")), None)
    if name is None:
        return None
    try:
        value = members[name]
        parsed = _from_json(value, name) if isinstance(value, str) else value
        if parsed in ("null", "None"):  # what a table makes of a value that is not there
            return None
        tools = as_list([parsed] if isinstance(parsed, Mapping) else parsed, name)
        return [_as_tool(tool, name) for tool in tools] or None
    except WrongType as error:
        raise BrokenSample(str(error), "tools that are not a list") from error


def _as_tool(tool: Any, name: str) -> Any:
    """A function's description on its own, as older data have it, in the form of today."""
    if isinstance(tool, str):
        tool = _from_json(tool, name)
    if not isinstance(tool, Mapping):
        raise WrongType(f"{name} should be a list of objects, found {kind_of(tool)} in it")
    is_bare = "name" in tool and "function" not in tool and "type" not in tool
    return {"type": "function", "function": tool} if is_bare else tool
