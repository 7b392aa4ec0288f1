"""What a page begins with: how much worse at which size, by which criterion, and how sure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from reap.evaluation.sweep_table import BASELINE, Sweep
from reap.evaluation.sweep_winner import is_choice, verdict_text
from reap.files.formatting import bytes_text
from reap.files.formatting import number_text as number
from reap.files.formatting import percent_text as percent
from reap.reporting import plots
from reap.reporting.page import Section, Table
from reap.reporting.report_sources import Sources
from reap.reporting.sweep_points import SweepPoint, points_of

_LEAD = (
    "How much perplexity on held-out text rises as experts go. The star is the model as it is; bars are standard"
    " errors; small open marks are single domains."
)


def cost_facts(sources: Sources) -> Iterator[tuple[str, str]]:
    """The answers in three boxes: what the plan costs, and which criterion is best at its size."""
    keep, n_experts = sources.plan.keep, sources.profile.n_experts
    with_experts = f"perplexity, with {keep} of {n_experts} experts"
    own = None if sources.sweep is None else _own_point(sources, sources.sweep)
    if sources.judged is not None:
        it = sources.judged
        yield _rise_text(it.rise, it.rise_error), f"{with_experts}, on text that had no part in the choice"
    elif own is not None:
        yield _rise_text(own.rise, own.rise_error), f"{with_experts} by {own.metric}, on the sweep's text"
    verdict = None if sources.sweep is None else sources.sweep.best().get(keep)
    if verdict is not None:
        margin = math.expm1(min(verdict.margin, 700))
        error = (1 + margin) * verdict.spread
        sure = f"clearly best with {keep} experts" if verdict.clear else f"first with {keep} experts, but not clearly"
        yield (
            verdict.metric,
            f"is {sure}: with {verdict.runner_up}, the next, perplexity is"
            f" {percent(margin, 1)} ± {percent(error, 1)} higher",
        )


def quality(sources: Sources, sweep: Sweep) -> Section | None:
    """One chart and one table of the whole text and of all its domains; None where a sweep has no perplexity."""
    parts = {domain: points_of(sweep, domain) for domain in (None, *sweep.domains)}
    whole = {metric: points for metric, points in parts[None].items() if metric != BASELINE}
    base = parts[None].get(BASELINE, [None])[0]
    if not whole or base is None:
        return None
    domains = {domain: points for domain, points in parts.items() if domain is not None}
    chart = plots.cost_curve(whole, domains, base, _own_point(sources, sweep))
    said = [verdict_text(verdict) for verdict in sweep.best().values()] or [
        "By how much perplexity rises with each size."
    ]
    notes = [*_other_winners(sweep), *sweep.warnings]
    return Section("quality", "What it costs", _LEAD, chart, " ".join(said), _table(sources, parts), notes)


def _other_winners(sweep: Sweep) -> Iterator[str]:
    """Of domains whose winner is not that of the whole text."""
    for domain in sweep.domains:
        for keep, verdict in sweep.best(domain).items():
            whole = sweep.best().get(keep)
            if whole is not None and verdict.metric != whole.metric:
                yield verdict_text(verdict)


def _own_point(sources: Sources, sweep: Sweep) -> SweepPoint | None:
    """Where the plan is on the chart; None where it is not."""
    if sources.is_example:
        return None
    row = next((row for row in sweep.select(keep=sources.plan.keep) if is_choice(row, sources.plan)), None)
    points = points_of(sweep, None)
    return None if row is None else next((it for it in points[row.metric] if it.keep == row.keep), None)


def _rise_text(rise: float, error: float) -> str:
    return f"{rise:+.1%}" + ("" if math.isnan(error) else f" ± {percent(error, 1)}")


def _table(sources: Sources, parts: Mapping[str | None, Mapping[str, Sequence[SweepPoint]]]) -> Table:
    rows = [
        [
            "all experts" if metric == BASELINE else metric,
            str(point.keep),
            bytes_text(point.n_bytes),
            "all" if domain is None else domain,
            f"{number(point.perplexity, 5)} ± {number(point.stderr, 2)}",
            "–" if point.spread is None else f"{number(point.spread[0])} to {number(point.spread[1])}",
            "–" if metric == BASELINE else f"{point.rise:+.2%} ± {percent(point.rise_error, 2)}",
            "–" if metric == BASELINE else number(point.kl_mean, 3),
            "–" if metric == BASELINE else percent(point.top1, 1),
        ]
        for domain, points in parts.items()
        for metric, group in points.items()
        for point in reversed(group)
    ]
    if sources.judged is not None:
        it = sources.judged
        size = "–" if sources.size is None else bytes_text(sources.size.n_bytes_after)
        name = f"{sources.plan.metric}, the file itself"
        perplexity, rise = f"{number(it.perplexity, 5)} ± {number(it.stderr, 2)}", _rise_text(it.rise, it.rise_error)
        rows.append([name, str(sources.plan.keep), size, "no part in the choice", perplexity, "–", rise, "–", "–"])
    columns = [
        "criterion", "experts", "size", "text", "perplexity", "over the seeds", "rise over all experts",
        "mean KL divergence", "top-1 agreement",
    ]  # fmt: skip
    return Table(columns, rows)
