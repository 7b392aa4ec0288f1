"""How sure a choice is: the parts of a profile, and what they say of another profile of as much text."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.profiles import add_sums, make_profile, random_sums
from reap.errors import FormatError, UsageError
from reap.scores import replicates
from reap.scores.comparing import compare
from reap.scores.merging import merge
from reap.scores.profile import Profile
from reap.scores.ranking import select_experts
from reap.scores.replicates import DEALT, PARTS, Replicates, fit, part_of, with_replicates
from reap.scores.stability import kept_by

N_LAYERS, N_EXPERTS = 3, 32
MODEL = {"n_experts": N_EXPERTS, "n_experts_used": 4}


class Source:
    """Text without an end: the sums of any number of its units. Experts differ little, and some are rare."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.popularity = rng.dirichlet(np.full(N_EXPERTS, 1.5), size=N_LAYERS)
        self.norm = rng.lognormal(0, 0.25, (N_LAYERS, N_EXPERTS))

    def units(self, n: int, rng: np.random.Generator, tokens: int = 60) -> list[dict[str, Any]]:
        found = []
        for _ in range(n):
            # what a unit is about: its tokens go to the same experts, with outputs of like size
            about = rng.gamma(1.5, 1, (N_LAYERS, N_EXPERTS)) * self.popularity
            about /= about.sum(axis=1, keepdims=True)
            counts = np.minimum(np.stack([rng.multinomial(4 * tokens, row) for row in about]), tokens)
            norm = self.norm * rng.lognormal(0, 0.4, counts.shape)
            used = np.where(counts > 0, norm, 0.0)
            found.append(
                {
                    "counts": counts,
                    "gate_sum": counts * 0.25,
                    "norm_sum": counts * norm,
                    "gated_norm_sum": counts * norm * 0.25,
                    "gated_norm_sq_sum": counts * (norm * 0.25) ** 2,
                    "norm_sq_sum": counts * norm**2,
                    "norm_max": used,
                    "total_tokens": np.full(N_LAYERS, tokens),
                }
            )
        return found


def profile_of(units: list[dict[str, Any]], n_parts: int = PARTS, model: dict[str, Any] = MODEL) -> Profile:
    made = Profile.from_sums(layers=range(N_LAYERS), **add_sums(units), model=model)
    parts = [(part_of(number), sums) for number, sums in enumerate(units)]
    return replace(made, replicates=Replicates.of(parts, n_parts))


def with_parts(seed: int = 0, n_units: int = 40, **options: Any) -> Profile:
    return profile_of(Source(seed).units(n_units, np.random.default_rng(seed)), **options)


# ---- parts


def test_units_are_dealt_out_evenly_and_not_in_a_pattern() -> None:
    dealt = [part_of(unit) for unit in range(1600)]
    for start in range(0, 1600, PARTS):
        assert sorted(dealt[start : start + PARTS]) == list(range(PARTS))
    every_fourth = Counter(dealt[::4])
    assert len(every_fourth) == PARTS
    assert max(every_fourth.values()) < 45  # 25 each by chance; four parts would have 100
    assert dealt[:16] == [part_of(unit) for unit in range(16)]


def test_the_deal_is_the_same_in_every_release() -> None:
    """Or profiles of two of them would not merge part by part, and a resume file would go on with other parts."""
    assert [part_of(unit) for unit in (*range(8), 16, 17, 1000)] == [13, 0, 12, 4, 10, 8, 9, 1, 10, 5, 1]


def test_parts_hold_what_their_units_added() -> None:
    units = Source().units(40, np.random.default_rng(0))
    profile = profile_of(units)
    assert profile.replicates is not None
    sums = profile.replicates.sums(profile)
    assert set(sums) == set(DEALT)
    for name in DEALT:
        for part in range(PARTS):
            mine = sum(unit[name] for number, unit in enumerate(units) if part_of(number) == part)
            np.testing.assert_allclose(sums[name][part], mine, atol=1e-5 * getattr(profile, name).max())


def test_parts_survive_their_file_to_the_last_bit(tmp_path: Path) -> None:
    profile = with_parts()
    again = Profile.load(profile.save(tmp_path / "p.json"))
    assert profile.replicates is not None
    assert again.replicates is not None
    for name in DEALT:
        assert np.array_equal(profile.replicates.shares[name], again.replicates.shares[name])
    assert again.stability() == profile.stability()
    assert again.to_dict() == profile.to_dict()


