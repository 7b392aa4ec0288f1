"""Shapes of samples: one object of a data set, as it was published, to the sample that it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from reap.errors import UsageError
from reap.files.strict_json import kind_of, shorten
from reap.text.conversations import (
    SYSTEMS,
    TOOLS,
    BrokenSample,
    Members,
    WrongType,
    as_list,
    is_message,
    messages_in,
    read_messages,
    read_system,
    read_tools,
    with_system,
)
from reap.text.lines import BadLine
from reap.text.sample import Message, Sample

DOMAIN_LIMIT = 128  # characters of a name
IGNORED_LABEL = -100  # where training computes no loss

# The richest first.
CONVERSATIONS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
PREFERENCES = ("prompt", "question", "instruction", "input")  # names beside "chosen"
TEXTS = ("text", "content", "code", "body")
TOKENS = ("tokens", "input_ids")
CONTEXTS = ("input", "context")  # beside an instruction
MEDIA = ("images", "image", "pixel_values", "videos", "video", "audios", "audio")  # what a text stands beside
ROLES = ("messages", "tools", "prompt", "system", "response", "text", "tokens", "domain")

KEYS = frozenset(
    [
        *(*CONVERSATIONS, *TEXTS, *TOKENS, *TOOLS, *SYSTEMS, *CONTEXTS, *PREFERENCES),
        *(name for pair in PAIRS for name in pair),
        *MEDIA,
        *("chosen", "query", "answers", "labels", "attention_mask", "domain", "role"),
    ]
)
"""Names that any shape looks at."""

KEY_SETS = (
    *(frozenset([name]) for name in (*CONVERSATIONS, "chosen", *TEXTS, *TOKENS)),
    *(frozenset(pair) for pair in (*PAIRS, ("query", "answers"))),
)

LISTED = (
    '"messages" or "conversations"; a pair such as "prompt" and "response", "instruction" and "output", "question" and'
    ' "answer"; "text" or "content"; "tokens"'
)


@dataclass(frozen=True)
class _Shape:
    names: tuple[str, ...]
    read: Callable[[Members], Sample]
    kind: str

    def is_in(self, members: Members) -> bool:
        return all(members.get(name) is not None for name in self.names)

    def adds_to(self, richer: _Shape, names: Sequence[str], members: Members) -> bool:
        """Whether members have this shape as well where `richer` was read from `names`: not in empty texts."""
        own = [members[name] for name in self.names if name not in names]
        return self.kind != richer.kind or any(not isinstance(value, str) or value != "" for value in own)


def parse_sample(
    members: Members, where: str, line: int, *, columns: Mapping[str, str] | None = None, domain: str | None = None
) -> Sample:
    """A line's object as a Sample.

    Of several shapes in one object the richest is read: messages, then a pair, then text, then tokens. What is null is
    as good as absent.

    Args:
        members: names and values.
        where, line: place of the object, for errors.
        columns: role -> name, of `ROLES`, for data that have other names.
        domain: of the whole file; it goes before the line's own.

    Raises BadLine, which begins with `where`, for an object of no known shape, or with something wrong in it.
    """

    def fail(problem: str, reason: str) -> NoReturn:
        raise BadLine(where, line, problem, reason)

    if columns:
        members = _by_columns(members, columns, fail)
    try:
        own_domain = _domain(members) if domain is None else domain
    except WrongType as error:
        fail(str(error), "domain that is not a name")
    present = [shape for shape in SHAPES if shape.is_in(members)]
    if present and not columns and (medium := next(filter(lambda name: _is_medium(members, name), MEDIA), None)):
        names = ",".join(f"{role}={name}" for role, name in _roles(present[0].names))
        way = f"; --columns {names} reads the text alone" if names else ""
        fail(
            f'has "{medium}" beside its text, and only text reaches a model here{way}',
            "images, sounds or films beside the text",
        )
    problems = []
    for index, shape in enumerate(present):
        try:
            sample = shape.read(members)
        except WrongType as error:
            problems.append(str(error))
            continue
        except BrokenSample as error:
            fail(str(error), error.reason)
        shape_name = sample.shape or "+".join(shape.names)
        unread = [other for other in present[:index:-1] if other.adds_to(shape, shape_name.split("+"), members)]
        poorer = {other.kind: "+".join(other.names) for other in unread}
        return replace(
            sample, where=where, line=line, domain=own_domain, shape=shape_name, passed_over=tuple(poorer.values())
        )
    if problems:
        fail(problems[0], "value of the wrong type")
    for shape in SHAPES:
        if all(name in members for name in shape.names):
            name = next(name for name in shape.names if members[name] is None)
            fail(f"{name} should be a {_expected(name)}, found null", "null where there should be a value")
    found = ", ".join(json.dumps(key)[:40] for key in list(members)[:8]) or "nothing"
    fail(f"should have one of {LISTED}, found {found}", "no known shape")


def _is_medium(members: Members, name: str) -> bool:
    """Whether there is an image, a sound or a film under a name; that of a sound or a film may be a remark in words."""
    value = members.get(name)
    return bool(value) and (isinstance(value, Mapping | list | tuple | bytes) or name.startswith(("image", "pixel")))


def _roles(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(role, name) of the names of a shape, as `--columns` takes them."""
    if len(names) == 2:
        yield from zip(("prompt", "response"), names, strict=True)
    else:
        kinds = (("messages", CONVERSATIONS), ("text", TEXTS), ("tokens", TOKENS))
        yield from ((role, name) for name in names for role, known in kinds if name in known)


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str] | None:
    """The columns by role, checked: UsageError for a role that is none, or roles that make no sample."""
    if not columns:
        return None
    for role, name in columns.items():
        if role not in ROLES or not isinstance(name, str) or not name:
            raise UsageError(f"columns: {role!r}: {name!r} should be one of the roles {', '.join(ROLES)} and a name")
    contents = sorted({"messages", "prompt", "response", "text", "tokens"} & columns.keys())
    if contents not in ([], ["messages"], ["prompt", "response"], ["text"], ["tokens"]):
        raise UsageError(
            f"columns: {', '.join(contents)} make no sample: expected messages, or prompt and response, or text,"
            " or tokens"
        )
    return dict(columns)


