"""The directive `reap-commands`: the help of every command, taken from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

from reap.cli.app import app

Rows = list[tuple[str, str]]


class Commands(SphinxDirective):
    """One section for each command: what it does, how it is called, its options, its example."""

    def run(self) -> list[nodes.Node]:
        return [self._section(name, command) for name, command in commands(get_command(app), "reap")]

    def _section(self, name: str, command: Any) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(name)])
        section += nodes.title(text=name)
        for paragraph in inspect.cleandoc(command.help or "").replace("\b", "").split("\n\n"):
            section += nodes.paragraph(text=" ".join(plain(paragraph).split()))
        section += nodes.literal_block(text=usage(name, command), language="console")
        rows = list(options_of(command))
        if rows:
            section += table(rows)
        if command.epilog:
            example = plain(command.epilog).removeprefix("Example:").strip()
            section += nodes.literal_block(text=example, language="console")
        return section


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(words that call it, command), depth first, hidden ones left out."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for word, child in inner.items():
        if not child.hidden:
            yield from commands(child, f"{name} {word}")


def usage(name: str, command: Any) -> str:
    """The call in one line, as --help prints it."""
    words = [argument_name(param) for param in command.params if param.param_type_name == "argument"]
    return " ".join([name, *words, "[OPTIONS]"])


def argument_name(param: Any) -> str:
    return str(getattr(param, "metavar", None) or param.name.upper())


def options_of(command: Any) -> Iterator[tuple[str, str]]:
    """(spellings, help) of each argument and option."""
    for param in command.params:
        if getattr(param, "hidden", False):
            continue
        named = param.param_type_name == "option"
        spellings = [*param.opts, *param.secondary_opts] if named else [argument_name(param)]
        metavar = getattr(param, "metavar", None)
        spelled = ", ".join(spellings) + (f" {metavar}" if named and metavar else "")
        yield spelled, plain(getattr(param, "help", None) or "")


def plain(text: str) -> str:
    """Without rich's markup."""
    return text.replace("[bold]", "").replace("[/bold]", "")


def table(rows: Rows) -> nodes.table:
    group = nodes.tgroup(cols=2)
    group += [nodes.colspec(colwidth=35), nodes.colspec(colwidth=65)]
    body = nodes.tbody()
    for spelled, text in rows:
        row = nodes.row()
        first, second = nodes.entry(), nodes.entry()
        first += nodes.paragraph("", "", nodes.literal(text=spelled))
        second += nodes.paragraph(text=text)
        row += [first, second]
        body += row
    group += body
    result = nodes.table()
    result += group
    return result


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("reap-commands", Commands)
    return {"parallel_read_safe": True}
