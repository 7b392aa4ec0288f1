"""The sandbox of chat templates against the folder of attacks beside this file: each ends in an error, soon, in little
memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from reap.errors import CalibrationError, UsageError
from reap.text import budget, sandbox
from reap.text.chat_template import ChatTemplate

ATTACKS = sorted((Path(__file__).parent / "attacks").glob("*.jinja"))
MESSAGES = [{"role": "user", "content": "question"}]
MEMORY = 600 << 20  # of address space: Python with jinja2 takes a third of it
SECONDS = 60  # a hang is meant; what is slow is caught by the steps

RUN = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
from reap.errors import CalibrationError
from reap.text.chat_template import ChatTemplate
ChatTemplate("{{ 1 }}", origin="what loads jinja2")
for path in sys.argv[2:]:
    started = time.process_time()
    try:
        template = ChatTemplate(open(path).read(), origin="attack")
        answer = {"text": template.render([{"role": "user", "content": "question"}])[:2000]}
    except CalibrationError as error:
        answer = {"error": str(error)}
    seconds = time.process_time() - started
    print(json.dumps({"path": path, "seconds": seconds, **answer}), flush=True)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(MEMORY), *map(str, ATTACKS)],
        capture_output=True,
        text=True,
        timeout=SECONDS * 4,
    )
    assert run.returncode == 0, run.stderr[-2000:] + run.stdout[-300:]
    return {Path(answer["path"]).stem: answer for answer in map(json.loads, run.stdout.splitlines())}


def test_there_are_attacks() -> None:
    assert len(ATTACKS) >= 50


@pytest.mark.parametrize("name", [path.stem for path in ATTACKS])
def test_an_attack_ends_in_an_error(name: str, answers: dict[str, dict[str, Any]]) -> None:
    answer = answers[name]
    assert "error" in answer
    assert answer["error"].startswith("attack")
    assert "MemoryError" not in answer["error"]
    assert answer["seconds"] < 1  # of processor time


def test_what_is_too_much_is_too_much_in_a_conversation_as_well() -> None:
    """Where a template is quick with the few words that it is tried with: all renderings of a conversation count
    together."""
    source = (
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% if 'question' in m.content %}"
        "{% set l = range(9999)|list %}{% for i in range(40) %}{% set n = l|sum %}{% endfor %}{% endif %}{% endfor %}"
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "question"} for i in range(8)]
    template = ChatTemplate(source, origin="the template")
    started = time.process_time()
    with pytest.raises(CalibrationError):
        template.read(messages, turns=True)
    assert time.process_time() - started < 2


def test_a_template_that_takes_too_much_is_tried_once() -> None:
    template = ChatTemplate(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", origin="x"
    )
    for _ in range(2):
        started = time.process_time()
        with pytest.raises(CalibrationError, match=r"x cannot render a message of three words: .* takes too"):
            template.render(MESSAGES)
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("found", ["3.1.5", "3.0", "2.11.3", "3.1.5.post1"])
def test_an_old_jinja2_is_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "version", lambda _: found)
    with pytest.raises(UsageError, match=rf"jinja2 {found} lets a chat template run programs; 3\.1\.6 or newer"):
        ChatTemplate("x", origin="the template")


@pytest.mark.parametrize("found", ["3.1.6", "3.2", "4.0.0rc1"])
def test_a_new_jinja2_is_not(found: str) -> None:
    sandbox.check_version(found)


def render(source: str) -> str:
    return ChatTemplate(source, origin="the template").render(MESSAGES)


def test_a_template_changes_its_own_lists() -> None:
    assert render("{% set l = [1] %}{% set _ = l.append(2) %}{{ l }}{{ l.pop() }}") == "[1, 2]2"
    assert render("{% set n = namespace(l=[]) %}{% set _ = n.l.append('x') %}{{ n.l[0] }}") == "x"
    assert render("{% set l = messages[:] %}{% set _ = l.append(1) %}{{ l | length }}{{ messages | length }}") == "21"
    with pytest.raises(CalibrationError, match="cannot render"):
        render("{{ messages.append(1) }}")


def test_what_llama_cpp_offers_beyond_transformers() -> None:
    assert render("""{{ ('{"a": [1]}' | from_json).a[0] }}""") == "1"
    assert render("{{ ' x ' | strip }}{{ 'a,b' | split(',') | last }}{{ 'ab' | startswith('a') }}") == "xbTrue"
    assert render("{{ messages | map(attribute='role') | tojson }}{{ tojson(1) }}") == '["user"]1'
    assert render("{{ 'a' + absent + 'b' }}") == "ab"
    assert render("{% for tool in tools %}x{% endfor %}y") == "y"


def test_long_conversations_are_within_the_bounds() -> None:
    source = (
        "{% for m in messages %}{% set n = namespace(last=0) %}{% for o in messages %}{% if o.role == 'user' %}"
        "{% set n.last = loop.index0 %}{% endif %}{% endfor %}{{ m.content }}{% endfor %}"
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(400)]
    text = ChatTemplate(source, origin="the template").render(messages)
    assert len(text) == 400 * 1000


def test_the_garbage_of_the_process_is_not_the_template_s_time() -> None:
    def work(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    with budget.limited(0.1):
        allowed = budget.Budget(0, 0)
        budget._COLLECTING.note("start", {})
        work(0.2)
        budget._COLLECTING.note("stop", {})
        allowed.tick()
        work(0.2)
        with pytest.raises(budget.Exhausted, match="takes too long"):
            allowed.tick()
