"""Every chat template of llama.cpp's tree with every conversation, rendered three times: by reap, by llama.cpp's own
engine along its server's path (tests/tools/render_template.cpp), by transformers.

    python -m helpers.chat_templates     (in tests/) prints the table of docs/chat-templates.md
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from helpers.conversations import CONVERSATIONS
from helpers.llama_tools import missing, require_tool, source_directory
from reap.errors import CalibrationError
from reap.text.chat_template import ChatTemplate, Rendered
from reap.text.marks import Unlocated
from reap.text.messages import normalise_messages, normalise_tools

BOS, EOS = "<s>", "</s>"
# The engine's server replaces the token that ends gpt-oss's last answer, since for it the conversation goes on.
LAST_TOKEN = {"openai-gpt-oss-120b": ("<|return|>", "<|end|>")}
# `safe` in this template makes `+` escape JSON for HTML in jinja2; llama.cpp's engine does not, and it is what runs.
ESCAPED = "meetkai-functionary-medium-v3.1"


@dataclass
class Outcome:
    """One conversation with one template: texts, or None where the renderer refused."""

    rendered: Rendered | None
    error: str
    is_located: bool
    engine: str | None
    engine_error: str


@cache
def sources() -> dict[str, str]:
    """The templates by name. Skips the test where llama.cpp's source is not known, and fails it where CI is set."""
    directory = source_directory()
    if directory is None:
        missing("the source that llama.cpp's programs were built from is not known")
    return {
        path.stem: path.read_text(encoding="utf-8") for path in sorted((directory / "models/templates").glob("*.jinja"))
    }


@cache
def chat_template(name: str, now: datetime | None = None) -> ChatTemplate:
    return ChatTemplate(sources()[name], origin=name, bos=BOS, eos=EOS, now=now)


def ask_engine(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of llama.cpp's engine, one for each request."""
    program = require_tool("reap-render-template")
    lines = "".join(json.dumps({"bos": BOS, "eos": EOS, **request}) + "\n" for request in requests)
    run = subprocess.run([program], input=lines.encode(), capture_output=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def _requests(source: str) -> Iterator[dict[str, Any]]:
    for conversation in CONVERSATIONS.values():
        request = {
            "template": source,
            "messages": normalise_messages(conversation["messages"]),
            # false, where the engine would leave it undefined; thoughts are kept
            "kwargs": {"add_generation_prompt": False, "preserve_reasoning": True},
        }
        tools = normalise_tools(conversation["tools"])
        yield {**request, "tools": tools} if tools else request


@cache
def results() -> tuple[dict[str, dict[str, Outcome]], dict[str, dict[str, bool]], datetime]:
    """Template -> conversation -> what came of it; template -> what the engine thinks it can take; the time."""
    templates = sources()
    requests = [request for source in templates.values() for request in _requests(source)]
    while True:
        now = datetime.now()
        answers = iter(ask_engine(requests))
        if datetime.now().date() == now.date():  # templates write the date
            break
    outcomes: dict[str, dict[str, Outcome]] = {}
    capabilities = {}
    for name, source in templates.items():
        template = ChatTemplate(source, origin=name, bos=BOS, eos=EOS, now=now)
        outcomes[name] = {}
        for title, conversation in CONVERSATIONS.items():
            answer = next(answers)
            capabilities[name] = answer["caps"]
            rendered, error, is_located = read(template, conversation)
            outcomes[name][title] = Outcome(rendered, error, is_located, answer.get("text"), answer.get("error", ""))
    return outcomes, capabilities, now


def read(template: ChatTemplate, conversation: dict[str, Any]) -> tuple[Rendered | None, str, bool]:
    """What reap makes of a conversation, the error where it refuses, and whether the turns were found."""
    try:
        return template.read(conversation["messages"], tools=conversation["tools"], turns=True), "", True
    except Unlocated:
        return template.read(conversation["messages"], tools=conversation["tools"]), "", False
    except CalibrationError as error:
        return None, str(error), False


def as_the_engine_ends(name: str, text: str) -> str:
    """reap's text with the last token that the engine's server would put there."""
    old, new = LAST_TOKEN.get(name, ("", ""))
    head, found, tail = text.rpartition(old) if old else ("", "", text)
    return head + new + tail if found else text


def by_transformers(name: str, title: str, now: datetime) -> str | None:
    """The same messages as transformers renders them; None where it refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat_template(name, now)
    conversation = CONVERSATIONS[title]
    try:
        prepared = template.prepare(conversation["messages"], conversation["tools"])
        texts, _ = render_jinja_template(
            conversations=[template.adapt(prepared.messages)],
            tools=prepared.tools,
            chat_template=template.source,
            **template.variables,
        )
    except Exception:  # it passes on whatever a template raises
        return None
    return str(texts[0])


def table() -> str:
    """The table of the documentation."""
    outcomes, _, now = results()
    rows = ["| template | renders | = llama.cpp | = transformers | turns found |", "|---|---|---|---|---|"]
    for name, by_title in outcomes.items():
        rendered = {title: it for title, it in by_title.items() if it.rendered is not None}
        engine = [
            as_the_engine_ends(name, it.rendered.text) == it.engine
            for it in rendered.values()
            if it.rendered and it.engine is not None
        ]
        theirs = {title: by_transformers(name, title, now) for title in rendered}
        equal = [
            it.rendered.text == theirs[title]
            for title, it in rendered.items()
            if it.rendered and theirs[title] is not None
        ]
        found = [it.is_located for it in rendered.values()]
        cells = [
            f"{len(rendered)} of {len(by_title)}",
            *(f"{sum(these)} of {len(these)}" for these in (engine, equal, found)),
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def page() -> Path:
    return Path(__file__).resolve().parents[2] / "docs" / "chat-templates.md"


if __name__ == "__main__":
    print(table(), end="")
