"""Rows of a sweep, wherever they come from: a file, a document, an object of reap.sweep, or a list of rows."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap.errors import FormatError, UsageError
from reap.jsonfile import EXPERT_LIMIT, Node, read_json
from reap.scores import check_format

FORMAT = "reap.sweep"
VERSION = 1
_MAX_BYTES = 64 << 20
_LARGEST_BYTES = 1 << 60

SweepSource = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Any


@dataclass(frozen=True)
class SweepRow:
    ""

    """One model of a sweep on one text; what the sweep did not say is None. domain "" is the whole text."""

    metric: str
    keep: int
    n_bytes: int | None
    perplexity: float | None
    stderr: float | None
    kl_mean: float | None
    top1: float | None
    domain: str
    seed: int | None


@dataclass(frozen=True)
class SweepVerdict:
    """The best metric at one size, by how many nats per token, with the standard error of that, and whether it is clear."""

    keep: int
    domain: str
    metric: str
    runner_up: str
    margin: float
    spread: float
    clear: bool


@dataclass(frozen=True)
class SweepData:
    """Rows and verdicts in order; fingerprint: of the model, None where the sweep did not say; warnings of the sweep."""

    rows: tuple[SweepRow, ...] = ()
    verdicts: tuple[SweepVerdict, ...] = ()
    fingerprint: str | None = None
    warnings: tuple[str, ...] = ()


def read_sweep(source: SweepSource) -> SweepData:
    """What pages show of a sweep. UsageError where a file cannot be read, FormatError where a field has the wrong type."""
    root = _document(source)
    rows = _entries(root, "rows")
    verdicts = _entries(root, "best") if "best" in root else []
    model = root["model"] if "model" in root else Node({}, root.where)
    fingerprint = model["fingerprint"].string() if model.members().get("fingerprint") is not None else None
    warnings = [node.string() for node in _entries(root, "warnings")] if "warnings" in root else []
    return SweepData(tuple(map(_row, rows)), tuple(map(_verdict, verdicts)), fingerprint, tuple(warnings))


def _document(source: SweepSource) -> Node:
    if isinstance(source, str | os.PathLike):
        root = read_json(source, what="sweep", max_bytes=_MAX_BYTES)
        check_format(root, FORMAT, VERSION)
        return root
    document = source.to_dict() if hasattr(source, "to_dict") else source
    if isinstance(document, Mapping):
        return Node(dict(document), "sweep")
    if not isinstance(document, Sequence):
        raise UsageError(f"a sweep should be a file, a document with rows or a list of rows, found {type(source).__name__}")
    return Node({"rows": [dict(row) for row in document]}, "sweep")


def _entries(parent: Node, key: str) -> list[Node]:
    return [parent[key].entry(index) for index in range(len(parent[key].entries()))]


def _row(node: Node) -> SweepRow:
    row = node.members()
    return SweepRow(
        metric=node["metric"].string() if row.get("metric") is not None else "baseline",
        keep=node["keep"].integer(1, EXPERT_LIMIT),
        n_bytes=node["bytes"].integer(0, _LARGEST_BYTES) if row.get("bytes") is not None else None,
        domain=_text(node, "domain"),
        seed=node["seed"].integer() if row.get("seed") is not None else None,
        perplexity=_number(node, "perplexity"),
        stderr=_number(node, "stderr"),
        kl_mean=_number(node, "kl_mean"),
        top1=_number(node, "top1"),
    )


def _verdict(node: Node) -> SweepVerdict:
    keep = node["keep"].integer(1, EXPERT_LIMIT)
    names = [node[key].string() for key in ("metric", "runner_up")]
    margin, spread = (_number(node, key) or 0.0 for key in ("margin", "spread"))
    return SweepVerdict(keep, _text(node, "domain"), names[0], names[1], margin, spread, node["clear"].value is True)


def _text(node: Node, key: str) -> str:
    return node[key].string() if node.members().get(key) is not None else ""


def _number(node: Node, name: str) -> float | None:
    value = node.members().get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise FormatError(f"{node.where}: {name} should be a number, found {value!r:.40}")
    return float(value)


@dataclass(frozen=True)
class SweepPoint:
    """One metric at one size in one domain: the mean over the seeds; spread is (lowest, highest) where there are several."""

    metric: str
    keep: int
    n_bytes: int | None
    perplexity: float
    stderr: float | None
    spread: tuple[float, float] | None
    kl_mean: float | None
    top1: float | None


def points_of(rows: Sequence[SweepRow], domain: str) -> dict[str, list[SweepPoint]]:
    """Metric -> its points in one domain, smallest first; rows without a perplexity are left out."""
    groups: dict[tuple[str, int], list[SweepRow]] = {}
    for row in rows:
        if row.domain == domain and row.perplexity is not None:
            groups.setdefault((row.metric, row.keep), []).append(row)
    points: dict[str, list[SweepPoint]] = {}
    for (metric, keep), group in sorted(groups.items(), key=lambda item: item[0][1]):
        perplexities = [row.perplexity for row in group if row.perplexity is not None]
        spread = (min(perplexities), max(perplexities)) if len(group) > 1 else None
        mean = [_mean([getattr(row, name) for row in group]) for name in ("perplexity", "stderr", "kl_mean", "top1")]
        assert mean[0] is not None
        points.setdefault(metric, []).append(SweepPoint(metric, keep, group[0].n_bytes, mean[0], mean[1], spread, mean[2], mean[3]))
    return points


def domains_of(rows: Sequence[SweepRow]) -> list[str]:
    """The domains, the whole text first."""
    return sorted({row.domain for row in rows}, key=lambda name: (name not in ("", "all"), name))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
