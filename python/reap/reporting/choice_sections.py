"""Sections of the page about the choice: other criteria, domains, experts to look at, where it all came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from reap.files.formatting import number_text as number
from reap.files.formatting import percent_text as percent
from reap.reporting import plots
from reap.reporting.page import Section, Table
from reap.reporting.report_sources import Sources
from reap.scores.plan import super_experts
from reap.scores.statistics import (
    kept_share,
    known_metrics,
    low_by_every_metric,
    mask_by,
    mean_of,
    overlaps,
)

_MOST_LISTED = 60


def criteria(sources: Sources) -> Section:
    names = [metric for metric in known_metrics(sources.profile) if metric != "random"]
    masks = [mask_by(sources.profile, metric, sources.plan.keep) for metric in names]
    chance = sources.plan.keep / sources.profile.n_experts
    values = overlaps([*masks, sources.mask])
    labels = [*names, "the example" if sources.is_example else "the plan"]
    alt = (
        "Of the experts that one metric keeps, the share that another keeps as well. Two blind choices would share"
        f" {percent(chance)}."
    )
    lead = (
        f"Would another metric have kept the same {sources.plan.keep} experts? Where two agree, the choice between"
        " them hardly matters; where they do not, a sweep on held-out text decides. None is best everywhere."
    )
    table = Table(
        ["", *labels], [[label, *map(percent, row)] for label, row in zip(labels, values.tolist(), strict=True)]
    )
    return Section(
        "criteria",
        "Agreement",
        lead,
        plots.matrix(labels, values, chance, "of the kept experts in common"),
        alt,
        table,
    )


def domains(sources: Sources) -> Section:
    profile, keep = sources.profile, sources.plan.keep
    names = list(profile.domains)
    parts = [profile.domain(name) for name in names]
    masks = [mask_by(part, sources.metric, keep) for part in parts]
    values = overlaps(masks)
    kept = [mean_of(kept_share(part.gated_norm_sum, sources.mask)) for part in parts]
    rows = [
        [name, f"{int(part.total_tokens.max()):,}", percent(share, 1), *map(percent, row)]
        for name, part, share, row in zip(names, parts, kept, values.tolist(), strict=True)
    ]
    chance = keep / profile.n_experts
    worst = int(np.argmin(np.nan_to_num(kept, nan=1)))
    alt = (
        "Of the experts that one domain alone would keep, the share that another would; two blind choices would "
        f"share {percent(chance)}. "
        f"Of all domains the plan serves {names[worst]} least: it keeps {percent(kept[worst])} of its Σ g·‖f‖."
    )
    lead = "Domains that need other experts pull a plan apart. What the calibration lacks, a plan does not protect."
    table = Table(["domain", "tokens", "kept of its Σ g·‖f‖", *names], rows)
    return Section(
        "domains",
        "Domains",
        lead,
        plots.matrix(names, values, chance, "of the kept experts in common"),
        alt,
        table,
        continues=True,
    )


def low(sources: Sources) -> Section:
    profile = sources.profile
    low, never = low_by_every_metric(profile), profile.never_routed
    rows = [
        [
            layer,
            _ids(np.flatnonzero(never[i])),
            _ids(np.flatnonzero(low[i] & ~never[i])),
            f"{int((low[i] & ~sources.mask[i]).sum())} of {int(low[i].sum())}" if low[i].any() else "–",
        ]
        for i, layer in enumerate(sources.layers)
    ]
    lead = (
        "Experts that were never routed to, and those in the lowest quarter of their layer by every metric:"
        " removing them is the safest bet, for this calibration text."
    )
    everywhere = np.flatnonzero(low.all(axis=0))
    notes = []
    without = int((~(low | never).any(axis=1)).sum())
    if without:
        notes.append("No layer has one." if without == profile.n_layers else f"The other {without} layers have none.")
    if profile.n_layers > 1:
        named = (
            f"Low in every layer: expert {_ids(everywhere)}. "
            if everywhere.size
            else "No expert id is low in every layer. "
        )
        notes.append(
            named + "Ids of different layers have nothing to do with each other, so one that is low everywhere points "
            "at the measurement more than at the expert."
        )
    columns = ["layer", "never routed to", "low by every metric", "removed of these"]
    return Section("low", "Experts to look at", lead, table=Table(columns, rows, is_words=True), notes=notes)


def super_experts_section(sources: Sources) -> Section:
    found = super_experts(sources.profile)
    lead = (
        "Experts whose largest output dwarfs the others' of their layer. Removing one tends to break a model, "
        "however rarely it is chosen; "
        "reap plan --super-experts protects them."
    )
    if not found:
        return Section("super-experts", "Super experts", lead + " None was found here.", continues=True)
    rows = [
        [f"layer {item.layer}, expert {item.expert}", number(item.norm_max), f"{item.ratio:.0f}",
         "kept" if item.expert in sources.plan.layers[item.layer] else "REMOVED"]
        for item in found[:_MOST_LISTED]
    ]  # fmt: skip
    return Section(
        "super-experts",
        "Super experts",
        lead,
        table=Table(["", "largest ‖f‖", "times the median", "the plan"], rows),
        continues=True,
    )


def provenance(sources: Sources) -> Section:
    rows = [[name, value] for name, value in _provenance_rows(sources) if value not in ("", "None")]
    lead = "What was measured, on what, with what."
    return Section("provenance", "Provenance", lead, table=Table([], rows, is_words=True))


def _provenance_rows(sources: Sources) -> Iterator[tuple[str, str]]:
    model, record, engine = sources.profile.model, sources.profile.calibration, sources.profile.engine
    yield "profile", sources.file_name or ""
    for key in ("name", "architecture", "fingerprint", "router_fingerprint", "n_experts_used", "n_groups"):
        yield f"model: {key.replace('_', ' ')}", str(model.get(key, ""))
    yield "calibration files", ", ".join(map(str, record.get("files") or ()))
    yield "their sha256", ", ".join(map(str, record.get("sha256") or ()))
    for key in (
        "samples",
        "tokens",
        "counted_tokens",
        "windows",
        "skipped",
        "failed",
        "ctx_size",
        "chat_template",
        "mask",
    ):
        value = record.get(key, "")
        yield f"calibration: {key.replace('_', ' ')}", f"{value:,}" if type(value) is int else str(value)
    yield "measured by", ", ".join(f"{key} {engine[key]}" for key in ("tool", "reap", "llama_cpp") if key in engine)
    options = engine.get("options")
    if isinstance(options, dict):
        yield (
            "engine options",
            ", ".join(f"{key}={value}" for key, value in options.items() if value not in (None, [], {})),
        )
    yield (
        "plan",
        f"{sources.plan.keep} of {sources.profile.n_experts}, by {sources.plan.metric}"
        + (" (an example)" if sources.is_example else ""),
    )
    plan_options = {
        key: value for key, value in sources.plan.options.items() if key not in ("super_experts", "protected")
    }
    yield "plan options", ", ".join(f"{key}={value}" for key, value in plan_options.items())
    protected = sources.plan.options.get("protected")
    if isinstance(protected, dict) and protected:
        yield "protected", ", ".join(f"layer {layer}: {ids}" for layer, ids in protected.items())
    if sources.info is not None:
        yield "model file", f"{sources.info.path.name}, {sources.info.n_bytes:,} bytes"


def _ids(found: Any) -> str:
    listed = ", ".join(map(str, found[:_MOST_LISTED].tolist()))
    return (listed + (f" and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else "")) or "–"