def test_merged_parts_are_those_of_all_units_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    every = [Source().units(32, rng) for _ in range(3)]
    profiles = [profile_of(units) for units in every]
    merged = merge(profiles)
    assert merged.to_dict()["replicates"] == merge(profiles[::-1]).to_dict()["replicates"]
    assert merged.replicates is not None
    sums = merged.replicates.sums(merged)
    for name in DEALT:
        for part in range(PARTS):
            mine = sum(unit[name] for units in every for number, unit in enumerate(units) if part_of(number) == part)
            np.testing.assert_allclose(sums[name][part], mine, atol=3e-5 * getattr(merged, name).max())
    fewer = merge([profiles[0], profile_of(every[1], 8)])
    assert fewer.replicates is not None
    assert fewer.replicates.n_parts == 8


def test_a_profile_without_parts_takes_them_from_what_it_is_merged_with() -> None:
    whole, without = with_parts(), replace(with_parts(1), replicates=None)
    for pair in ([whole, without], [without, whole]):
        merged = merge(pair)
        assert merged.replicates is None
        assert "replicates" not in merged.to_dict()
        with pytest.raises(UsageError, match=r"keeps no parts of its calibration.*merged with one.*profile again"):
            merged.stability()


def test_the_parts_of_a_large_profile_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts_of(seed: int) -> dict[int, dict[str, Any]]:
        units = Source(seed).units(PARTS, np.random.default_rng(seed))
        return {part_of(number): sums for number, sums in enumerate(units)}

    domains = {name: parts_of(seed) for seed, name in enumerate(("code", "law", "prose"))}
    whole: dict[str, Any] = {name: add_sums(list(parts.values())) for name, parts in domains.items()}
    plain = Profile.from_sums(layers=range(N_LAYERS), **add_sums(list(whole.values())), model=MODEL, domains=whole)

    def sizes(budget: float) -> list[int | None]:
        monkeypatch.setattr(replicates, "BUDGET", budget)
        made = with_replicates(plain, domains)
        found = [part.replicates for part in (made, *made.parts.values())]
        text = json.dumps([part.to_record() for part in found if part is not None])
        assert len(text) < 1.1 * budget + 4000
        return [None if part is None else part.n_parts for part in found]

    one = N_LAYERS * N_EXPERTS * len(DEALT) * 2 * 4 / 3  # bytes of one part
    assert sizes(64 * one) == [16] * 4
    assert sizes(63 * one) == [8] * 4
    assert sizes(16 * one) == [4] * 4
    assert sizes(15 * one) == [8, None, None, None]
    assert sizes(3 * one) == [None] * 4


# ---- what is kept


@pytest.mark.parametrize("n_groups", [1, 4])
def test_kept_as_the_plan_keeps(n_groups: int) -> None:
    rng = np.random.default_rng(n_groups)
    for _ in range(50):
        score = rng.integers(0, 6, (3, 16)).astype(float)
        score[rng.random(score.shape) < 0.1] = np.nan
        counts = rng.integers(0, 4, score.shape)
        mask = kept_by(score, counts, 8, n_groups)
        for row in range(3):
            assert tuple(np.flatnonzero(mask[row])) == select_experts(score[row], counts[row], 8, n_groups)


# ---- what is promised


@pytest.mark.parametrize("metric", ["reap", "weighted_ean_sum", "frequency", "msan"])
@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_another_profile_of_as_much_text_keeps_the_promise(metric: str, keep: float) -> None:
    rng = np.random.default_rng(5)
    source = Source(1)
    promised, observed = [], []
    for _ in range(30):
        one, other = (profile_of(source.units(64, rng)) for _ in range(2))
        promised.append(one.stability(keep, metric).overlap)
        observed.append(compare(one, other, keep=keep, metric=metric).overlap)
    print(f"{metric}, {keep:.0%}: promised {np.mean(promised):.1%}, observed {np.mean(observed):.1%}")
    assert 0.5 < np.mean(observed) < 0.99
    assert abs(np.mean(promised) - np.mean(observed)) < 0.03


def test_more_text_makes_a_choice_surer() -> None:
    rng = np.random.default_rng(2)
    units = Source(2).units(512, rng)
    overlaps = [profile_of(units[:n]).stability(0.25).overlap for n in (16, 64, 512)]
    assert overlaps == sorted(overlaps)
    assert overlaps[2] > overlaps[0] + 0.05


