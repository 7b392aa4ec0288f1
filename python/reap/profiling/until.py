"""When a profile has seen enough: `until` ends a run once more text would hardly change the choice of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from reap.errors import UsageError
from reap.profiling.resume import Arrays
from reap.scores.profile import METRICS, Profile
from reap.scores.ranking import Keep, resolve_keep
from reap.scores.records import add_up
from reap.scores.replicates import Replicates
from reap.scores.stability import TooFewPartsError

#: Units before the first look, and by how much their number grows from one look to the next.
_FIRST = 32
_GROWTH = 1.1


class UntilArguments(TypedDict, total=False):
    """Keyword arguments that a function hands on to `Until.of`."""

    until: float | None
    keep: Keep | None
    metric: str


@dataclass
class Until:
    """Ends a run when another profile of as much text would keep `overlap` of the same experts.

    It looks after 32 units (samples, windows of a text file) and then whenever there are a tenth more, so that looking
    takes little time.
    """

    overlap: float
    """The share of the kept experts to reach, above 0 and up to 1."""
    keep: int
    """Experts kept of each layer."""
    metric: str
    """What ranks them."""
    model: Mapping[str, Any]
    """The profile's record of the model."""
    found: float | None = None
    """The share at the last look."""
    _next: float = field(default=_FIRST, repr=False)

    @classmethod
    def of(
        cls, model: Mapping[str, Any], *, until: float | None = None, keep: Keep | None = None, metric: str = "reap"
    ) -> Until | None:
        """What the arguments of a function ask for; None where they do not. UsageError where they cannot be.

        Args:
            model: the profile's record of the model.
            until: the share of the kept experts that another profile of as much text should keep as well.
            keep: the number or fraction of experts that will be kept.
            metric: what will rank them.
        """
        check_until(until=until, keep=keep, metric=metric)
        if until is None or keep is None:
            return None
        number = resolve_keep(keep, int(model["n_experts"]), int(model.get("n_groups") or 1), model)
        return cls(float(until), number, metric, model)

    def pass_over(self, units: int) -> None:
        """Units of an earlier run, which were looked at then."""
        while self._next <= units:
            self._next *= _GROWTH

    def is_due(self, units: int) -> bool:
        """Whether it is time to look, so many units being done."""
        return units >= self._next

    def is_reached(self, units: int, parts: Mapping[str | None, Mapping[int, Arrays]]) -> bool:
        """Whether the sums so far (domain -> part -> sums) are enough."""
        self.pass_over(units)
        every = [item for of_domain in parts.values() for item in of_domain.items()]
        if not every:
            return False
        whole = add_up(sums for _, sums in every)
        profile = Profile.from_sums(layers=range(len(whole["counts"])), **whole, model=self.model)
        try:
            self.found = replace(profile, replicates=Replicates.of(every)).stability(self.keep, self.metric).overlap
        except TooFewPartsError:
            return False
        return self.has_enough

    @property
    def has_enough(self) -> bool:
        return self.found is not None and self.found >= self.overlap

    def record(self) -> dict[str, Any]:
        """For a profile's "calibration"."""
        return {
            "overlap": self.overlap,
            "keep": self.keep,
            "metric": self.metric,
            "found": self.found,
            "reached": self.has_enough,
        }


def check_until(*, until: float | None = None, keep: Keep | None = None, metric: str = "reap") -> None:
    """UsageError where the arguments of `Until.of` cannot be, whatever the model is."""
    if until is None:
        if keep is not None:
            raise UsageError("keep says what until is to judge; give until as well, or leave keep to the plan")
        return
    if isinstance(until, bool) or not isinstance(until, int | float) or not 0 < until <= 1:
        raise UsageError(f"until is {until!r}, expected a share above 0 and up to 1 (0.98 is 98%)")
    if keep is None:
        raise UsageError("until needs keep: how many experts are to be kept decides how much text is enough")
    if metric not in METRICS or metric == "random":
        known = ", ".join(name for name in METRICS if name != "random")
        raise UsageError(f"until cannot judge the metric {metric!r}; it can: {known}")
