"""Messages and tools as data sets hold them -> the form that llama.cpp's server gives a chat template.

Read at common/chat.cpp, `common_chat_msgs_parse_oaicompat` and `common_chat_tools_parse_oaicompat`: `content` is a
string or a list of text parts, `arguments` a JSON string, and what is null or empty is absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from reap.errors import CalibrationError
from reap.files.strict_json import kind_of

Message = dict[str, Any]
Tool = dict[str, Any]

TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_MEDIA_OF_MESSAGES = ("images", "image", "image_url", "videos", "audios")
_MEDIA = ("image", "audio", "video", "file", "refusal")


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages of a conversation, each with "role" and "content" and, where they are not empty,
    "reasoning_content", "name", "tool_call_id" and "tool_calls".

    Raises CalibrationError that names message and field where one is not what it should be.
    """
    if not messages:
        raise CalibrationError("the conversation has no messages")
    return [_normalise(message, f"message {number}") for number, message in enumerate(messages, 1)]


def normalise_tools(tools: Any) -> list[Tool] | None:
    """The tools as {"type", "function": {"name", "description", "parameters"}}; None where there are none.

    A JSON string is parsed, and a function without its wrapper is wrapped. CalibrationError for anything else.
    """
    if isinstance(tools, str):
        tools = _parse(tools, "tools") if tools.strip() else None
    if tools is None or tools == []:
        return None
    if isinstance(tools, Mapping) and ("function" in tools or "name" in tools):
        tools = [tools]
    if not isinstance(tools, list | tuple):
        _fail("tools", "a list of objects", tools)
    return [_normalise_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def join_parts(parts: Sequence[Mapping[str, Any]]) -> str:
    """Text parts as one text, each on a line of its own, as the server joins them."""
    text = ""
    for part in parts:
        text += ("\n" if text else "") + part["text"]
    return text


def parse_arguments(message: Message, number: int) -> Message:
    """The message with the arguments of its calls as objects. CalibrationError where one is not an object."""
    if "tool_calls" not in message:
        return message
    calls = []
    for index, call in enumerate(message["tool_calls"]):
        where = f"message {number}: tool_calls[{index}].function.arguments"
        arguments = _parse(call["function"]["arguments"], where)
        if isinstance(arguments, str):  # encoded twice
            arguments = _parse(arguments, where)
        if not isinstance(arguments, dict):
            _fail(where, "an object", arguments)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _normalise(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping):
        _fail(where, "an object", message)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        _fail(f"{where}: role", "a string", role)
    medium = next((name for name in _MEDIA_OF_MESSAGES if message.get(name)), None)
    if medium is not None:
        raise CalibrationError(f"{where} has {medium} beside its content (only text reaches a model here)")
    result: Message = {"role": role}
    content, thoughts = _read_content(message.get("content"), role, where)
    result["content"] = content
    for name in THOUGHTS:
        given = message.get(name)
        if isinstance(given, str):
            thoughts = thoughts or given
        elif given is not None and name == THOUGHTS[0]:
            _fail(f"{where}: {name}", "a string", given)
    if thoughts:
        result["reasoning_content"] = thoughts
    result |= _read_names(message, where)
    if calls := _read_calls(message, where):
        result["tool_calls"] = calls
    if role == "function":  # what tools were called before 2023-11
        result["role"] = "tool"
    return result


def _read_names(message: Mapping[str, Any], where: str) -> Message:
    """Who speaks, and which call is answered."""
    found: Message = {}
    for name in ("name", "tool_call_id"):
        given = message.get(name)
        if given is not None and not isinstance(given, str | int):
            _fail(f"{where}: {name}", "a string", given)
        if given not in (None, ""):
            found[name] = str(given)
    return found


def _read_content(content: Any, role: str, where: str) -> tuple[str | list[dict[str, str]], str]:
    """A message's content, and the thoughts that are a part of it."""
    where = f"{where}: content"
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if role in ("tool", "function") and not _are_parts(content):
        return json.dumps(content, ensure_ascii=False), ""  # a result that was not made a string yet
    if not isinstance(content, list | tuple):
        _fail(where, "a string or a list of text parts", content)
    parts, thoughts = [], ""
    for index, part in enumerate(content):
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind, text = _read_part(part, f"{where}[{index}]")
        if kind == "text":
            parts.append({"type": "text", "text": text})
        else:
            thoughts += ("\n" if thoughts else "") + text
    return parts or "", thoughts


def _are_parts(content: Any) -> bool:
    return isinstance(content, list | tuple) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("type"), str)) for part in content
    )


def _read_part(part: Any, where: str) -> tuple[str, str]:
    """("text" or "thinking", its text)."""
    if not isinstance(part, Mapping):
        _fail(where, 'an object with a "type"', part)
    kind = part.get("type", next((name for name in ("text", *_MEDIA_OF_MESSAGES) if name in part), None))
    if not isinstance(kind, str):
        _fail(f"{where}: type", "a string", kind)
    if kind in ("thinking", "reasoning"):
        name = next((name for name in ("thinking", "reasoning", "text") if isinstance(part.get(name), str)), "thinking")
    elif kind in TEXT_PARTS:
        name = "text"
    else:
        article = "an" if kind[0:1] in "aeiou" else "a"
        known = " (only text reaches a model here)" if kind.startswith(_MEDIA) else ""
        raise CalibrationError(f'{where} is {article} "{kind[:40]}" part, expected a "text" part{known}')
    text = part.get(name)
    if not isinstance(text, str):
        _fail(f"{where}: {name}", "a string", text)
    return ("text" if kind in TEXT_PARTS else "thinking"), text


def _read_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = _parse(calls, f"{where}: tool_calls") if calls.strip() else None
    if not calls and isinstance(message.get("function_call"), Mapping):
        calls = [{"function": message["function_call"]}]
    if calls is None:
        return []
    if not isinstance(calls, list | tuple):
        _fail(f"{where}: tool_calls", "a list", calls)
    return [_read_call(call, f"{where}: tool_calls[{index}]") for index, call in enumerate(calls)]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        _fail(where, "an object", call)
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        _fail(f"{where}.function", "an object", function)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        _fail(f"{where}.function.name", "a string", name)
    arguments = function.get("arguments", function.get("parameters"))
    if arguments is None or arguments == "":
        arguments = "{}"
    elif not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    result = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") not in (None, ""):
        result["id"] = str(call["id"])
    return result


def _normalise_tool(tool: Any, where: str) -> Tool:
    if isinstance(tool, str):
        tool = _parse(tool, where)
    if not isinstance(tool, Mapping):
        _fail(where, "an object", tool)
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        _fail(f"{where}.function", 'an object with a "name"', function)
    parameters = function.get("parameters")
    if isinstance(parameters, str):
        parameters = _parse(parameters, f"{where}.function.parameters")
    description = function.get("description")
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": description if isinstance(description, str) else "",
            "parameters": {} if parameters is None else parameters,
        },
    }


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} should be JSON, found {text[:40]!r}") from error


def _fail(where: str, expected: str, found: object) -> NoReturn:
    raise CalibrationError(f"{where} should be {expected}, found {'nothing' if found is None else kind_of(found)}")
