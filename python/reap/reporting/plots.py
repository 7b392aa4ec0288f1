"""The figures: arrays of a profile -> plotly figures, for the page and for notebooks.

Marks, dashes and words carry what colours say, so that no figure needs colour vision. Colours have a contrast of 3:1
and more with a white and with a dark ground; text, grid and ground are the page's.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped]
from numpy.typing import NDArray

from reap.pruning.sizing import ModelSize
from reap.reporting.gpu_fit import GIB, MEMORY_GB
from reap.reporting.sweep_points import SweepPoint
from reap.scores.profile import Profile
from reap.scores.ranking import order_experts
from reap.scores.records import Floats
from reap.scores.stability import Stability
from reap.scores.statistics import (
    Mask,
    best_share,
    busiest_share,
    effective_experts,
    find_cut,
    gini,
    kept_share,
    random_share,
)

BLUE, ORANGE, GREEN, GREY, PURPLE = "#2f86c7", "#cf6a1e", "#1f9474", "#878e97", "#a868b0"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, "#b8860b", "#d0557f", "#4c9aa8", GREY)
MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
PATTERNS = ("", "/", "x", ".", "-", "\\", "+", "|")
SCALE = "Cividis"  # perceptually uniform, and made for colour-blind readers
SCALINGS = ("relative", "value", "rank")
HEIGHT = 380


def figure(*traces: Any, **layout: Any) -> Any:
    """A figure in the manner of the page: a small margin, the legend above, the ground left to the page around it.

    A trace without a number is left out, and so is its entry of the legend.
    """
    made = go.Figure(data=[trace for trace in traces if _has_data(trace)])
    made.update_layout(
        template="none",
        height=layout.pop("height", HEIGHT),
        margin=dict(l=64, r=16, t=28, b=48),
        legend=dict(orientation="h", x=0, y=1.02, xanchor="left", yanchor="bottom"),
        hovermode=layout.pop("hovermode", "closest"),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        **layout,
    )
    return made


def _has_data(trace: Any) -> bool:
    if not isinstance(trace, go.Scatter | go.Bar) or trace.orientation == "h":
        return True
    values = [value for value in (() if trace.y is None else trace.y) if value is not None]
    return any(isinstance(value, str) or np.isfinite(value) for value in values)


def safe(text: object) -> str:
    """A stranger's text in a label, where plotly would read tags."""
    return html.escape(str(text), quote=False)


def line(x: Sequence[Any], y: Any, name: str, index: int, **options: Any) -> Any:
    """A line with its own colour, mark and dash, so that any one of the three tells it apart."""
    colour = options.pop("colour", SERIES[index % len(SERIES)])
    return go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines+markers",
        line=dict(color=colour, dash=DASHES[index % len(DASHES)], width=2),
        marker=dict(symbol=MARKS[index % len(MARKS)], size=7, color=colour),
        **options,
    )


