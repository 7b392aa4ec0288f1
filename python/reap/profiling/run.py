"""The one driver of every profile: feeds a calibration to a session, unit by unit, and keeps what an interrupted run
goes on from."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, groupby
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reap.errors import CalibrationError, EngineError, Interrupted, MismatchError, OutputError, ReapError
from reap.profiling.interrupts import endings_as_interrupts, uninterrupted
from reap.profiling.resume import Arrays, Key, ResumeFile, State
from reap.profiling.until import Until
from reap.progress import Progress, ProgressCallback
from reap.scores.records import add_up
from reap.scores.replicates import part_of
from reap.text.windows import Calibration, Tokenizer, Window

NOT_COUNTED = -1
# short samples that may share one batch, as separate sequences
SHARED_SEQUENCES = 32
# so many failures, and more than successes: the fault is not the samples'
MAX_LEADING_FAILURES = 10

Int32s = NDArray[np.int32]


class BrokenModelError(EngineError):
    """A session's word for a fault of the model itself: no sample is to blame, and no other one would fare better."""


class Session(Protocol):
    """What runs a model and sums up: `reap._core.Session`, or `reap.hf.memory.sessions.ModelSession`."""

    @property
    def batch_size(self) -> int:
        """Tokens of one batch, at most."""

    @property
    def n_sequences(self) -> int:
        """Windows that may share one batch."""

    @property
    def units(self) -> int:
        """Units that were committed, those of a restored run included."""

    @property
    def n_groups(self) -> int:
        """Groups that `sums` can be asked for."""

    def profile_batch(self, tokens: Int32s, positions: Int32s, sequences: Int32s, groups: Int32s) -> None:
        """Run a batch; arrays int32 [n_tokens]. What it adds waits for `commit`. EngineError: all that waits is
        discarded."""

    def commit(self, n_units: int) -> None:
        """Add what waits to the sums and `n_units` to `units`, in one step that no signal can part."""

    def discard(self) -> None:
        """Forget what waits."""

    def restore(self, group: int, sums: dict[str, Any], n_units: int) -> None:
        """Go on from the sums of an earlier run, as `sums` gave them."""

    def sums(self, group: int) -> dict[str, NDArray[Any]]:
        """Of a group: float64 or int64 [n_layers, n_experts], and total_tokens [n_layers]."""


@dataclass(frozen=True)
class RunResult:
    """What a run that has ended counted."""

    parts: Mapping[str | None, Mapping[int, Arrays]]
    """Domain -> part of the calibration (`reap.scores.replicates`) -> sums, where there is a counted token; None: of
    lines without a domain."""
    failed: Sequence[str]
    """"where: why" of the units that the engine failed on, in the calibration's order."""

    @property
    def groups(self) -> dict[str | None, Arrays]:
        """The sums of each domain that has a counted token."""
        return {domain: add_up(parts[part] for part in sorted(parts)) for domain, parts in self.parts.items()}


def measure(
    session: Session,
    tokenizer: Tokenizer,
    source: Calibration,
    keeper: ResumeFile | None = None,
    progress: ProgressCallback | None = None,
    until: Until | None = None,
) -> RunResult:
    """Run the whole calibration through a session, from where the keeper's state left off.

    What belongs together (a unit: a sample, or one window of a text file) is counted whole or not. A unit that the
    engine fails on is left out and named. With a keeper, whatever ends the run leaves what was measured in its file,
    and SIGTERM and SIGHUP are answered like Ctrl-C. With `until` the run ends where that has seen enough.

    Raises:
        Interrupted: Ctrl-C with a keeper. Without one it is KeyboardInterrupt.
        CalibrationError: the calibration has no usable sample, or a line that cannot be read.
        MismatchError: the calibration does not begin with what the resume file's run consumed.
        EngineError: too many units failed.
    """
    run = _Run(session, tokenizer, source, keeper, progress, until)
    with endings_as_interrupts() if keeper else nullcontext():
        try:
            run.go()
        except KeyboardInterrupt as stop:
            if keeper is None:
                raise
            raise Interrupted(f"stopped {run.keep()}") from stop
        except BaseException as error:
            if keeper is None or not run.has_news:
                raise
            kept = run.keep()
            if isinstance(error, ReapError):
                error.args = (f"{error}; the run ended {kept}",)
            raise
        if keeper:
            with uninterrupted():
                keeper.save_or_warn(run.state()) if any(run.counted()) else keeper.remove()
    return run.result()


