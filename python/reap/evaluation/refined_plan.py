"""The plan that a search ends with, and what it records of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from reap.evaluation.hold_out import Verdict
from reap.evaluation.search import Search
from reap.scores.plan import PrunePlan
from reap.text.evaluation_text import EvaluationText
from reap.text.overlap import Sketch, merge_sketches


def refined_plan(
    plans: Mapping[str, PrunePlan],
    order: Sequence[str],
    search: Search,
    verdict: Verdict | None,
    text: EvaluationText,
    record: Mapping[str, Any],
) -> PrunePlan:
    """What the search found where it is clearly better than the best plain criterion, else that.

    Args:
        plans: the plain criteria's choices.
        order: their names, the best first.
        search: as it ended.
        verdict: of the windows held out; None where it was stopped before they were asked.
        text: that was searched on.
        record: what else `options["refined"]` is to hold.
    """
    is_kept = verdict is None or verdict.is_better
    first = plans[search.start if is_kept else order[0]]
    layers = {**first.layers, **search.kept} if is_kept else first.layers
    digests = text.file_digests()
    stats = search.stats
    windows = search.windows
    refined = {
        "start": search.start,
        "best_criterion": order[0],
        "result": "refined" if is_kept else "start",
        "passes": round(stats.passes, 2),
        "experts_tried": stats.tried,
        "experts_exchanged": stats.exchanged,
        "layers_of_another_criterion": stats.crossed,
        "text": list(text.files),
        "text_sha256": list(digests.values()),
        "ctx_size": text.ctx_size,
        "windows_divided": {
            "propose": len(windows.propose), "confirm": len(windows.confirm), "hold_out": len(windows.hold_out),
        },
        **record,
        **_judged(verdict),
    }  # fmt: skip
    super_experts = [
        {**found, "kept": found["expert"] in layers[found["layer"]]} for found in first.options["super_experts"]
    ]
    calibration = {
        **first.calibration,
        **{
            key: [*first.calibration.get(key, ()), *(it for it in items if it not in first.calibration.get(key, ()))]
            for key, items in (("files", list(digests)), ("sha256", list(digests.values())))
        },
        "sketch": _sketch(first, text),
    }
    return replace(
        first,
        metric=f"{first.metric}+refined" if is_kept else first.metric,
        layers=layers,
        calibration=calibration,
        options={**first.options, "super_experts": super_experts, "refined": refined},
    )


def _sketch(first: PrunePlan, text: EvaluationText) -> dict[str, Any]:
    """Of the windows that the plan has seen: the profile's, and those of the search."""
    seen = Sketch()
    for window in text.windows:
        seen.add(window)
    return merge_sketches([*filter(None, [first.calibration.get("sketch")]), seen.to_dict()])


def _judged(verdict: Verdict | None) -> dict[str, Any]:
    """Figures of the windows held out: of the best plain criterion, and of what is returned."""
    if verdict is None:
        return {"judged": False}
    after = verdict.after if verdict.is_better else verdict.before
    return {
        "judged": True,
        "kl_before": verdict.before.kl_mean,
        "kl_after": after.kl_mean,
        "perplexity_before": verdict.before.perplexity,
        "perplexity_after": after.perplexity,
        "kl_gain": verdict.divergence.mean,
        "kl_gain_stderr": verdict.divergence.stderr,
        "loss_gain": verdict.loss.mean,
        "loss_gain_stderr": verdict.loss.stderr,
    }