def layer_axis(profile: Profile) -> dict[str, Any]:
    layers = profile.layers.tolist()
    ticks = layers[:: 1 + len(layers) // 24]
    return dict(
        title="layer",
        tickvals=ticks,
        ticktext=[str(layer) for layer in ticks],
        range=[layers[0] - 0.6, layers[-1] + 0.6],
    )


# ---- layer × expert


def heatmap(profile: Profile, metric: str, mask: Mask | None, *, scaling: str = "relative") -> Any:
    """Every expert of every layer; those that the plan removes are struck out."""
    score = profile.score(metric)
    order = np.argsort(
        np.stack([order_experts(score[row], profile.counts[row]) for row in range(profile.n_layers)]), axis=1
    )
    fate = np.full(score.shape, "", dtype=object) if mask is None else np.where(mask, "kept", "removed")
    z, title, ticks = scaled(score, order, scaling)
    low, high = _range(z)
    trace = go.Heatmap(
        z=z,
        colorscale=SCALE,
        zmin=low,
        zmax=high,
        colorbar=dict(title=dict(text=title, side="right"), thickness=14, **ticks),
        customdata=np.dstack(
            [
                score.astype(object),
                order.astype(object) + 1,
                fate,
                np.broadcast_to(profile.layers[:, None], score.shape),
            ]
        ),
        hovertemplate=(
            f"layer %{{customdata[3]}}, expert %{{x}}<br>{metric} %{{customdata[0]:.4g}}, rank %{{customdata[1]}} of"
            f" {profile.n_experts}<br>%{{customdata[2]}}<extra></extra>"
        ),
        hoverongaps=False,
    )
    rows = list(range(profile.n_layers))
    made = figure(
        trace,
        height=max(260, min(900, 90 + 13 * profile.n_layers)) if profile.n_layers > 12 else 110 + 44 * profile.n_layers,
        xaxis=dict(title="expert", showgrid=False, zeroline=False, constrain="domain"),
        yaxis=dict(
            title="layer", autorange="reversed", showgrid=False, zeroline=False, tickvals=rows[:: 1 + len(rows) // 24],
            ticktext=[str(layer) for layer in profile.layers.tolist()][:: 1 + len(rows) // 24],
        ),
    )  # fmt: skip
    if mask is not None and not mask.all():
        path = strike_path(~mask)
        made.update_layout(shapes=[_strike(path, "#10151c", 2.6), _strike(path, "#ffffff", 1.2)])
    return made


def scaled(score: Floats, order: NDArray[np.int64], scaling: str) -> tuple[Floats, str, dict[str, Any]]:
    """(what is drawn, its name, ticks of the colour bar); what is undefined or, on a log scale, 0 is NaN."""
    if scaling == "rank":
        return (order + 1).astype(np.float64), "rank in the layer (1 is best)", {}
    if scaling == "value":
        return score, "value", {}
    with np.errstate(divide="ignore", invalid="ignore"):
        positive = np.where(score > 0, score, np.nan)
        medians = [np.median(row[row > 0]) if (row > 0).any() else np.nan for row in score]
        z = np.log2(positive / np.array(medians)[:, None])
    steps = list(range(-6, 7))
    texts = [f"1/{2**-step}" if step < 0 else str(2**step) for step in steps]
    return z, "times the layer's median", dict(tickvals=steps, ticktext=texts)


def _range(z: Floats) -> tuple[float | None, float | None]:
    """All but the outermost hundredth at each end, so that one outlier does not flatten the rest."""
    known = z[np.isfinite(z)]
    if not known.size:
        return None, None
    low, high = (float(value) for value in np.quantile(known, [0.01, 0.99]))
    return (low, high) if high > low else (float(known.min()), float(known.max()) + 1e-9)


def strike_path(removed: Mask) -> str:
    """An SVG path in axis units: a line through each run of removed cells of a row."""
    parts = []
    for row, cells in enumerate(removed):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], cells, [False]]).astype(np.int8)))
        parts += [
            f"M{start - 0.42:g},{row}H{end - 0.58:g}"
            for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
        ]
    return "".join(parts)


def _strike(path: str, colour: str, width: float) -> dict[str, Any]:
    return dict(type="path", path=path, xref="x", yref="y", line=dict(color=colour, width=width), layer="above")


# ---- by layer


