"""Layers whose experts are chosen by token id (DeepSeek-V4's first ones): counts follow from the table in the file,
sums from the graph."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import reap
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from helpers.architectures import N_EXPERTS, write_model
from helpers.graph_oracle import Sums, dump, read_routing
from helpers.llama_tools import require_tool
from helpers.rewrite import rewrite
from helpers.sums import SUMS
from reap.engine.options import EngineOptions
from reap.engine.session import open_session
from reap.errors import MismatchError, ReapWarning, UnsupportedModelError, UsageError
from reap.evaluation import plan_evaluator
from reap.evaluation.plan_evaluator import PlanEvaluator
from reap.scores.hash_routing import Substitutes, read_record
from reap.scores.profile import Profile
from reap.text.evaluation_text import EvaluationText

N_HASHED = 2
OPTIONS = {"type_k": "f32", "type_v": "f32", "flash_attn": "off", "threads": 1, "ctx_size": 128}
EXACT = 'type_k="f32", type_v="f32", flash_attn="off", threads=1, ctx_size=128'


def write_hashed(source: Path, target: Path) -> np.ndarray:
    """The same model with its first layers routed by a table, int32 [n_layers hashed, n_vocab, n_used]."""
    reader = GGUFReader(source)
    n_vocab = next(len(tensor.data) for tensor in reader.tensors if tensor.name == "token_embd.weight")
    rng = np.random.default_rng(11)
    pairs = [rng.choice(N_EXPERTS, 2, replace=False) for _ in range(N_HASHED * n_vocab)]
    table = np.array(pairs, dtype=np.int32).reshape(N_HASHED, n_vocab, 2)
    writer = GGUFWriter(target, "deepseek4")
    for key, pair in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = N_HASHED if key == "deepseek4.hash_layer_count" else pair.contents()
            if pair.types[0] != GGUFValueType.ARRAY or len(value):
                writer.add_key_value(key, value, pair.types[0], sub_type=pair.types[1] if len(pair.types) > 1 else None)
    for tensor in reader.tensors:
        if not any(tensor.name.startswith(f"blk.{layer}.exp_probs_b") for layer in range(N_HASHED)):
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for layer in range(N_HASHED):
        writer.add_tensor(f"blk.{layer}.ffn_gate_tid2eid.weight", table[layer], raw_dtype=GGMLQuantizationType.I32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return table


def test_counts_follow_the_table_and_sums_the_graph(tmp_path: Path) -> None:
    program, oracle = require_tool("test-llama-archs"), require_tool("reap-dump-nodes")
    plain = write_model(program, "deepseek4", tmp_path)
    hashed = tmp_path / "hashed.gguf"
    table = write_hashed(plain, hashed)
    samples = np.random.default_rng(2).integers(0, 100, (6, 16)).tolist()

    # in a process of its own: a failed assertion of llama.cpp would end this one
    lines = [{"tokens": tokens} for tokens in samples]
    code = f"import reap; reap.profile({str(hashed)!r}, {lines!r}, {EXACT}).save({str(tmp_path / 'p.json')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = Profile.load(tmp_path / "p.json")

    for layer in range(N_HASHED):
        expected = np.zeros(N_EXPERTS, dtype=np.int64)
        for tokens in samples:
            for token in tokens:
                expected[table[layer, token]] += 1
        assert found.counts[found.row(layer)].tolist() == expected.tolist()
    assert found.total_tokens.tolist() == [96] * found.n_layers

    sums = {int(layer): Sums(N_EXPERTS) for layer in found.layers}
    for tokens, nodes in zip(samples, dump(oracle, hashed, samples, tmp_path), strict=True):
        for layer, total in sums.items():
            total.add(read_routing(nodes, layer, len(tokens), gate_first=False))
    for layer in range(N_HASHED):
        for name in SUMS:
            np.testing.assert_allclose(
                getattr(found, name)[found.row(layer)], sums[layer].arrays[name], rtol=1e-5, err_msg=name
            )


@pytest.fixture(scope="module")
def hashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hashed")
    write_hashed(write_model(require_tool("test-llama-archs"), "deepseek4", folder), folder / "hashed.gguf")
    return folder / "hashed.gguf"


@pytest.fixture(scope="module")
def profile(hashed: Path) -> Profile:
    samples = np.random.default_rng(5).integers(0, 120, (12, 32)).tolist()
    return reap.profile(hashed, [{"tokens": tokens} for tokens in samples], **OPTIONS)


def read_table(path: Path, layer: int) -> np.ndarray:
    name = f"blk.{layer}.ffn_gate_tid2eid.weight"
    return next(np.array(tensor.data) for tensor in GGUFReader(path).tensors if tensor.name == name)


def test_likeness_is_that_of_the_router_s_values(hashed: Path, profile: Profile, tmp_path: Path) -> None:
    """Against the graph's own values: the experts are clones of two, and a clone is what an expert is most like."""
    samples = np.random.default_rng(5).integers(0, 120, (12, 32)).tolist()
    nodes = dump(require_tool("reap-dump-nodes"), hashed, samples, tmp_path)
    for layer in range(N_HASHED):
        values = np.concatenate([np.asarray(found[f"ffn_moe_probs-{layer}"]).reshape(-1, N_EXPERTS) for found in nodes])
        assert len(values) == 384
        expected = np.argsort(-np.corrcoef(values.T) - 9 * np.eye(N_EXPERTS), axis=1, kind="stable")[:, 1:]
        assert read_record(profile.model)[layer].tolist() == expected.tolist()
        assert profile.model["hash_routing"][str(layer)]["tokens"] == 384