def parse_columns(values: Sequence[str]) -> dict[str, str]:
    """ROLE=NAME,... as the command line has it. UsageError."""
    columns: dict[str, str] = {}
    for part in (part for value in values for part in value.split(",") if part.strip()):
        role, found, name = part.partition("=")
        if not found or not name or role.strip() in columns:
            raise UsageError(f"--columns should be ROLE=NAME,... with each role once, found {part!r}")
        columns[role.strip()] = name.strip()
    return check_columns(columns) or {}


def _by_columns(members: Members, columns: Mapping[str, str], fail: Callable[[str, str], NoReturn]) -> Members:
    for role, name in columns.items():
        if name not in members:
            found = ", ".join(json.dumps(key)[:40] for key in list(members)[:8]) or "nothing"
            fail(f"lacks {shorten(name)}, which the columns name as {role}; found {found}", "a named column is absent")
    named = {role: members[name] for role, name in columns.items()}
    if "domain" in named and isinstance(named["domain"], int):
        named["domain"] = str(named["domain"])  # a number of a class
    if named.keys() - {"domain", "tools", "system"}:
        return named
    return {**members, **named}


def _domain(members: Members) -> str | None:
    domain = members.get("domain")
    if domain is None or (isinstance(domain, str) and 0 < len(domain) <= DOMAIN_LIMIT):
        return domain
    raise WrongType(f"domain should be a string of 1 to {DOMAIN_LIMIT} characters, found {kind_of(domain)}")


def _expected(name: str) -> str:
    return "list" if name in (*CONVERSATIONS, *TOKENS) else "string"


# ---- messages


def _conversation(name: str) -> Callable[[Members], Sample]:
    def read(members: Members) -> Sample:
        messages = list(read_messages(as_list(members[name], name), name))
        return _chat(with_system(messages, members), members)

    return read


def _chat(messages: list[Message], members: Members, shape: str = "") -> Sample:
    return Sample("", 0, messages=messages, tools=read_tools(members), shape=shape)


# ---- pairs


def _pair(prompt_name: str, response_name: str) -> Callable[[Members], Sample]:
    def read(members: Members) -> Sample:
        return _joined(members, prompt_name, response_name)

    return read


def _joined(members: Members, prompt_name: str, response_name: str) -> Sample:
    """A pair of strings; where either side is a list of messages, the messages of both."""
    prompt, response = (_turns(members[name]) for name in (prompt_name, response_name))
    shape = f"{prompt_name}+{response_name}"
    if any(_is_conversation(side) for side in (prompt, response)):
        head = list(_side(prompt, prompt_name, "user"))
        tail = list(_side(response, response_name, "assistant"))
        whole = tail if tail[: len(head)] == head or (_opens(tail) and isinstance(prompt, str)) else head + tail
        return _chat(with_system(whole, members), members, shape=shape)
    for name, side in ((prompt_name, prompt), (response_name, response)):
        if not isinstance(side, str):
            raise WrongType(f"{name} should be a string, found {kind_of(side)}")
    if prompt_name == "instruction":
        for name in CONTEXTS:
            context = members.get(name)
            if isinstance(context, str) and context and name != response_name:
                prompt, shape = f"{prompt}\n\n{context}" if prompt else context, f"instruction+{name}+{response_name}"
                break
    return Sample("", 0, pair=(prompt, response), system=read_system(members), shape=shape)