def distribution(profile: Profile, metric: str, mask: Mask | None) -> Any:
    """Quartiles of the score in each layer, its extremes, and the cut between the lowest kept and the highest
    removed."""
    score = profile.score(metric)
    known = [row[~np.isnan(row)] if (~np.isnan(row)).any() else np.array([np.nan]) for row in score]
    quantiles = np.array([np.quantile(row, [0, 0.25, 0.5, 0.75, 1]) for row in known])
    x = profile.layers.tolist()
    boxes = go.Box(
        x=x, lowerfence=quantiles[:, 0], q1=quantiles[:, 1], median=quantiles[:, 2], q3=quantiles[:, 3],
        upperfence=quantiles[:, 4],
        name="all experts: extremes, quartiles, median", line=dict(color=GREY, width=1.2),
        fillcolor="rgba(135,142,151,0.25)",
    )  # fmt: skip
    traces = [boxes]
    if mask is not None and not mask.all():
        cut = find_cut(score, mask)
        traces += [
            go.Scatter(x=x, y=cut.lowest_kept, name="lowest kept", mode="markers", marker=dict(symbol="triangle-up",
            size=9, color=BLUE)),
            go.Scatter(
                x=x, y=cut.highest_removed, name="highest removed", mode="markers",
                marker=dict(symbol="triangle-down-open", size=9, color=ORANGE, line=dict(width=2)),
            ),
        ]  # fmt: skip
    positive = score[score > 0]
    is_wide = positive.size and positive.max() > 30 * np.median(positive)
    return figure(*traces, xaxis=layer_axis(profile), yaxis=dict(title=metric, type="log" if is_wide else "linear"))


def inequality(profile: Profile, metric: str, mask: Mask | None) -> Any:
    """Gini of the score and of the load, and the gap at the cut, by layer."""
    x = profile.layers.tolist()
    score = profile.score(metric)
    traces = [
        line(x, gini(score), f"Gini of {metric}", 0),
        line(x, gini(profile.counts), "Gini of the load", 1),
    ]
    if mask is not None and not mask.all():
        traces.append(line(x, find_cut(score, mask).gap, "gap at the cut, of the lowest kept", 2))
    return figure(
        *traces, xaxis=layer_axis(profile), yaxis=dict(title="0 is equal", rangemode="tozero"), hovermode="x unified"
    )


def load(profile: Profile) -> Any:
    """How evenly tokens are spread over experts, by layer."""
    x = profile.layers.tolist()
    traces = [
        line(x, effective_experts(profile.counts) / profile.n_experts, "effective experts, of all", 0),
        line(x, busiest_share(profile.counts), "routings that the busiest tenth gets", 1),
    ]
    if profile.never_routed.any():
        pattern = dict(shape="/", fgcolor=GREY, bgcolor="rgba(0,0,0,0)", fillmode="overlay")
        bars = dict(name="experts never routed to", marker=dict(color=GREY, pattern=pattern))
        traces.append(go.Bar(x=x, y=profile.never_routed.mean(axis=1), **bars))
    return figure(
        *traces,
        xaxis=layer_axis(profile),
        yaxis=dict(title="share", tickformat=".0%", rangemode="tozero"),
        hovermode="x unified",
    )


def mass(profile: Profile, mask: Mask) -> Any:
    """What the kept experts contributed (Σ g·‖f‖), against the best choice and against a blind one, by layer."""
    keep = int(mask[0].sum())
    total = profile.gated_norm_sum
    x = profile.layers.tolist()
    mean, deviation = random_share(total, keep, profile.n_groups)
    band = go.Scatter(
        x=[*x, *reversed(x)], y=np.concatenate([mean + 2 * deviation, (mean - 2 * deviation)[::-1]]), fill="toself",
        mode="lines",
        fillcolor="rgba(135,142,151,0.22)", line=dict(width=0), hoverinfo="skip",
        name="at random: mean ± 2 standard deviations",
    )  # fmt: skip
    traces = [
        band,
        line(x, mean, "at random", 2, colour=GREY, showlegend=False),
        line(x, best_share(total, keep, profile.n_groups), "the most that as many experts hold", 1, opacity=0.8),
        line(x, kept_share(total, mask), "kept of Σ g·‖f‖", 0),
        line(x, kept_share(profile.counts.astype(np.float64), mask), "kept of the routings", 3),
    ]
    return figure(
        *traces, xaxis=layer_axis(profile), yaxis=dict(title="share kept", tickformat=".0%"), hovermode="x unified"
    )


