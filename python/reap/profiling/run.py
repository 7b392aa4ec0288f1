"""Feeds a calibration to a session: units of work, failures, what is kept of an interrupted run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np

from reap.errors import EngineError
from reap.profiling.resume import Arrays, Checkpoint, State
from reap.progress import Progress, ProgressCallback
from reap.text.calibration import Calibration, Tokenizer, Window

NOT_COUNTED = -1
# short samples that may share one batch, as separate sequences
SHARED_SEQUENCES = 32
# this many failures and no success: the fault is not the sample's
HOPELESS = 10


class Run:
    """Feeds windows to a session. What belongs together (a unit: a sample, or one window of a text file) is counted
    whole or not.

    session  `reap._core.Session`, or an object with the part of it that is used here
    """

    def __init__(
        self,
        session: Any,
        tokenizer: Tokenizer,
        source: Calibration,
        keeper: Checkpoint | None,
        progress: ProgressCallback | None,
    ) -> None:
        self.session = session
        self._tokenizer = tokenizer
        self.domains: list[str | None] = []
        self.failed: dict[int, str] = {}
        self._source = source
        self._keeper = keeper
        self._progress = progress or (lambda _: None)
        self._waiting: list[list[Window]] = []  # short units that will share a batch
        self._tokens_done = 0

    def go(self, state: State) -> None:
        """Run the whole calibration, from where `state` left off."""
        for group, sums in enumerate(state.groups):
            self.session.restore(group, dict(sums), state.units)
        if not state.groups:
            self.session.commit(state.units)
        self.domains = list(state.domains)
        self.failed = dict(state.failed)
        done = state.units
        for unit, windows in groupby(self._source.windows(self._tokenizer), key=lambda window: window.unit):
            if unit < done:
                self._tokens_done += sum(len(window.tokens) for window in windows)
            else:
                self._add(unit, windows)
        self._flush()

    def state(self) -> State:
        """What is committed, for a checkpoint."""
        groups: list[Arrays] = [
            self.session.sums(group) for group in range(min(len(self.domains), self.session.n_groups))
        ]
        units = self.session.units
        failed = {unit: reason for unit, reason in self.failed.items() if unit < units}
        return State(units, self.domains[: len(groups)], groups, failed)

    def _add(self, unit: int, windows: Iterator[Window]) -> None:
        head: list[Window] = []
        for window in windows:
            head.append(window)
            if not self._fits(head):
                self._flush()
                self._run_long(unit, chain(head, windows))
                return
        if not self._fits([window for waiting in self._waiting for window in waiting] + head):
            self._flush()
        self._waiting.append(head)

    def _fits(self, windows: Sequence[Window]) -> bool:
        n_tokens = sum(len(window.tokens) for window in windows)
        return bool(n_tokens <= self.session.batch_size and len(windows) <= self.session.n_sequences)

    def _run_long(self, unit: int, windows: Iterator[Window]) -> None:
        """A unit that fills more than one batch."""
        try:
            for window in windows:
                for start in range(0, len(window.tokens), self.session.batch_size):
                    self._run_batch([window], start)
        except EngineError as error:
            self._fail(unit, window, error)
        self._commit(1)

    def _flush(self) -> None:
        """Run the units that wait, in one batch; where that fails each alone, to find the one at fault."""
        units, self._waiting = self._waiting, []
        if not units:
            return
        try:
            self._run_batch([window for unit in units for window in unit], 0)
        except EngineError as error:
            if len(units) > 1:
                for unit in units:
                    self._waiting = [unit]
                    self._flush()
                return
            self._fail(units[0][0].unit, units[0][0], error)
        self._commit(len(units))

    def _run_batch(self, windows: Sequence[Window], start: int) -> None:
        """One batch: of a window the tokens from `start` on, of several windows all tokens, each a sequence of its
        own."""
        part = slice(start, start + self.session.batch_size)
        tokens = [window.tokens[part] for window in windows]
        positions = [np.arange(start, start + len(ids), dtype=np.int32) for ids in tokens]
        sequences = [np.full(len(ids), index, np.int32) for index, ids in enumerate(tokens)]
        groups = [
            np.where(window.counted[part], self._group(window.domain), NOT_COUNTED).astype(np.int32)
            for window in windows
        ]
        batch = [np.concatenate(arrays) for arrays in (tokens, positions, sequences, groups)]
        self.session.profile_batch(*batch)
        self._tokens_done += len(batch[0])
        self._progress(Progress(self._tokens_done, self._source.estimated_tokens()))

    def _fail(self, unit: int, window: Window, error: EngineError) -> None:
        self.session.discard()
        self.failed[unit] = f"{window.where}: {error}"
        if len(self.failed) >= HOPELESS and len(self.failed) > self.session.units:
            raise EngineError(
                f"{window.where}: {error} (and so did each of the {len(self.failed) - 1} samples before it)"
            ) from error

    def _commit(self, n_units: int) -> None:
        self.session.commit(n_units)
        if self._keeper and self._keeper.is_due():
            self._keeper.save(self.state())

    def _group(self, domain: str | None) -> int:
        if domain not in self.domains:
            self.domains.append(domain)
        return self.domains.index(domain)


def total(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums over all groups; of the largest norm the largest."""
    total = dict(groups[0])
    for sums in groups[1:]:
        for name, values in sums.items():
            total[name] = np.maximum(total[name], values) if name == "norm_max" else total[name] + values
    return total
