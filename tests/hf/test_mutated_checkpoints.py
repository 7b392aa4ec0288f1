"""200 checkpoints, each changed in one to three of the ways in which publishers leave them (seeded): each either prunes
to a model that transformers loads whole and that computes what the original computes with its routers masked, or is
refused in one sentence.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_hf_prune_families import moe_layers, needs  # noqa: F401  (a fixture)

from reap.errors import ReapError
from reap.hf import prune
from reap.scores.plan import PrunePlan

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

N_SEEDS = 200
FAMILIES = ("qwen3moe", "mixtral", "gpt_oss", "qwen3_next", "nemotronh", "qwen3_5_moe")
TOKENS = list(range(20, 37))


@dataclass(frozen=True)
class Base:
    """A sound checkpoint, and the logits of its model with experts masked."""

    kind: type[Any]
    directory: Path
    n_layers: int
    kept: dict[int, tuple[int, ...]]
    expected: Any


def make_base(family: str, directory: Path) -> Base:
    from helpers import checkpoint_models, oracle

    model = checkpoint_models.build(family)
    source = checkpoint_models.save(model, directory / "hf")
    layers, n_experts = moe_layers(source)
    kept = {
        layer: tuple(sorted(np.random.default_rng(layer).permutation(n_experts)[: n_experts // 2].tolist()))
        for layer in layers
    }
    with checkpoint_models.masked_experts(model, kept):
        expected = oracle.logits(model, TOKENS)
    config = getattr(model.config, "text_config", model.config)
    return Base(type(model), source, config.num_hidden_layers, kept, expected)


@pytest.fixture(scope="module")
def bases(needs: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:  # noqa: F811
    return functools.cache(lambda family: make_base(family, tmp_path_factory.mktemp(family)))


@dataclass
class Trial:
    """One changed checkpoint, and how it is pruned."""

    base: Base
    it: Any
    options: dict[str, Any]
    kept: dict[int, tuple[int, ...]]


def make_trial(seed: int, bases: Callable[[str], Base]) -> Trial:
    from helpers import mutations

    rng = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    base = bases(family)
    possible = [m for m in mutations.MUTATIONS if family in mutations.WITH_MTP or m not in mutations.ABOUT_MTP]
    chosen = rng.sample(possible, rng.choice([1, 1, 1, 2, 2, 3]))
    is_split = any(m in mutations.NEEDS_SHARDS for m in chosen) or rng.random() < 0.3
    it = mutations.draft(base.directory, base.n_layers, 3 if is_split else 1)
    it.may_predict = family in mutations.WITH_MTP
    for mutation in chosen:
        mutation(it, rng)
        it.done.append(mutation.__name__)
    options = {
        "trust": rng.choice([None, *["shards"] * 4, "index"]),
        "other_weights": rng.choice([None, "leave", "leave", "carry", "carry"]),
        "drop_prediction": rng.random() < 0.6,
    }
    kept = dict(base.kept)
    if it.mtp_experts and rng.random() < 0.8:
        kept[base.n_layers] = (0, 1, 2, 3)
    return Trial(base, it, options, kept)


def run_trial(trial: Trial, tmp_path: Path) -> str:
    """ "pruned", or the error's kind. AssertionError where something is wrong."""
    trial.it.write(tmp_path / "in")
    plan = PrunePlan({"n_experts": 8}, "reap", 4, trial.kept)
    try:
        report = prune(tmp_path / "in", tmp_path / "out", plan, **trial.options)
    except ReapError as error:
        said = str(error)
        assert "\n" not in said
        assert 20 < len(said) < 1200
        assert not (tmp_path / "out").exists()
        return type(error).__name__
    check_model(trial, tmp_path / "out")
    check_index(tmp_path / "out")
    check_lists(trial, tmp_path / "out")
    said = " ".join(report.warnings)
    assert ("expert_slots_total: 8" in said) == ("unknown_count" in trial.it.done)
    assert ("stats/experts.json" in said) == ("stale_json" in trial.it.done)
    left = trial.options["other_weights"] == "leave"
    for name in trial.it.raw:
        assert (tmp_path / "out" / name).exists() or (left and name in said)
    return "pruned"