def stability(profile: Profile, found: Mapping[str, Stability]) -> Any:
    """The overlap that another profile of as much text would have, by layer; of all text and of each domain."""
    traces = [
        line(list(part.layers), list(part.layers.values()), safe(name), index, opacity=0.7 if index else 1)
        for index, (name, part) in enumerate(found.items())
    ]
    axis = dict(title="kept by another profile as well", tickformat=".0%", rangemode="normal")
    return figure(*traces, xaxis=layer_axis(profile), yaxis=axis, hovermode="x unified")


# ---- agreement


def matrix(names: Sequence[str], values: Floats, chance: float, what: str) -> Any:
    """A square table as a heat map with its numbers written in."""
    labels = [safe(name if len(name) <= 24 else name[:23] + "…") for name in names]
    text = [[f"{value:.0%}" for value in row] for row in values]
    trace = go.Heatmap(
        z=values, x=labels, y=labels, text=text, texttemplate="%{text}", colorscale=SCALE,
        zmin=min(chance, float(np.nanmin(values))), zmax=1,
        hovertemplate=f"%{{y}} and %{{x}}: %{{text}} {what}<extra></extra>", colorbar=dict(tickformat=".0%",
        thickness=14),
    )  # fmt: skip
    return figure(
        trace,
        height=max(260, 120 + 34 * len(names)),
        yaxis=dict(autorange="reversed", type="category", showgrid=False),
        xaxis=dict(type="category", showgrid=False),
    ).update_layout(margin=dict(l=80, b=40, t=30))


# ---- sizes and quality


def cost_curve(
    whole: Mapping[str, Sequence[SweepPoint]],
    domains: Mapping[str, Mapping[str, Sequence[SweepPoint]]],
    base: SweepPoint,
    own: SweepPoint | None,
) -> Any:
    """Rise of the perplexity against size: a line for each criterion on the whole text, from the model as it is; its
    domains as small marks; the plan in a ring."""
    largest = max(point.n_bytes for group in (*whole.values(), [base]) for point in group)
    unit, name = _unit(largest)
    traces = []
    for index, (metric, group) in enumerate(whole.items()):
        parts = [(domain, it) for domain, found in domains.items() for it in found.get(metric, ())]
        traces += [_cost_line(metric, [*group, base], unit, index), _cost_marks(metric, parts, unit, index)]
    star = dict(symbol="star", size=14, color=GREY, line=dict(width=1, color=GREY))
    traces.append(go.Scatter(
        x=[base.n_bytes / unit], y=[1.0], name="all experts", mode="markers", marker=star,
        hovertemplate=f"all {base.keep} experts: perplexity {base.perplexity:.4g}<extra></extra>",
    ))  # fmt: skip
    if own is not None:
        ring = dict(symbol="circle-open", size=20, color=GREY, line=dict(width=2.5))
        traces.append(go.Scatter(
            x=[own.n_bytes / unit], y=[1 + own.rise], name="the plan", mode="markers", marker=ring, hoverinfo="skip",
        ))  # fmt: skip
    shown = [1 + point.rise for group in whole.values() for point in group]
    shown += [1 + point.rise for found in domains.values() for group in found.values() for point in group]
    values, texts = rise_ticks(min([1.0, *shown]), max([1.0, *shown]))
    axis = dict(title="perplexity rises by", type="log", tickvals=values, ticktext=texts)
    return figure(*traces, height=360, xaxis=dict(title=f"size of the file ({name})"), yaxis=axis)


def _cost_line(metric: str, group: Sequence[SweepPoint], unit: int, index: int) -> Any:
    """A criterion on the whole text; the last point, the model as it is, has no error."""
    ratios = [1 + point.rise for point in group]
    plus = [_above(point) for point in group[:-1]] + [0.0]
    minus = [_below(point) for point in group[:-1]] + [0.0]
    error = dict(type="data", array=plus, arrayminus=minus, symmetric=False, thickness=1.2, width=5)
    texts = [f"{point.rise:+.1%} ± {np.nan_to_num(point.rise_error):.1%}" for point in group]
    return line(
        [point.n_bytes / unit for point in group], ratios, safe(metric), index, error_y=error, legendgroup=metric,
        customdata=[[point.keep, text] for point, text in zip(group, texts, strict=True)],
        hovertemplate="%{customdata[0]} experts: %{customdata[1]}",
    )  # fmt: skip


