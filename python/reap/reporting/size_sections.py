"""Sections of the page about what is gained and lost: quality against size, bytes, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reap.evaluation.sweep_table import Sweep, Verdict
from reap.files.formatting import bytes_text
from reap.files.formatting import number_text as number
from reap.files.formatting import percent_text as percent
from reap.pruning.sizing import ModelSize
from reap.reporting import plots
from reap.reporting.gpu_fit import Fit, describe_fit, fits
from reap.reporting.page import Section, Table
from reap.reporting.report_sources import Sources
from reap.reporting.sweep_points import SweepPoint, points_of

_QUALITY_LEAD = (
    "Perplexity on held-out text against size. Bars are standard errors, or the range over the seeds. Models on one"
    " text make mostly the same mistakes, so a difference smaller than its bar can be real; it can also be luck."
)


def quality(sources: Sources, sweep: Sweep) -> Iterator[Section]:
    known = [(domain, points) for domain in (None, *sweep.domains) if (points := points_of(sweep, domain))]
    for index, (domain, points) in enumerate(known):
        whole = [
            point.perplexity for group in points.values() for point in group if point.keep >= sources.profile.n_experts
        ]
        curves = {
            metric: group
            for metric, group in points.items()
            if any(point.keep < sources.profile.n_experts for point in group)
        }
        title = "Quality and size" + (f": {domain}" if domain is not None else "")
        verdicts = [verdict for verdict in sweep.verdicts if verdict.domain == domain]
        yield Section(
            "quality" if index == 0 else f"quality-{index}",
            title,
            "" if index else _QUALITY_LEAD,
            plots.sweep_curve(curves or points, whole[0] if whole else None),
            _best_by_size(points, verdicts),
            _points_table(points),
            () if index else sweep.warnings,
            navigation="" if index else "Quality and size",
        )


def sizes(sources: Sources, size: ModelSize) -> Section:
    rows = [
        [item.name, bytes_text(item.n_bytes_before), bytes_text(item.n_bytes_after), str(item.n_tensors)]
        for item in size.classes
    ]
    rows.append(
        [
            "in all",
            bytes_text(size.n_bytes_before),
            bytes_text(size.n_bytes_after),
            str(sum(item.n_tensors for item in size.classes)),
        ]
    )
    alt = (
        f"{size.n_bytes_before:,} bytes before, {size.n_bytes_after:,} after. After:"
        f" {describe_fit(size.n_bytes_after)}."
    )
    notes = []
    if sources.info is not None and sources.info.refusals:
        notes.append(f"This model cannot be pruned: {sources.info.refusals[0]}")
    lead = "Of the file, to the byte. Only experts and routers shrink."
    return Section(
        "sizes", "Sizes", lead, plots.sizes(size), alt, Table(["kind", "before", "after", "tensors"], rows), notes
    )


def memory(sources: Sources, size: ModelSize) -> Section:
    both = zip(fits(size.n_bytes_before), fits(size.n_bytes_after), strict=True)
    rows = [
        [f"{pair[0].gb} GB", *(f"{fit.verdict}, {bytes_text(abs(fit.bytes_left))} {_left(fit)}" for fit in pair)]
        for pair in both
    ]
    lead = (
        "Whether the weights go into one device's memory, of as many times 2³⁰ bytes, as memories are sold. Fits"
        " means that they leave a tenth of it free, tight that they leave less. The cache grows with the context"
        " and is not counted; experts may also stay in the computer's own memory, which is slower but removes"
        " nothing."
    )
    return Section("memory", "Memory", lead, table=Table(["memory", "before", "after"], rows))


def _left(fit: Fit) -> str:
    return "missing" if fit.bytes_left < 0 else "left"


def _best_by_size(points: dict[str, list[SweepPoint]], verdicts: Sequence[Verdict]) -> str:
    """For each size the metric with the lowest perplexity, and by how much: as the sweep itself judged, where it
    did."""
    if verdicts:
        words = [
            f"{item.keep} experts: {item.metric} before {item.runner_up} by {number(item.margin, 2)} ± "
            f"{number(item.spread, 2)} nats a token" + ("" if item.clear else " (no clear winner)")
            for item in sorted(verdicts, key=lambda item: -item.keep)
        ]
        return "Best at " + "; ".join(words) + "."
    by_keep: dict[int, list[SweepPoint]] = {}
    for group in points.values():
        for point in group:
            by_keep.setdefault(point.keep, []).append(point)
    sentences = []
    for keep, candidates in sorted(by_keep.items(), reverse=True):
        ranked = sorted(candidates, key=lambda point: point.perplexity)
        if len(ranked) > 1:
            margin = ranked[1].perplexity - ranked[0].perplexity
            error = f", standard error {number(ranked[0].stderr, 2)}" if ranked[0].stderr > 0 else ""
            sentences.append(
                f"{keep} experts: {ranked[0].metric}, by {number(margin, 2)} before {ranked[1].metric}{error}"
            )
    return ("Lowest perplexity at " + "; ".join(sentences) + ".") if sentences else "Perplexity by size."


def _points_table(points: dict[str, list[SweepPoint]]) -> Table:
    rows = [
        [
            metric,
            str(point.keep),
            bytes_text(point.n_bytes),
            f"{number(point.perplexity, 5)} ± {number(point.stderr, 2)}",
            "–" if point.spread is None else f"{number(point.spread[0])} to {number(point.spread[1])}",
            f"{percent(point.rise, 2)} ± {percent(point.rise_error, 2)}",
            number(point.kl_mean, 3),
            percent(point.top1, 1),
        ]
        for metric, group in points.items()
        for point in group
    ]
    columns = [
        "metric",
        "experts",
        "size",
        "perplexity",
        "over the seeds",
        "rise over all experts",
        "mean KL divergence",
        "top-1 agreement",
    ]
    return Table(columns, rows)
