"""Texts that a model goes on with: many prompts at once, by llama.cpp's samplers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reap.errors import UsageError

if TYPE_CHECKING:
    from reap import _core

#: `Continuation.ended`
LENGTH, TEXT_END, STOP = "length", "text", "stop"
MOST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, in this order: top-k, top-p, min-p, temperature. UsageError for what cannot be."""

    temperature: float = 0.0
    """0: the most probable token, and nothing else matters."""
    top_k: int = 0
    """Of so many most probable tokens; 0: of all."""
    top_p: float = 1.0
    """Of the most probable tokens that have this share of the probability; 1: of all."""
    min_p: float = 0.0
    """Of tokens with at least this share of the most probable one's probability; 0: of all."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature!r}, expected a number of at least 0")
        if type(self.top_k) is not int or not 0 <= self.top_k < 2**31:
            raise UsageError(f"top_k is {self.top_k!r}, expected a whole number of at least 0")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} is {value!r}, expected a number from 0 to 1")


@dataclass(frozen=True)
class Prompt:
    """What is to be continued."""

    tokens: tuple[int, ...]
    """Token ids, at least one."""
    n_new: int
    """At most so many tokens follow."""
    seed: int = 0
    """Of this prompt's draws alone, so that they do not depend on what shares its batch."""
    stops: tuple[bytes, ...] = ()
    """Texts in UTF-8 that end the continuation where they appear in it."""


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt."""

    tokens: tuple[int, ...]
    """Token ids, the one that ended the text included."""
    ended: str
    """ "length": n_new tokens are there; "text": by a token that ends a text; "stop": by one of the stops."""


def in_batches(sizes: Sequence[int], *, n_sequences: int, n_tokens: int) -> Iterator[range]:
    """Which neighbours are run together: at most n_sequences of them, with at most n_tokens tokens in all."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == n_sequences or total + size > n_tokens):
            yield range(start, index)
            start, total = index, 0
        total += size
    if sizes:
        yield range(start, len(sizes))


def prompt_batches(session: _core.Session, prompts: Sequence[Prompt]) -> Iterator[range]:
    """Which prompts the session runs together: the same whenever the prompts are the same."""
    sizes = [len(prompt.tokens) + prompt.n_new for prompt in prompts]
    return in_batches(sizes, n_sequences=session.n_sequences, n_tokens=session.cache_size)


def continue_batch(
    session: _core.Session, prompts: Sequence[Prompt], sampling: Sampling | None = None
) -> list[Continuation]:
    """The continuations of prompts that fit one batch; the most probable tokens where no sampling is given."""
    sampling = sampling or Sampling()
    asked = [(np.array(it.tokens, np.int32), it.n_new, it.seed, list(it.stops)) for it in prompts]
    found = session.generate(asked, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return [Continuation(tuple(tokens.tolist()), ended) for tokens, ended in found]