def _cost_marks(metric: str, parts: Sequence[tuple[str, SweepPoint]], unit: int, index: int) -> Any:
    """The same criterion on each domain."""
    colour, mark = SERIES[index % len(SERIES)], MARKS[index % len(MARKS)]
    return go.Scatter(
        x=[point.n_bytes / unit for _, point in parts], y=[1 + point.rise for _, point in parts], mode="markers",
        name=safe(metric), legendgroup=metric, showlegend=False,
        marker=dict(symbol=f"{mark}-open", size=6, color=colour, line=dict(width=1.2)),
        customdata=[[point.keep, safe(domain), f"{point.rise:+.1%}"] for domain, point in parts],
        hovertemplate="%{customdata[0]} experts, %{customdata[1]}: %{customdata[2]}",
    )  # fmt: skip


def _above(point: SweepPoint) -> float:
    """Up to where the bar of a ratio goes: its standard error, or the highest of several seeds."""
    if point.spread is not None:
        return (1 + point.rise) * (point.spread[1] / point.perplexity - 1)
    return float(np.nan_to_num(point.rise_error))


def _below(point: SweepPoint) -> float:
    if point.spread is not None:
        return (1 + point.rise) * (1 - point.spread[0] / point.perplexity)
    return float(np.nan_to_num(point.rise_error))


_RISES = (-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100, 1000)


def rise_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """(ratios, their texts in per cent) for a logarithmic axis from `low` to `high`; 0 % is always one."""
    span = np.log(high / low)
    apart = max(span / 9, 1e-6)
    chosen = [0.0]
    for rise in sorted(_RISES, key=abs, reverse=True):
        within = np.log(low) - span / 20 <= np.log1p(rise) <= np.log(high) + span / 20
        if within and all(abs(np.log((1 + rise) / (1 + other))) >= apart for other in chosen):
            chosen.append(rise)
    return [1 + rise for rise in sorted(chosen)], [f"{rise:+.0%}" if rise else "0%" for rise in sorted(chosen)]


def sizes(size: ModelSize) -> Any:
    """Bytes by kind of tensor, before and after, with the memories that lie within reach."""
    unit, name = _unit(size.n_bytes_before)
    traces = [
        go.Bar(
            y=["after", "before"], x=[item.n_bytes_after / unit, item.n_bytes_before / unit], name=item.name,
            orientation="h",
            marker=dict(
                color=SERIES[index % len(SERIES)], line=dict(width=0.5, color="#ffffff"),
                pattern=dict(shape=PATTERNS[index % len(PATTERNS)], fgcolor="#ffffff", fgopacity=0.7, size=7,
                fillmode="overlay"),
            ),
            hovertemplate=f"%{{x:.4g}} {name}<extra>{item.name}</extra>",
        )
        for index, item in enumerate(size.classes)
        if item.n_bytes_before
    ]  # fmt: skip
    axis = dict(title=name, rangemode="tozero")
    made = figure(*traces, barmode="stack", height=290, xaxis=axis, yaxis=dict(type="category"))
    for gb in MEMORY_GB:
        if gb * GIB <= 1.15 * size.n_bytes_before:
            made.add_vline(
                x=gb * GIB / unit,
                line=dict(dash="dot", width=1.5, color=GREY),
                annotation_text=f"{gb} GB",
                annotation_position="top",
            )
    return made.update_layout(legend=dict(y=-0.3, yanchor="top", traceorder="normal"), margin=dict(t=28, b=80))


def _unit(n_bytes: int) -> tuple[int, str]:
    return (GIB, "GiB") if n_bytes >= GIB else (1 << 20, "MiB")
