"""`reap.hf.llmcompressor`: written-down expectations, and the same calls to the package itself where it is installed
(0.14, whose pins want a transformers of their own: `pytest tests/hf/test_llmcompressor.py` in such an environment)."""

from __future__ import annotations

import inspect
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from reap.errors import ReapWarning, UsageError

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

IDS = [[0, 1], [2, 0], [0, 2]]
GATES = [[0.6, 0.4], [0.5, 0.25], [0.3, 0.7]]
# expert 0 is chosen by tokens 0 and 2 first, then by token 1: its routed norms are in another order than the tokens
ROUTED = {0: [3.0, 2.0, 1.0], 1: [5.0], 2: [4.0, 6.0]}
EVERY = {0: [3.0, 1.0, 2.0], 1: [5.0, 9.0, 9.0], 2: [9.0, 4.0, 6.0], 3: [9.0, 9.0, 9.0]}
SUMS, COUNTS = [2.65, 2.0, 6.2, 0.0], [3.0, 1.0, 2.0, 0.0]
MEANS = [2.65 / 3, 2.0, 3.1, 0.0]


@pytest.fixture
def ours() -> ModuleType:
    import reap.hf.llmcompressor as module

    return module


@pytest.fixture
def theirs() -> ModuleType:
    pytest.importorskip("llmcompressor", reason="compared where llm-compressor is installed; 0.14 was")
    import llmcompressor.modifiers.pruning.reap.utils as module

    return module


@pytest.fixture
def flag(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool | None], None]:
    """Set llm-compressor's flag; None: as if it were not imported."""

    def put(value: bool | None) -> None:
        name = "llmcompressor.modeling.moe.context"
        if value is None:
            monkeypatch.delitem(sys.modules, name, raising=False)
        elif name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "_CALIBRATE_ALL_EXPERTS", value)
        else:
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(get_calibrate_all_experts_flag=lambda: value))

    return put


def norms(values: dict[int, list[float]]) -> dict[int, Any]:
    return {expert: torch.tensor(given) for expert, given in values.items()}


def updated(module: ModuleType, given: dict[int, list[float]], n: int = 1, **options: Any) -> Any:
    tracker = module.REAPSaliencyTracker(num_experts=4)
    for _ in range(n):
        tracker.update(torch.tensor(IDS), torch.tensor(GATES), norms(given), **options)
    return tracker


@pytest.mark.parametrize(
    ("imported", "given", "option"),
    [
        (False, ROUTED, None),
        (True, EVERY, None),
        (None, ROUTED, None),
        (None, EVERY, None),  # expert 1 has three norms and one token: they are of every token
        (True, ROUTED, False),
        (False, EVERY, True),
        (None, EVERY, True),
    ],
)
def test_the_sums(ours: ModuleType, flag: Any, imported: bool | None, given: Any, option: bool | None) -> None:
    flag(imported)
    tracker = updated(ours, given, n=2, **({} if option is None else {"every_token": option}))
    assert tracker.sum_saliency.tolist() == pytest.approx([2 * value for value in SUMS], rel=1e-6)
    assert tracker.count.tolist() == [2 * value for value in COUNTS]
    assert tracker.mean_saliency.tolist() == pytest.approx(MEANS, rel=1e-6)
    assert (tracker.total_count, tracker.count.dtype, tracker.sum_saliency.dtype) == (12.0, *2 * (torch.float64,))


def test_lengths_that_fit_both_are_of_the_routed_tokens_unless_told(ours: ModuleType, flag: Any) -> None:
    """One expert that both tokens chose, one of them second: both forms have two norms, in another order."""
    flag(None)
    ids, gates = torch.tensor([[1, 0], [0, 1]]), torch.tensor([[0.25, 1.0], [0.5, 0.75]])
    given = {0: torch.tensor([2.0, 3.0]), 1: torch.tensor([1.0, 1.0])}
    found = []
    for options in ({}, {"every_token": False}, {"every_token": True}):
        tracker = ours.REAPSaliencyTracker(2)
        tracker.update(ids, gates, given, **options)
        found.append(float(tracker.sum_saliency[0]))
    assert found == [0.5 * 2 + 1.0 * 3, 0.5 * 2 + 1.0 * 3, 1.0 * 2 + 0.5 * 3]


