"""Which choices of experts a sweep tries: criteria at sizes, plans made elsewhere, what fits a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from reap.errors import UsageError
from reap.evaluation.keep_limits import largest
from reap.scores.plan import PrunePlan
from reap.scores.profile import Profile

CandidateKey = tuple[str, int | None, int, int | None]  # (name, seed, experts kept, experts of each token)


@dataclass(frozen=True)
class Candidate:
    """A choice of experts, and where it came from."""

    name: str
    """Of the criterion; a plan that was given has its own."""
    seed: int | None
    """Of metric random; None otherwise."""
    plan: PrunePlan
    """The choice."""
    n_bytes: int
    """Exact size of the file that it leaves."""
    used: int | None = None
    """Experts of each token; None: as many as the model uses itself."""

    @property
    def key(self) -> CandidateKey:
        """What tells it from the others of a sweep."""
        return self.name, self.seed, self.plan.keep, self.used

    @property
    def digest(self) -> str:
        """SHA-256 of the experts that it keeps."""
        return self.plan.experts_sha256


@dataclass(frozen=True)
class Choices:
    """Makes candidates of a profile; what cannot work is an error here, before a model is loaded."""

    profile: Profile
    """Whose scores rank the experts."""
    metrics: Sequence[str]
    """The criteria to compare."""
    seeds: int
    """Selections of metric random."""
    keeps: Sequence[int]
    """Numbers of experts that the router can live with, ascending."""
    choose: Callable[..., PrunePlan]
    """`plan` with the options that hold for every candidate."""
    size_of: Callable[[PrunePlan], int]
    """Bytes of the file that a plan leaves; checks the plan against the model, too."""

    def candidate(self, metric: str, keep: int, seed: int = 0) -> Candidate:
        """The choice of one metric at one size."""
        made = self.choose(self.profile, keep=keep, metric=metric, seed=seed)
        return Candidate(metric, seed if metric == "random" else None, made, self.size_of(made))

    def at(self, metric: str, keep: int) -> list[Candidate]:
        """The choice of one metric at one size, of random one for each seed."""
        return [self.candidate(metric, keep, seed) for seed in range(self.seeds if metric == "random" else 1)]

    def grid(self, keeps: Iterable[int]) -> list[Candidate]:
        """Every metric at every size."""
        return [candidate for keep in keeps for metric in self.metrics for candidate in self.at(metric, keep)]

    def given(self, plans: Iterable[PrunePlan]) -> list[Candidate]:
        """Plans made elsewhere, under their own names, with a number where two would have the same."""
        found: list[Candidate] = []
        for made in plans:
            taken = [item.name for item in found if item.plan.keep == made.keep] + list(self.metrics)
            names = [made.metric, *(f"{made.metric}-{number}" for number in range(2, len(taken) + 3))]
            found.append(Candidate(next(name for name in names if name not in taken), None, made, self.size_of(made)))
        return found

    def largest_within(self, max_bytes: int) -> dict[str, list[Candidate]]:
        """metric -> its choice at the largest size whose file has at most `max_bytes`. UsageError where even the
        smallest has more."""
        found = {metric: largest(self.keeps, partial(self._is_within, metric, max_bytes)) for metric in self.metrics}
        for metric, keep in found.items():
            if keep is None:
                raise UsageError(
                    f"target_size: {max_bytes:,} bytes cannot be reached: with {self.keeps[0]} experts, the fewest that"
                    f" the router can live with, the file still has {self.candidate(metric, self.keeps[0]).n_bytes:,}"
                    " bytes"
                )
        return {metric: self.at(metric, keep) for metric, keep in found.items() if keep is not None}

    def _is_within(self, metric: str, max_bytes: int, keep: int) -> bool:
        return self.candidate(metric, keep).n_bytes <= max_bytes
