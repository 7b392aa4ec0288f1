"""The section of the page that says how sure a choice is."""

from __future__ import annotations

from reap.files.formatting import percent_text as percent
from reap.reporting import plots
from reap.reporting.page import Section, Table
from reap.reporting.report_sources import Sources
from reap.scores.stability import Stability

_MOST_DOMAINS = 7


def stability(sources: Sources) -> Section | None:
    """What `Profile.stability` says of the plan's number of experts; None where the profile cannot say."""
    found = sources.stability
    if found is None:
        return None
    domains = dict(sorted(found.domains.items(), key=lambda item: item[1].overlap)[:_MOST_DOMAINS])
    lead = (
        f"Of the {found.keep} experts that {found.metric} keeps in a layer, the share that another profile of as much"
        " text, of the same kind, would keep as well: an estimate from the parts of this calibration. Where it is low,"
        " more text would still change the choice. It says nothing of text of another kind, nor how much the choice"
        " matters."
    )
    low, worst = found.lowest
    alt = f"{percent(found.overlap, 1)} on average; the least in layer {worst}, {percent(low, 1)}."
    if domains:
        alt += " By the tokens of one domain alone: "
        alt += ", ".join(f"{name} {percent(part.overlap, 1)}" for name, part in domains.items()) + "."
    columns = ["layer", "all text", *domains]
    rows = [
        [str(layer), percent(overlap, 1), *(percent(part.layers[layer], 1) for part in domains.values())]
        for layer, overlap in found.layers.items()
    ]
    figure = plots.stability(sources.profile, {"all text": found, **domains})
    return Section("stability", "How sure", lead, figure, alt, Table(columns, [*rows, _mean_row(found, domains)]))


def _mean_row(found: Stability, domains: dict[str, Stability]) -> list[str]:
    return ["mean", percent(found.overlap, 1), *(percent(part.overlap, 1) for part in domains.values())]
