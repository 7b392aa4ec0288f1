"""What a sweep found to be best, and the plan that makes it. Needs no native module."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap.errors import MismatchError, UsageError
from reap.files.formatting import number_text
from reap.files.paths import PathLike
from reap.scores.plan import PrunePlan, parse_protect, plan
from reap.scores.profile import METRICS, Profile
from reap.scores.ranking import Keep, resolve_keep

if TYPE_CHECKING:
    from reap.evaluation.candidates import Candidate
    from reap.evaluation.sweep_table import Sweep, SweepRow, Target, Verdict

CHOICE_KEYS = ("protect", "protect_super_experts", "blend")


@dataclass(frozen=True)
class Winner:
    """The best choice at one size."""

    row: SweepRow
    """What was measured of it, on the whole text."""
    verdict: Verdict | None
    """How sure that is; None where it was the only criterion at this size."""

    @property
    def is_clear(self) -> bool:
        """Whether it beats the next criterion beyond doubt."""
        return self.verdict is not None and self.verdict.clear


def record_choice(profile: object, options: Mapping[str, Any], given: Iterable[Candidate]) -> dict[str, Any]:
    """What a sweep keeps of how its candidates were made, as JSON types.

    Args:
        profile: what the sweep was given: a path, or a Profile.
        options: of `plan`, for every candidate.
        given: candidates that were plans already.
    """
    protect = [
        str(layer) if expert is None else f"{layer}:{expert}" for layer, expert in parse_protect(options["protect"])
    ]
    path = {"profile": os.fspath(profile)} if isinstance(profile, str | os.PathLike) else {}
    return {
        **path,
        **{name: options[name] for name in CHOICE_KEYS},
        "protect": protect,
        "plans": [candidate.name for candidate in given],
    }


def find_winner(table: Sweep, keep: Keep | None = None) -> Winner:
    """The best criterion at `keep`, or at the size that the sweep's limit led to, or at its only size.

    Within a limit on the size the lowest perplexity wins, within one on the perplexity the fewest experts. Raises
    UsageError where the sweep is incomplete, has no such size, or has several and nothing says which.
    """
    if not table.complete:
        raise UsageError("the sweep was interrupted before its end; complete it with --resume")
    sizes = sorted({row.keep for row in table.select() if row.metric != table.baseline.metric}, reverse=True)
    if not sizes:
        raise UsageError("the sweep tried nothing but the model as it is")
    if keep is None:
        number = _limited_size(table.targets) or (sizes[0] if len(sizes) == 1 else None)
        if number is None:
            listed = ", ".join(map(str, sizes))
            raise UsageError(
                f"the sweep has a winner at each of its sizes ({listed} experts): say which, with --keep (keep=)"
            )
    else:
        model = table.model
        number = resolve_keep(keep, int(model.get("n_experts") or table.baseline.keep), int(model.get("n_groups") or 1))
        if number not in sizes:
            raise UsageError(f"the sweep did not try {number} experts, but {', '.join(map(str, sizes))}")
    return _winner_at(table, number)


def _limited_size(targets: Iterable[Target]) -> int | None:
    """Experts of the best that the limits allow; None where there is no limit, or two kinds of them."""
    known = [target for target in targets if math.isfinite(target.perplexity)]
    kinds = {target.kind for target in known}
    if kinds == {"size"}:
        return min(known, key=lambda target: target.perplexity).keep
    if kinds == {"perplexity"}:
        return min(known, key=lambda target: (target.keep, target.perplexity)).keep
    return None


def _winner_at(table: Sweep, keep: int) -> Winner:
    verdict = table.best().get(keep)
    rows = [row for row in table.select(keep=keep) if row.metric != table.baseline.metric]
    named = [row for row in rows if verdict is None or row.metric == verdict.metric]
    found = min(named, key=lambda row: row.perplexity if math.isfinite(row.perplexity) else math.inf, default=None)
    if found is None or not math.isfinite(found.perplexity):
        raise UsageError(f"the sweep has no perplexity with {keep} experts")
    return Winner(found, verdict)


def winning_plan(table: Sweep, profile: Profile | PathLike | None = None, *, keep: Keep | None = None) -> PrunePlan:
    """The plan of the winner, made again from the profile, and compared with what the sweep judged.

    Args:
        table: the sweep.
        profile: that it was made with; None: the file that the sweep names.
        keep: as of `find_winner`.

    Raises:
        UsageError: as `find_winner`; the winner is a plan that was given to the sweep; there is no profile.
        MismatchError: the profile gives other experts than those that were judged.
    """
    row = find_winner(table, keep).row
    return plan_of_row(table, row, profile_of(table) if profile is None else Profile.of(profile))


def plan_of_row(table: Sweep, row: SweepRow, profile: Profile) -> PrunePlan:
    """The plan of one candidate of a sweep, as `winning_plan` makes it."""
    if row.metric in (table.choice.get("plans") or ()) or row.metric not in METRICS:
        raise UsageError(
            f"with {row.keep} experts the best is {row.metric!r}, a plan that the sweep was given: prune with that file"
        )
    options = {name: table.choice[name] for name in CHOICE_KEYS if name in table.choice}
    made = plan(profile, keep=row.keep, metric=row.metric, seed=row.seed or 0, **options)
    if row.experts_sha256 not in (None, made.experts_sha256):
        raise MismatchError(
            f"with {row.keep} experts by {row.metric} the profile gives other experts than those that the sweep judged:"
            " it is not the profile that the sweep was made with"
        )
    return made


def profile_of(table: Sweep, folder: Path | None = None) -> Profile:
    """The profile that a sweep says it was made with; looked for in the folder of the sweep's file as well.

    Raises UsageError where it names none, or the file is not there.
    """
    name = table.choice.get("profile")
    if not isinstance(name, str):
        raise UsageError("the sweep names no profile: give the one that it was made with")
    places = [Path(name), *([folder / name, folder / Path(name).name] if folder is not None else [])]
    return Profile.load(next((place for place in places if place.is_file()), places[0]))


def verdict_text(verdict: Verdict) -> str:
    """Which criterion is best at a size, and how sure that is, in a sentence."""
    where = "" if verdict.domain is None else f" on {verdict.domain}"
    ratio = math.exp(min(verdict.margin, 700))
    numbers = f"with {verdict.runner_up}, the next, perplexity is {ratio - 1:.2%} ± {ratio * verdict.spread:.2%} higher"
    if verdict.clear:
        return f"{verdict.keep} experts{where}: {verdict.metric} is best; {numbers}."
    return (
        f"{verdict.keep} experts{where}: no clear winner; {verdict.metric} comes first, but {numbers}, which may be"
        " chance."
    )


def plan_remark(table: Sweep, made: PrunePlan) -> str | None:
    """A sentence where a plan is not what the sweep found to be best at its size; None where it is."""
    tried = [row for row in table.select(keep=made.keep) if row.metric != table.baseline.metric]
    if not tried:
        return f"The sweep did not try {made.keep} experts, so it says nothing of this plan."
    try:
        winner = find_winner(table, made.keep)
    except UsageError as error:
        return f"Whether the plan is the sweep's winner is not known: {error}."
    own = next((row for row in tried if is_choice(row, made)), None)
    if own is not None and own.metric == winner.row.metric:
        return None
    best = f"{winner.row.metric} (perplexity {number_text(winner.row.perplexity)})"
    clearly = "" if winner.is_clear else ", though not clearly"
    if own is None:
        return (
            f"The plan is not one that the sweep judged: with {made.keep} experts it found {best} to be best{clearly}."
        )
    return (
        f"The plan is not the sweep's winner: with {made.keep} experts {best} is best{clearly}; the plan's experts, by"
        f" {own.metric}, have {number_text(own.perplexity)}."
    )


def is_choice(row: SweepRow, made: PrunePlan) -> bool:
    """Whether a row is of the plan's experts; in a file that does not name them, of its metric."""
    return row.metric == made.metric if row.experts_sha256 is None else row.experts_sha256 == made.experts_sha256
