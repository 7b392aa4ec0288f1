"""Sections of the page about the experts: the map, one layer, and what holds layer by layer."""

from __future__ import annotations

import numpy as np

from reap.files.formatting import number_text as number
from reap.files.formatting import percent_text as percent
from reap.reporting import plots
from reap.reporting.page import Section, Table
from reap.reporting.report_sources import Sources
from reap.scores.statistics import (
    FEW_TOKENS,
    best_share,
    busiest_share,
    effective_experts,
    find_cut,
    gini,
    kept_share,
    lowest_of,
    mean_of,
    random_share,
)


def experts(sources: Sources) -> Section:
    struck = " A line through a cell means that the expert is removed." if sources.removes else ""
    alt = (
        f"Heat map of {sources.profile.n_layers} layers and {sources.profile.n_experts} experts, coloured by the"
        f" chosen metric; brighter is higher, grey is not defined.{struck}"
    )
    lead = (
        "Every expert of every layer. Scores compare experts of one layer; between layers the sizes of outputs"
        " differ, so the colour is relative."
    )
    return Section("experts", "Experts", lead, "experts", alt)


def layer(sources: Sources) -> Section:
    lead = (
        "A steep fall means that few experts matter; a flat line that the choice hardly does. A click on the map"
        " chooses the layer."
    )
    alt = "The experts of one layer in the order of the metric chosen above" + (
        ", kept ones as dots, removed ones as crosses." if sources.removes else "."
    )
    return Section("layer", "One layer", lead, "layer", alt, continues=True)


def distribution(sources: Sources) -> Section:
    score, cut = sources.profile.score(sources.metric), find_cut(sources.profile.score(sources.metric), sources.mask)
    quartiles = np.array(
        [
            np.nanquantile(row, [0, 0.25, 0.5, 0.75, 1]) if np.isfinite(row).any() else np.full(5, np.nan)
            for row in score
        ]
    )
    columns = ["layer", "lowest", "quarter", "median", "three quarters", "highest"]
    rows = [[layer, *map(number, values)] for layer, values in zip(sources.layers, quartiles.tolist(), strict=True)]
    if sources.removes:
        columns += ["lowest kept", "highest removed"]
        for row, kept, removed in zip(rows, cut.lowest_kept.tolist(), cut.highest_removed.tolist(), strict=True):
            row += [number(kept), number(removed)]
    lead = f"How {sources.metric} is spread in each layer" + (", and where the plan cuts." if sources.removes else ".")
    alt = f"Boxes of {sources.metric} by layer" + (
        ", with the lowest kept and the highest removed score marked as triangles." if sources.removes else "."
    )
    figure = plots.distribution(sources.profile, sources.metric, sources.mask)
    return Section("distribution", "Scores", lead, figure, alt, Table(columns, rows))


def inequality(sources: Sources) -> Section:
    score = sources.profile.score(sources.metric)
    columns, values = (
        ["layer", f"Gini of {sources.metric}", "Gini of the load"],
        [gini(score), gini(sources.profile.counts)],
    )
    if sources.removes:
        columns.append("gap at the cut")
        values.append(find_cut(score, sources.mask).gap)
    rows = [[layer, *(number(column[index], 3) for column in values)] for index, layer in enumerate(sources.layers)]
    alt = (
        f"Mean Gini of {sources.metric}: {number(mean_of(values[0]), 2)}; of the load: {number(mean_of(values[1]), 2)}"
    )
    alt += (
        f"; mean gap at the cut: {percent(mean_of(values[2]), 1)} of the lowest kept score." if sources.removes else "."
    )
    lead = (
        "Gini 0: all experts alike; near 1: few have nearly all. The gap says how far the score falls at the cut: "
        "near 0 the experts on "
        "either side are interchangeable, below 0 something else than this score chose as well."
    )
    figure = plots.inequality(sources.profile, sources.metric, sources.mask)
    return Section("inequality", "Gini and gap", lead, figure, alt, Table(columns, rows), continues=True)


def load(sources: Sources) -> Section:
    profile = sources.profile
    effective, busiest, never = (
        effective_experts(profile.counts),
        busiest_share(profile.counts),
        profile.never_routed.sum(axis=1),
    )
    seen = np.median(profile.counts, axis=1)
    rows = [
        [
            layer,
            f"{int(profile.total_tokens[i]):,}",
            number(effective[i], 3),
            percent(busiest[i], 1),
            str(never[i]),
            f"{seen[i]:,.0f}",
        ]
        for i, layer in enumerate(sources.layers)
    ]
    few = int(((profile.counts > 0) & (profile.counts < FEW_TOKENS)).sum())
    notes = (
        [
            f"{few:,} experts were seen with fewer than {FEW_TOKENS} tokens: their means say little, and more"
            " calibration text would."
        ]
        if few
        else []
    )
    lead = (
        "Effective experts is the exponential of the load's entropy: as many as would be in use if all were used alike."
    )
    mean = mean_of(effective)
    alt = (
        f"On average {number(mean, 3)} of {profile.n_experts} experts are effectively in use, and the busiest tenth"
        f" gets {percent(mean_of(busiest))} of the routings."
    )
    columns = [
        "layer",
        "tokens",
        "effective experts",
        "busiest tenth gets",
        "never routed to",
        "tokens of the median expert",
    ]
    return Section("load", "Load", lead, plots.load(profile), alt, Table(columns, rows), notes)


def kept_mass(sources: Sources) -> Section:
    profile, keep = sources.profile, sources.plan.keep
    total = profile.gated_norm_sum
    kept, best = kept_share(total, sources.mask), best_share(total, keep, profile.n_groups)
    mean, deviation = random_share(total, keep, profile.n_groups)
    routed = kept_share(profile.counts.astype(np.float64), sources.mask)
    rows = [
        [
            layer,
            percent(kept[i], 1),
            f"{percent(mean[i], 1)} ± {percent(deviation[i], 1)}",
            percent(best[i], 1),
            percent(routed[i], 1),
        ]
        for i, layer in enumerate(sources.layers)
    ]
    low = lowest_of(kept, profile.layers)
    where = f"; the least in layer {low[1]}, {percent(low[0])}" if low else ""
    alt = (
        f"The plan keeps {percent(mean_of(kept))} of Σ g·‖f‖ on average{where}. A blind choice would keep"
        f" {percent(mean_of(mean))}."
    )
    lead = (
        "What the kept experts contributed on the calibration text, of all that was contributed. It says how much"
        " is touched, not how much worse the model gets: the router sends the removed experts' tokens to others."
    )
    columns = [
        "layer",
        "kept of Σ g·‖f‖",
        "at random (± standard deviation)",
        "the most possible",
        "kept of the routings",
    ]
    return Section("mass", "Kept mass", lead, plots.mass(profile, sources.mask), alt, Table(columns, rows))
