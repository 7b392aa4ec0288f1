"""A page: facts, sections, figures with their tables -> one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from reap.files.atomic import write_whole
from reap.files.paths import PathLike

_NOTHING = ("–", "")


@dataclass(frozen=True)
class Table:
    """Rows under columns."""

    columns: Sequence[str]
    """Their heads."""
    rows: Sequence[Sequence[str]]
    """Their cells, which are text already."""
    is_words: bool = False
    """Cells are to be read, not compared."""
    is_text: bool = False
    """Cells are text of several lines, shown as it is."""

    @property
    def shown(self) -> Table:
        """Without what says nothing: rows and columns of dashes alone."""
        rows = [row for row in self.rows if len(row) < 2 or any(cell not in _NOTHING for cell in row[1:])]
        used = [
            index
            for index in range(max(map(len, rows), default=len(self.columns)))
            if index == 0 or not rows or any(row[index] not in _NOTHING for row in rows)
        ]
        columns = [self.columns[index] for index in used] if self.columns else self.columns
        return replace(self, columns=columns, rows=[[row[index] for index in used] for row in rows])


@dataclass(frozen=True)
class Section:
    """One part of a page."""

    id: str
    """Its anchor, and its figure's."""
    title: str
    """Its heading."""
    lead: str
    """Sentences above the figure."""
    figure: Any = None
    """A plotly figure, or the name of one that the page's script draws ("experts", "layer", "scatter")."""
    alt: str = ""
    """What the figure shows, for those who do not see it."""
    table: Table | None = None
    """The numbers of the figure; folded away where there is one."""
    notes: Sequence[str] = ()
    """Sentences below it all."""
    navigation: str | None = None
    """Its name in the list of sections; None: the title."""
    continues: bool = False
    """It is of one idea with the section before, and stands within it."""


@dataclass(frozen=True)
class Page:
    """What a page shows."""

    title: str
    """Its heading."""
    subtitle: str
    """Below the heading."""
    facts: Sequence[tuple[str, str]]
    """The key numbers at the top: (value, what it is)."""
    sections: Sequence[Section]
    """In order."""
    warnings: Sequence[str] = ()
    """Sentences above the facts."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What the page's script needs: JSON types and packed arrays."""


def write_page(page: Page, output: PathLike, *, force: bool) -> Path:
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