def test_what_an_empty_tracker_says(ours: ModuleType) -> None:
    tracker = ours.REAPSaliencyTracker(3)
    assert (tracker.sum_saliency, tracker.count, tracker.total_count) == (None, None, 0.0)
    assert tracker.mean_saliency.tolist() == [0, 0, 0]
    tracker.update(torch.tensor([[0]]), torch.ones(1, 1), {})
    assert tracker.count is None
    tracker.reduce_saliency_stats(torch.device("cpu"))
    assert tracker.count.tolist() == [0, 0, 0]


def test_a_routed_expert_without_norms_counts_as_zero(ours: ModuleType, flag: Any) -> None:
    flag(False)
    tracker = updated(ours, {0: ROUTED[0]})
    assert tracker.count.tolist() == COUNTS
    assert tracker.sum_saliency.tolist() == pytest.approx([2.65, 0, 0, 0], rel=1e-6)


def test_sums_can_be_set(ours: ModuleType) -> None:
    tracker = ours.REAPSaliencyTracker(8)
    tracker.sum_saliency = torch.tensor([0.1, 0.9, 0.8, 0.7, 0.6, 0.2, 0.5, 0.4], dtype=torch.float64)
    tracker.count = torch.tensor([1.0, 1, 1, 1, 2, 1, 1, 0], dtype=torch.float64)
    attributes = SimpleNamespace(n_group=2, group_size=4)
    assert tracker.compute_retained_experts(3, None, attributes).tolist() == [1, 2, 3, 6, 7]  # 0.4 / max(0, 1)
    found = tracker.compute_retained_experts(2, 1, attributes)
    assert (found.tolist(), found.dtype) == ([1, 2, 3, 4, 6, 7], torch.int32)
    tracker.count[0] = 0.5
    assert tracker.total_count == 7.5
    with pytest.raises(UsageError, match="moe_attrs names none"):
        tracker.compute_retained_experts(2, 1, SimpleNamespace(n_group=None, group_size=None))


def test_what_does_not_belong_together_adds_nothing(ours: ModuleType, flag: Any) -> None:
    flag(None)
    tracker = ours.REAPSaliencyTracker(4)
    wrong = norms({0: [1.0, 2.0], 1: [5.0]})
    with pytest.raises(UsageError, match=r"expert 0 has norms of shape \[2\], expected \[3\]"):
        tracker.update(torch.tensor(IDS), torch.tensor(GATES), wrong)
    with pytest.raises(UsageError, match=r"both be \[num_tokens, top_k\]"):
        tracker.update(torch.tensor(IDS), torch.tensor(GATES)[:2], norms(ROUTED))
    assert tracker.total_count == 0


class Router(torch.nn.Module):
    def __init__(self, n_experts: int, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(n_experts, width))
        self.bias = torch.nn.Parameter(torch.randn(n_experts))
        self.register_buffer("e_score_correction_bias", torch.arange(float(n_experts)))
        self.num_experts = self.out_features = n_experts


def model_of(experts: Callable[[], Any], *, n_experts: int = 8, **config: Any) -> Any:
    """Two blocks; the experts' module is what `experts` makes."""
    model = torch.nn.Module()
    values = {"num_experts": n_experts, "num_experts_per_tok": 2, **config}
    model.config = SimpleNamespace(**{key: value for key, value in values.items() if value is not None})
    model.layers = torch.nn.ModuleList()
    for _ in range(2):
        block = torch.nn.Module()
        block.gate, block.experts, block.num_experts = Router(n_experts, 4), experts(), n_experts
        block.register_buffer("e_score_correction_bias", 10 + torch.arange(float(n_experts)))
        model.layers.append(block)
    return model


