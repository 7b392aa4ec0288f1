"""A page: facts, sections, figures with their tables -> one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from reap.files.atomic import write_whole


@dataclass(frozen=True)
class Table:
    """Rows under columns; cells are text already. is_words: cells are to be read, not compared."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_words: bool = False


@dataclass(frozen=True)
class Section:
    """One part of a page.

    id: anchor, and of its figure. lead: sentences above it. figure: a plotly figure, or the name of one that the page's
    script draws ("experts", "layer", "scatter"). alt: what the figure shows, for those who do not see it. table: the
    numbers behind it, folded away where there is a figure. notes: sentences below it all. navigation: its name in the
    list of sections; None: the title; empty: not listed.
    """

    id: str
    title: str
    lead: str
    figure: Any = None
    alt: str = ""
    table: Table | None = None
    notes: Sequence[str] = ()
    navigation: str | None = None


@dataclass(frozen=True)
class Page:
    """facts: the key figures at the top, (value, what it is). data: what the page's script needs, JSON types and packed
    arrays."""

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


def write_page(page: Page, output: str | os.PathLike[str], *, force: bool) -> Path:
    """Write the page, whole or not at all. Raises OutputError, and UsageError where a file is there without `force`."""
    return write_whole(output, render(page).encode("utf-8", "xmlcharrefreplace"), force=force)


def render(page: Page) -> str:
    """The page as HTML. Every text in it is escaped; scripts run by their hash alone, and nothing may be loaded."""
    scripts = (get_plotlyjs(), _resource("page.js"))
    figures = {section.id: _figure_json(section.figure) for section in page.sections if section.figure is not None}
    data = '{"figures":{' + ",".join(f"{json.dumps(name)}:{text}" for name, text in figures.items()) + "}"
    data += "".join(f",{json.dumps(str(name))}:{json.dumps(_finite(value))}" for name, value in page.data.items()) + "}"
    return environment().get_template("page.html.j2").render(
        page=page,
        style=Markup(_resource("page.css")),
        scripts=[Markup(script) for script in scripts],
        policy=Markup(" ".join(f"'sha256-{_digest(script)}'" for script in scripts)),
        data=Markup(_inside_script(data)),
        logo=Markup(_resource("logo.svg")),
    )  # fmt: skip


def environment() -> jinja2.Environment:
    """Templates of the package; HTML is escaped, an unknown name is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("reap.reporting"),
        autoescape=lambda name: name is None or ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def packed(array: NDArray[Any]) -> dict[str, str]:
    """An array as plotly packs it: float32, int32 or uint8 in base64."""
    names = {"f": "f4", "i": "i4", "b": "u1", "u": "u1"}
    dtype = names[array.dtype.kind]
    data = np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<"))
    return {
        "dtype": dtype,
        "bdata": base64.b64encode(data.tobytes()).decode(),
        "shape": ", ".join(map(str, array.shape)),
    }


def _resource(name: str) -> str:
    return (files("reap.reporting") / "templates" / name).read_text(encoding="utf-8")


def _figure_json(figure: Any) -> str:
    if isinstance(figure, str):
        return json.dumps(figure)
    figure.layout.template = None
    return str(figure.to_json())


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _inside_script(text: str) -> str:
    """JSON that cannot end the element it stands in."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
