"""Numbers in words: of terminals, pages and errors. Imports nothing of reap's."""

from __future__ import annotations

import math
from collections.abc import Sequence


def bytes_text(n_bytes: int) -> str:
    """12345678 -> "11.8 MiB"."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def number_text(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits; a dash for what is undefined."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def percent_text(share: float | None, digits: int = 0) -> str:
    """0.1234 -> "12%"; a dash for what is undefined."""
    return "–" if share is None or math.isnan(share) else f"{share:.{digits}%}"


def ranges_text(ids: Sequence[int]) -> str:
    """Ascending ids with runs of three and more drawn together: 0-2, 5, 7, 8."""
    parts: list[str] = []
    start = 0
    for index, number in enumerate(ids):
        if index + 1 < len(ids) and ids[index + 1] == number + 1:
            continue
        run = ids[start : index + 1]
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(one) for one in run]
        start = index + 1
    return ", ".join(parts) or "none"


def shortened_list(names: Sequence[str], most: int = 8) -> str:
    """ "a, b, c"; of more than `most` the first, and how many there are besides."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
