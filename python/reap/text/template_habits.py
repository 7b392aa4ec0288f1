"""What llama.cpp's engine changes in the messages, or in the source, for one family of templates or another.

Each was read at common/chat.cpp (`common_chat_templates_init`, `common_chat_templates_apply_jinja`,
`common_chat_try_specialized_template`) or in common/parsers; a family is told by the words in its template's source,
as there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from reap.text.messages import Message, join_parts

Adaptation = Callable[[list[Message]], list[Message]]

# Checks that refuse what the engine's own answers look like.
_OVERRULED = (
    (
        "<|channel|>",
        '{%- if "<|channel|>analysis<|message|>" in message.content or'
        ' "<|channel|>final<|message|>" in message.content %}',
    ),
    (
        "[TOOL_CALLS]",
        "{%- if (message['content'] is none or message['content'] == '' or message['content']|length == 0) and"
        " (message['tool_calls'] is not defined or message['tool_calls'] is none or"
        " message['tool_calls']|length == 0) %}",
    ),
)


def patch_source(source: str) -> str:
    """The template as the engine compiles it."""
    for sign, check in _OVERRULED:
        if sign in source:
            source = source.replace(check, "{%- if false %}")
    return source


def trims_contents(source: str) -> bool:
    """Whether white space around texts is taken off first (StepFun)."""
    return "You have access to the following functions in JSONSchema format" in source


def trim(messages: Sequence[Message]) -> list[Message]:
    """The messages without white space around their texts."""
    return [
        {
            name: _trimmed(value) if name in ("content", "reasoning_content") else value
            for name, value in message.items()
        }
        for message in messages
    ]


def _trimmed(value: Any) -> Any:
    if isinstance(value, list):
        return [{**part, "text": part["text"].strip(" \t\n\r\f\v")} for part in value]
    return value.strip(" \t\n\r\f\v")


def keeps_developer(source: str) -> bool:
    """Whether the template knows the role "developer"; for all others it is "system"."""
    return "<|channel|>" in source


def merge_system(messages: list[Message]) -> list[Message]:
    """For a template that knows no system prompt: the first message at the head of the second."""
    if not messages or messages[0]["role"] != "system" or len(messages) < 2:
        return messages
    texts = [
        message["content"] if isinstance(message["content"], str) else join_parts(message["content"])
        for message in messages[:2]
    ]
    return [{**messages[1], "content": "\n".join(texts)}, *messages[2:]]


def adaptation(source: str) -> Adaptation | None:
    """What is done to the messages in the end, in the engine's own order of preference; None: nothing."""
    has = source.__contains__
    if has("[SYSTEM_PROMPT]") and has("[TOOL_CALLS]") and has("[ARGS]") and not has("[CALL_ID]"):
        return _thoughts_as_parts
    if has("<|channel|>"):
        return _thinking_instead_of_content
    if has("<|tool_list_start|>") or has("List of tools: ["):
        return _thinking_too
    if has("dsml_token") and has("DSML") and has("tool_calls") and not has("function_calls"):
        return sort_tool_results
    if has("'<|tool_call>call:'") and not has("{#- OpenAI Chat Completions:"):
        return results_into_calls
    return None


def _thoughts_as_parts(messages: list[Message]) -> list[Message]:
    """Ministral 3: thoughts and text as parts of the content."""
    adapted = []
    for message in messages:
        if message["role"] in ("system", "assistant"):
            content = message["content"]
            parts: list[dict[str, str]] = []
            if "reasoning_content" in message:
                parts.append({"type": "thinking", "thinking": message["reasoning_content"]})
            parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
            message = {name: value for name, value in message.items() if name != "reasoning_content"}
            message["content"] = parts
        adapted.append(message)
    return adapted


def _thinking_too(messages: list[Message]) -> list[Message]:
    """LFM2: thoughts under another name as well."""
    return [
        {**message, "thinking": message["reasoning_content"]} if "reasoning_content" in message else message
        for message in messages
    ]


def _thinking_instead_of_content(messages: list[Message]) -> list[Message]:
    """gpt-oss: thoughts under another name, and in front of a call instead of what was said."""
    return [
        {name: value for name, value in message.items() if name != "content"}
        if "thinking" in message and "tool_calls" in message
        else message
        for message in _thinking_too(messages)
    ]


def sort_tool_results(messages: list[Message]) -> list[Message]:
    """DeepSeek-V4: the results of a turn in the order of its calls."""
    adapted = list(messages)
    order: dict[str, int] = {}
    start = 0
    while start < len(adapted):
        message = adapted[start]
        if message["role"] == "assistant" and "tool_calls" in message:
            order = {call["id"]: index for index, call in enumerate(message["tool_calls"]) if "id" in call}
        end = start
        while end < len(adapted) and adapted[end]["role"] in ("user", "tool"):
            end += 1
        places = [place for place in range(start, end) if adapted[place]["role"] == "tool"]
        results = sorted(
            (adapted[place] for place in places), key=lambda result: order.get(result.get("tool_call_id", ""), 0)
        )
        if order:
            for place, result in zip(places, results, strict=True):
                adapted[place] = result
        start = max(end, start + 1)
    return adapted


def results_into_calls(messages: list[Message]) -> list[Message]:
    """Gemma 4's older template: calls, their results and the answer in one message."""
    adapted = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        if message["role"] != "assistant" or "tool_calls" not in message:
            adapted.append(message)
            continue
        names = [call["function"]["name"] for call in message["tool_calls"]]
        joined: Message = {"role": "assistant", "tool_calls": message["tool_calls"]}
        results: list[dict[str, Any]] = []
        while rest and rest[0]["role"] == "tool":
            result = rest.pop(0)
            name = names[len(results)] if len(results) < len(names) else result.get("tool_call_id", "")
            results.append({"name": name, "response": _parsed(result["content"])})
        if results:
            joined["tool_responses"] = results
        if rest and rest[0]["role"] == "assistant" and "tool_calls" not in rest[0] and rest[0]["content"]:
            joined["content"] = rest.pop(0)["content"]
        if "reasoning_content" in message:
            joined["reasoning_content"] = message["reasoning_content"]
        adapted.append(joined)
    return adapted


def _parsed(content: Any) -> Any:
    try:
        return json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return content
