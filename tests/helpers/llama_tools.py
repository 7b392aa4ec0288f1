"""Finds the programs of the pinned llama.cpp that tests compare with. They are built by

    cmake --preset tools && cmake --build build/tools --target reap-llama-tools

or are in the folder that REAP_LLAMA_TOOLS names. On a laptop they may be missing, and a test that needs them is
skipped; where CI is set they may not, and it fails.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_DIRECTORY = ROOT / "build" / "tools" / "bin"


def tools_directory() -> Path:
    """Where the programs are looked for."""
    return Path(os.environ.get("REAP_LLAMA_TOOLS") or DEFAULT_DIRECTORY)


def find_tool(name: str) -> Path | None:
    """A program by its name, or None where it was not built."""
    path = tools_directory() / name
    return path if path.is_file() and os.access(path, os.X_OK) else None


def require_tool(name: str) -> Path:
    """A program by its name; skips the test where it was not built, and fails it where CI is set."""
    found = find_tool(name)
    if found is None:
        missing(
            f"{name} is not in {tools_directory()}; build it with: cmake --build build/tools --target reap-llama-tools"
        )
    return found


def missing(reason: str) -> NoReturn:
    """Skip on a laptop, fail in CI."""
    import pytest  # only where it is needed: the processes that run one model each start faster

    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def source_directory() -> Path | None:
    """The sources that the programs were built from, as CMake remembers them; None where that is not known."""
    cache = tools_directory().parent / "CMakeCache.txt"
    if not cache.is_file():
        return None
    match = re.search(r"^llama\.cpp_SOURCE_DIR:STATIC=(.+)$", cache.read_text(encoding="utf-8"), re.MULTILINE)
    return Path(match[1]) if match and Path(match[1]).is_dir() else None
