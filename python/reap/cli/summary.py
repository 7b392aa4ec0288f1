"""What profile, plan and inspect say at their end: the figures that answer most questions, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reap.files.formatting import bytes_text
from reap.reporting.gpu_fit import describe_fit

if TYPE_CHECKING:
    import numpy as np

    from reap.gguf.model_info import ModelInfo
    from reap.scores.plan import PrunePlan
    from reap.scores.profile import Profile
    from reap.scores.records import Floats

Facts = list[tuple[str, object]]
_MOST_NAMED = 5


def profile_facts(profile: Profile) -> Facts:
    """Load, inequality, rarely seen experts, super experts, and what half of the experts would keep."""
    from reap.scores.plan import super_experts
    from reap.scores.statistics import FEW_TOKENS, busiest_share, effective_experts, gini, mean_of

    counts = profile.counts
    load = gini(counts)
    few = int(((counts > 0) & (counts < FEW_TOKENS)).sum())
    found = super_experts(profile) if profile.trusted else None
    named = ", ".join(
        f"{item.layer}:{item.expert} ({item.ratio:.0f} times the median norm)" for item in (found or ())[:_MOST_NAMED]
    )
    return [
        ("never routed to", _never_text(profile)),
        (
            "rarely routed to",
            f"{few:,} of them, with fewer than {FEW_TOKENS} tokens: their means say little" if few else None,
        ),
        (
            "load",
            (
                f"Gini {_range_text(load, profile, '.2f')}; {mean_of(effective_experts(counts)):.3g} of"
                f" {profile.n_experts} experts effectively in use, the busiest tenth gets"
                f" {mean_of(busiest_share(counts)):.0%}"
            ),
        ),
        ("scores", f"Gini of reap {_range_text(gini(profile.score()), profile, '.2f')}"),
        ("super experts", None if found is None else named + _more(len(found)) or "none found"),
        ("half by reap", _half_text(profile)),
        ("how sure", _stability_text(profile)),
    ]


def until_text(calibration: Mapping[str, Any]) -> str | None:
    """What became of --until."""
    until = calibration.get("until")
    if not isinstance(until, dict):
        return None
    asked = f"{until['overlap']:.1%} asked for by {until['metric']} at {until['keep']} kept"
    if until["found"] is None:
        return f"with the calibration, which is too short to be judged ({asked})"
    if until["reached"]:
        return f"early: at {until['found']:.1%} ({asked}), after {calibration.get('samples', 0):,} samples"
    return f"with the calibration, at {until['found']:.1%} ({asked})"


def _stability_text(profile: Profile) -> str | None:
    """What `Profile.stability` says of half of the experts, or of what --until was given."""
    from reap.scores.stability import TooFewPartsError
    from reap.scores.statistics import plan_of_half

    until = profile.calibration.get("until")
    asked = until if isinstance(until, dict) else {}
    keep, metric = asked.get("keep", plan_of_half(profile).keep), asked.get("metric", "reap")
    if profile.replicates is None or keep >= profile.n_experts:
        return None
    try:
        found = profile.stability(keep, metric)
    except TooFewPartsError as error:
        return f"not known: {error}"
    spread = ""
    if profile.n_layers > 1:
        (low, worst), (high, best) = found.lowest, found.highest
        spread = f" ({low:.0%} in layer {worst} to {high:.0%} in layer {best})"
    worst_first = sorted((part.overlap, name) for name, part in found.domains.items())
    domains = ", ".join(f"{name} {overlap:.0%}" for overlap, name in worst_first[: 2 * _MOST_NAMED])
    return (
        f"of the {keep} experts that {metric} keeps, another profile of as much text would keep {found.overlap:.1%}"
        + spread
        + (f"; of each domain's own choice: {domains}" if domains else "")
    )


def _more(count: int) -> str:
    return f" and {count - _MOST_NAMED} more" if count > _MOST_NAMED else ""


def _never_text(profile: Profile) -> str:
    never = profile.never_routed.sum(axis=1)
    total = f"{int(never.sum()):,} of {profile.counts.size:,} experts"
    if not never.any():
        return total
    worst = [
        f"{int(never[row])} in layer {int(profile.layers[row])}"
        for row in (-never).argsort(kind="stable")[:3]
        if never[row]
    ]
    return f"{total}; most: {', '.join(worst)}"


def _half_text(profile: Profile) -> str | None:
    from reap.scores.statistics import plan_of_half

    half = plan_of_half(profile)
    return (
        f"{half.keep} of {profile.n_experts} experts would keep {kept_text(profile, half)}"
        if half.keep < profile.n_experts
        else None
    )


def kept_text(profile: Profile, plan: PrunePlan) -> str:
    """Share of Σ g·‖f‖ that a plan keeps, against chance."""
    from reap.scores.statistics import kept_mask, kept_share, mean_of, random_share

    kept = kept_share(profile.gated_norm_sum, kept_mask(profile, plan.layers))
    mean, deviation = random_share(profile.gated_norm_sum, plan.keep, profile.n_groups)
    return f"{_range_text(kept, profile, '.0%')} of Σ g·‖f‖; at random {mean_of(mean):.0%} ± {mean_of(deviation):.0%}"


def plan_facts(profile: Profile, plan: PrunePlan) -> Facts:
    """What the plan keeps against chance, in all, by stretch of layers and by domain; the gap at the cut."""
    from reap.scores.statistics import find_cut, kept_mask, kept_share, known_metrics, mean_of

    if plan.keep == profile.n_experts:
        return []
    mask = kept_mask(profile, plan.layers)
    kept = kept_share(profile.gated_norm_sum, mask)
    facts: Facts = [("keeps of the mass", kept_text(profile, plan)), ("by layers", _stretches(kept, profile.layers))]
    if plan.metric in known_metrics(profile) and plan.metric != "random":
        gap = find_cut(profile.score(plan.metric), mask).gap
        facts.append(
            (
                "gap at the cut",
                f"{_range_text(gap, profile, '.1%')} of the lowest kept score; near 0 the choice there is arbitrary",
            )
        )
    shares = {name: mean_of(kept_share(part.gated_norm_sum, mask)) for name, part in profile.parts.items()}
    if len(shares) > 1:
        worst_first = sorted(shares.items(), key=lambda item: item[1])
        facts.append(("by domain", ", ".join(f"{name} {share:.0%}" for name, share in worst_first[: 2 * _MOST_NAMED])))
    return facts


def plan_figures(profile: Profile, plan: PrunePlan) -> dict[str, object]:
    """The same for --json: the kept share of Σ g·‖f‖ by layer, and what a blind choice keeps on average."""
    from reap.scores.statistics import kept_mask, kept_share, mean_of, random_share

    kept = kept_share(profile.gated_norm_sum, kept_mask(profile, plan.layers))
    blind = mean_of(random_share(profile.gated_norm_sum, plan.keep, profile.n_groups)[0])
    by_layer = {str(layer): float(share) for layer, share in zip(profile.layers.tolist(), kept, strict=True)}
    return {"kept_share": mean_of(kept), "kept_share_at_random": blind, "kept_share_by_layer": by_layer}


def _stretches(values: Floats, layers: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> str | None:
    """Means over up to four stretches of neighbouring layers."""
    import numpy as np

    if len(layers) < 2:
        return None
    parts = np.array_split(np.arange(len(layers)), min(4, len(layers)))
    names = [f"{layers[part[0]]}" if len(part) == 1 else f"{layers[part[0]]}-{layers[part[-1]]}" for part in parts]
    return ", ".join(
        f"{name}: {np.nanmean(values[part]):.0%}"
        for name, part in zip(names, parts, strict=True)
        if np.isfinite(values[part]).any()
    )


def _range_text(values: Floats, profile: Profile, form: str) -> str:
    """0.48 (0.43 in layer 3 to 0.56 in layer 0)."""
    from reap.scores.statistics import highest_of, lowest_of, mean_of

    low, high = lowest_of(values, profile.layers), highest_of(values, profile.layers)
    if low is None or high is None:
        return "not defined"
    if len(profile.layers) == 1:
        return format(low[0], form)
    return f"{mean_of(values):{form}} ({low[0]:{form}} in layer {low[1]} to {high[0]:{form}} in layer {high[1]})"


def engine_facts(n_experts: int, n_groups: int) -> Facts:
    """In which engines so many experts run slower or fail, and how they divide among GPUs."""
    from reap.scores.engine_counts import kernel_notes, parallel_text

    notes = kernel_notes(n_experts, n_groups)
    facts: Facts = [(f"{n_experts} experts", note) for note in notes]
    return [*facts, ("expert parallel", parallel_text(n_experts))]


def fit_facts(info: ModelInfo) -> Facts:
    """Which memory the weights fit into, whole and with fewer experts."""
    facts: Facts = [("fits in", describe_fit(info.n_bytes))]
    if not info.is_moe or info.refusals:
        return facts
    for part, name in ((0.75, "with 75 %"), (0.5, "with half")):
        keep = round(info.n_experts * part)
        if info.n_experts_used <= keep < info.n_experts and keep % info.n_groups == 0:
            n_bytes = info.n_bytes - info.bytes_per_expert * (info.n_experts - keep)
            facts.append((name, f"{keep} experts: {bytes_text(n_bytes)}; {describe_fit(n_bytes)}"))
    return facts + engine_facts(info.n_experts, info.n_groups)
