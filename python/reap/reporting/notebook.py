"""plot(): one figure of a profile, for notebooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reap.errors import UsageError
from reap.reporting import plots
from reap.scores.plan import PrunePlan
from reap.scores.plan import plan as make_plan
from reap.scores.profile import Profile
from reap.scores.ranking import Keep
from reap.scores.statistics import Mask, kept_mask, known_metrics, mask_by, overlaps, require_plan_of

KINDS = ("heatmap", "distribution", "inequality", "load", "mass", "metrics", "domains")


def plot(
    profile: Profile,
    kind: str = "heatmap",
    *,
    metric: str = "reap",
    plan: PrunePlan | None = None,
    keep: Keep | None = None,
    scaling: str = "relative",
) -> Any:
    """A figure of the report as a plotly Figure, for notebooks: it shows itself, and has `write_html` and
    `write_image`.

    Args:
        kind: "heatmap": layers × experts · "distribution": quartiles of the score by layer, and the cut · "inequality":
            Gini, gap at the cut · "load" · "mass": kept share of Σ g·‖f‖ against chance · "metrics", "domains": overlap
            of what each would keep.
        plan: what stays (a PrunePlan of this profile); or `keep`, for what `reap.plan` would choose by `metric`;
            "mass", "metrics" and "domains" need one of the two.
        scaling: of the heat map: "relative" to the layer's median (log), "value", or "rank" in the layer.

    Raises:
        UsageError: another word.
        MismatchError: a plan of another model.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind of plot {kind!r}; known: {', '.join(KINDS)}")
    if scaling not in plots.SCALINGS:
        raise UsageError(f"unknown scaling {scaling!r}; known: {', '.join(plots.SCALINGS)}")
    if plan is not None and keep is not None:
        raise UsageError("give either a plan or how many experts to keep")
    if plan is not None:
        require_plan_of(profile, plan)
    made = make_plan(profile, keep=keep, metric=metric) if keep is not None else plan
    mask = None if made is None else kept_mask(profile, made.layers)
    figure = _DRAW[kind](profile, metric, mask, scaling)
    return figure.update_layout(template="plotly_white", paper_bgcolor=None, plot_bgcolor=None)


def _mass(profile: Profile, metric: str, mask: Mask | None, scaling: str) -> Any:
    return plots.mass(profile, _needed(mask, "mass"))


def _metrics(profile: Profile, metric: str, mask: Mask | None, scaling: str) -> Any:
    keep = int(_needed(mask, "metrics")[0].sum())
    names = [name for name in known_metrics(profile) if name != "random"]
    values = overlaps([mask_by(profile, name, keep) for name in names])
    return plots.matrix(names, values, keep / profile.n_experts, "of the kept experts in common")


def _domains(profile: Profile, metric: str, mask: Mask | None, scaling: str) -> Any:
    keep = int(_needed(mask, "domains")[0].sum())
    if not profile.domains:
        raise UsageError("the profile has no domains")
    values = overlaps([mask_by(profile.domain(name), metric, keep) for name in profile.domains])
    return plots.matrix(profile.domains, values, keep / profile.n_experts, "of the kept experts in common")


def _needed(mask: Mask | None, kind: str) -> Mask:
    if mask is None:
        raise UsageError(f"the plot {kind!r} needs a plan, or how many experts to keep")
    return mask


_DRAW: dict[str, Callable[[Profile, str, Mask | None, str], Any]] = {
    "heatmap": lambda profile, metric, mask, scaling: plots.heatmap(profile, metric, mask, scaling=scaling),
    "distribution": lambda profile, metric, mask, scaling: plots.distribution(profile, metric, mask),
    "inequality": lambda profile, metric, mask, scaling: plots.inequality(profile, metric, mask),
    "load": lambda profile, metric, mask, scaling: plots.load(profile),
    "mass": _mass,
    "metrics": _metrics,
    "domains": _domains,
}