def _turns(side: Any) -> Any:
    """One side of a pair, in a list where it is one message."""
    side = messages_in(side)
    return [side] if is_message(side) else side


def _is_conversation(side: Any) -> bool:
    return isinstance(side, list | tuple) and all(isinstance(entry, Mapping) for entry in side)


def _side(value: Any, name: str, role: str) -> Iterator[Message]:
    if isinstance(value, str):
        yield {"role": role, "content": value}
        return
    yield from read_messages(as_list(value, name), name)


def _opens(messages: list[Message]) -> bool:
    """Whether a conversation has its own beginning, a prompt."""
    return any(message.get("role") == "user" for message in messages)


def _preference(members: Members) -> Sample:
    """Of two answers the one that was preferred: beside its prompt, or the whole conversation."""
    chosen = _turns(members["chosen"])
    side = {**members, "chosen": chosen}
    name = next((name for name in PREFERENCES if isinstance(members.get(name), str | list | tuple)), None)
    if name is not None:
        return _joined(side, name, "chosen")
    if isinstance(chosen, str):
        return Sample("", 0, text=chosen)
    return _chat(list(read_messages(as_list(chosen, "chosen"), "chosen")), members)


def _function_calls(members: Members) -> Sample:
    """A question and the calls that answer it, both in JSON; an answer in words is a pair."""
    query, answers = members["query"], members["answers"]
    if isinstance(query, str) and isinstance(answers, str) and answers.lstrip()[:1] != "[":
        return _joined(members, "query", "answers")
    calls = as_list(answers, "answers")
    if not isinstance(query, str) or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise WrongType("answers should be calls, each with a name")
    tool_calls = [{"type": "function", "function": dict(call)} for call in calls]
    messages: list[Message] = [
        {"role": "user", "content": query},
        {"role": "assistant", "content": "", "tool_calls": tool_calls},
    ]
    return _chat(with_system(messages, members), members)


# ---- text and tokens


def _text(name: str) -> Callable[[Members], Sample]:
    def read(members: Members) -> Sample:
        if not isinstance(members[name], str):
            raise WrongType(f"{name} should be a string, found {kind_of(members[name])}")
        if name == "content" and isinstance(members.get("role"), str):
            raise BrokenSample(
                f"is one message, of the role {shorten(members['role'])}; expected all messages of a conversation in"
                ' one line, {"messages": [...]} (--columns text=content reads each as a text)',
                "message without its conversation",
            )
        return Sample("", 0, text=members[name])

    return read


def _ids(name: str) -> Callable[[Members], Sample]:
    def read(members: Members) -> Sample:
        tokens = _integers(members[name], name)
        labelled = None
        if members.get("labels") is not None:
            labels = _integers(members["labels"], "labels", len(tokens))
            labelled = [label != IGNORED_LABEL for label in labels]
        if members.get("attention_mask") is not None:
            seen = _integers(members["attention_mask"], "attention_mask", len(tokens))
            labelled = labelled and [flag for flag, is_seen in zip(labelled, seen, strict=True) if is_seen]
            tokens = [token for token, is_seen in zip(tokens, seen, strict=True) if is_seen]
        return Sample("", 0, tokens=tokens, labelled=labelled)

    return read


def _integers(value: Any, name: str, length: int | None = None) -> list[int]:
    entries = as_list(value, name)
    for index, entry in enumerate(entries):
        if type(entry) is not int:
            raise BrokenSample(
                f"{name}[{index}] should be an integer, found {kind_of(entry)}", "token that is not a number"
            )
    if length is not None and len(entries) != length:
        raise BrokenSample(
            f"{name} has {len(entries)} entries for {length} tokens", "labels of another length than the tokens"
        )
    return entries


SHAPES = (
    *(_Shape((name,), _conversation(name), "messages") for name in CONVERSATIONS),
    _Shape(("query", "answers"), _function_calls, "messages"),
    _Shape(("chosen",), _preference, "messages"),
    *(_Shape(pair, _pair(*pair), "pair") for pair in PAIRS),
    *(_Shape((name,), _text(name), "text") for name in TEXTS),
    *(_Shape((name,), _ids(name), "tokens") for name in TOKENS),
)
