"""scores.profile, profile_file, merging and comparing: the arrays, the metrics, the file, merging and comparing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.profiles import add_sums, from_scores, make_profile, random_sums, reference_document
from helpers.sums import COUNTS_AND_SUMS
from reap.errors import FormatError, MismatchError, OutputError, ReapWarning, UsageError
from reap.scores.comparing import compare
from reap.scores.merging import merge
from reap.scores.profile import METRICS, Profile
from reap.scores.records import ARRAYS, SUMS


def same(a: Profile, b: Profile) -> bool:
    names = (*COUNTS_AND_SUMS, "layers", "total_tokens")
    return (
        all(np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True) for name in names)
        and (a.model, a.calibration, a.engine, a.trusted, a.domains)
        == (b.model, b.calibration, b.engine, b.trusted, b.domains)
        and all(same(a.domain(name), b.domain(name)) for name in a.domains)
    )


# ---- metrics


def test_metrics_by_hand() -> None:
    profile = Profile.from_sums(
        layers=[2],
        total_tokens=[10],
        counts=np.array([[4, 0]]),
        gate_sum=np.array([[2.0, 0]]),
        norm_sum=np.array([[8.0, 0]]),
        gated_norm_sum=np.array([[6.0, 0]]),
        gated_norm_sq_sum=np.array([[36.0, 0]]),
        norm_sq_sum=np.array([[100.0, 0]]),
        norm_max=np.array([[3.0, 0]]),
        model={"n_experts": 2},
    )
    expected = {
        "reap": [1.5, np.nan],
        "weighted_ean_sum": [6.0, 0.0],
        "ean_sum": [8.0, 0.0],
        "ean_mean": [2.0, np.nan],
        "frequency": [0.4, 0.0],
        "gate_sum": [2.0, 0.0],
        "reap_l2": [3.0, np.nan],
        "msan": [5.0, np.nan],
    }
    for metric, row in expected.items():
        score = profile.score(metric)
        assert score.dtype == np.float64
        np.testing.assert_array_equal(score, [row], err_msg=metric)
    assert set(expected) | {"random"} == set(METRICS)


def test_random_is_seeded_by_seed_and_layer() -> None:
    profile = make_profile()
    assert np.array_equal(profile.score("random", seed=1), profile.score("random", seed=1))
    assert not np.array_equal(profile.score("random", seed=1), profile.score("random", seed=2))
    one_layer = make_profile(layers=(3,))
    assert np.array_equal(one_layer.score("random", seed=7)[0], profile.score("random", seed=7)[1])
    assert profile.score("random")[0].tolist() != profile.score("random")[1].tolist()
    with pytest.raises(UsageError, match="seed"):
        profile.score("random", seed=-1)


def test_unknown_metric_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"'loudness'.*reap.*random"):
        make_profile().score("loudness")


def test_score_is_a_copy() -> None:
    profile = make_profile()
    profile.score("ean_sum")[:] = -1
    assert (profile.norm_sum >= 0).all()


def test_unknown_domain() -> None:
    with pytest.raises(UsageError, match=r"'law'.*code, prose"):
        make_profile(domains=("prose", "code")).domain("law")


# ---- from_sums


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["gate_sum"].__setitem__((0, 7), 1.0), "layer 1: expert 7 was never routed to, yet its gate_sum"),
        (lambda s: s["norm_sum"].__setitem__((1, 0), np.nan), "layer 3: expert 0 has a norm_sum that is not finite"),
        (lambda s: s["gated_norm_sum"].__setitem__((1, 2), np.inf), "gated_norm_sum that is not finite"),
        (lambda s: s["gate_sum"].__setitem__((1, 2), -1.0), "negative gate_sum"),
        (lambda s: s["counts"].__setitem__((0, 0), -1), "count that cannot be"),
        (lambda s: s["counts"].__setitem__((0, 0), 201), "above the layer's total_tokens"),
        (lambda s: s["norm_max"].__setitem__((0, 0), 1e9), "norm_max above its norm_sum"),
        (lambda s: s.__setitem__("gate_sum", s["gate_sum"][:, :-1]), r"gate_sum should be \[2, 8\], found \[2, 7\]"),
    ],
)
def test_contradictory_sums_are_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    sums = random_sums(np.random.default_rng(0), 2, 8)
    change(sums)
    with pytest.raises(FormatError, match=message):
        Profile.from_sums(layers=[1, 3], **sums, model={"n_experts": 8})


def test_model_and_arrays_must_agree_on_experts() -> None:
    with pytest.raises(FormatError, match="8 experts where the model says 16"):
        make_profile(model={"n_experts": 16})


def test_domains_cannot_outnumber_the_whole() -> None:
    sums = random_sums(np.random.default_rng(0), 1, 8)
    with pytest.raises(FormatError, match="counted more often in its domains than in total"):
        Profile.from_sums(layers=[0], **sums, model={}, domains={"a": sums, "b": sums})


# ---- the file


def test_round_trip_is_exact(tmp_path: Path) -> None:
    profile = make_profile(domains=("prose", "code"))
    assert same(Profile.load(profile.save(tmp_path / "p.json")), profile)


def test_file_has_the_documented_keys(tmp_path: Path) -> None:
    profile = make_profile(domains=("code",))
    document = json.loads(profile.save(tmp_path / "p.json").read_text())
    assert list(document) == ["format", "version", "model", "calibration", "engine", "layers", "domains"]
    layer = document["layers"]["3"]
    assert list(layer) == [
        "total_tokens",
        "activation_counts",
        "activation_frequency",
        "avg_gate_weight",
        "ean_mean",
        "reap",
        "never_activated",
        "gate_sum",
        "norm_sum",
        "gated_norm_sum",
        "gated_norm_sq_sum",
        "norm_sq_sum",
        "norm_max",
    ]
    assert layer["reap"][7] == 0  # never routed to: 0 in the file, NaN in memory
    assert np.isnan(Profile.load(tmp_path / "p.json").score("reap")[1, 7])
    assert layer["never_activated"] == 1
    assert layer["avg_gate_weight"][0] == profile.gate_sum[1, 0] / profile.counts[1, 0]
    assert layer["activation_frequency"][0] == profile.counts[1, 0] / 200
    assert document["domains"]["code"]["layers"].keys() == document["layers"].keys()


def test_save_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_profile(0).save(tmp_path / "p.json")
    before = target.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match=r"p\.json: cannot be written: the disk is full"):
        make_profile(1).save(target)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_save_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        make_profile().save(tmp_path / "absent" / "p.json")


def test_save_goes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    make_profile().save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert same(Profile.load(tmp_path / "real.json"), make_profile())


def test_names_that_are_no_utf8_survive(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    profile = make_profile(calibration={"files": [name], "sha256": [], "samples": 1})
    assert Profile.load(profile.save(tmp_path / "p.json")).calibration["files"] == [name]


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def layer_key(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda d: d["layers"]["3"].__setitem__(key, value)


HOSTILE_EDITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.__setitem__("format", "reap.plan"), "format should be 'reap.profile', found 'reap.plan'"),
    (lambda d: d.__setitem__("version", 2), "version is 2; this release of reap reads version 1"),
    (lambda d: d.__setitem__("version", True), "version should be an integer, found true"),
    (lambda d: d.pop("model"), 'lacks "model"'),
    (lambda d: d["model"].pop("n_experts"), 'model lacks "n_experts"'),
    (lambda d: d["model"].__setitem__("n_experts", 10**15), "n_experts should be an integer from 1"),
    (lambda d: d["model"].__setitem__("n_groups", 3), "8 experts, which 3 groups cannot share"),
    (lambda d: d["model"].__setitem__("fingerprint", 3), "fingerprint should be a string, found the number 3"),
    (lambda d: d.__setitem__("layers", []), "layers should be an object, found a list"),
    (lambda d: d.__setitem__("layers", {}), "holds 0 layers"),
    (lambda d: d["layers"].__setitem__("01", d["layers"]["3"]), "layers: 01 is not a layer number"),
    (lambda d: d["layers"].__setitem__("-1", d["layers"]["3"]), "-1 is not a layer number"),
    (lambda d: d["layers"].__setitem__("9" * 5000, d["layers"]["3"]), "is not a layer number"),
    (layer_key("total_tokens", 1.5), "layer 3: total_tokens should be an integer, found the number 1.5"),
    (layer_key("total_tokens", -1), "layer 3: total_tokens should be an integer from 0"),
    (layer_key("activation_counts", [1] * 7), "layer 3: activation_counts has 7 entries where 8 were expected"),
    (
        layer_key("activation_counts", [1.0] * 8),
        r"layer 3: activation_counts\[0\] should be an integer, found the number 1.0",
    ),
    (layer_key("activation_counts", [True] * 8), r"activation_counts\[0\] should be an integer, found true"),
    (layer_key("activation_counts", [10**30] * 8), "activation_counts has a number that is too large"),
    (layer_key("gate_sum", ["1"] * 8), r"gate_sum\[0\] should be a number, found the string"),
    (layer_key("gate_sum", [None] * 8), r"gate_sum\[0\] should be a number, found null"),
    (layer_key("gate_sum", [-0.5] * 8), r"gate_sum\[0\] should not be negative"),
    (layer_key("gate_sum", [10**400] * 8), "gate_sum has a number that is too large"),
    (
        lambda d: d["layers"]["3"].pop("avg_gate_weight") and layer_key("gate_sum", [1e300] * 7 + [0])(d),
        "has a gate_sum above 1e.200",
    ),
    (lambda d: d["calibration"].__setitem__("sha256", None), "calibration: sha256 should be a list, found null"),
    (lambda d: d["calibration"].__setitem__("files", [1]), r"calibration: files\[0\] should be a string"),
    (lambda d: d["calibration"].__setitem__("tokens", "9"), "calibration: tokens should be an integer"),
    (layer_key("norm_max", [0.0] * 7 + [1.0]), "expert 7 was never routed to, yet its norm_max"),
    (layer_key("reap", [5.0] * 8), r"layer 3: reap\[0\] is 5, but gated_norm_sum gives .* scores are made of the sums"),
    (layer_key("never_activated", 0), "never_activated is 0, but 1 experts have a count of 0"),
    (lambda d: d["layers"]["3"].pop("gated_norm_sum"), 'layer 3 lacks "gated_norm_sum"'),
    (
        lambda d: d.__setitem__("domains", {"x": {"layers": {"3": d["layers"]["3"]}}}),
        "domain 'x': its layers are not those",
    ),
    (
        lambda d: d.__setitem__("domains", {"x": {"layers": d["layers"]}, "y": {"layers": d["layers"]}}),
        "more often in its domains",
    ),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE_EDITS, ids=[message[:40] for _, message in HOSTILE_EDITS])
def test_a_wrong_field_is_one_clear_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = edit(make_profile().save(tmp_path / "p.json"), change)
    with pytest.raises(FormatError, match=message) as caught:
        Profile.load(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is an empty file"),
        (b"{", "is not JSON"),
        (b"[]", "should be an object, found a list"),
        (b"{}", "is not a profile"),
        (b'{"a": 1}', "is not a profile"),
        (b'{"format": "reap.profile", "format": "reap.profile"}', "the key format appears twice"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (b'{"format": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"format": 1e999}', "does not fit a double"),
        (b'{"format": ' + b"9" * 100_000 + b"}", "number|string"),
        (b'{"a":' * 100_000 + b"}" * 100_000, "nested too deeply"),
        (b"[" * 50_000, "nested too deeply"),
        (b"[" * 1_000_000, "has 1,000,000 lists and objects, more than 100,000; no profile of reap has as many"),
        (b"\xff\xfe{}", "is a text file \\(UTF-16\\)"),
        (b'{"0": {"activation_counts": []}}', "have no experts"),
        (b'{"0": {"activation_counts": [1]}}', 'layer 0 lacks "total_tokens"'),
        (b'{"0": 5}', "layer 0 should be an object"),
    ],
)
def test_hostile_bytes_are_format_errors(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text)
    with pytest.raises(FormatError, match=message) as caught:
        Profile.load(path)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_missing_file_is_a_wrong_call(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.json: cannot read the profile: No such file"):
        Profile.load(tmp_path / "absent.json")
    with pytest.raises(UsageError, match="Is a directory"):
        Profile.load(tmp_path)


def test_oversized_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_profile().save(tmp_path / "p.json")
    monkeypatch.setattr("reap.files.strict_json.MAX_BYTES", 100)
    with pytest.raises(FormatError, match=r"is larger than .* REAP_LARGE_FILES=1 reads it"):
        Profile.load(path)
    monkeypatch.setattr("reap.files.strict_json.MAX_BYTES", path.stat().st_size // 2)
    monkeypatch.setenv("REAP_LARGE_FILES", "1")
    assert Profile.load(path).counts.sum() > 0


def test_what_cannot_be_read_again_is_said_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reap.files.strict_json.MAX_VALUES", 10)
    with pytest.warns(ReapWarning, match=r"p\.json: .* REAP_LARGE_FILES=1"):
        path = make_profile().save(tmp_path / "p.json")
    with pytest.raises(FormatError, match="values, more than 10; no profile"):
        Profile.load(path)


# ---- the reference profiler's files


def load_reference(path: Path, document: dict[str, Any]) -> Profile:
    path.write_text(json.dumps(document))
    with pytest.warns(ReapWarning, match="not to be trusted"):
        return Profile.load(path)


def test_reference_file_opens_untrusted(tmp_path: Path) -> None:
    profile = load_reference(tmp_path / "ref.json", reference_document())
    assert not profile.trusted
    assert profile.layers.tolist() == [0, 2]
    np.testing.assert_array_equal(profile.score("reap")[0], [0.5, 0.5, 2.0, np.nan])
    np.testing.assert_array_equal(profile.norm_sum[0], [4.0, 6.0, 6.0, 0.0])
    np.testing.assert_array_equal(profile.score("frequency")[0], [0.4, 0.3, 0.2, 0.0])
    with pytest.raises(UsageError, match=r"needs gated_norm_sq_sum, .*file of llama-expert-profile"):
        profile.score("reap_l2")


def test_reference_file_stays_untrusted_when_saved(tmp_path: Path) -> None:
    load_reference(tmp_path / "ref.json", reference_document()).save(tmp_path / "own.json")
    assert "norm_max" not in json.loads((tmp_path / "own.json").read_text())["layers"]["0"]
    with pytest.warns(ReapWarning, match="not to be trusted"):
        again = Profile.load(tmp_path / "own.json")
    assert not again.trusted


def test_reference_files_do_not_mix_with_ours(tmp_path: Path) -> None:
    reference = load_reference(tmp_path / "ref.json", reference_document())
    ours = from_scores([[1, 2, 3, 4]] * 2)
    with pytest.raises(MismatchError, match="different MoE layers"):
        merge([ours, reference])
    document = reference_document()
    document["1"] = document.pop("2")
    with pytest.raises(MismatchError, match="cannot be merged with a profile of reap"):
        merge([ours, load_reference(tmp_path / "ref.json", document)])
    merged = merge([reference, reference])
    assert merged.counts[0].tolist() == [8, 6, 4, 0]
    assert not merged.trusted


def of_an_earlier_release(path: Path, **options: Any) -> Path:
    """A profile's file without what came later."""
    document = make_profile(**options).to_dict()
    for part in (document, *document["domains"].values()):
        for layer in part["layers"].values():
            del layer["norm_sq_sum"]
    path.write_text(json.dumps(document))
    return path