def plain_experts(n_experts: int = 8) -> Any:
    """A module for each expert, and one that is not."""
    experts = torch.nn.Module()
    for number in range(n_experts):
        experts.add_module(str(number), torch.nn.Linear(4, 4))
    experts.act_fn = torch.nn.SiLU()
    experts.num_experts = n_experts
    return experts


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where llm-compressor is not imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "llmcompressor"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("apart")
def test_the_attributes(ours: ModuleType) -> None:
    attributes = ours.get_moe_attrs(model_of(plain_experts, n_group=2, topk_group=1), ignore=[])
    assert attributes == ours.MoeModelAttrs(
        "num_experts", "gate", "experts", ["layers.0", "layers.1"], 8, 2, False, 2, 1, 4
    )
    model = model_of(plain_experts, num_experts=None, num_local_experts=8, num_experts_per_tok=None, moe_top_k=3)
    model.config = SimpleNamespace(text_config=model.config)
    attributes = ours.get_moe_attrs(model, ignore=[r"layers\.0"])
    assert (attributes.num_experts_config_key, attributes.top_k, attributes.has_text_config) == (
        "num_local_experts",
        3,
        True,
    )
    assert (attributes.moe_layer_names, attributes.n_group, attributes.group_size) == (["layers.1"], None, None)
    ours.update_model_config(model, attributes, 5)
    assert model.config.text_config.num_local_experts == 5


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": None}, "no number of experts under"),
        ({"num_experts_per_tok": None}, "no number of experts of a token under"),
        ({"n_group": 2}, "has n_group, but no topk_group"),
        ({"topk_group": 1}, "has topk_group, but no n_group"),
        ({"n_group": 3, "topk_group": 1}, "8 experts cannot be shared equally by 3 groups"),
    ],
)
def test_a_configuration_that_lacks_a_number(ours: ModuleType, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.get_moe_attrs(model_of(plain_experts, **config), ignore=[])


@pytest.mark.usefixtures("apart")
def test_experts_that_share_tensors_are_passed_over(ours: ModuleType) -> None:
    def fused() -> Any:
        experts = torch.nn.Module()
        experts.gate_up_proj = torch.nn.Parameter(torch.zeros(8, 4, 4))
        return experts

    with (
        pytest.warns(ReapWarning, match=r"layers\.0: passed over"),
        pytest.raises(ValueError, match=r"reap\.hf\.prune_moe_layer also take"),
    ):
        ours.get_moe_attrs(model_of(fused), ignore=[])
    model = torch.nn.Module()
    model.config = SimpleNamespace(num_experts=8, top_k=2)
    with pytest.raises(ValueError, match="has no block with experts and a router or a gate"):
        ours.get_moe_attrs(model, ignore=[])


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("retained", [[1, 2, 4, 6, 7], [7, 0]])
def test_a_layer_is_cut(ours: ModuleType, retained: list[int]) -> None:
    model = model_of(plain_experts)
    attributes = ours.get_moe_attrs(model, ignore=[])
    block, other = model.layers
    before = [block.experts.get_submodule(str(number)) for number in range(8)]
    weight, bias = block.gate.weight.detach().clone(), block.gate.bias.detach().clone()
    assert ours.prune_moe_layer(model, "layers.0", retained, attributes) is retained
    assert [block.experts.get_submodule(str(number)) for number in range(len(retained))] == [
        before[number] for number in retained
    ]
    assert [*block.experts._modules] == [*map(str, range(len(retained))), "act_fn"]
    assert torch.equal(block.gate.weight, weight[retained])
    assert torch.equal(block.gate.bias, bias[retained])
    assert block.gate.e_score_correction_bias.tolist() == retained
    assert block.e_score_correction_bias.tolist() == [10 + number for number in retained]
    counts = (block.num_experts, block.experts.num_experts, block.gate.num_experts, block.gate.out_features)
    assert counts == (len(retained),) * 4
    assert (other.num_experts, len(other.gate.weight), model.config.num_experts) == (8, 8, 8)


# ---- the package itself


def their_experts() -> Any:
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
    from transformers import PretrainedConfig

    class Experts(LinearExperts2D):
        is_concatenated = is_transposed = has_bias = False
        has_gate = True

        @staticmethod
        def _apply_gate(both: Any) -> Any:
            gate, up = both.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

    config = PretrainedConfig()
    for name, value in {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 4,
        "intermediate_size": 6,
        "hidden_act": "silu",
        "use_bias": False,
        "dtype": torch.float32,
    }.items():
        setattr(config, name, value)
    return Experts(config)


def test_the_names_and_signatures_are_theirs(ours: ModuleType, theirs: ModuleType) -> None:
    assert sorted(ours.__all__) == sorted(theirs.__all__)
    for name in ours.__all__:
        members = [
            name,
            *(f"{name}.{inner}" for inner, _ in inspect.getmembers(getattr(theirs, name)) if inner[0] != "_"),
        ]
        for path in members:
            one, other = ours, theirs
            for part in path.split("."):
                one, other = getattr(one, part), getattr(other, part)
            if callable(other):
                found = [p for p in inspect.signature(one).parameters.values() if p.kind is not p.KEYWORD_ONLY]
                expected = inspect.signature(other).parameters.values()
                assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected], path


