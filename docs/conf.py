"""Settings of the documentation site: `sphinx-build -W -b html docs build/site`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from benchmarks import results  # noqa: E402

import reap  # noqa: E402

project = "reap"
author = "The reap authors"
release = reap.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "command_line",
]
intersphinx_mapping: dict[str, tuple[str, None]] = {}  # nothing is fetched where the site is built
source_suffix = {".md": "markdown"}
exclude_patterns = ["examples", "_ext", "_generated"]
html_theme = "furo"
html_title = "reap"
html_static_path: list[str] = []
html_extra_path: list[str] = []
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
nitpicky = False
copybutton_prompt_text = "$ "

(HERE / "_generated").mkdir(exist_ok=True)
(HERE / "_generated" / "measurements.md").write_text(results.table() + "\n", encoding="utf-8")
