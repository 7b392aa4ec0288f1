"""scores.plan and scores.ranking: how many experts are kept, which ones, and the plan's file."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.profiles import add_sums, from_scores, make_profile, reference_document
from helpers.sums import COUNTS_AND_SUMS
from reap.errors import FormatError, ReapWarning, UsageError
from reap.scores.plan import PrunePlan, fused_router_counts, plan, resolve_keep, router_warning, super_experts
from reap.scores.profile import METRICS, Profile
from reap.text.overlap import Sketch, overlap_warnings

# ---- how many


@pytest.mark.parametrize(
    ("keep", "n_experts", "n_groups", "expected"),
    [
        (0.20, 128, 1, 26),  # 25.6
        (0.5, 5, 1, 3),  # 2.5: halves up
        (0.29, 50, 1, 15),  # 14.5 in decimal, 14.499999999999998 in binary
        (1.0, 64, 1, 64),
        (1, 64, 1, 1),
        (np.int64(26), 128, 1, 26),
        (np.float64(0.5), 8, 1, 4),
        (0.5, 64, 8, 32),
        (0.45, 64, 8, 32),  # 28.8: nearest multiple of 8
        (0.4375, 64, 8, 32),  # 28 lies between 24 and 32: halves up
        (0.4, 64, 8, 24),
        (0.99, 64, 8, 64),
        (24, 64, 8, 24),
    ],
)
def test_resolve_keep(keep: Any, n_experts: int, n_groups: int, expected: int) -> None:
    number = resolve_keep(keep, n_experts, n_groups)
    assert number == expected
    assert type(number) is int


@pytest.mark.parametrize(
    ("keep", "n_groups", "message"),
    [
        (0, 1, "keep 0 is not between 1 and the model's 64"),
        (-3, 1, "keep -3"),
        (65, 1, "keep 65"),
        (0.0, 1, r"keep 0\.0"),
        (-0.5, 1, r"keep -0\.5"),
        (1.5, 1, r"keep 1\.5"),
        (float("nan"), 1, "keep nan"),
        (float("inf"), 1, "keep inf"),
        (0.001, 1, "rounds to none"),
        (True, 1, "found True"),
        (False, 1, "found False"),
        ("0.5", 1, "found '0.5'"),
        (None, 1, "found None"),
        (26, 8, "cannot be shared equally by the router's 8 groups; 24 and 32 can"),
        (8, 8, "needs at least 2 in each: 16 or more"),
        (0.1, 8, "needs at least 2 in each: 16 or more"),
    ],
)
def test_resolve_keep_refuses(keep: Any, n_groups: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_keep(keep, 64, n_groups)


@given(st.floats(0.001, 1.0), st.integers(1, 512))
def test_a_fraction_is_rounded_by_less_than_one(keep: float, n_experts: int) -> None:
    try:
        number = resolve_keep(keep, n_experts)
    except UsageError:
        assert keep * n_experts <= 0.5
    else:
        assert abs(number - keep * n_experts) <= 0.5 + 1e-9


def test_fewer_than_the_router_chooses() -> None:
    profile = make_profile(model={"n_experts_used": 4})
    with pytest.raises(UsageError, match="keep 3 is fewer than the 4 experts"):
        plan(profile, keep=3)
    assert plan(profile, keep=4).keep == 4


def test_reachable_groups_must_hold_enough() -> None:
    model = {"n_experts_used": 4, "n_groups": 4, "n_groups_used": 1}
    profile = make_profile(n_experts=16, model=model)
    with pytest.raises(
        UsageError, match=r"leaves 2 experts in each of 4 groups; the 1 groups .* hold 2, fewer than the 4"
    ):
        plan(profile, keep=8)
    assert plan(profile, keep=16).keep == 16


# ---- which


def test_best_scores_stay() -> None:
    result = plan(from_scores([[4, 1, 3, 2], [1, 2, 3, 4]]), keep=2)
    assert result.layers == {0: (0, 2), 1: (2, 3)}
    assert result.removed(0) == (1, 3)
    assert result.n_experts == 4


def test_never_routed_is_last_even_behind_zero() -> None:
    result = plan(from_scores([[0, 0, 5, 0]], [[1, 0, 1, 0]]), keep=2)
    assert result.layers[0] == (0, 2)


def test_ties_go_to_the_count_then_to_the_lower_id() -> None:
    profile = from_scores([[1, 1, 1, 1, 1]], [[1, 2, 4, 2, 1]])
    assert [plan(profile, keep=n).layers[0] for n in range(1, 6)] == [
        (2,),
        (1, 2),
        (1, 2, 3),
        (0, 1, 2, 3),
        (0, 1, 2, 3, 4),
    ]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("blend", "model"), [("sum", {}), ("maxmin", {}), ("sum", {"n_groups": 2}), ("maxmin", {"n_groups": 2})]
)
def test_plans_are_nested_and_deterministic(metric: str, blend: str, model: dict[str, Any]) -> None:
    profile = make_profile(5, n_experts=12, domains=("a", "b", "c"), model=model)
    protect = "1:3,3:11"
    plans = [plan(profile, keep=n, metric=metric, blend=blend, protect=protect, seed=9) for n in (4, 6, 8, 10, 12)]
    for small, large in pairwise(plans):
        for layer, kept in small.layers.items():
            assert set(kept) < set(large.layers[layer])
    for result in plans:
        assert 3 in result.layers[1]
        assert 11 in result.layers[3]
        assert all(list(kept) == sorted(set(kept)) and len(kept) == result.keep for kept in result.layers.values())
        if model:
            assert all(sum(expert < 6 for expert in kept) * 2 == result.keep for kept in result.layers.values())
    assert plans[0] == plan(profile, keep=4, metric=metric, blend=blend, protect=protect, seed=9)


def test_groups_keep_equally_many() -> None:
    result = plan(from_scores([[8, 7, 6, 5, 4, 3, 2, 1]], n_groups=2), keep=4)
    assert result.layers[0] == (0, 1, 4, 5)


# ---- protect


@pytest.mark.parametrize(
    "protect", ["0:3,1:0", ["0:3", "1:0"], [(0, 3), (1, 0)], ["0:3, 1:0,"], [(np.int64(0), 3), "1:0"]]
)
def test_protected_experts_stay(protect: Any) -> None:
    profile = from_scores([[4, 3, 2, 1], [1, 2, 3, 4]])
    result = plan(profile, keep=2, protect=protect)
    assert result.layers == {0: (0, 3), 1: (0, 3)}
    assert result.options["protected"] == {"0": [3], "1": [0]}


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        ("7:0", "layer 7 is not a MoE layer of the profile, which has 0, 1"),
        ("0:4", "layer 0 has experts 0 to 3, no 4"),
        ("0:0,0:1,0:2", "layer 0 has 3 protected experts, but every layer keeps 2"),
        ("1", "layer 1 has 4 protected experts, but every layer keeps 2"),
        ("0;1", "neither LAYER:ID nor LAYER"),
        ("0:1:2", "neither LAYER:ID nor LAYER"),
        ("-1:2", "neither LAYER:ID nor LAYER"),
        ([3], "neither LAYER:ID, LAYER nor a pair"),
        ([(0, 1, 2)], "neither LAYER:ID, LAYER nor a pair"),
        ([(0, -1)], "no -1"),
    ],
)
def test_protect_refuses(protect: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(from_scores([[4, 3, 2, 1], [1, 2, 3, 4]]), keep=2, protect=protect)


def test_protecting_a_layer_is_fine_where_all_stay() -> None:
    assert plan(from_scores([[1, 2]]), keep=2, protect="0").layers[0] == (0, 1)


def test_protected_beyond_a_group() -> None:
    with pytest.raises(UsageError, match="3 protected experts in one group of the router, which keeps 2"):
        plan(from_scores([[1] * 8], n_groups=2), keep=4, protect="0:0,0:1,0:2")


# ---- domains


def domain_profile(a: list[float], b: list[float]) -> Profile:
    parts = {"a": from_scores([a]), "b": from_scores([b])}
    arrays = {
        name: {key: getattr(part, key) for key in ("total_tokens", *COUNTS_AND_SUMS)} for name, part in parts.items()
    }
    return Profile.from_sums(layers=[0], **add_sums(list(arrays.values())), model={"n_experts": len(a)}, domains=arrays)


def test_maxmin_serves_the_worst_served_domain() -> None:
    # "a" is loud: pooled, its experts 0 to 3 win every place; "b" lives in expert 4
    profile = domain_profile([100, 90, 80, 70, 1, 1], [1, 1, 1, 1, 20, 1])
    assert plan(profile, keep=3).layers[0] == (0, 1, 2)
    assert plan(profile, keep=3, blend="maxmin").layers[0] == (0, 1, 4)


def test_maxmin_needs_domains() -> None:
    with pytest.raises(UsageError, match="needs domains"):
        plan(make_profile(), keep=4, blend="maxmin")


def test_unknown_blend_and_metric() -> None:
    with pytest.raises(UsageError, match=r"'mean'.*sum, maxmin"):
        plan(make_profile(), keep=4, blend="mean")
    with pytest.raises(UsageError, match="unknown metric"):
        plan(make_profile(), keep=4, metric="x")


# ---- super experts


def test_super_experts_are_found_and_protected() -> None:
    scores = np.random.default_rng(0).uniform(1, 2, (4, 16))
    scores[2, 5] = 400.0
    counts = np.full((4, 16), 1)
    profile = from_scores(scores.tolist(), counts.tolist())
    found = super_experts(profile)
    assert [(item.layer, item.expert, item.norm_max) for item in found] == [(2, 5, 400.0)]
    assert found[0].ratio > 100
    result = plan(profile, keep=2, metric="random", protect_super_experts=True)
    assert result.options["protected"] == {"2": [5]}
    assert 5 in result.layers[2]


def test_super_experts_are_reported_though_not_protected() -> None:
    scores = np.random.default_rng(0).uniform(1, 2, (4, 16))
    scores[2, 5] = 400.0
    profile = from_scores(scores.tolist())
    [found] = plan(profile, keep=2, metric="reap").options["super_experts"]
    assert (found["layer"], found["expert"], found["norm_max"], found["kept"]) == (2, 5, 400.0, True)
    random = [plan(profile, keep=2, metric="random", seed=seed) for seed in range(20)]
    for made in random:
        assert made.options["protected"] == {}
        assert made.options["super_experts"][0]["kept"] == (5 in made.layers[2])
    assert len({made.options["super_experts"][0]["kept"] for made in random}) == 2


def test_an_even_model_has_no_super_experts(tmp_path: Path) -> None:
    assert super_experts(make_profile(n_experts=64)) == ()
    made = plan(make_profile(), keep=4)
    assert made.options["super_experts"] == []
    assert PrunePlan.load(made.save(tmp_path / "p.json")) == made


# ---- the file


def test_plan_file_round_trip(tmp_path: Path) -> None:
    result = plan(make_profile(), keep=0.5, protect="1:0")
    assert PrunePlan.load(result.save(tmp_path / "plan.json")) == result
    assert result.calibration_sha256 == ("0" * 64,)
    assert result.fingerprint == "sha256:" + "0" * 64
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["format"] == "reap.plan"
    assert document["keep"] == 4
    assert document["layers"]["1"]["kept"] == list(result.layers[1])


def test_a_plan_carries_the_sketch_of_its_calibration(tmp_path: Path) -> None:
    sketch = Sketch()
    sketch.add(range(100))
    made = plan(make_profile(calibration={"files": ["a"], "sketch": sketch.to_dict(), "samples": 3}), keep=4)
    saved = PrunePlan.of(made.save(tmp_path / "plan.json"))
    assert saved.calibration == {"files": ["a"], "sketch": sketch.to_dict()}
    assert PrunePlan.of(made) is made
    assert overlap_warnings({"t": "0"}, range(50, 100), saved.calibration)
    assert not overlap_warnings({"t": "0"}, range(1000, 1050), saved.calibration)


def test_plan_takes_a_path(tmp_path: Path) -> None:
    path = make_profile().save(tmp_path / "p.json")
    assert plan(path, keep=4) == plan(make_profile(), keep=4)


def test_plan_of_a_reference_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "ref.json").write_text(json.dumps(reference_document()))
    with pytest.warns(ReapWarning):
        result = plan(tmp_path / "ref.json", keep=2)
    assert result.layers == {0: (0, 2), 2: (0, 1)}
    assert result.options["trusted"] is False
    assert result.fingerprint is None
    assert PrunePlan.load(result.save(tmp_path / "plan.json")) == result
    with pytest.warns(ReapWarning), pytest.raises(UsageError, match="norm_max"):
        plan(tmp_path / "ref.json", keep=2, protect_super_experts=True)


def kept(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda d: d["layers"]["3"].__setitem__("kept", value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (kept([0, 1, 2]), 'layer 3: kept lists 3 experts where "keep" says 4'),
        (kept([0, 1, 2, 2]), "layer 3: kept should ascend without repeats, but 2 follows 2"),
        (kept([0, 2, 1, 3]), "but 1 follows 2"),
        (kept([0, 1, 2, 8]), "names expert 8, but the model's experts are 0 to 7"),
        (kept([-3, 0, 1, 2]), r"kept\[0\] should not be negative"),
        (kept([0, 1, 2, 3.5]), r"kept\[3\] should be an integer, found the number 3\.5"),
        (kept([0, 1, 2, True]), r"kept\[3\] should be an integer, found true"),
        (kept([]), "lists 0 experts"),
        (kept("all"), "should be a list, found the string"),
        (lambda d: d["layers"].clear(), "holds 0 layers"),
        (lambda d: d["layers"]["3"].pop("kept"), 'layer 3 lacks "kept"'),
        (lambda d: d.__setitem__("keep", 9), "keep should be an integer from 1 to 8, found 9"),
        (lambda d: d.__setitem__("keep", 1), "keep cannot be: keep 1 is fewer than the 2 experts"),
        (lambda d: d.__setitem__("keep", 0.5), "keep should be an integer, found the number 0.5"),
        (lambda d: d.__setitem__("metric", 1), "metric should be a string"),
        (lambda d: d["model"].__setitem__("n_groups", 2), r"keeps \[\d, \d\] experts in the router's 2 groups"),
        (lambda d: d["calibration"].__setitem__("sha256", [1]), r"sha256\[0\] should be a string"),
        (lambda d: d.__setitem__("format", "reap.profile"), "format should be 'reap.plan'"),
    ],
)
def test_a_wrong_edit_is_one_clear_error(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = plan(from_scores_of_groups(), keep=4).save(tmp_path / "plan.json")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(FormatError, match=message) as caught:
        PrunePlan.load(path)
    assert str(caught.value).startswith(str(path))


def from_scores_of_groups() -> Profile:
    """Layers 0 to 3 whose best four experts are 0, 1, 2 and 7."""
    return from_scores([[9, 8, 7, 1, 1, 1, 1, 9]] * 4, n_experts_used=2)


# ---- the router of a GPU


def test_fused_router_counts() -> None:
    assert fused_router_counts(128) == (1, 2, 4, 8, 16, 32, 64, 128)
    assert fused_router_counts(1000)[-3:] == (288, 512, 576)


def test_router_warning_names_the_nearest() -> None:
    assert router_warning(64, 128) is None
    assert "32 or 64 would" in str(router_warning(48, 128))
    assert "256 or 288" in str(router_warning(280, 512))
    assert router_warning(48, 160) is None  # the source runs without it as well