@pytest.mark.parametrize("every_token", [False, True])
def test_both_trackers_on_the_same_calls(ours: ModuleType, theirs: ModuleType, flag: Any, every_token: bool) -> None:
    flag(every_token)
    generator = torch.Generator().manual_seed(1)
    for n_experts, top_k in ((4, 1), (8, 3), (16, 16)):
        trackers = [module.REAPSaliencyTracker(n_experts) for module in (ours, theirs)]
        for n_tokens in (1, 7, 40):
            ids = torch.stack([torch.randperm(n_experts, generator=generator)[:top_k] for _ in range(n_tokens)])
            gates = torch.rand(n_tokens, top_k, generator=generator)
            table = 10 * torch.rand(n_tokens, n_experts, generator=generator)
            order = [torch.where(expert == ids.T)[1] for expert in range(n_experts)]
            given = {e: table[:, e] if every_token else table[order[e], e] for e in range(n_experts)}
            if not every_token:
                given = {expert: values for expert, values in given.items() if expert != 1}  # left out
            for tracker in trackers:
                tracker.update(ids, gates, given)
        mine, other = trackers
        assert mine.count.tolist() == other.count.tolist()
        assert mine.total_count == other.total_count
        assert torch.allclose(mine.sum_saliency, other.sum_saliency, rtol=1e-13, atol=0)
        assert torch.allclose(mine.mean_saliency, other.mean_saliency, rtol=1e-13, atol=0)
        attributes = SimpleNamespace(n_group=2, group_size=n_experts // 2)
        for dropped, a_group in ((1, None), (n_experts // 2, None), (2, 1)):
            found, expected = (t.compute_retained_experts(dropped, a_group, attributes) for t in trackers)
            assert (found.tolist(), found.dtype) == (expected.tolist(), expected.dtype)


def test_equals_go_as_theirs_go(ours: ModuleType, theirs: ModuleType) -> None:
    for n_experts in (8, 64, 256):
        trackers = [module.REAPSaliencyTracker(n_experts) for module in (ours, theirs)]
        for tracker in trackers:
            tracker.sum_saliency = torch.arange(n_experts).remainder(3).double()  # many equals
            tracker.count = torch.ones(n_experts, dtype=torch.float64)
        for dropped in (1, n_experts // 4, n_experts // 2):
            found, expected = (t.compute_retained_experts(dropped, None, None) for t in trackers)
            assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("offloaded", [False, True])
def test_both_cut_the_same(ours: ModuleType, theirs: ModuleType, offloaded: bool) -> None:
    import copy

    model = model_of(their_experts, n_group=2, topk_group=1)
    models = [model, copy.deepcopy(model)]
    if offloaded:
        from compressed_tensors.offload import offload_module

        for one in models:
            for module in list(one.modules()):
                if module._parameters or module._buffers:
                    offload_module(module, "cpu", "cpu")
    retained = [6, 1, 2, 5]
    for module, one in zip((ours, theirs), models, strict=True):
        attributes = module.get_moe_attrs(one, ignore=["layers.1"])
        assert vars(attributes) == vars(theirs.get_moe_attrs(models[1], ignore=["layers.1"]))
        assert module.prune_moe_layer(one, "layers.0", retained, attributes) == retained
        module.update_model_config(one, attributes, 4)
    first, second = ({**m.state_dict()} for m in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for one in models:
        block = one.layers[0]
        assert (block.num_experts, block.experts.num_experts, block.gate.out_features) == (4, 4, 4)
        assert one.config.num_experts == 4


RANK = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
import torch, torch.distributed as dist
from test_llmcompressor import EVERY, updated
import reap.hf.llmcompressor as ours
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[3]}", rank=rank, world_size=2)
tracker, idle = updated(ours, EVERY, n=1 + rank), ours.REAPSaliencyTracker(4)
tracker.reduce_saliency_stats(torch.device("cpu"))
idle.reduce_saliency_stats(torch.device("cpu"))
if rank == 0:
    print(tracker.count.tolist(), [round(v, 5) for v in tracker.sum_saliency.tolist()], idle.count.tolist())
dist.destroy_process_group()
"""


def test_rank_0_has_the_sums_of_both(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, str(tmp_path / "rank.py"), str(Path(__file__).parent)]
    ranks = [
        subprocess.Popen([*command, str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    sums = [round(3 * value, 5) for value in SUMS]
    assert said[0][0].strip() == f"{[3 * count for count in COUNTS]} {sums} {[0.0] * 4}"
