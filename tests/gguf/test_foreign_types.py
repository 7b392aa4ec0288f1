"""Types of tensors that the pinned engine does not know: their experts are cut by bytes alone, and no command runs
them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import reap
from helpers.foreign_tensors import Stored, store_as
from helpers.gguf_builder import build_moe
from reap.errors import FormatError, UnsupportedModelError
from reap.gguf.foreign_types import FOREIGN_TYPES, Extent, sizes_in_bytes
from reap.gguf.model_info import inspect
from reap.gguf.reader import GGUFModel
from reap.gguf.tensor_types import TENSOR_TYPES
from reap.pruning.gguf import prune, size_after
from reap.pruning.sizing import measure_size
from reap.scores.plan import PrunePlan

EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")
KEPT = (0, 3, 4, 6)


def model_with(tmp_path: Path, stored: Stored, **changes: object) -> tuple[Path, dict[str, bytes]]:
    plain = build_moe(tmp_path / "plain.gguf", n_embd=256, n_ff=256, n_heads=4, n_head_dim=64, **changes)
    target = tmp_path / "foreign.gguf"
    return target, store_as(plain, target, dict.fromkeys(EXPERTS, stored))


def plan_of(path: Path) -> PrunePlan:
    info = inspect(path)
    model = {"n_experts": info.n_experts, "fingerprint": info.fingerprint}
    return PrunePlan(model, "reap", len(KEPT), dict.fromkeys(info.moe_layers, KEPT))


#: What a row of 256 elements takes: blocks, and a prefix of the row where the type has one.
STORED = {
    "IQ2_K": Stored(137, 76),
    "IQ4_KS, a row begins with a scale": Stored(144, 136 + 4),
    "IQ2_KS, a row begins with half a scale": Stored(145, 70 + 2),
    "Q8_KV, a row begins with a scale and a sum": Stored(151, 256 + 8),
    "IQ4_K_R4, four rows interleaved": Stored(339, 144),
    "BF16_R16, sixteen rows interleaved": Stored(230, 512),
    "Unsloth's 1-bit type": Stored(66, 36),
    "a type to come": Stored(50, 90),
    "I2_S, a scale for a whole tensor": Stored(36, 64, 32),
}


@pytest.mark.parametrize("name", STORED)
def test_experts_are_cut_by_bytes(name: str, tmp_path: Path) -> None:
    stored = STORED[name]
    path, made = model_with(tmp_path, stored)
    plan, output = plan_of(path), tmp_path / "small.gguf"

    report = prune(path, output, plan, verify="full")
    assert report.n_bytes_after == output.stat().st_size == size_after(path, plan)
    size = measure_size(path, plan)
    assert size.n_bytes_after == output.stat().st_size
    assert next(item for item in size.classes if item.name == "experts").n_bytes_after == sum(
        (len(raw) - stored.tail_bytes) // 2 + stored.tail_bytes for raw in made.values()
    )
    with GGUFModel.open(output) as written:
        for tensor, raw in made.items():
            rows = np.frombuffer(raw[: len(raw) - stored.tail_bytes], dtype=np.uint8).reshape(8, -1)
            expected = rows[list(KEPT)].tobytes() + raw[len(raw) - stored.tail_bytes :]
            assert bytes(written.data(written.tensors[tensor])) == expected
            assert written.tensors[tensor].type == stored.type_id
    assert inspect(output).n_experts == len(KEPT)


def test_inspect_says_which_engine_runs_it_and_nothing_here_does(tmp_path: Path) -> None:
    path, _ = model_with(tmp_path, STORED["IQ2_K"], tokenizer="words", n_vocab=320)
    info = inspect(path)
    assert info.tensor_types["IQ2_K"] == 6
    assert not info.refusals
    message = (
        r"foreign.gguf: the llama.cpp that reap is built with cannot run it: blk.0.ffn_gate_exps.weight and 5 more are"
        r" stored as IQ2_K, which ik_llama.cpp runs; inspect, plan and prune work, and a profile of another"
        r" quantisation of the same model serves this file"
    )
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 " * 50)
    with pytest.raises(UnsupportedModelError, match=message):
        reap.profile(path, [{"text": "w1 w2 w3"}])
    with pytest.raises(UnsupportedModelError, match=message):
        reap.evaluate(path, text)
    with pytest.raises(UnsupportedModelError, match=message):
        reap.preview(path, [{"text": "w1 w2 w3"}])
    with pytest.raises(UnsupportedModelError, match=message):
        reap.quantize(path, tmp_path / "q.gguf", "Q8_0")


@pytest.mark.parametrize(("type_id", "text"), [(66, "Unsloth's build"), (50, "may be newer"), (4, "has removed")])
def test_whose_a_type_is(type_id: int, text: str, tmp_path: Path) -> None:
    path, _ = model_with(tmp_path, Stored(type_id, 100))
    assert text in str(inspect(path).engine_refusal)


def test_a_plan_of_the_model_in_a_known_type_serves(tmp_path: Path) -> None:
    path, _ = model_with(tmp_path, STORED["IQ2_K"])
    plain = inspect(tmp_path / "plain.gguf")
    assert inspect(path).fingerprint == plain.fingerprint


def test_rows_of_several_experts_in_one_block_are_refused(tmp_path: Path) -> None:
    path, _ = model_with(tmp_path, Stored(230, 512))
    other = tmp_path / "odd.gguf"
    plain = build_moe(tmp_path / "p.gguf", n_embd=256, n_ff=24, n_heads=4, n_head_dim=64)
    store_as(plain, other, {"ffn_gate_exps.weight": Stored(230, 512)})
    assert not inspect(path).refusals
    assert "BF16_R16 interleaves 16 rows, which belong to several experts" in inspect(other).refusals[0]


@pytest.mark.parametrize("n_bytes", [1, 31, 32, 100, 5000])
def test_a_file_that_lacks_its_end_is_refused(n_bytes: int, tmp_path: Path) -> None:
    path, _ = model_with(tmp_path, STORED["IQ2_K"])
    path.write_bytes(path.read_bytes()[:-n_bytes])
    with pytest.raises(FormatError):
        inspect(path)
    # and where the experts are last in the file
    last = tmp_path / "last.gguf"
    store_as(tmp_path / "plain.gguf", last, dict.fromkeys((*EXPERTS, "output.weight"), Stored(137, 76)))
    last.write_bytes(last.read_bytes()[: -n_bytes - 32])
    with pytest.raises(FormatError, match=r"output\.weight"):
        inspect(last)


def test_a_tensor_of_few_rows_takes_its_size_from_those_alike() -> None:
    extents = [Extent("one row", 50, (256,), 96), Extent("many rows", 50, (256, 1000), 76_000)]
    assert sizes_in_bytes(extents, 32) == {"one row": 76, "many rows": 76_000}
    assert sizes_in_bytes(extents[:1], 32) == {"one row": -1}
    assert sizes_in_bytes([*extents, Extent("cut off", 50, (256, 1000), 70_000)], 32)["cut off"] == -1


def test_no_type_is_known_twice() -> None:
    assert not set(FOREIGN_TYPES) & set(TENSOR_TYPES)
    names = [kind.name for kind in (*FOREIGN_TYPES.values(), *TENSOR_TYPES.values())]
    assert len(set(names)) == len(names)
