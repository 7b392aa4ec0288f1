"""What a profile's run should count, the slow and obvious way, and a session that counts in whole eighths.

Nothing here knows units of work, batches or resume files: a calibration is a list of lines, each is tokenised, cut into
windows and looked at token by token.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helpers.sums import COUNTS_AND_SUMS
from reap.errors import EngineError

N_LAYERS, N_EXPERTS = 2, 3
BOS = 256
BAD = ord("X")  # the engine fails on it


class Bytes:
    """A tokenizer of bytes."""

    n_vocab = 257
    has_tokenizer = True
    add_bos = True
    bos: int | None = BOS
    eos: int | None = None
    chat_template: str | None = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [BOS] * add_special + list(text.encode())

    def token_text(self, token: int) -> bytes:
        return b"" if token == BOS else bytes([token])


def routing(layer: int, token: int, position: int) -> tuple[int, float, float]:
    """Expert, gate and norm; sums of such fractions are exact in any order."""
    return (token * 7 + position * 5 + layer) % N_EXPERTS, (token % 5 + 1) / 8, ((token * 3 + layer) % 7 + 1) / 4


class Tally:
    """The sums of one domain, a routing at a time."""

    def __init__(self) -> None:
        self.total_tokens = [0] * N_LAYERS
        self.sums = {name: [[0.0] * N_EXPERTS for _ in range(N_LAYERS)] for name in COUNTS_AND_SUMS}

    def add(self, token: int, position: int) -> None:
        for layer in range(N_LAYERS):
            expert, gate, norm = routing(layer, token, position)
            self.total_tokens[layer] += 1
            added = (1, gate, norm, gate * norm, (gate * norm) ** 2, norm**2)
            for name, value in zip(COUNTS_AND_SUMS, added, strict=False):
                self.sums[name][layer][expert] += value
            largest = self.sums["norm_max"][layer]
            largest[expert] = max(norm, largest[expert])

    def plus(self, other: Tally) -> Tally:
        both = Tally()
        both.total_tokens = [a + b for a, b in zip(self.total_tokens, other.total_tokens, strict=True)]
        for name, rows in both.sums.items():
            combine = max if name == "norm_max" else float.__add__
            for row, mine, theirs in zip(rows, self.sums[name], other.sums[name], strict=True):
                row[:] = map(combine, mine, theirs)
        return both

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        arrays = {name: np.array(rows) for name, rows in self.sums.items()}
        return arrays | {"total_tokens": np.array(self.total_tokens), "counts": arrays["counts"].astype(np.int64)}


@dataclass
class Expected:
    """What should come out of a calibration."""

    domains: dict[str | None, Tally] = field(default_factory=lambda: defaultdict(Tally))
    failed: list[int] = field(default_factory=list)  # lines
    skipped: list[int] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    is_hopeless: bool = False


def tokens_of(line: dict[str, Any], mask: str) -> tuple[list[int], list[bool]]:
    """Ids, and which of them are counted."""
    if "tokens" in line:
        return line["tokens"], [True] * len(line["tokens"])
    if "text" in line:
        ids = [BOS, *line["text"].encode()] if line["text"] else []
        return ids, [True] * len(ids)
    head = [BOS, *line["prompt"].encode(), 10]
    response = list(line["response"].encode())
    return head + response, [mask == "all"] * len(head) + [True] * len(response)


def count(
    lines: list[dict[str, Any] | None], *, is_text: bool, ctx_size: int, mask: str, max_tokens: int | None
) -> Expected:
    """Each line in turn; None is a blank one. With `is_text`, the first line's text is a text file."""
    found = Expected()
    n_measured = 0
    for number, line in enumerate(lines, 1):
        if line is None:
            continue
        ids, counted = tokens_of(line, mask)
        if not any(counted):
            found.skipped.append(number)
            continue
        room = len(ids) if max_tokens is None else max_tokens - found.tokens
        ids, counted = ids[:room], counted[:room]
        found.samples += 1
        found.tokens += len(ids)
        windows = [range(start, min(start + ctx_size, len(ids))) for start in range(0, len(ids), ctx_size)]
        for unit in [[window] for window in windows] if is_text else [windows]:
            if any(ids[at] == BAD for window in unit for at in window):
                found.failed.append(number)
                if len(found.failed) >= 10 and len(found.failed) > n_measured:
                    found.is_hopeless = True
                    return found
                continue
            n_measured += 1
            for window in unit:
                for at in window:
                    if counted[at]:
                        found.domains[line.get("domain")].add(ids[at], at - window.start)
        if found.tokens == max_tokens:
            break
    return found


class CountingSession:
    """What `measure` needs of a session, around `routing`; `before` is called as each step of it begins or ends.

    is_late: a group is there from its first committed token on, as in a ModelSession; else once it was heard of.
    """

    def __init__(self, batch_size: int, n_sequences: int, *, is_late: bool, before: Any) -> None:
        self.batch_size, self.n_sequences = batch_size, n_sequences
        self.units = 0
        self.n_batches = 0
        self._before, self._is_late = before, is_late
        self._n_heard_of = 1
        self._done: dict[int, Tally] = {}
        self._waiting: dict[int, Tally] = {}
        self._cache: list[int] = []  # of a window that came in parts

    @property
    def n_groups(self) -> int:
        return max(self._done, default=-1) + 1 if self._is_late else self._n_heard_of

    def profile_batch(self, tokens: Any, positions: Any, sequences: Any, groups: Any) -> None:
        self._before()
        self._check(tokens, positions, sequences)
        self.n_batches += 1
        waiting = {group: tally.plus(Tally()) for group, tally in self._waiting.items()}
        for token, position, group in zip(tokens.tolist(), positions.tolist(), groups.tolist(), strict=True):
            if token == BAD:
                self._waiting = {}
                raise EngineError("layer 0: not a finite number")
            self._n_heard_of = max(self._n_heard_of, group + 1)
            if group >= 0:
                waiting.setdefault(group, Tally()).add(token, position)
        self._waiting = waiting
        self._before()

    def _check(self, tokens: Any, positions: Any, sequences: Any) -> None:
        """A batch holds whole windows, each from position 0 on, or the next part of one window."""
        assert 0 < len(tokens) <= self.batch_size
        assert all(values.dtype == np.int32 for values in (tokens, positions, sequences))
        runs = [positions[sequences == number].tolist() for number in range(int(sequences.max()) + 1)]
        assert len(runs) <= self.n_sequences
        if runs[0][0] == 0:
            self._cache = []
        else:
            assert len(runs) == 1
        for run in runs:
            first = len(self._cache) if len(runs) == 1 else 0
            assert run == list(range(first, first + len(run)))
        if len(runs) == 1:
            self._cache += runs[0]

    def commit(self, n_units: int) -> None:
        self._before()
        groups = {*self._done, *self._waiting}
        done = {group: self._done.get(group, Tally()).plus(self._waiting.get(group, Tally())) for group in groups}
        self._done, self._waiting, self.units = done, {}, self.units + n_units
        self._before()

    def discard(self) -> None:
        self._waiting = {}

    def restore(self, group: int, sums: dict[str, Any], n_units: int) -> None:
        tally = Tally()
        tally.total_tokens = sums["total_tokens"].tolist()
        tally.sums = {name: np.asarray(sums[name], np.float64).tolist() for name in COUNTS_AND_SUMS}
        self._done[group] = tally
        self._n_heard_of = max(self._n_heard_of, group + 1)
        self.units = n_units

    def sums(self, group: int) -> dict[str, NDArray[Any]]:
        if group >= self.n_groups:
            raise IndexError("group")
        return self._done.get(group, Tally()).to_arrays()
