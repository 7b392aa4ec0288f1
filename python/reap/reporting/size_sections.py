"""Sections of the page about what is gained: bytes, and the memories they go into."""

from __future__ import annotations

from reap.files.formatting import bytes_text
from reap.pruning.sizing import ModelSize
from reap.reporting import plots
from reap.reporting.gpu_fit import Fit, describe_fit, fits
from reap.reporting.page import Section, Table
from reap.reporting.report_sources import Sources


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
        "sizes",
        "Size and memory",
        lead,
        plots.sizes(size),
        alt,
        Table(["kind", "before", "after", "tensors"], rows),
        notes,
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
    return Section("memory", "Memory", lead, table=Table(["memory", "before", "after"], rows), continues=True)


def _left(fit: Fit) -> str:
    return "missing" if fit.bytes_left < 0 else "left"