@dataclass(frozen=True)
class _Unit:
    number: int
    windows: Sequence[Window]

    @property
    def n_tokens(self) -> int:
        return sum(len(window.tokens) for window in self.windows)


class _Run:
    """One run over a calibration; `measure` says what it does.

    Units are committed in their order, so the session's count of them says which are done. Batches are formed alike
    whether a run begins or goes on: units that are done take part in that, and are not run again.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        source: Calibration,
        keeper: ResumeFile | None,
        progress: ProgressCallback | None,
        until: Until | None,
    ) -> None:
        state = keeper.state if keeper else State()
        if state.now:
            source.now = datetime.fromisoformat(state.now)  # one moment for the whole run, interruptions included
        self.failed: dict[int, str] = dict(state.failed)
        self._session, self._tokenizer, self._source, self._keeper = session, tokenizer, source, keeper
        self._before, self._until = state, until
        if until is not None:
            until.pass_over(state.units)
        self._group_of = {key: group for group, key in enumerate(state.keys)}  # (domain, part) -> the session's group
        self._waiting: list[_Unit] = []  # short units that will share a batch
        self._n_waiting = 0, 0  # their tokens and windows
        # units done -> digest of what they consumed; of the next unit it is not yet the last one
        self._consumed = {0: ""}
        self._meter = _Meter(progress, source.estimated_tokens)
        self._reading_error: CalibrationError | None = None
        self._is_checked = not state.units  # that the calibration begins with what an earlier run consumed
        if hasattr(session, "report_to"):  # its batches take long
            session.report_to(self._meter.show)

    def go(self) -> None:
        """Run all units that are not done."""
        for group, sums in enumerate(self._before.groups):
            self._session.restore(group, dict(sums), self._before.units)
        if not self._before.groups:
            self._session.commit(self._before.units)
        for number, windows in groupby(self._windows(), key=lambda window: window.unit):
            self._add(number, windows)
        if self._reading_error is not None:  # units that wait for others to share a batch with still do
            raise self._reading_error
        self._flush()
        if self._until is not None and not self._until.has_enough:
            self._until.is_reached(self._session.units, self.result().parts)

    # ---- what is kept

    @property
    def has_news(self) -> bool:
        """Whether anything was done since the run began."""
        return self._session.units > self._before.units

    def state(self) -> State:
        """What is committed."""
        units = self._session.units
        found = list(self.counted())
        failed = {unit: reason for unit, reason in self.failed.items() if unit < units}
        return State(
            units,
            self._consumed[units],
            [key for key, _ in found],
            [sums for _, sums in found],
            failed,
            self._source.now.isoformat(),
        )

    def counted(self) -> Iterator[tuple[Key, Arrays]]:
        """The sums of each part of each domain that has a counted token."""
        for key, group in self._group_of.items():
            if group < self._session.n_groups:
                sums = self._session.sums(group)
                if sums["total_tokens"].any():
                    yield key, sums

    def result(self) -> RunResult:
        """What is committed, as what a run that has ended counted."""
        parts: dict[str | None, dict[int, Arrays]] = {}
        for (domain, part), sums in self.counted():
            parts.setdefault(domain, {})[part] = sums
        return RunResult(parts, [self.failed[unit] for unit in sorted(self.failed)])

    def keep(self) -> str:
        """Save what is committed, where that is news, and say how to go on from it: "after 3 samples, which ..."."""
        assert self._keeper is not None
        units = max(self._session.units, self._before.units)  # which it may not yet have been told
        if self.has_news:
            try:
                with uninterrupted():  # by a second Ctrl-C
                    self._keeper.save(self.state())
            except OutputError as error:
                return f"after {units} samples, which could not be kept ({error})"
        elif not units:
            return "before a sample was done, so there is nothing to go on from"
        same = ", given the same standard input again," if "-" in self._source.paths else ""
        return (
            f"after {units} samples, which {self._keeper.path} keeps; --resume (resume=True){same} goes on from there"
        )

    # ---- units

    def _windows(self) -> Iterator[Window]:
        """The calibration's windows; an error in reading them ends what comes, and is raised when that is done."""
        windows = self._source.windows(self._tokenizer)
        while True:
            try:
                window = next(windows, None)
            except CalibrationError as error:
                self._reading_error, window = error, None
            if not self._is_checked and (window is None or window.unit == self._before.units):
                self._check_beginning()
            if window is None:
                return
            self._consumed[window.unit + 1] = window.consumed.hex()
            yield window

    def _check_beginning(self) -> None:
        """MismatchError where the calibration does not begin with what an earlier run consumed."""
        units = self._before.units
        self._is_checked = self._consumed.get(units) == self._before.consumed
        ended_early = units not in self._consumed and self._reading_error is not None  # which will say why
        if not self._is_checked and not ended_early:
            assert self._keeper is not None
            names = ", ".join(self._source.summary()["files"])
            raise MismatchError(
                f"{self._keeper.path}: is of another calibration: {names} does not begin with the {units} samples that"
                " were measured"
            )

    def _add(self, number: int, windows: Iterator[Window]) -> None:
        head: list[Window] = []
        n_tokens = 0
        for window in windows:
            head.append(window)
            n_tokens += len(window.tokens)
            if not self._fits(n_tokens, len(head)):
                self._flush()
                return self._run_long(number, head, windows)
        if not self._fits(self._n_waiting[0] + n_tokens, self._n_waiting[1] + len(head)):
            self._flush()
        self._waiting.append(_Unit(number, head))
        self._n_waiting = self._n_waiting[0] + n_tokens, self._n_waiting[1] + len(head)

    def _fits(self, n_tokens: int, n_windows: int) -> bool:
        return n_tokens <= self._session.batch_size and n_windows <= self._session.n_sequences

    def _run_long(self, number: int, head: list[Window], rest: Iterator[Window]) -> None:
        """A unit that fills more than one batch: `head` is its first windows, which are one too many."""
        if number < self._before.units:
            return self._meter.skip(sum(len(window.tokens) for window in chain(head, rest)))
        together: list[Window] = []
        n_tokens = 0
        try:
            for window in chain(head, rest):
                n_tokens += len(window.tokens)
                if not self._fits(n_tokens, len(together) + 1):
                    self._run_windows(together)
                    together, n_tokens = [], len(window.tokens)
                together.append(window)
            self._run_windows(together)
        except BrokenModelError:
            raise
        except EngineError as error:
            self._fail(number, head[0].where, error)
            deque(rest, maxlen=0)  # it is consumed all the same
        self._commit(1)

    def _flush(self) -> None:
        """Run the units that wait."""
        units, self._waiting, self._n_waiting = self._waiting, [], (0, 0)
        if units:
            self._run_together(units)

    def _run_together(self, units: Sequence[_Unit]) -> None:
        """Units in one batch; where that fails, each half of them, and so on to the one at fault."""
        n_done = sum(unit.number < self._before.units for unit in units)
        if n_done == len(units):
            self._meter.skip(sum(unit.n_tokens for unit in units))
        # where only some are done, an earlier run found that this batch fails
        elif n_done or not self._runs_whole(units):
            middle = len(units) // 2
            self._run_together(units[:middle])
            self._run_together(units[middle:])

    def _runs_whole(self, units: Sequence[_Unit]) -> bool:
        """Run units in one batch. False where that fails and it has to be found out which of them is at fault."""
        try:
            self._run_windows([window for unit in units for window in unit.windows])
        except BrokenModelError:
            raise
        except EngineError as error:
            self._session.discard()
            if len(units) > 1:
                return False
            self._fail(units[0].number, units[0].windows[0].where, error)
        self._commit(len(units))
        return True

    # ---- batches

    def _run_windows(self, windows: Sequence[Window]) -> None:
        """Whole windows in one batch, or one that is longer than a batch in several."""
        if not windows:
            return
        longest = max(len(window.tokens) for window in windows)
        for start in range(0, longest, self._session.batch_size):
            self._run_batch(windows, start)

    def _run_batch(self, windows: Sequence[Window], start: int) -> None:
        """One batch: of each window the tokens from `start` on, each a sequence of its own."""
        part = slice(start, start + self._session.batch_size)
        tokens = [window.tokens[part] for window in windows]
        positions = [np.arange(start, start + len(ids), dtype=np.int32) for ids in tokens]
        sequences = [np.full(len(ids), index, np.int32) for index, ids in enumerate(tokens)]
        groups = [self._groups_of(window)[part] for window in windows]
        batch = [np.concatenate(arrays) for arrays in (tokens, positions, sequences, groups)]
        self._meter.begin(len(batch[0]))
        self._session.profile_batch(*batch)
        self._meter.add(len(batch[0]))

    def _groups_of(self, window: Window) -> Int32s:
        """int32 [n_tokens]: what each token is counted in. A part of a domain becomes a group with its first counted
        token."""
        if not window.counted.any():
            return np.full(len(window.counted), NOT_COUNTED, np.int32)
        group = self._group_of.setdefault((window.domain, part_of(window.unit)), len(self._group_of))
        return np.where(window.counted, group, NOT_COUNTED).astype(np.int32)

    def _fail(self, number: int, where: str, error: EngineError) -> None:
        self._session.discard()
        n_failed = len(self.failed)  # before this one
        n_measured = self._session.units - n_failed
        self.failed[number] = f"{where}: {error}"
        if n_failed + 1 >= MAX_LEADING_FAILURES and n_failed + 1 > n_measured:
            before = f"so did each of the {n_failed} samples before it"
            if n_measured:
                before = f"so did {n_failed} of the {n_failed + n_measured} samples before it"
            raise EngineError(f"{where}: {error} (and {before})") from error

    def _commit(self, n_units: int) -> None:
        self._session.commit(n_units)
        for known in [known for known in self._consumed if known < self._session.units]:
            del self._consumed[known]
        units = self._session.units
        if self._until is not None and self._until.is_due(units) and self._until.is_reached(units, self.result().parts):
            self._source.stop()
        if self._keeper and self._keeper.is_due():
            self._keeper.save_or_warn(self.state())


class _Meter:
    """How far a run is, and how fast: tokens passed over are not work."""

    def __init__(self, progress: ProgressCallback | None, total: Callable[[], int | None]) -> None:
        self._progress, self._total = progress, total
        self._done = 0
        self._worked = 0
        self._running = 0
        self._began: float | None = None

    def skip(self, n_tokens: int) -> None:
        """Tokens of an earlier run."""
        self._done += n_tokens

    def begin(self, n_tokens: int) -> None:
        """A batch of so many tokens begins."""
        self._running = n_tokens
        if self._began is None:
            self._began = time.monotonic()

    def add(self, n_tokens: int) -> None:
        """A batch is through."""
        self._done += n_tokens
        self._worked += n_tokens
        self._running = 0
        self.show(0)

    def show(self, share: float) -> None:
        """Of the batch that runs, `share` is through."""
        if self._progress is None or self._began is None:
            return
        part = round(share * self._running)
        seconds = max(time.monotonic() - self._began, 1e-6)
        self._progress(Progress(self._done + part, self._total(), rate=(self._worked + part) / seconds))
