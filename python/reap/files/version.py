"""The version of reap, kept in one place: the distribution's metadata."""

from __future__ import annotations

import functools


@functools.cache
def version() -> str:
    """The installed distribution's version; "unknown" where reap runs from a source tree without having been
    installed."""
    from importlib import metadata

    try:
        return metadata.version("reap-moe")
    except metadata.PackageNotFoundError:
        return "unknown"