def test_a_file_of_an_earlier_release_opens_and_refuses_what_it_lacks(tmp_path: Path) -> None:
    old = Profile.load(of_an_earlier_release(tmp_path / "old.json", domains=("code", "prose")))
    new = make_profile(domains=("code", "prose"))
    assert new.metrics == METRICS
    for profile, other in ((old, new), (old.domain("code"), new.domain("code"))):
        assert profile.metrics == tuple(name for name in METRICS if name != "msan")
        with pytest.raises(UsageError, match=r"'msan' needs norm_sq_sum.*one of an earlier release.*profile again"):
            profile.score("msan")
        for name in profile.metrics:
            assert np.array_equal(profile.score(name), other.score(name), equal_nan=True)
    assert same(Profile.load(old.save(tmp_path / "again.json")), old)
    assert "norm_sq_sum" not in json.loads((tmp_path / "again.json").read_text())["layers"]["1"]


def test_what_one_of_merged_profiles_lacks_the_merged_one_lacks(tmp_path: Path) -> None:
    old, new = Profile.load(of_an_earlier_release(tmp_path / "old.json")), make_profile(1)
    for pair in ([old, new], [new, old]):
        merged = merge(pair)
        assert "msan" not in merged.metrics
        np.testing.assert_array_equal(merged.gated_norm_sum, old.gated_norm_sum + new.gated_norm_sum)
        assert same(Profile.load(merged.save(tmp_path / "merged.json")), merged)
    twice = merge([new, make_profile(1, calibration={"samples": 3})])
    np.testing.assert_array_equal(twice.norm_sq_sum, 2 * new.norm_sq_sum)


