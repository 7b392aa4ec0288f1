"""Who takes a removed expert's place where a token id chooses the experts: the ranking, its record, the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reap
from reap.errors import FormatError, MismatchError
from reap.scores.hash_routing import (
    HASH_ROUTING,
    rank_alike,
    read_record,
    require_substitutes,
    rewrite_table,
    substitutes_of,
    to_record,
)
from reap.scores.plan import PrunePlan
from reap.scores.profile import Profile
from reap.scores.records import ARRAYS

N_EXPERTS, N_USED = 12, 3


def sums_of(values: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """What the engine sums of values [n_tokens, n_experts]."""
    return len(values), values.sum(axis=0), values.T @ values


def model_of(seed: int) -> dict[str, object]:
    values = np.random.default_rng(seed).random((50, N_EXPERTS))
    record = to_record({0: sums_of(values), 2: sums_of(values[::-1] ** 2)})
    return json.loads(json.dumps({"n_experts": N_EXPERTS, "n_experts_used": N_USED, HASH_ROUTING: record}))


def test_the_ranking_is_by_correlation() -> None:
    rng = np.random.default_rng(3)
    values = rng.random((400, 6))
    values[:, 4] = 0.1 * values[:, 1] + 0.001 * rng.random(400)  # small, and alike
    values[:, 5] = 1 - values[:, 1]
    found = rank_alike(*sums_of(values))
    expected = np.argsort(-np.corrcoef(values.T) + 2 * np.eye(6) * -2, axis=1, kind="stable")[:, 1:]
    assert found.tolist() == expected.tolist()
    assert found[1][0] == 4
    assert found[1][-1] == 5


def test_an_expert_whose_value_never_changes_is_like_no_other() -> None:
    values = np.random.default_rng(0).random((30, 4))
    values[:, 2] = 0.5
    found = rank_alike(*sums_of(values))
    assert found[2].tolist() == [0, 1, 3]
    assert sorted(found[0].tolist()) == [1, 2, 3]


def test_a_record_survives_its_file_and_a_damaged_one_is_refused() -> None:
    model = model_of(0)
    assert sorted(read_record(model)) == [0, 2]
    for damage in ({"tokens": 3}, {"alike": "?"}, {"alike": "AAAA"}, 7, {"alike": 7}):
        with pytest.raises(FormatError, match="hash_routing of layer 0 does not rank"):
            read_record(model | {HASH_ROUTING: {"0": damage}})
    with pytest.raises(FormatError, match="should be an object"):
        read_record(model | {HASH_ROUTING: [1]})
    assert read_record({"n_experts": 8}) == {}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(N_USED, N_EXPERTS))
def test_no_row_of_the_table_gets_an_expert_twice(seed: int, n_kept: int) -> None:
    rng = np.random.default_rng(seed)
    model = model_of(seed)
    kept = sorted(rng.choice(N_EXPERTS, n_kept, replace=False).tolist())
    table = np.stack([rng.choice(N_EXPERTS, N_USED, replace=False) for _ in range(40)]).astype(np.int32)
    substitutes = substitutes_of(model, {0: kept, 1: kept})
    assert sorted(substitutes) == [0]
    written = rewrite_table(table, kept, substitutes[0])

    ranking = read_record(model)[0]
    for old, new in zip(table.tolist(), written.tolist(), strict=True):
        row = list(old)
        for place, expert in enumerate(row):
            if expert not in kept:  # the most alike of those that stay and that the token does not have
                row[place] = next(other for other in ranking[expert].tolist() if other in kept and other not in row)
        assert new == [kept.index(expert) for expert in row]
        assert len(set(new)) == N_USED


def test_a_table_that_cannot_be_is_refused() -> None:
    substitutes = substitutes_of(model_of(1), {0: [0, 1, 2, 3]})[0]
    for row in ([0, 1, 12], [0, 1, -1]):
        with pytest.raises(FormatError, match="names an expert that is not among the 12"):
            rewrite_table(np.array([row, [0, 1, 2]], dtype=np.int32), [0, 1, 2, 3], substitutes)
    few = substitutes_of(model_of(1), {0: [0, 1]})[0]
    with pytest.raises(FormatError):
        rewrite_table(np.array([[0, 1, 2]], dtype=np.int32), [0, 1], few)


def test_a_row_that_names_an_expert_twice_gets_another() -> None:
    kept = [1, 3, 4, 7]
    substitutes = substitutes_of(model_of(1), {0: kept})[0]
    table = np.array([[1, 1, 1], [3, 1, 3], [0, 0, 0], [7, 3, 1]], dtype=np.int32)
    written = rewrite_table(table, kept, substitutes)
    assert written[0].tolist() == [0, 1, 2]
    assert written[1].tolist() == [1, 0, 2]
    assert written[2].tolist() == [kept.index(other) for other in substitutes[0]]
    assert written[3].tolist() == [3, 1, 0]


def test_a_plan_that_says_nothing_of_such_layers_is_refused() -> None:
    require_substitutes({0: {}, 1: {}}, (0, 1))
    with pytest.raises(MismatchError, match="layers 1, 2 are chosen by token id"):
        require_substitutes({0: {}}, (0, 1, 2))


def test_a_profile_and_a_plan_of_256_experts_keep_it(tmp_path: Path) -> None:
    n_experts, rng = 256, np.random.default_rng(2)
    values = rng.random((60, n_experts))
    record = to_record({layer: sums_of(np.roll(values, layer)) for layer in range(3)})
    ones = np.ones((3, n_experts))
    sums = {name: ones for name in ARRAYS if name not in ("total_tokens", "counts")}
    model = {"n_experts": n_experts, "n_experts_used": 6, HASH_ROUTING: record}
    whole = Profile.from_sums(
        layers=[0, 1, 2], model=model, total_tokens=np.full(3, 256), counts=np.ones((3, n_experts), np.int64), **sums
    )
    read = Profile.load(whole.save(tmp_path / "profile.json"))
    made = PrunePlan.load(reap.plan(read, keep=100).save(tmp_path / "plan.json"))
    assert made.substitutes == reap.plan(whole, keep=100).substitutes
    assert all(len(others) == 6 for row in made.substitutes.values() for others in row.values())
    assert [len(row) for row in made.substitutes.values()] == [156] * 3