def test_a_stability_says_where_and_of_what() -> None:
    source, rng = Source(), np.random.default_rng(0)
    domains = {"code": source.units(20, rng), "law": source.units(2, rng)}
    every = [*domains["code"], *domains["law"]]
    plain = Profile.from_sums(
        layers=range(N_LAYERS),
        **add_sums(every),
        model=MODEL,
        domains={name: add_sums(units) for name, units in domains.items()},
    )
    parts: dict[str | None, dict[int, Any]] = {
        "code": {part: add_sums([u for n, u in enumerate(every[:20]) if part_of(n) == part]) for part in range(16)},
        "law": {part_of(20 + n): unit for n, unit in enumerate(domains["law"])},
    }
    found = with_replicates(plain, parts).stability(8, "frequency")
    assert (found.metric, found.keep) == ("frequency", 8)
    assert list(found.layers) == [0, 1, 2]
    assert found.overlap == pytest.approx(np.mean(list(found.layers.values())))
    assert found.lowest[0] <= found.overlap <= found.highest[0]
    assert found.layers[found.lowest[1]] == found.lowest[0]
    assert set(found.domains) == {"code"}  # two samples of law say nothing
    assert found.to_dict()["domains"] == {"code": found.domains["code"].overlap}
    assert json.loads(json.dumps(found.to_dict()))["layers"].keys() == {"0", "1", "2"}


def test_the_groups_of_a_router_choose_apart() -> None:
    grouped = with_parts(model=MODEL | {"n_groups": 4, "n_groups_used": 2})
    assert grouped.stability(16).overlap != with_parts().stability(16).overlap
    with pytest.raises(UsageError, match="cannot be shared equally"):
        grouped.stability(15)


def test_what_cannot_be_judged_is_said() -> None:
    with pytest.raises(UsageError, match="'random' does not depend on the text"):
        with_parts().stability(metric="random")
    with pytest.raises(UsageError, match="unknown metric 'loudness'"):
        with_parts().stability(metric="loudness")
    with pytest.raises(UsageError, match="from 4 samples on; here are 3"):
        with_parts(n_units=3).stability()
    with pytest.raises(UsageError, match="keeps no parts"):
        make_profile().stability()
    assert with_parts().stability(N_EXPERTS).overlap == 1


def test_a_sum_that_is_not_known_has_no_parts() -> None:
    units = Source().units(20, np.random.default_rng(0))
    for unit in units:
        del unit["norm_sq_sum"]
    made = Profile.from_sums(
        layers=range(N_LAYERS),
        **{name: sum(unit[name] for unit in units) for name in units[0] if name != "norm_max"},
        norm_max=np.maximum.reduce([unit["norm_max"] for unit in units]),
        model=MODEL,
    )
    profile = replace(made, replicates=Replicates.of([(part_of(n), unit) for n, unit in enumerate(units)]))
    assert "norm_sq_sum" not in profile.to_dict()["replicates"]
    assert 0 < profile.stability().overlap <= 1
    with pytest.raises(UsageError, match="'msan' needs norm_sq_sum"):
        profile.stability(metric="msan")


def test_a_domain_with_too_few_parts_fits_as_well() -> None:
    assert fit(make_profile(domains=("code",))).replicates is None


# ---- the file


def recode(record: dict[str, Any], key: str, change: Callable[[Any], Any]) -> None:
    values = np.frombuffer(base64.b64decode(record[key]), "<u2").copy()
    record[key] = base64.b64encode(change(values).tobytes()).decode()


def doubled(values: Any) -> Any:
    values[:40] = 60000
    return values


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.pop("parts"), 'replicates lacks "parts"'),
        (lambda r: r.update(parts=3), "parts should be an integer from 4 to 16"),
        (lambda r: r.pop("activation_counts"), 'lacks "activation_counts"'),
        (lambda r: r.update(gate_sum=[1, 2]), "gate_sum should be a string"),
        (lambda r: r.update(gate_sum="?"), "gate_sum should be base64"),
        (lambda r: recode(r, "norm_sum", lambda v: v[1:]), "norm_sum holds 3070 bytes, expected 3072"),
        (lambda r: recode(r, "norm_sum", doubled), "has shares of expert 0.*do not add up to a whole"),
    ],
)
def test_damaged_parts_are_refused(change: Any, sentence: str, tmp_path: Path) -> None:
    document = with_parts().to_dict()
    change(document["replicates"])
    (tmp_path / "p.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=sentence):
        Profile.load(tmp_path / "p.json")


def test_a_file_without_parts_opens(tmp_path: Path) -> None:
    document = with_parts().to_dict()
    del document["replicates"]
    (tmp_path / "p.json").write_text(json.dumps(document))
    assert Profile.load(tmp_path / "p.json").replicates is None


def test_random_sums_have_parts_too() -> None:
    """Of few units each part is a unit."""
    units = [random_sums(np.random.default_rng(seed), N_LAYERS, N_EXPERTS, tokens=30) for seed in range(6)]
    assert 0 < profile_of(units).stability(0.25, "weighted_ean_sum").overlap < 1
