"""comparison_report(): how far two profiles of one model agree, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped]

from reap.files.atomic import check_distinct, paths_of
from reap.files.formatting import number_text as number
from reap.files.formatting import percent_text as percent
from reap.files.paths import PathLike
from reap.reporting import plots
from reap.reporting.page import Page, Section, Table, packed, write_page
from reap.scores.comparing import Comparison, compare
from reap.scores.profile import Profile
from reap.scores.ranking import Keep
from reap.scores.records import Floats
from reap.scores.statistics import Mask, mask_by, mean_of

_BINS = 32


def comparison_report(
    a: Profile | PathLike,
    b: Profile | PathLike,
    output: PathLike,
    *,
    keep: Keep = 0.5,
    metric: str = "reap",
    seed: int = 0,
    allow_mismatch: bool = False,
    force: bool = False,
) -> Path:
    """Write one HTML file that shows how far two profiles of one model agree: the figures of `compare`. Returns its
    path; `allow_mismatch` is that of `compare`, `force` replaces an output that exists.

    Raises what `compare` raises, and OutputError.
    """
    check_distinct([output], paths_of(a, b))
    names = [item.model.get("name") or "profile" if isinstance(item, Profile) else Path(item).name for item in (a, b)]
    first, second = Profile.of(a), Profile.of(b)
    result = compare(first, second, keep=keep, metric=metric, seed=seed, allow_mismatch=allow_mismatch)
    masks = mask_by(first, metric, result.keep, seed), mask_by(second, metric, result.keep, seed)
    scores = first.score(metric, seed=seed), second.score(metric, seed=seed)
    chance = result.keep / first.n_experts
    facts = [
        (number(result.spearman, 3), "rank correlation of the scores, mean over the layers"),
        (percent(result.overlap), f"of the {result.keep} kept experts in common; by chance {percent(chance)}"),
        (number(result.jaccard, 3), "Jaccard: kept by both, of those kept by either"),
    ]
    sections = [
        _by_layer(first, result, chance),
        Section(
            "scatter", "One layer", "An expert is a point; on a rising curve both profiles rank alike.", "scatter",
            f"The {metric} of every expert of a layer in A and in B, marked by who keeps it.",
        ),
        _ranks_section(first, second, metric, scores),
        _provenance(names, first, second),
    ]  # fmt: skip
    warnings = [
        f"{label} was written by llama-expert-profile, whose counts and scores are not to be trusted: {name}"
        for label, name, profile in zip("AB", names, (first, second), strict=True)
        if not profile.trusted
    ]
    data = {"scatter": _scatter(first, metric, scores, masks)}
    subtitle = f"A is {names[0]}, B is {names[1]}; the better {result.keep} of {first.n_experts} experts by {metric}."
    write_page(Page("Two profiles compared", subtitle, facts, sections, warnings, data), output, force=force)
    return Path(output)


def _by_layer(profile: Profile, result: Comparison, chance: float) -> Section:
    x = [layer.layer for layer in result.layers]
    columns = [[getattr(layer, name) for layer in result.layers] for name in ("spearman", "overlap", "jaccard")]
    labels = ("rank correlation", f"overlap of {result.keep} kept", "Jaccard")
    traces = [
        plots.line(x, values, label, index) for index, (values, label) in enumerate(zip(columns, labels, strict=True))
    ]
    figure = plots.figure(
        *traces, xaxis=plots.layer_axis(profile), yaxis=dict(title="1 is full agreement"), hovermode="x unified"
    )
    figure.add_hline(
        y=chance,
        line=dict(dash="dot", color=plots.GREY),
        annotation_text="overlap by chance",
        annotation_position="bottom right",
    )
    rows = [[str(layer), *(number(values[index], 3) for values in columns)] for index, layer in enumerate(x)]
    lead = (
        "Of two halves of one calibration, low agreement means that it was too short; of two domains, that they need "
        "other experts. Experts near the "
        "cut change sides easily, so the overlap is below 1 where the correlation is high."
    )
    worst = min(result.layers, key=lambda layer: layer.overlap)
    alt = (
        f"Overlap {percent(result.overlap)} on average, least in layer {worst.layer} with {percent(worst.overlap)}; "
        f"rank correlation {number(result.spearman, 3)}."
    )
    return Section("layers", "By layer", lead, figure, alt, Table(["layer", *labels], rows))


def _ranks_section(a: Profile, b: Profile, metric: str, scores: tuple[Floats, Floats]) -> Section:
    places = [_places(score) for score in scores]
    counts, _, _ = np.histogram2d(
        places[1].ravel(), places[0].ravel(), bins=min(_BINS, a.n_experts), range=[[0, 1], [0, 1]]
    )
    trace = go.Heatmap(
        z=counts, colorscale=plots.SCALE, x0=0.5 / len(counts), dx=1 / len(counts), y0=0.5 / len(counts),
        dy=1 / len(counts),
        hovertemplate="place %{x:.0%} in A, %{y:.0%} in B: %{z} experts<extra></extra>",
        colorbar=dict(title="experts", thickness=14),
    )  # fmt: skip
    axes = {
        "xaxis": dict(title="place in A: 0 % lowest, 100 % best", tickformat=".0%"),
        "yaxis": dict(title="place in B", tickformat=".0%"),
    }
    alt = f"Where the experts of all layers stand by {metric}, in A and in B. On the diagonal both say the same."
    return Section("ranks", "All layers",
    "A bright diagonal is agreement; the experts that matter most are at its top right.",
                   plots.figure(trace, height=460, **axes), alt)  # fmt: skip


def _places(score: Floats) -> Floats:
    """float64 of the same shape: the place in the layer, between 0 for the lowest and 1 for the best."""
    known = np.where(np.isnan(score), -np.inf, score)
    place = np.argsort(np.argsort(known, axis=1, kind="stable"), axis=1, kind="stable")
    return np.asarray((place + 0.5) / score.shape[1], dtype=np.float64)


def _scatter(profile: Profile, metric: str, scores: tuple[Floats, Floats], masks: tuple[Mask, Mask]) -> dict[str, Any]:
    only_a, only_b = masks[0] & ~masks[1], masks[1] & ~masks[0]
    fates = np.where(masks[0] & masks[1], 0, np.where(only_a, 1, np.where(only_b, 2, 3))).astype(np.uint8)
    arrays = {"a": packed(np.nan_to_num(scores[0])), "b": packed(np.nan_to_num(scores[1])), "fates": packed(fates)}
    return {"layers": profile.layers.tolist(), "n_experts": profile.n_experts, "metric": metric, **arrays}


def _provenance(names: list[str], first: Profile, second: Profile) -> Section:
    columns = []
    for name, profile in zip(names, (first, second), strict=True):
        record = profile.calibration
        columns.append(
            [name, str(profile.model.get("name") or ""), str(profile.model.get("fingerprint") or ""),
             ", ".join(map(str, record.get("files") or ())),
             f""
             f"{record.get('tokens') or int(profile.total_tokens.max()):,}", ", ".join(profile.domains),
             f"{int(profile.never_routed.sum()):,}",
             number(mean_of(profile.counts.mean(axis=1)))]
        )  # fmt: skip
    labels = [
        "file",
        "model",
        "fingerprint",
        "calibration files",
        "tokens",
        "domains",
        "never routed to",
        "tokens of an expert, mean",
    ]
    rows = [[label, columns[0][index], columns[1][index]] for index, label in enumerate(labels)]
    return Section("provenance", "Provenance", "What was measured.", table=Table(["", "A", "B"], rows, is_words=True))
