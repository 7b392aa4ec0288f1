"""The loop probe: repetition counted by hand, and the model's own continuations."""

from __future__ import annotations

import numpy as np
import pytest

from reap.evaluation.loops import Continuations, choose_prompts, ends_in_loop, loop_metrics, repeated_share


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234
        ([9] * 8, 4 / 5),
        ([1, 2, 3], 0.0),
        ([], 0.0),
    ],
)
def test_repeated_share(tokens: list[int], share: float) -> None:
    assert repeated_share(tokens) == pytest.approx(share)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        (list(range(100)), False),
        ([*range(50), *([7] * 16)], True),
        ([*range(50), *([7] * 15)], False),  # 15 tokens alike: too few to call it a loop
        ([*range(50), *([1, 2, 3, 4, 5] * 4)], True),
        ([*range(50), *([1, 2, 3, 4, 5] * 4), 1, 2], True),  # in the middle of the run
        ([*range(50), *(list(range(100, 120)) * 2)], False),  # twice is not three times
        ([*range(50), *(list(range(100, 120)) * 3)], True),
        ([*([7] * 40), 1, 2, 3], False),  # it found its way out
        ([7] * 16, True),
        ([1, 2, 1, 2], False),
        ([], False),
    ],
)
def test_ends_in_loop(tokens: list[int], loops: bool) -> None:
    assert ends_in_loop(tokens) is loops


def test_figures_beside_the_reference() -> None:
    steady, stuck = tuple(range(20)), (0, 1, *([7] * 18))
    found = loop_metrics(
        Continuations(4, 20, (stuck, (0, 1)), (False, True)),
        Continuations(4, 20, (steady, (0, 1, 2, 3)), (False, False)),
    )
    assert (found.prompts, found.prompt_tokens, found.new_tokens) == (2, 4, 20)
    assert (found.looping, found.reference_looping) == (0.5, 0.0)
    assert (found.unfinished, found.reference_unfinished) == (0.5, 1.0)
    assert found.repeated == pytest.approx(repeated_share(stuck) / 2)
    assert found.same_start == pytest.approx((2 / 20 + 2 / 4) / 2)
    alone = loop_metrics(Continuations(4, 20, (steady,), (True,)))
    assert alone.reference_repeated is alone.same_start is None


def test_prompts_are_spread_over_the_text() -> None:
    windows = [np.full(512, index, dtype=np.int32) for index in range(24)]
    prompts, new_tokens = choose_prompts(windows, 512)
    assert [int(prompt[0]) for prompt in prompts] == [0, 3, 6, 9, 12, 15, 18, 21]
    assert {len(prompt) for prompt in prompts} == {64}
    assert new_tokens == 128
    prompts, new_tokens = choose_prompts(windows[:2], 8)
    assert [len(prompt) for prompt in prompts] == [2, 2]
    assert new_tokens == 6