def check_model(trial: Trial, directory: Path) -> None:
    """transformers loads it whole, and it computes what the masked original computes."""
    from helpers import oracle

    model, found = trial.base.kind.from_pretrained(directory, output_loading_info=True, local_files_only=True)
    faults = {what: names for what, names in found.items() if names}
    assert not faults
    model.set_attn_implementation("eager")
    difference = np.abs(oracle.logits(model.eval(), TOKENS) - trial.base.expected).max()
    assert difference < 1e-5 * max(1, trial.base.expected.std())


def check_index(directory: Path) -> None:
    from safetensors import safe_open

    path = directory / "model.safetensors.index.json"
    if path.exists():
        held = {}
        for file in directory.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                held |= dict.fromkeys(opened.keys(), file.name)
        assert json.loads(path.read_text())["weight_map"] == held


def check_lists(trial: Trial, directory: Path) -> None:
    """The list in config.json chooses, of the new modules, those whose old ones it chose."""
    config = json.loads((directory / "config.json").read_text())
    before, after = (one.get("module_lists", {}).get("ignore", []) for one in (trial.it.config, config))
    for block, kept in blocks_of(trial):
        for new, old in enumerate(kept):
            for matrix in matrices_of(trial, block):
                was, is_now = (chooses(names, block, number, matrix) for names, number in ((before, old), (after, new)))
                assert was == is_now, (before, after, block, old, new, matrix)
    for key in ("n_routed_experts", "num_local_experts", "num_experts"):
        assert f'"{key}": 8' not in json.dumps(config.get("block_configs"))


def blocks_of(trial: Trial) -> list[tuple[str, tuple[int, ...]]]:
    names = {name.partition(".experts.")[0] for name in trial.it.tensors if ".experts." in name}
    names = {name for name in names if not name.startswith("mtp")}
    return [(name, trial.kept[int(re.findall(r"layers\.(\d+)", name)[-1])]) for name in sorted(names)]


def matrices_of(trial: Trial, block: str) -> list[str]:
    """Modules of an expert; of fused ones, as lists name them."""
    start = f"{block}.experts.0."
    found = [name.removeprefix(start).removesuffix(".weight") for name in trial.it.tensors if name.startswith(start)]
    return found or ["gate_proj", "up_proj", "down_proj"]


def chooses(names: list[str], block: str, expert: int, matrix: str) -> bool:
    """Whether a list means a module: by its name under any prefix, a part of it, or a pattern."""
    module = f"{block}.experts.{expert}.{matrix}"
    tail = module[module.index("layers.") :]
    for name in names:
        if name.startswith("re:"):
            if re.match(name[3:], module):
                return True
        elif f".{name}." in f".{module}." or (name.endswith(tail) and name.partition("layers.")[0] in PREFIXES):
            return True
    return False


PREFIXES = ("", "model.", "language_model.model.", "backbone.")


def test_changed_checkpoints(bases: Callable[[str], Base], tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    wrong = []
    for seed in range(N_SEEDS):
        trial = make_trial(seed, bases)
        (tmp_path / str(seed)).mkdir()
        try:
            outcomes[run_trial(trial, tmp_path / str(seed))] += 1
        except Exception as error:
            wrong.append(f"seed {seed}: {trial.it.done} {trial.options}: {type(error).__name__}: {str(error)[:300]}")
    print(dict(outcomes))
    assert not wrong, "\n".join(wrong)
    assert sum(outcomes.values()) == N_SEEDS
    assert outcomes["pruned"] > N_SEEDS * 0.3  # neither are all refused,
    assert outcomes["pruned"] < N_SEEDS * 0.8  # nor do all go through
    assert len(outcomes) >= 4