@pytest.mark.parametrize("keep", [2, 4, 5, 7])
def test_virtual_pruning_equals_the_file(keep: int, hashed: Path, profile: Profile, tmp_path: Path) -> None:
    plan = reap.plan(profile, keep=keep)
    small = tmp_path / "small.gguf"
    reap.prune(hashed, small, plan.save(tmp_path / "plan.json"), verify="full")
    for layer in range(N_HASHED):
        before, after = read_table(hashed, layer), read_table(small, layer)
        assert all(len(set(row)) == len(row) for row in after.tolist())
        stays = np.isin(before, plan.layers[layer])
        assert (np.array(plan.layers[layer])[after][stays] == before[stays]).all()
        assert 0 <= after.min() <= after.max() < keep
    virtual = open_session(hashed, EngineOptions(**OPTIONS))
    virtual.set_kept({layer: list(ids) for layer, ids in plan.layers.items()}, plan.substitutes)
    real = open_session(small, EngineOptions(**OPTIONS))
    whole = open_session(hashed, EngineOptions(**OPTIONS))
    for tokens in np.random.default_rng(9).integers(0, 120, (4, 48)).astype(np.int32):
        expected = real.logits(tokens, 0)
        np.testing.assert_allclose(virtual.logits(tokens, 0), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        assert np.abs(whole.logits(tokens, 0) - expected).max() > 100 * 1e-5 * np.abs(expected).max()
    virtual.set_kept(None)
    assert (virtual.logits(tokens, 0) == whole.logits(tokens, 0)).all()


def write_kin(source: Path, target: Path, share: float = 0.2) -> Path:
    """The same model, whose experts in the hashed layers are four and four alike: those of one parity differ by
    `share` of what they differ by in `source`."""
    changed = {}
    for tensor in GGUFReader(source).tensors:
        name = tensor.name.split(".", 2)
        if name[0] == "blk" and int(name[1]) < N_HASHED and ("_exps." in name[2] or name[2] == "ffn_gate_inp.weight"):
            values = np.array(tensor.data)
            kin = np.stack([values[expert % 2 :: 2].mean(axis=0) for expert in range(N_EXPERTS)])
            changed[tensor.name] = (kin + share * (values - kin)).astype(np.float32)
    assert len(changed) >= 4 * N_HASHED
    return rewrite(source, target, tensors=changed)


def test_what_replaces_best_costs_less_than_a_random_substitute(hashed: Path, tmp_path: Path) -> None:
    kin = write_kin(hashed, tmp_path / "kin.gguf")
    samples = np.random.default_rng(5).integers(0, 120, (12, 32)).tolist()
    plan = reap.plan(reap.profile(kin, [{"tokens": tokens} for tokens in samples], **OPTIONS), keep=4)
    layers = {layer: (0, 1, 2, 3) if layer < N_HASHED else tuple(range(N_EXPERTS)) for layer in plan.layers}
    plan = replace(plan, layers=layers)
    for row in plan.substitutes.values():
        for expert, others in row.items():
            assert others[0] % 2 == expert % 2  # of its kin
    whole, virtual = (open_session(kin, EngineOptions(**OPTIONS)) for _ in range(2))
    windows = np.random.default_rng(10).integers(0, 120, (6, 48)).astype(np.int32)
    kept = {layer: list(ids) for layer, ids in layers.items()}

    def cost(substitutes: Substitutes) -> float:
        virtual.set_kept(kept, substitutes)
        found = [np.abs(virtual.logits(tokens, 0) - whole.logits(tokens, 0)).mean() for tokens in windows]
        return float(np.mean(found))

    rng = np.random.default_rng(0)

    def draw(layer: int) -> dict[int, list[int]]:
        return {expert: rng.permutation(kept[layer])[:2].tolist() for expert in plan.substitutes[layer]}

    at_random = [{layer: draw(layer) for layer in plan.substitutes} for _ in range(5)]
    measured, drawn = cost(plan.substitutes), [cost(substitutes) for substitutes in at_random]
    print(f"mean |difference| of the logits: {measured:.3f}; with random substitutes {np.mean(drawn):.3f}")
    assert measured < min(drawn)


def test_who_takes_the_place_must_be_said_and_must_stay(hashed: Path, profile: Profile, tmp_path: Path) -> None:
    plan = reap.plan(profile, keep=4)
    kept = {layer: list(ids) for layer, ids in plan.layers.items()}
    session = open_session(hashed, EngineOptions(**OPTIONS))
    with pytest.raises(UnsupportedModelError, match="layer 0: its experts are selected by token id, and nothing says"):
        session.set_kept(kept)
    removed = plan.removed(0)
    for wrong, message in (
        ({**plan.substitutes[0], removed[0]: [removed[1], *kept[0]]}, "not among those that stay"),
        ({**plan.substitutes[0], removed[0]: kept[0][:1]}, "names 1 experts that may take the place"),
    ):
        with pytest.raises(UsageError, match=message):
            session.set_kept(kept, {**plan.substitutes, 0: wrong})
    silent = replace(plan, model={key: value for key, value in plan.model.items() if key != "hash_routing"})
    with pytest.raises(MismatchError, match="layers 0, 1 are chosen by token id"):
        reap.prune(hashed, tmp_path / "small.gguf", silent)


def test_commands_that_try_plans_rewrite_the_ids_as_well(
    hashed: Path, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = tuple(np.random.default_rng(1).integers(0, 120, (3, 32)).astype(np.int32))  # the model has no tokenizer
    text = EvaluationText(("text.txt",), 32, windows, (None,) * 3, 0)
    monkeypatch.setattr(plan_evaluator, "read_evaluation_text", lambda *_: text)
    (tmp_path / "text.txt").write_text("text")
    options = EngineOptions(**{**OPTIONS, "ctx_size": 32})
    evaluator = PlanEvaluator(hashed, tmp_path / "text.txt", options)
    plan = reap.plan(profile, keep=4)
    found = evaluator.score(plan)
    reap.prune(hashed, tmp_path / "small.gguf", plan)
    real = PlanEvaluator(tmp_path / "small.gguf", tmp_path / "text.txt", options).score(reference=evaluator.reference())
    assert found.kl_mean == pytest.approx(real.kl_mean, rel=1e-3)
    assert found.kl_mean > 0
    tried = evaluator.try_experts(plan.layers, [0, 1, 2]).divergence()
    assert np.mean(tried) == pytest.approx(found.kl_mean, rel=1e-6)


def test_profiles_of_such_a_model_merge(profile: Profile, tmp_path: Path) -> None:
    longer = {layer: {**entry, "tokens": entry["tokens"] + 1} for layer, entry in profile.model["hash_routing"].items()}
    other = replace(profile, model=profile.model | {"hash_routing": longer})
    with pytest.warns(ReapWarning, match="merged more than once"):
        merged = reap.merge([profile, other])
    assert merged.model["hash_routing"] == longer
    assert Profile.load(profile.save(tmp_path / "p.json")).model["hash_routing"] == profile.model["hash_routing"]


def test_a_run_that_had_nothing_left_to_measure_says_what_it_lacks(hashed: Path, tmp_path: Path) -> None:
    lines, keeper = [{"tokens": list(range(40))}], tmp_path / "keeper"
    whole = reap.profile(hashed, lines, checkpoint=keeper, **OPTIONS)
    with pytest.warns(ReapWarning, match="had no token left to measure"):
        found = reap.profile(hashed, lines, checkpoint=keeper, resume=True, **OPTIONS)
    assert found.counts.tolist() == whole.counts.tolist()
    assert "hash_routing" in whole.model
    assert "hash_routing" not in found.model
