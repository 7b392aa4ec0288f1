"""The loop probe: how a model continues a few prompts, greedily, and how much of that is repetition.

A model that lost the experts it needs often falls into a loop, and its perplexity hardly shows it: on given text it
never follows its own choices for long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from reap.engine.generation import TEXT_END, Continuation, Prompt, continue_batch, prompt_batches
from reap.evaluation.shares import needed, two_shares, wilson

if TYPE_CHECKING:
    from reap import _core

NGRAM = 4
N_PROMPTS = 8
PROMPT_TOKENS = 64
NEW_TOKENS = 128
#: A loop is a run of tokens that stands at the end so many times, and fills so many tokens.
LOOP_TIMES = 3
LOOP_TOKENS = 16
#: The change in the share of loops that a user should be told of.
CHANGE = 0.02


@dataclass(frozen=True)
class LoopMetrics:
    """How a model continues some prompts, each time with the most probable token.

    What concerns a reference is None where there is none.
    """

    prompts: int
    """How many."""
    prompt_tokens: int
    """Tokens of each; of the longest, where they differ."""
    new_tokens: int
    """The most tokens that a continuation has."""
    repeated: float
    """Mean share of 4-grams that occurred before in the same continuation."""
    looping: float
    """Share of the continuations that end in a loop, the same run of tokens over and over."""
    unfinished: float
    """Share of the continuations that no end-of-text token ended."""
    reference_repeated: float | None = None
    """`repeated` of the reference's continuations."""
    reference_looping: float | None = None
    """`looping` of the reference's continuations."""
    reference_unfinished: float | None = None
    """`unfinished` of the reference's continuations."""
    same_start: float | None = None
    """Mean share of the new tokens before the first that differs from the reference's."""
    looping_interval: tuple[float, float] = (0.0, 1.0)
    """The 95 % interval of `looping`, by Wilson's score."""
    reference_looping_interval: tuple[float, float] | None = None
    """The same of `reference_looping`."""
    looping_p_value: float | None = None
    """Two-proportion test of the two shares: how probable so large a difference is where there is none."""
    prompts_needed: int = 0
    """Prompts that would show, four times of five, that two more of a hundred end in a loop."""
    tool_calls: ToolCallMetrics | None = None
    """Of the answers to prompts with tools; None: there were none."""
    reference_tool_calls: ToolCallMetrics | None = None
    """The same of the reference's answers."""


@dataclass(frozen=True)
class ToolCallMetrics:
    """What became of the tools that prompts carry."""

    prompts: int
    """Prompts with tools."""
    called: int
    """Answers with a call, readable or not."""
    calls: int
    """Calls that were begun."""
    parsed: int
    """Calls that can be read: a name, and arguments that are an object."""
    matched: int
    """Calls of a tool that there is, with arguments that its schema allows."""

    @property
    def parsed_share(self) -> float | None:
        """Of the calls; None: there were none."""
        return self.parsed / self.calls if self.calls else None

    @property
    def matched_share(self) -> float | None:
        """Of the calls; None: there were none."""
        return self.matched / self.calls if self.calls else None


@dataclass(frozen=True)
class Continuations:
    """What a model made of its prompts."""

    prompt_tokens: int
    """Tokens of each prompt; of the longest, where they differ."""
    new_tokens: int
    """The most tokens that a continuation has."""
    tokens: tuple[tuple[int, ...], ...]
    """Token ids of each continuation, the one that ended the text included."""
    finished: tuple[bool, ...]
    """Of each continuation, whether an end-of-text token ended it."""
    tool_calls: ToolCallMetrics | None = None
    """Of the answers to prompts with tools."""


def choose_prompts(
    windows: Sequence[NDArray[np.int32]], ctx_size: int, n_prompts: int = N_PROMPTS
) -> tuple[list[NDArray[np.int32]], int]:
    """Beginnings of at most n_prompts windows, spread evenly, and how many new tokens fit after each."""
    n_prompts = min(n_prompts, len(windows))
    length = min(PROMPT_TOKENS, max(1, ctx_size // 4))
    chosen = [windows[index * len(windows) // n_prompts][:length] for index in range(n_prompts)]
    return chosen, min(NEW_TOKENS, ctx_size - length)


def continue_prompts(
    session: _core.Session, prompts: Sequence[NDArray[np.int32]], new_tokens: int, report: Callable[[int], None]
) -> Continuations:
    """Let the model continue each prompt; `report` gets the number of prompts done."""
    asked = [Prompt(tuple(prompt.tolist()), new_tokens) for prompt in prompts]
    continuations: list[Continuation] = []
    for batch in prompt_batches(session, asked):
        continuations += continue_batch(session, [asked[index] for index in batch])
        report(len(continuations))
    tokens = tuple(it.tokens for it in continuations)
    finished = tuple(it.ended == TEXT_END for it in continuations)
    return Continuations(len(prompts[0]), new_tokens, tokens, finished)


def loop_metrics(found: Continuations, reference: Continuations | None = None) -> LoopMetrics:
    """The figures of some continuations, beside those of the reference's from the same prompts."""
    loops = [ends_in_loop(tokens) for tokens in found.tokens]
    figures = LoopMetrics(
        prompts=len(found.tokens),
        prompt_tokens=found.prompt_tokens,
        new_tokens=found.new_tokens,
        repeated=float(np.mean([repeated_share(tokens) for tokens in found.tokens])),
        looping=float(np.mean(loops)),
        unfinished=1 - float(np.mean(found.finished)),
        looping_interval=wilson(sum(loops), len(loops)),
        prompts_needed=needed(sum(loops) / len(loops), CHANGE),
        tool_calls=found.tool_calls,
    )
    if reference is None:
        return figures
    before = loop_metrics(reference)
    n_before = round(before.looping * before.prompts)
    return replace(
        figures,
        reference_repeated=before.repeated,
        reference_looping=before.looping,
        reference_unfinished=before.unfinished,
        same_start=float(
            np.mean([_same_start(ours, theirs) for ours, theirs in zip(found.tokens, reference.tokens, strict=True)])
        ),
        reference_looping_interval=before.looping_interval,
        looping_p_value=two_shares(sum(loops), len(loops), n_before, before.prompts),
        prompts_needed=before.prompts_needed,
        reference_tool_calls=before.tool_calls,
    )


def loop_warnings(loops: LoopMetrics | None) -> list[str]:
    """A sentence where too few prompts were run for what the figures are asked to show."""
    if loops is None or loops.prompts >= loops.prompts_needed:
        return []
    return [
        f"{loops.prompts:,} prompts do not show whether two more of a hundred end in a loop; about"
        f" {loops.prompts_needed:,} would, four times of five (--loop-prompts)"
    ]


def repeated_share(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of n-grams that occurred before; 0 where there are none."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the end is one run of tokens, LOOP_TIMES times or more and at least LOOP_TOKENS tokens long in all."""
    for period in range(1, len(tokens) // LOOP_TIMES + 1):
        n_equal = next(
            (n for n in range(len(tokens) - period) if tokens[-1 - n] != tokens[-1 - n - period]),
            len(tokens) - period,
        )
        if n_equal + period >= max(LOOP_TIMES * period, LOOP_TOKENS):
            return True
    return False


def _same_start(ours: Sequence[int], theirs: Sequence[int]) -> float:
    longest = max(len(ours), len(theirs))
    n_same = next(
        (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    return n_same / longest