def test_a_sum_that_some_layers_lack_is_refused(tmp_path: Path) -> None:
    document = make_profile().to_dict()
    del document["layers"]["3"]["norm_sq_sum"]
    (tmp_path / "p.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match="layer 3: expert 0 has a norm_sq_sum that is not finite"):
        Profile.load(tmp_path / "p.json")


def test_of_takes_a_profile_or_its_file(tmp_path: Path) -> None:
    profile = make_profile()
    assert Profile.of(profile) is profile
    assert same(Profile.of(profile.save(tmp_path / "p.json")), profile)
    assert same(Profile.of(str(tmp_path / "p.json")), profile)


def test_from_sums_says_which_array_is_missing_or_unknown() -> None:
    sums = random_sums(np.random.default_rng(0), 1, 4)
    with pytest.raises(TypeError, match="no argument 'gate'"):
        Profile.from_sums(layers=[0], **sums, gate=sums["gate_sum"], model={})
    del sums["norm_max"]
    with pytest.raises(TypeError, match="missing norm_max"):
        Profile.from_sums(layers=[0], **sums, model={})


def test_the_sums_are_spelled_once() -> None:
    fields = [field.name for field in dataclasses.fields(Profile)]
    assert fields[fields.index("counts") + 1 : fields.index("model")] == list(SUMS)
    assert set(ARRAYS) == {"counts", "total_tokens", *SUMS}
    assert ("counts", *SUMS) == COUNTS_AND_SUMS


# ---- merge


def test_merge_equals_one_profile_of_all_tokens() -> None:
    rng = np.random.default_rng(3)
    parts = [random_sums(rng, 2, 8) for _ in range(3)]
    profiles = [
        Profile.from_sums(layers=[0, 1], **part, model={"n_experts": 8}, calibration={"files": [str(i)], "samples": i})
        for i, part in enumerate(parts)
    ]
    merged = merge(profiles)
    whole = Profile.from_sums(layers=[0, 1], **add_sums(parts), model={"n_experts": 8})
    assert np.array_equal(merged.counts, whole.counts)
    assert np.array_equal(merged.total_tokens, whole.total_tokens)
    assert np.array_equal(merged.norm_max, whole.norm_max)
    np.testing.assert_allclose(merged.gated_norm_sum, whole.gated_norm_sum, rtol=1e-15)
    assert merged.calibration == {"files": ["0", "1", "2"], "samples": 3}
    again = merge(reversed(profiles))
    assert all(np.array_equal(getattr(merged, name), getattr(again, name)) for name in COUNTS_AND_SUMS)


def test_merge_of_one_changes_nothing() -> None:
    profile = make_profile(domains=("code", "prose"))
    assert same(merge([profile]), profile)


def test_merge_joins_domains_by_name(tmp_path: Path) -> None:
    a, b = make_profile(1, domains=("code", "law")), make_profile(2, domains=("code",))
    b.save(tmp_path / "b.json")
    merged = merge([a, tmp_path / "b.json"])
    assert merged.domains == ("code", "law")
    assert np.array_equal(merged.domain("code").counts, a.domain("code").counts + b.domain("code").counts)
    assert np.array_equal(merged.domain("law").counts, a.domain("law").counts)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(n_experts=16), "8 experts and 16"),
        (dict(layers=(1, 2)), "different MoE layers: 1, 3 and 1, 2"),
        (dict(model={"fingerprint": "sha256:1"}), "different models: tiny .* and tiny"),
    ],
)
def test_merge_refuses_another_model(other: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        merge([make_profile(1), make_profile(2, **other)])


def test_merge_adds_what_was_left_out() -> None:
    records = [
        {"skipped": 2, "skipped_lines": ["a:1", "a:2"], "failed": 1, "failed_samples": ["a:3: why"]},
        {"skipped": 3, "skipped_lines": ["b:1"], "failed": 2, "failed_samples": ["b:2: why", "b:4: why"]},
    ]
    merged = merge([make_profile(seed, calibration=record) for seed, record in enumerate(records)]).calibration
    assert (merged["skipped"], merged["failed"]) == (5, 3)
    assert merged["skipped_lines"] == ["a:1", "a:2", "b:1"]
    assert merged["failed_samples"] == ["a:3: why", "b:2: why", "b:4: why"]


def test_merge_adds_what_was_counted_by_name() -> None:
    records: list[dict[str, Any]] = [
        {"shapes": {"text": 3, "messages": 1}, "skipped_reasons": {"no text": 1}},
        {"shapes": {"text": 3, "messages": 1}, "skipped_reasons": {"not JSON": 2}},
    ]
    merged = merge([make_profile(seed, calibration=record) for seed, record in enumerate(records)]).calibration
    assert merged["shapes"] == {"text": 6, "messages": 2}
    assert merged["skipped_reasons"] == {"not JSON": 2, "no text": 1}


def test_merge_of_nothing() -> None:
    with pytest.raises(UsageError, match="at least one"):
        merge([])


def test_merge_warns_of_the_same_text_twice() -> None:
    with pytest.warns(ReapWarning, match="same calibration file"):
        merge([make_profile(1), make_profile(1)])


def test_merge_warns_of_other_routers() -> None:
    a, b = (make_profile(seed, model={"router_fingerprint": f"sha256:{seed}"}) for seed in (1, 2))
    with pytest.warns(ReapWarning, match="routers differ"):
        merged = merge([a, b])
    assert "router_fingerprint" not in merged.model


# ---- compare


def test_compare_with_itself() -> None:
    result = compare(make_profile(), make_profile(), keep=4)
    assert (result.spearman, result.overlap, result.jaccard, result.keep) == (pytest.approx(1.0), 1.0, 1.0, 4)


def test_compare_by_hand() -> None:
    a, b = from_scores([[1, 2, 3, 4]]), from_scores([[1, 4, 3, 2]])
    result = compare(a, b, keep=0.5)
    # ranks 0 1 2 3 against 0 3 2 1: 1 - 6·(0 + 4 + 0 + 4) / (4·15)
    assert result.layers[0].spearman == pytest.approx(0.2)
    assert (result.layers[0].overlap, result.layers[0].jaccard) == (0.5, 1 / 3)


def test_compare_averages_the_ranks_of_ties() -> None:
    result = compare(from_scores([[1, 1, 2, 3]]), from_scores([[1, 2, 2, 3]]))
    # ranks .5 .5 2 3 against 0 1.5 1.5 3: covariance 3.75 + .25·... worked out with fractions: 15/18
    assert result.spearman == pytest.approx(15 / 18)


def test_compare_puts_never_routed_experts_last() -> None:
    a = from_scores([[1, 2, 3, 0]], [[1, 1, 1, 0]])
    b = from_scores([[1, 2, 3, 0.5]])
    assert compare(a, b, keep=2).spearman == pytest.approx(1.0)


def test_compare_of_equal_scores_has_no_correlation() -> None:
    result = compare(from_scores([[1, 1, 1, 1]]), from_scores([[1, 2, 3, 4]]))
    assert np.isnan(result.spearman)
    document = result.to_dict()
    assert document["spearman"] is None
    assert json.loads(json.dumps(document, allow_nan=False))["layers"][0]["layer"] == 0


def test_compare_refuses_another_model() -> None:
    with pytest.raises(MismatchError, match="different models"):
        compare(make_profile(), make_profile(model={"fingerprint": "sha256:1"}))


def test_the_two_forms_of_a_model_compare_but_do_not_add_up() -> None:
    checkpoint = make_profile(model={"fingerprint": "hf-sha256:" + "1" * 64, "n_experts_used": 2})
    assert compare(make_profile(), checkpoint).overlap == 1
    with pytest.raises(MismatchError, match="different models"):
        merge([make_profile(), checkpoint])
    with pytest.raises(MismatchError, match="n_experts_used is 2 in tiny and 3 in tiny"):
        compare(make_profile(), make_profile(model={"fingerprint": "hf-sha256:" + "1" * 64, "n_experts_used": 3}))
